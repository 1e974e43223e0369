"""FlashAttention 3 (package fa3-fwd: the forward of Hopper): dense."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.peers.peer import Peer, needs


def attention(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Dense attention; its layout is [B, S, H, D], of which ours is a view."""
    from fa3_fwd_interface import flash_attn_func

    def run() -> Tensor:
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


PEERS = (Peer("fa3", "dense", needs("fa3_fwd_interface", "pip install fa3-fwd"), attention),)
