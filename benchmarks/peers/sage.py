"""SageAttention (package sageattention): dense attention in 8 bits. It is checked as all others
are, so where 8 bits are less exact than twice the error of bf16, it gets no time."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.peers.peer import Peer, needs


def attention(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Dense attention in the layout [B, H, S, D]."""
    from sageattention import sageattn

    return lambda: sageattn(q, k, v, tensor_layout="HND")


PEERS = (Peer("sage", "dense", needs("sageattention", "pip install sageattention"), attention),)
