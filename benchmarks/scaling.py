"""Cost over tokens: dense attention, ours at a fixed density, ours at a fixed number of kept blocks
in each row, and the mask.

    time = factor * tokens^exponent     fitted by least squares of the logarithms
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from benchmarks import block_attention
from benchmarks.case import Case, Contest, MaskSpec, Shape
from benchmarks.peers.peer import Peer
from benchmarks.results import Row
from benchmarks.timing import fit_power

STAGE = "scaling"
DENSITY = 0.1
KEPT = 16  # blocks in each row, where their number is fixed


def specs(shape: Shape) -> list[MaskSpec]:
    """A density, and a number of blocks."""
    few = min(1.0, KEPT / shape.workload.grid.num_blocks)
    return [MaskSpec("random", DENSITY), MaskSpec("random", few)]


def cost(shape: Shape) -> float:
    """FLOPs of one round."""
    return block_attention.cost(shape, specs(shape))


def contest(shape: Shape, peers: list[Peer]) -> Contest:
    """Dense attention, two masks, and building a mask."""
    fastest = [peer for peer in peers if peer.role == "dense"]
    found = block_attention.build(STAGE, shape, specs(shape), fastest, with_grad=False)
    *dense, at_density, at_blocks, mask = found.cases
    found.cases = [
        *(_with_part(case, "dense") for case in dense),
        _with_part(at_density, f"density {DENSITY}"),
        _with_part(at_blocks, f"{KEPT} blocks a row"),
        mask,
    ]
    return found


def _with_part(case: Case, part: str) -> Case:
    return replace(case, row=replace(case.row, part=part))


def fits(rows: Sequence[Row]) -> dict[str, tuple[float, float, float, list[tuple[int, float]]]]:
    """Factor, exponent, the largest relative error and the points (tokens, seconds), by curve."""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if row.stage == STAGE and row.seconds is not None:
            name = row.part if row.part != "dense" else row.implementation
            curves[name].append((row.tokens, row.seconds.median))
    return {
        name: (*fit_power(points), sorted(points))
        for name, points in curves.items()
        if len(points) > 2
    }
