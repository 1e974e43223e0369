"""What attention does to a whole clip, and to a thousand: arithmetic from measured figures.

bound        of the speed-up of a layer by FLOPs: (linear + attention) / (linear + d * attention)
clip         calls * layers * (linear / product rate + attention / rate of attention), where rates
             are those that a run measured: of dense attention, and of ours at the density
device-hours 1000 clips on one device, for the denoising alone
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from benchmarks.results import OURS, Row, Run
from benchmarks.tables import Table
from benchmarks.workloads import WORKLOADS, Workload

PAPER = (
    "  Table 1 of the NABLA paper: 2.72x end to end for wan14b-720p at density 0.075 on 4 H100, of "
    "at most 3.09x"
)
NOT_OF_TIME = (
    "  A bound of operations: where attention runs at a lower rate than the rest, the speed-up "
    "can be larger."
)
CLIPS = 1000
UNMEASURED = "unmeasured"

T = TypeVar("T")


def bounds(runs: Sequence[Run]) -> Table:
    """Every model workload: the bound by FLOPs beside the end-to-end speed-up of a run, if any."""
    cells = [
        [
            workload.name,
            f"{density:g}",
            f"{workload.flops / 1e12:.1f}",
            f"{workload.linear_flops / 1e12:.1f}",
            f"{workload.bound(density):.2f}x",
            _first_known(_end_to_end(run, workload, density) for run in runs) or UNMEASURED,
        ]
        for workload, density in _cases()
    ]
    columns = (
        *("workload", "density", "attention TFLOP", "other TFLOP", "bound"),
        "measured end to end",
    )
    return Table("end-to-end bound of a layer by FLOPs", columns, cells, [PAPER, NOT_OF_TIME])


def device_hours(runs: Sequence[Run]) -> Table:
    """Device-hours for a thousand clips, dense against NABLA, by the runs of one machine."""
    cells = []
    for workload, density in _cases():
        found = _first_known(_hours(run, workload, density) for run in runs)
        shown = [UNMEASURED] * 3
        if found is not None:
            dense, ours = found
            shown = [f"{dense:,.0f}", f"{ours:,.0f}", f"{dense / ours:.2f}x"]
        cells.append([workload.name, f"{density:g}", *shown, f"{workload.bound(density):.2f}x"])
    device = "GPU" if runs[0].about["device"] == "cuda" else "CPU"
    columns = (
        *("workload", "density", f"dense, {device}-hours", f"NABLA, {device}-hours"),
        *("speed-up", "bound"),
    )
    notes = [
        f"  Extrapolated from measured rates of one {device}: denoising alone, without text "
        "encoder and VAE. Rates of shorter sequences stand for the whole where a run was reduced."
    ]
    return Table(f"{CLIPS:,} clips: device-hours", columns, cells, notes)


def _cases() -> Iterator[tuple[Workload, float]]:
    for workload in WORKLOADS:
        for density in workload.densities:
            yield workload, density


def _first_known(found: Iterable[T | None]) -> T | None:
    return next((value for value in found if value is not None), None)


def _hours(run: Run, workload: Workload, density: float) -> list[float] | None:
    """Dense and with NABLA; None if the run has not measured it."""
    of_workload = [row for row in run.measured("block_attention") if row.workload == workload.name]
    dense = [row.flops_per_second for row in of_workload if row.mask == "dense"]
    ours = [
        row.flops_per_second
        for row in of_workload
        if row.implementation == OURS and row.asked == density and row.mask.startswith("nabla-like")
    ]
    mask = [row for row in run.measured("block_mask", OURS) if row.workload == workload.name]
    dtype = of_workload[0].dtype if of_workload else ""
    if not (dense and ours and mask and workload.model and dtype in run.limits.gemm):
        return None
    linear = workload.linear_flops / run.limits.gemm[dtype]
    layers = workload.model.calls * workload.model.layers
    masks = _seconds(mask[0]) * workload.heads / mask[0].heads
    each = (
        linear + workload.flops / max(rate for rate in dense if rate),
        linear + masks + density * workload.flops / min(rate for rate in ours if rate),
    )
    return [CLIPS * layers * seconds / 3600 for seconds in each]


def _seconds(row: Row) -> float:
    assert row.seconds is not None
    return row.seconds.median


def _end_to_end(run: Run, workload: Workload, density: float) -> str | None:
    """The speed-up of a step of this run; None if it has not measured it."""
    for row in run.rows:
        of_step = (row.stage, row.part) == ("block", "step")
        if of_step and row.workload == workload.name and row.asked == density and row.speedup:
            layers = row.values["layers"]
            note = f"{row.speedup:.2f}x, a step of {layers} layer{'s' if layers > 1 else ''}"
            if row.reduced:
                note += f" at {row.reduced}, density {row.density:.2f}, bound there "
                note += f"{row.values['bound']:.2f}x"
            return note
    return None
