"""Pictures of a run, one PNG each: what it can show with the rows that it has.

speedup     speed-up over density, with the line that no kernel can be above (1 / density)
tokens      time over tokens, with fitted exponents
kept        time over kept blocks, with fitted lines
memory      peak memory over tokens
share       what each stage takes of nabla.attention
roofline    FLOPs per second over FLOPs per byte, under the measured limits
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import functional, scaling
from benchmarks.results import OURS, Row, Run
from benchmarks.timing import fit_line

WIDTH, HEIGHT = 10.0, 4.6
DPI = 110


def all_of(run: Run) -> dict[str, bytes]:
    """The PNGs that the rows of a run allow, by name."""
    drawings: dict[str, Callable[[Run], bytes | None]] = {
        "speedup": speedup,
        "share": share,
        "tokens": tokens,
        "kept": kept,
        "memory": memory,
        "roofline": roofline,
    }
    pictures = ((name, draw(run)) for name, draw in drawings.items())
    return {name: picture for name, picture in pictures if picture is not None}


def speedup(run: Run) -> bytes | None:
    """Speed-up of ours over dense attention, by shape, over density."""
    curves = _by_shape(
        row
        for row in run.measured("block_attention") + run.measured("train")
        if row.mask == "random" and row.speedup
    )
    others = [
        row
        for row in run.measured("block_attention")
        if row.mask not in ("random", "dense", "built")
        and row.implementation == OURS
        and row.speedup
    ]
    if not curves and not others:
        return None
    figure, axes = _figure("speed-up over dense attention", "density", "times faster")
    for name, rows in curves.items():
        points = sorted((row.density, row.speedup) for row in rows)
        axes.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1, label=name)
    for mask in sorted({row.mask for row in others}):
        points = [(row.density, row.speedup) for row in others if row.mask == mask]
        axes.plot(*zip(*points, strict=True), "x", markersize=6, label=f"{mask} mask")
    ends = [row.density for rows in (*curves.values(), others) for row in rows]
    line = (min(ends), max(ends))
    axes.plot(line, [1 / x for x in line], "k--", linewidth=1, label="1 / density")
    _logarithmic(axes)
    return _png(figure, axes)


def share(run: Run) -> bytes | None:
    """What the stages take of nabla.attention, one bar a shape."""
    bars = defaultdict(dict)
    for row in run.measured(functional.STAGE, OURS):
        name = _shape(row).replace(" ", "\n")
        bars[name][row.part or "attention()"] = row.seconds.median * 1e3
    bars = {name: parts for name, parts in bars.items() if set(functional.PARTS) <= set(parts)}
    if not bars:
        return None
    figure, axes = _figure("nabla.attention, stage by stage", "ms", "")
    left = [0.0] * len(bars)
    for part in functional.PARTS:
        widths = [parts[part] for parts in bars.values()]
        drawn = axes.barh(list(bars), widths, left=left, label=part)
        axes.bar_label(drawn, [f"{w:.3g}" for w in widths], label_type="center", fontsize=7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.margins(y=0.6)
    return _png(figure, axes)


def tokens(run: Run) -> bytes | None:
    """Time over tokens."""
    if not (curves := scaling.fits(run.rows)):
        return None
    figure, axes = _figure("time over tokens", "tokens", "ms")
    for name, (_, exponent, _, points) in curves.items():
        xs, ys = zip(*points, strict=True)
        label = f"{name}: tokens^{exponent:.2f}"
        axes.plot(xs, [1e3 * y for y in ys], "o-", markersize=3, linewidth=1, label=label)
    _logarithmic(axes)
    return _png(figure, axes)


def kept(run: Run) -> bytes | None:
    """Time over kept blocks, by shape, beside the fitted lines."""
    if not (curves := lines_over_kept_blocks(run)):
        return None
    figure, axes = _figure("time over kept blocks, all heads", "kept blocks", "ms")
    for name, (start, slope, _, points) in curves.items():
        xs, ys = zip(*points, strict=True)
        marker = "^" if name.endswith("with backward") else "o"  # there are more lines than colours
        (drawn,) = axes.plot(xs, ys, marker, markersize=3, label=name)
        axes.plot(xs, [start + slope * x for x in xs], color=drawn.get_color(), linewidth=1)
    _logarithmic(axes)
    return _png(figure, axes)


def lines_over_kept_blocks(
    run: Run,
) -> dict[str, tuple[float, float, float, list[tuple[float, float]]]]:
    """By shape: start (ms), slope (ms per kept block), the largest relative error, the points."""
    rows = run.measured("block_attention") + run.measured("train")
    curves = _by_shape(row for row in rows if row.mask == "random" and not row.part)
    found = {}
    for name, of_shape in curves.items():
        points = sorted(
            (row.density * row.heads * (row.tokens / 64) ** 2, row.seconds.median * 1e3)
            for row in of_shape
        )
        if len(points) > 2:
            found[name] = (*fit_line(points), points)
    return found


def memory(run: Run) -> bytes | None:
    """Peak memory above the inputs, over tokens."""
    curves = defaultdict(list)
    for row in run.rows:
        if row.stage == "memory" and row.part == "forward + backward":
            curves[row.implementation].append((row.tokens, row.values["peak"] / 2**20))
    if max((len(points) for points in curves.values()), default=0) < 2:
        return None
    figure, axes = _figure("peak memory above the inputs, forward + backward", "tokens", "MiB")
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
    axes.set_ylim(bottom=0)
    return _png(figure, axes)


def roofline(run: Run) -> bytes | None:
    """Rates over intensities, under the limits that the machine was measured to have."""
    rows = [
        row
        for stage in ("block_attention", "train", "scores", "functional")
        for row in run.measured(stage)
        if row.flops and row.bytes and not row.part
    ]
    if not rows:
        return None
    figure, axes = _figure("roofline, as measured here", "FLOPs per byte", "GFLOP/s")
    xs = [row.flops / row.bytes for row in rows]
    low, high = min(xs) / 2, max(xs) * 2
    for dtype, gemm in run.limits.gemm.items():
        ridge = gemm / run.limits.copy
        corners = [low, min(max(ridge, low), high), high]
        roof = [min(x * run.limits.copy, gemm) / 1e9 for x in corners]
        axes.plot(corners, roof, "k-", linewidth=1)
        axes.annotate(f"{dtype} product", (high, roof[-1]), ha="right", va="bottom", fontsize=7)
    groups = defaultdict(list)
    for row in rows:
        groups[f"{row.stage} {row.implementation} {row.dtype}"].append(
            (row.flops / row.bytes, row.flops / row.seconds.median / 1e9)
        )
    for name, points in groups.items():
        axes.plot(*zip(*points, strict=True), "o", markersize=3, label=name)
    _logarithmic(axes)
    return _png(figure, axes)


def _by_shape(rows: Iterable[Row]) -> dict[str, list[Row]]:
    curves = defaultdict(list)
    for row in rows:
        if row.implementation == OURS and row.density is not None and row.seconds is not None:
            curves[f"{_shape(row)}{', with backward' * (row.stage == 'train')}"].append(row)
    return dict(curves)


def _shape(row: Row) -> str:
    return f"{row.workload} S={row.tokens} H={row.heads} D={row.head_dim} {row.dtype}"


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _logarithmic(axes: Any) -> None:
    """Both axes, with plain numbers on them."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""  # where there is space for it

    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(Plain())
        axis.set_minor_formatter(Plain(minor_thresholds=(2, 0.5)))
        axis.set_tick_params(which="minor", labelsize=6)


def _png(figure: Any, axes: Any) -> bytes:
    figure.legend(fontsize=6, loc="outside right upper")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    return picture.getvalue()
