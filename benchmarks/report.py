"""What a run shows: tables for the terminal, pictures, and one HTML file that holds it all."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import arithmetic, plots, scaling
from benchmarks.machine import Limits, describe
from benchmarks.results import OURS, Change, Row, Run
from benchmarks.tables import Table

COLUMNS = (
    *("whose", "mask", "density", "ms (p20-p80)", "rounds", "GFLOP/s", "GB/s", "of limit"),
    *("speed-up (95 %)", "E", "E with mask", "error", "allowed"),
)


NOT_ON_A_TERMINAL = ("rounds", "GB/s", "allowed")  # which is too narrow; the report has them
FILE_WIDTH = 200


def table(rows: Sequence[Row], limits: Limits, title: str = "") -> list[Table]:
    """A table for every stage and shape of some rows."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        shape = (row.stage, row.workload, row.tokens, row.heads, row.head_dim, row.dtype)
        groups.setdefault(shape if row.tokens else shape[:2], []).append(row)
    return [_table(of_shape, limits) for of_shape in groups.values()]


def _table(rows: Sequence[Row], limits: Limits) -> Table:
    first = rows[0]
    title = f"{first.stage}  {first.workload}"
    if first.tokens:
        title += f"  S={first.tokens} H={first.heads} D={first.head_dim} {first.dtype}"
    notes = [f"  reduced: {first.reduced}"] if first.reduced else []
    for row in rows:
        if row.seconds is None and row.reason:
            notes.append(f"  {row.implementation} {row.mask} {row.status}: {row.reason}")
    with_time = [row for row in rows if row.seconds is not None]
    notes += sorted({f"  {row.reason}" for row in with_time if row.reason})
    if first.stage == "memory":
        return Table(title, *_memory(rows), notes)
    cells = [_cells(row, limits) for row in with_time]
    used = [i for i in range(len(COLUMNS)) if i < 2 or any(line[i] for line in cells)]
    references = sorted({row.reference for row in with_time if row.reference})
    if references:
        notes.insert(0, f"  speed-up over {', '.join(references)} in the same rounds")
    notes += bounds_of(with_time)
    return Table(
        title, [COLUMNS[i] for i in used], [[line[i] for i in used] for line in cells], notes
    )


def _cells(row: Row, limits: Limits) -> list[str]:
    assert row.seconds is not None
    median, p20, p80 = (f"{1e3 * x:.4g}" for x in row.seconds)
    share, extra = row.share_of_limit(limits), ""
    if row.extra_flops:
        extra = f" (+{row.extra_flops / row.flops:.0%} FLOPs)"
    speedup = ""
    if row.relative == (1, 1, 1) and row.dense == 1:
        speedup = "reference"
    elif row.relative is not None and row.speedup is not None and row.rounds:
        low, high = row.dense / row.relative.high, row.dense / row.relative.low
        speedup = f"{row.speedup:.2f}x ({low:.2f}-{high:.2f})"
    elif row.speedup is not None:
        speedup = f"{row.speedup:.2f}x"
    is_sparse = row.mask not in ("dense", "built") and row.stage not in ("block", "generate")
    return [
        row.implementation,
        f"{row.mask} {row.part}".strip() + extra,
        _number(row.density, ".3f"),
        f"{median} ({p20}-{p80})",
        str(row.rounds or ""),
        _number(row.flops_per_second, ".0f", 1e-9),
        _number(row.bytes_per_second, ".1f", 1e-9),
        _number(share, ".0%"),
        speedup,
        _number(row.efficiency, ".2f") if is_sparse else "",
        _number(row.efficiency_with_mask, ".2f"),
        _number(row.error, ".1e"),
        _number(row.allowed, ".1e"),
    ]


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "" if value is None else format(value * factor, form)


def _memory(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[str]]]:
    columns = ("whose", "what", "peak MiB", "KiB per token", "of q + k + v")
    cells = [
        [
            row.implementation,
            row.part,
            f"{row.values['peak'] / 2**20:.0f}",
            _number(row.values.get("per_token"), ".2f", 2**-10),
            _number(row.values.get("share_of_qkv"), ".1%"),
        ]
        for row in rows
        if "peak" in row.values
    ]
    return columns, cells


def bounds_of(rows: Iterable[Row]) -> list[str]:
    """The bound of FLOPs beside the speed-up of each row that has one."""
    return [
        f"  density {row.density:.3f}{f' {row.part}' * bool(row.part)}: {row.speedup:.2f}x of at "
        f"most {row.values['bound']:.2f}x by FLOPs"
        + (
            f"; at the whole workload at most {row.values['bound_of_the_whole']:.2f}x"
            if row.reduced
            else ""
        )
        for row in rows
        if row.values.get("bound") and row.implementation == OURS and row.speedup
    ]


def summary(run: Run) -> list[Table]:
    """What no single stage shows: fits, bounds and arithmetic."""
    found = []
    lines = [
        [name, f"{start:.2f} ms", f"{1e3 * slope:.3f} us", f"{worst:.0%}"]
        for name, (start, slope, worst, _) in plots.lines_over_kept_blocks(run).items()
    ]
    if lines:
        columns = ("shape", "start", "per kept block", "at most off")
        found.append(Table("time over kept blocks: start + slope * blocks", columns, lines))
    fits = [
        [name, f"{exponent:.2f}", f"{1e3 * points[-1][1]:.3g} ms", f"{worst:.0%}"]
        for name, (_, exponent, worst, points) in scaling.fits(run.rows).items()
    ]
    if fits:
        columns = ("curve", "exponent", "at the longest", "at most off")
        found.append(Table("time over tokens: factor * tokens^exponent", columns, fits))
    extrapolated = [row for row in run.rows if row.status == "extrapolated"]
    found += table(extrapolated, run.limits)
    found.append(arithmetic.bounds([run]))
    return found


def changes(found: Sequence[Change], before: Run) -> list[Table]:
    """How ratios differ from those of another run."""
    cells = [
        [
            f"{c.row.stage} {c.row.workload} S={c.row.tokens} D={c.row.head_dim} {c.row.dtype}",
            f"{c.row.mask} {c.row.part} {_number(c.row.asked, '.3g')}".strip(),
            f"{c.factor:.2f} ({c.low:.2f}-{c.high:.2f})",
            "SLOWER" if c.is_slower else "",
        ]
        for c in sorted(found, key=lambda c: -c.factor)
    ]
    title = f"time relative to the reference, now over {before.about['date'][:16]}"
    return [Table(title, ("case", "mask", "factor (range)", ""), cells)]


def limits_line(limits: Limits, rates) -> str:
    """What the machine was measured to reach."""
    products = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {name}" for name, rate in limits.gemm.items())
    dense = ", ".join(f"{rate / 1e9:.0f} {dtype}" for dtype, rate in rates.items())
    return (
        f"limits measured: copy {limits.copy / 1e9:.1f} GB/s, product {products}; "
        f"dense attention GFLOP/s: {dense.replace('torch.', '')}"
    )


def plain(what: object) -> None:
    """Print text and tables without colours."""
    for part in what if isinstance(what, list) else [what]:
        print(part.plain() if isinstance(part, Table) else part, flush=True)


def rich(what: object) -> None:
    """Print text and tables as rich does."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    for part in what if isinstance(what, list) else [what]:
        if not isinstance(part, Table):
            console.print(Text(str(part)))
            continue
        drawn = RichTable(title=part.title, title_justify="left", box=None, pad_edge=False)
        shown = [i for i, name in enumerate(part.columns) if name not in NOT_ON_A_TERMINAL]
        for index in shown:
            side = "left" if index < part.texts else "right"
            drawn.add_column(part.columns[index], justify=side, no_wrap=True)
        for line in part.cells:
            style = "bold" * (line[0] == OURS)
            drawn.add_row(*(Text(line[index]) for index in shown), style=style)
        console.print()
        if part.cells:
            console.print(drawn)
        else:
            console.print(Text(part.title))
        for note in part.notes:
            console.print(Text(note, style="dim"))


def write(run: Run, folder: Path) -> list[Path]:
    """Write the rows, the pictures and the report into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "results.jsonl"]
    run.write(written[0])
    try:
        pictures = plots.all_of(run)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        pictures = {}
    for name, picture in pictures.items():
        written.append(folder / f"{name}.png")
        written[-1].write_bytes(picture)
    written.append(folder / "report.html")
    written[-1].write_text(page(run, pictures))
    return written


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; text-align: right; white-space: nowrap; }
th { border-bottom: 1px solid #999; }
.text { text-align: left; }
tr:nth-child(odd) td { background: #f4f4f4; }
h2 { margin-top: 2.5rem; } h3 { margin-bottom: .3rem; } p { margin: .2rem 0; color: #444; }
img { max-width: 100%; } .pictures { display: grid; gap: 1rem;
grid-template-columns: repeat(auto-fit, minmax(28rem, 1fr)); }
"""


def page(run: Run, pictures: dict[str, bytes]) -> str:
    """The report, self-contained."""
    images = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        for name, picture in pictures.items()
    )
    reasons = [row for row in run.rows if row.seconds is None and row.stage != "memory"]
    unmeasured = Table(
        "not measured",
        ("what", "whose", "why"),
        [[r.stage, r.implementation, f"{r.status}: {r.reason}"] for r in reasons],
        texts=3,
    )
    measured = [row for row in run.rows if row.status == "measured"]
    tables = "".join(part.html() for part in table(measured, run.limits))
    summaries = "".join(part.html() for part in summary(run))
    about = run.about
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>nabla bench {html.escape(run.preset)}</title>
<style>{STYLE}</style></head><body>
<h1>nabla bench {html.escape(run.preset)}</h1>
<p>{html.escape(describe(about))}</p>
<p>{html.escape(about["platform"])}, Python {about["python"]}, load {about["load"]:.1f} on
{about["cores"]} cores, {about["date"]}</p>
<p>{html.escape(limits_line(run.limits, {}).partition("; dense")[0])}</p>
<p>Times are medians of cases that run in turn. A speed-up is the median ratio within a round, with
an interval that holds the true one with 95 % confidence. E = density &times; dense time / time.
FLOPs are those of kept blocks. What is less exact than the tolerance policy asks gets no time.</p>
<div class="pictures">{images}</div>
<h2>Summary</h2>{summaries}
<h2>Internet scale</h2>{arithmetic.device_hours([run]).html()}
<h2>Measurements</h2>{tables}
<h2>Not measured</h2>{unmeasured.html()}
</body></html>
"""
