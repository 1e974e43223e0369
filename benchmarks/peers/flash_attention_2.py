"""FlashAttention 2 (package flash-attn): dense, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.peers.peer import Peer, needs


def attention(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Dense attention; its layout is [B, S, H, D], of which ours is a view."""
    from flash_attn import flash_attn_func

    return lambda: flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


PEERS = (Peer("fa2", "dense", needs("flash_attn", "pip install flash-attn"), attention, ("cuda",)),)
