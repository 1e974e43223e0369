"""Tables of what GPUs of one model have measured, for README.md and the page beside the results.

attention   forward under NABLA-like masks of the densities of trained models, and the peers
training    the same with the backward
mask        building the mask, against the sort-based way of the public code
block       one CrossDiT block: projections, cross-attention, feed-forward, mask and attention
machine     what the GPU reaches, as measured there
predicted   benchmarks/predictions.py
unmeasured  what was not measured, and why
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks import predictions
from benchmarks.machine import describe
from benchmarks.peers import NAMES
from benchmarks.results import OURS, Row, Run
from benchmarks.tables import Table
from benchmarks.workloads import WORKLOADS, Workload

UNMEASURED = "Not measured yet."
UNKNOWN = "-"


def attention(runs: Sequence[Run]) -> str:
    """Forward: speed-up over dense attention, E, and how much faster than each peer."""
    return _attention(runs, "block_attention")


def training(runs: Sequence[Run]) -> str:
    """Forward and backward, and the same with deterministic algorithms."""
    return _attention(runs, "train")


def mask(runs: Sequence[Run]) -> str:
    """Building the mask of q and k."""
    cells = []
    for workload in WORKLOADS:
        rows = [row for row in _measured(runs, "block_mask") if row.workload == workload.name]
        ours, sorting = (_first(rows, implementation=name) for name in (OURS, "sorting"))
        if ours is not None:
            share = [_ms(sorting), f"{_ratio(sorting, ours):.0f}x"] if sorting else [UNKNOWN] * 2
            rate = f"{(ours.bytes_per_second or 0) / 1e9:,.0f}"
            blocks = f"{ours.heads} heads, {workload.grid.num_blocks:,} blocks"
            cells.append([workload.name, blocks, share[0], _ms(ours), share[1], rate])
    columns = ("workload", "of", "by sorting, ms", "nabla, ms", "speed-up", "GB/s of q and k")
    return _quoted(Table("", columns, cells), runs)


def block(runs: Sequence[Run]) -> str:
    """One CrossDiT block at the widths of the model, dense and with NABLA."""
    cells = []
    for workload, density in _cases():
        of_block = [
            row
            for row in _measured(runs, "block")
            if row.workload == workload.name and row.part == "block"
        ]
        dense, ours = _first(of_block, mask="dense"), _first(of_block, asked=density)
        if dense is not None and ours is not None and ours.speedup is not None:
            cells.append(
                [
                    *(workload.name, f"{density:g}", _ms(dense), _ms(ours)),
                    *(f"{ours.speedup:.2f}x", f"{ours.values['bound']:.2f}x"),
                ]
            )
    columns = ("workload", "density", "dense, ms", "NABLA, ms", "speed-up", "bound by FLOPs")
    return _quoted(Table("", columns, cells), runs)


def machine(runs: Sequence[Run]) -> str:
    """What the GPU reaches."""
    limits = runs[-1].limits
    rows = [("copy, bytes read and written", f"{limits.copy / 1e12:.2f} TB/s")]
    rows += [
        (f"product of {dtype} matrices", f"{rate / 1e12:,.0f} TFLOP/s")
        for dtype, rate in limits.gemm.items()
    ]
    l2 = next((found for run in runs if (found := predictions.l2_bandwidth(run))), None)
    if l2 is not None:
        rows.append(("L2 to shared memory, by bulk copies", f"{l2 / 1e12:.2f} TB/s"))
    return _quoted(Table("", ("", "measured"), rows, texts=1), runs)


def predicted(runs: Sequence[Run]) -> str:
    """What the rows hold that were predicted."""
    found = [one for run in runs for one in predictions.stored(run)]
    lines = predictions.table(sorted(found, key=lambda one: one.stage))
    return "\n\n".join([_quoted(lines, runs), *lines.notes]) if found else UNMEASURED


def unmeasured(runs: Sequence[Run]) -> str:
    """What was left out, or failed."""
    cells = [
        [row.stage, row.workload, row.implementation, f"{row.status}: {_line(row.reason)}"]
        for run in runs
        for row in run.rows
        if row.status not in ("measured", "extrapolated")
    ]
    columns = ("stage", "workload", "whose", "why")
    return Table("", columns, cells, texts=4).markdown() if cells else "Everything was measured."


TABLES: dict[str, Callable[[Sequence[Run]], str]] = {
    "attention": attention,
    "training": training,
    "mask": mask,
    "block": block,
    "machine": machine,
    "predicted": predicted,
    "unmeasured": unmeasured,
}


def _attention(runs: Sequence[Run], stage: str) -> str:
    rows = [row for row in _measured(runs, stage) if row.flops_per_second]
    with_deterministic = any(row.part == "deterministic" for row in rows)
    peers = {row.implementation for row in rows if row.mask.startswith("nabla-like")}
    names = [name for name in NAMES if name in peers]
    cells = []
    for workload, density in _cases():
        of_workload = [row for row in rows if row.workload == workload.name]
        dense = min((row for row in of_workload if row.mask == "dense"), key=_seconds, default=None)
        of_case = [row for row in of_workload if row.mask == "nabla-like 0.5"]
        of_case = [row for row in of_case if row.asked == density]
        ours = _first(of_case, implementation=OURS, part="")
        if dense is None or ours is None:
            continue
        rate = f"{(ours.flops_per_second or 0) / 1e12:.0f}"
        others = [_first(of_case, implementation=name) for name in names]
        cells.append(
            [
                *(workload.name, f"{density:g}", f"{_ms(dense)} {dense.implementation}"),
                *(_ms(ours), rate, _speedup(ours)),
                *([_speedup(_first(of_case, part="deterministic"))] if with_deterministic else []),
                *(UNKNOWN if peer is None else f"{_ratio(peer, ours):.1f}x" for peer in others),
            ]
        )
    columns = (
        *("workload", "density", "dense, ms", "nabla, ms", "TFLOP/s", "over dense (E)"),
        *(["deterministic (E)"] if with_deterministic else []),
        *(f"over {name}" for name in names),
    )
    return _quoted(Table("", columns, cells), runs)


def _cases() -> Iterable[tuple[Workload, float]]:
    return ((workload, density) for workload in WORKLOADS for density in workload.densities)


def _measured(runs: Sequence[Run], stage: str) -> list[Row]:
    return [row for run in runs for row in run.measured(stage)]


def _first(rows: Iterable[Row], **values: object) -> Row | None:
    """The first row that has these values."""
    return next(
        (row for row in rows if all(getattr(row, name) == x for name, x in values.items())), None
    )


def _seconds(row: Row) -> float:
    assert row.seconds is not None
    return row.seconds.median


def _ms(row: Row) -> str:
    ms = 1e3 * _seconds(row)
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:#.3g}"


def _ratio(slower: Row, faster: Row) -> float:
    """Of ratios within rounds, where both have them: steadier than that of the medians."""
    if slower.relative and faster.relative and slower.reference == faster.reference:
        return slower.relative.median / faster.relative.median
    return _seconds(slower) / _seconds(faster)


def _speedup(row: Row | None) -> str:
    if row is None or row.speedup is None or row.efficiency is None:
        return UNKNOWN
    return f"{row.speedup:.1f}x ({row.efficiency:.2f})"


def _line(text: str) -> str:
    """What fits into a cell."""
    return " ".join(text.replace("|", "/").split())[:160]


def _quoted(table: Table, runs: Sequence[Run]) -> str:
    if not table.cells:
        return UNMEASURED
    quoted = "; ".join(dict.fromkeys(describe(run.about) for run in runs))
    return f"{table.markdown()}\n\n{quoted}."
