"""Stage 2: block means and the softmax between them, against the same in torch."""

from __future__ import annotations

import torch
from torch import Tensor

import nabla
from benchmarks.accuracy import Accuracy, WrongOutput
from benchmarks.case import Case, Contest, Shape
from benchmarks.peers.peer import Peer
from benchmarks.results import OURS

STAGE = "scores"
ALLOWED = 1e-5  # of scores in float32, relative to the largest


def contest(shape: Shape, peers: list[Peer]) -> Contest:
    """Pool, multiply, normalize."""
    q, k, _ = shape.inputs()
    grid = shape.workload.grid

    def by_torch(*qk: Tensor) -> Tensor:
        q_mean, k_mean = (x.unflatten(2, (-1, grid.block_size)).mean(3) for x in qk)
        return (q_mean @ k_mean.mT * shape.workload.head_dim**-0.5).softmax(-1)

    def check() -> Accuracy:
        ours = nabla.pooled_scores(q, k, grid)[:, :1].double()
        exact = by_torch(q[:, :1].double(), k[:, :1].double())
        error = ((ours - exact).abs().max() / exact.max()).item()
        if not error <= ALLOWED:
            raise WrongOutput(f"scores: error {error:.2e} above {ALLOWED:.0e}")
        return Accuracy(error, ALLOWED)

    scores = torch.empty(1, shape.workload.heads, grid.num_blocks, grid.num_blocks, device="meta")
    about = {
        "bytes": float(q.nbytes + k.nbytes + 4 * scores.numel()),
        "flops": 2.0 * scores.numel() * shape.workload.head_dim,
    }
    return Contest(
        [
            Case(shape.row(STAGE, "torch", **about), lambda: by_torch(q, k)),
            Case(shape.row(STAGE, OURS, **about), lambda: nabla.pooled_scores(q, k, grid), check),
        ]
    )
