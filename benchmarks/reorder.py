"""Stage 1: raster to block order, against a copy of the same bytes."""

from __future__ import annotations

import torch

import nabla
from benchmarks.accuracy import Accuracy, WrongOutput
from benchmarks.case import Case, Contest, Shape
from benchmarks.peers.peer import Peer
from benchmarks.results import OURS

STAGE = "reorder"


def contest(shape: Shape, peers: list[Peer]) -> Contest:
    """Reorder q; a copy is what any reordering costs at least."""
    q, _, _ = shape.inputs()
    grid = shape.workload.grid

    def check() -> Accuracy:
        there = nabla.fractal_flatten(q, grid)
        if not torch.equal(nabla.fractal_unflatten(there, grid), q) or torch.equal(there, q):
            raise WrongOutput("fractal_unflatten(fractal_flatten(x)) is not x")
        return Accuracy(0.0, 0.0)

    moved = 2.0 * q.nbytes
    return Contest(
        [
            Case(shape.row(STAGE, "copy", bytes=moved), q.clone),
            Case(
                shape.row(STAGE, OURS, bytes=moved), lambda: nabla.fractal_flatten(q, grid), check
            ),
        ]
    )
