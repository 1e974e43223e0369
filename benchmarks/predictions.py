"""What our attention was predicted to reach on a GPU, beside what a run measured there.

    model      FLOPs of the main loops over their simulated time (benchmarks/issue_model.py)
    L2         FLOPs of a kept block * bytes per second of L2 / bytes of a kept block from L2
    measured   FLOPs of kept blocks over the whole time, TFLOP/s like the others

Training launches several kernels, whose predicted times add up: 7 products / sum(products / rate).
The blocks that a group of blocks loads are counted in the very mask that was measured.
"""

from __future__ import annotations

from dataclasses import replace
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
# By stage and part, the products of each kernel that is launched; more than 7 are computed again.
# Where there is no kernel of 5, gradients are deterministic in any case.
KERNELS = {
    ("block_attention", ""): (2,),
    ("block_attention", "graph"): (2,),
    ("train", ""): (2, 5),
    ("train", "deterministic"): (2, 4, 3),
}
# What a group of blocks loads, by the products of a kernel: the name of a value of a row.
UNIONS = {2: "union", 5: "union_of_keys", 4: "union_of_keys", 3: "union_of_queries"}
NAME = "predicted"  # of the value of a row that holds what was predicted of it


class Prediction(NamedTuple):
    """One measured case, in TFLOP/s.

    Args:
        workload: Its name.
        mask: Its kind, and "graph" for a replayed launch.
        density: Of the mask.
        union: Blocks that a group of query blocks loads, per block that one of them keeps.
        model: The bound by the machine code.
        bottleneck: What bounds it there, in the kernel that takes longest.
        l2: The bound by L2.
        measured: What was measured.
        stage: "block_attention" is the forward, "train" with the backward.
    """

    workload: str
    mask: str
    density: float
    union: float
    model: float
    bottleneck: str
    l2: float
    measured: float
    stage: str = "block_attention"


def predictions(run: Run, architecture: str) -> list[Prediction]:
    """Every case of attention of ours in a run that our CUDA kernels computed.

    Args:
        run: Of a GPU.
        architecture: What its kernels are compiled for, such as "sm_90a".

    Raises:
        FileNotFoundError: If the compiled kernels, or the tool that reads them, are not there.
        ValueError: If there is no model of the architecture.
    """
    return stored(with_predictions(run, architecture))


def with_predictions(run: Run, architecture: str) -> Run:
    """The same run; its rows hold what is predicted of the kernels as they are compiled here.

    Rows that hold a prediction keep it. Raises what `predictions` does.
    """
    kernels = {
        (attention.head_dim, attention.products): attention
        for attention in bounds.KERNELS
        if attention.architecture == architecture
    }
    if not kernels:
        raise ValueError(f"there is no model of {architecture}")
    bandwidth = l2_bandwidth(run) or Chip(architecture)["l2"] * 1e12
    return replace(run, rows=[_with_prediction(row, kernels, bandwidth) for row in run.rows])


def stored(run: Run) -> list[Prediction]:
    """The predictions that the rows of a run hold, beside what was measured."""
    return [
        Prediction(
            workload=row.workload,
            mask=f"{row.mask} {row.part}".strip(),
            density=row.density or 0.0,
            union=row.values["union"],
            **row.values[NAME],
            measured=(row.flops_per_second or 0.0) / 1e12,
            stage=row.stage,
        )
        for row in run.rows
        if NAME in row.values
    ]


def l2_bandwidth(run: Run) -> float | None:
    """Bytes per second of L2, if a run has measured them."""
    return next((row.bytes_per_second for row in run.measured("l2")), None)


def table(found: list[Prediction]) -> Table:
    """Predicted beside measured."""
    columns = ("workload", "mask", "density", "union", "model", "L2", "measured", "of the lower")
    cells = [
        [
            one.workload + (" with gradients" if one.stage == "train" else ""),
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
    return Table("attention, TFLOP/s: predicted and measured", columns, cells, NOTES)


def _with_prediction(row: Row, kernels: dict[tuple[int, int], Attention], bandwidth: float) -> Row:
    products = KERNELS.get((row.stage, row.part), ())
    if 5 in products and (row.head_dim, 5) not in kernels:
        products = KERNELS[row.stage, "deterministic"]
    used = [kernels.get((row.head_dim, number)) for number in products]
    if row.implementation != OURS or not row.flops_per_second or NAME in row.values:
        return row
    if not products or None in used or any(UNIONS[number] not in row.values for number in products):
        return row
    model, l2, slowest, bottleneck = 0.0, 0.0, 0.0, ""
    for number, attention in zip(products, used, strict=True):
        assert attention is not None
        union = max(row.values[UNIONS[number]], 1.0) if attention.sharing > 1 else 1.0
        modelled = _bound(attention, round(union, 1))
        seconds = number / modelled.tflops
        model, l2 = model + seconds, l2 + number * attention.l2_bytes(union) / attention.flop
        if seconds > slowest:
            slowest, bottleneck = seconds, modelled.bottleneck
    counted = 2 if row.stage == "block_attention" else 7
    predicted = {
        "model": counted / model,
        "bottleneck": bottleneck,
        "l2": counted / l2 * bandwidth / 1e12,
    }
    return replace(row, values=row.values | {NAME: predicted})


@cache
def _bound(attention: Attention, union: float) -> Bound:
    return bound(bounds.compiled(attention).main_loop(), attention, union)
