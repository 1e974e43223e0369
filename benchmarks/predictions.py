"""What our forward was predicted to reach on a GPU, beside what a run measured there.

    model      FLOPs of the main loop over its simulated time (benchmarks/issue_model.py)
    L2         FLOPs of a kept block * bytes per second of L2 / bytes of a kept block from L2
    measured   FLOPs of kept blocks over the whole time, TFLOP/s like the others

The blocks that a group of query blocks loads are counted in the very mask that was measured.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from benchmarks import bounds
from benchmarks.issue_model import Attention, Bound, Chip, bound
from benchmarks.results import OURS, Row, Run
from benchmarks.tables import Table

NOTES = (
    "Both predictions lie above what a kernel reaches: they leave out DRAM, the ends of rows, the "
    "launch, and clocks that differ. FlashAttention-3 is published at 0.85 of the model.",
    "Graph: launches replayed back to back, with a warm L2; else each meets a cold one.",
)


class Prediction(NamedTuple):
    """One measured case, in TFLOP/s.

    Args:
        workload: Its name.
        mask: Its kind, and "graph" for a replayed launch.
        density: Of the mask.
        union: Blocks that a group of query blocks loads, per block that one of them keeps.
        model: The bound by the machine code.
        bottleneck: What bounds it there.
        l2: The bound by L2.
        measured: What was measured.
    """

    workload: str
    mask: str
    density: float
    union: float
    model: float
    bottleneck: str
    l2: float
    measured: float


def predictions(run: Run, architecture: str) -> list[Prediction]:
    """Every forward of ours in a run that our CUDA kernels computed.

    Args:
        run: Of a GPU.
        architecture: What its kernels are compiled for, such as "sm_90a".

    Raises:
        FileNotFoundError: If the compiled kernels, or the tool that reads them, are not there.
        ValueError: If there is no model of the architecture.
    """
    kernels = {
        attention.head_dim: attention
        for attention in bounds.KERNELS
        if attention.architecture == architecture and attention.products == 2
    }
    if not kernels:
        raise ValueError(f"there is no model of {architecture}")
    bandwidth = l2_bandwidth(run) or Chip(architecture)["l2"] * 1e12
    found = []
    for row in run.measured("block_attention", OURS):
        attention = kernels.get(row.head_dim)
        if attention is not None and "union" in row.values and row.flops_per_second:
            found.append(_prediction(row, attention, bandwidth))
    return found


def l2_bandwidth(run: Run) -> float | None:
    """Bytes per second of L2, if a run has measured them."""
    return next((row.bytes_per_second for row in run.measured("l2")), None)


def table(found: list[Prediction]) -> Table:
    """Predicted beside measured."""
    columns = ("workload", "mask", "density", "union", "model", "L2", "measured", "of the lower")
    cells = [
        [
            one.workload,
            one.mask,
            f"{one.density:.3f}",
            f"{one.union:.2f}",
            f"{one.model:.0f} ({one.bottleneck})",
            f"{one.l2:.0f}",
            f"{one.measured:.0f}",
            f"{one.measured / min(one.model, one.l2):.2f}",
        ]
        for one in found
    ]
    return Table("forward, TFLOP/s: predicted and measured", columns, cells, NOTES)


def _prediction(row: Row, attention: Attention, bandwidth: float) -> Prediction:
    assert row.density is not None and row.flops_per_second is not None
    union = row.values["union"]
    modelled = _bound(attention, round(max(union, 1.0), 1))
    return Prediction(
        workload=row.workload,
        mask=f"{row.mask} {row.part}".strip(),
        density=row.density,
        union=union,
        model=modelled.tflops,
        bottleneck=modelled.bottleneck,
        l2=attention.flop * bandwidth / attention.l2_bytes(union) / 1e12,
        measured=row.flops_per_second / 1e12,
    )


@cache
def _bound(attention: Attention, union: float) -> Bound:
    return bound(bounds.compiled(attention).main_loop(), attention, union)
