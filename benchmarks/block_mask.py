"""Stages 2 and 3: building the NABLA mask, against the sort-based way of the public code.

Bytes are those of q and k, read once, and of the mask; FLOPs those of the products of means. The
speed-up is over sorting.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import nabla
from benchmarks.accuracy import Accuracy, WrongOutput, check_mask
from benchmarks.case import Case, Contest, Shape, with_role
from benchmarks.peers.peer import Peer
from benchmarks.results import OURS
from benchmarks.workloads import Workload
from nabla import BlockMask

STAGE = "block_mask"
DIFFERING = 1e-2  # the public builder averages in the dtype of the model: blocks at the cut differ


def contest(shape: Shape, peers: list[Peer]) -> Contest:
    """Build the mask of q and k as the model of the workload does."""
    q, k, _ = shape.inputs()
    workload = shape.workload
    build = builder(q, k, workload)
    row = about(build, q, k)

    def check() -> Accuracy:
        return check_mask(build(), q, k, top_p=workload.top_p, window=workload.window)

    found = Contest()
    for peer in with_role(peers, "mask", shape.device):
        run = peer.prepare(q, k, workload.grid, workload.top_p, workload.window)

        def check_peer(run: Callable[[], tuple[Tensor, ...]] = run) -> Accuracy:
            theirs, ours = run()[0][:, :1], build().to_dense()[:, :1]
            share = (theirs != ours).float().mean().item()
            if not share <= DIFFERING:
                raise WrongOutput(f"{share:.2%} of the mask differ from ours")
            return Accuracy(share, DIFFERING)

        found.cases.append(Case(shape.row(STAGE, peer.name, **row), run, check_peer))
    found.cases.append(Case(shape.row(STAGE, OURS, **row), build, check))
    return found


def about(build: Callable[[], BlockMask], q: Tensor, k: Tensor) -> dict:
    """What a row has to say of building a mask of q and k."""
    blocks = build()
    return {
        "mask": "built",
        "density": float(blocks.density()),
        "flops": 2.0 * math.prod(blocks.shape) * q.shape[-1],  # of the products of means
        "bytes": float(q.nbytes + k.nbytes + blocks.bits.nbytes),
    }


def builder(q: Tensor, k: Tensor, workload: Workload) -> Callable[[], BlockMask]:
    """Build the mask of q and k with ours."""
    options = {"grid": workload.grid, "top_p": workload.top_p, "window": workload.window}
    return lambda: nabla.create_block_mask(q, k, **options)


def prepare(name: str, shape: Shape) -> Callable[[], object]:
    """Inputs for a measurement of memory, and the run: ours, or by sorting."""
    from benchmarks.peers import sorting

    with torch.no_grad():
        q, k, _ = shape.inputs()
    workload = shape.workload
    if name == OURS:
        return builder(q, k, workload)
    return sorting.builder(q, k, workload.grid, workload.top_p, workload.window)
