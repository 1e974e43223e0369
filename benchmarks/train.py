"""Training: forward and backward of attention over the kept blocks, against dense attention.

FLOPs are 3.5 times those of the forward: two products forward, five backward.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import block_attention
from benchmarks.case import Contest, MaskSpec, Shape
from benchmarks.peers.peer import Peer

STAGE = "train"


def cost(shape: Shape, specs: Sequence[MaskSpec], **counts: float) -> float:
    """FLOPs of one round, by the same counts."""
    return block_attention.BACKWARD_WORK * block_attention.cost(shape, specs, **counts)


def contest(shape: Shape, specs: Sequence[MaskSpec], peers: list[Peer]) -> Contest:
    """Forward and backward, under masks of every specification."""
    return block_attention.build(STAGE, shape, specs, peers, with_grad=True)
