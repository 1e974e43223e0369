"""The page of the quality study: README.md with its pictures, from results.json alone.

Every sentence with a verdict is made of the numbers: where NABLA loses, the page says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
COLOURS = {"dense": "#22303c", "NABLA 0.5": "#e4572e", "NABLA 0.8": "#1d4e89"}


def write_page(results: dict[str, Any], out: Path) -> Path:
    """Write README.md, losses.png and calibration.png into a folder."""
    models = results["models"]
    arms = list(dict.fromkeys(model["arm"] for model in models))
    by_arm = {arm: [model for model in models if model["arm"] == arm] for arm in arms}
    sources = list(models[0]["own"]["loss"])
    _draw_losses(by_arm, sources, out / "losses.png")
    gain = _draw_calibration(by_arm["dense"], out / "calibration.png")
    parts = [
        _heading(results),
        _losses(by_arm, sources),
        _crossed(by_arm, sources),
        _frames(by_arm, sources),
        _sweep(by_arm, sources),
        _calibration(by_arm["dense"], gain),
    ]
    path = out / "README.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _heading(results: dict[str, Any]) -> str:
    study = results["study"]
    minutes = results["cpu_seconds"] / 60
    trained = "" if results["trained_now"] else " (the models were there before)"
    return f"""# Does NABLA cost quality?

The tiny CrossDiT (2.0 M parameters) trained on real clips, dense and with NABLA,
{len(study["seeds"])} seeds each: {study["small"]} steps on small windows, then {study["large"]}
on 12 frames of 128 x 128 pixels (3,072 tokens, 48 blocks). Arms share seeds, data and noise, and
differ in their attention alone. NABLA has the window (3, 1, 1). Held out are the later frames of a
clip that was trained on, and a clip that was not.

A model this small, this young and with 48 blocks says little about one with 19 B parameters and
3,660 blocks: its attention is spread wider, so a `top_p` costs it more blocks and leaves more out.

`make quality`, commit {results["commit"]}, {results["date"]}, {results["machine"]},
torch {results["torch"]}: {minutes:.0f} minutes of CPU time on two cores{trained}, so about
{minutes / 2:.0f} minutes when both are free."""


def _losses(by_arm: dict[str, Rows], sources: list[str]) -> str:
    header = ["trained with", "density"]
    header += [f"loss, {source}" for source in sources]
    rows = []
    for arm, models in by_arm.items():
        row = [arm, _mean_spread([m["own"]["density"] for m in models], 2)]
        row += [_mean_spread(_own(models, source), 4) for source in sources]
        rows.append(row)
    text = [
        "## Trained and judged with the same attention",
        "Flow-matching loss on held-out windows, mean ± standard deviation over the seeds.",
        _table(header, rows),
    ]
    text += [
        _verdict(arm, models, by_arm["dense"], source)
        for arm, models in by_arm.items()
        if arm != "dense"
        for source in sources
    ]
    return "\n\n".join(text)


def _verdict(arm: str, models: Rows, dense: Rows, source: str) -> str:
    """Whether an arm is within the spread of the dense one, in words."""
    ours, theirs = _own(models, source), _own(dense, source)
    pairs = [a / b - 1 for a, b in zip(ours, theirs, strict=True)]
    density = statistics.mean(m["own"]["density"] for m in models)
    mean = statistics.mean(ours)
    if mean < min(theirs):
        place = "below every dense seed"
    elif mean <= max(theirs):
        place = "within the spread of the dense seeds"
    else:
        place = f"above every dense seed, {mean / max(theirs) - 1:.1%} over the worst: NABLA loses"
    return (
        f"- {arm}, density {density:.2f}, {source}: {place} ({min(theirs):.4f} to "
        f"{max(theirs):.4f}). Seed by seed " + ", ".join(f"{pair:+.1%}" for pair in pairs) + "."
    )


def _crossed(by_arm: dict[str, Rows], sources: list[str]) -> str:
    judges = list(by_arm)
    rows = []
    for arm, models in by_arm.items():
        for source in sources:
            values = [[m["loss"][judge]["loss"][source] for m in models] for judge in judges]
            rows.append([arm, source, *(_mean_spread(v, 4) for v in values)])
    header = ["trained with", "held out", *(f"judged with {judge}" for judge in judges)]
    return "\n\n".join(["## Trained with one, judged with another", _table(header, rows)])


def _frames(by_arm: dict[str, Rows], sources: list[str]) -> str:
    rows = []
    for arm, models in by_arm.items():
        for judge in by_arm:
            row = [arm, judge]
            for source in sources:
                for metric, digits in (("psnr", 2), ("ssim", 3)):
                    values = [m["frames"][judge][source][metric] for m in models]
                    row.append(_mean_spread(values, digits))
            rows.append(row)
    header = ["trained with", "sampled with"]
    header += [f"{metric}, {source}" for source in sources for metric in ("PSNR (dB)", "SSIM")]
    return "\n\n".join(
        [
            "## Sampled frames",
            "The frames after the first, against the real ones. A sampled future may be good and "
            "yet another than the real one: the numbers compare arms, they are no quality alone.",
            _table(header, rows),
            "The later frames of the known clip, by the models of the first seed:",
            "![clips](clips.gif)",
        ]
    )


def _sweep(by_arm: dict[str, Rows], sources: list[str]) -> str:
    rows = []
    settings = [(s["top_p"], s["window"]) for s in next(iter(by_arm.values()))[0]["sweep"]]
    for index, (top_p, window) in enumerate(settings):
        row = [str(top_p), "none" if window is None else str(tuple(window))]
        for models in by_arm.values():
            cells = [m["sweep"][index] for m in models]
            row.append(f"{statistics.mean(c['density'] for c in cells):.2f}")
            mean = statistics.mean(c["loss"][s] for c in cells for s in sources)
            row.append(f"{mean:.4f}")
        rows.append(row)
    header = ["top_p", "window"]
    header += [x for arm in by_arm for x in (f"density, {arm}", f"loss, {arm}")]
    return "\n\n".join(
        [
            "## Judged over top_p and window",
            "Mean loss of both held-out clips, of models trained as the columns say (fewer windows "
            "than above, the same for all).",
            _table(header, rows),
            "![loss over density](losses.png)",
        ]
    )


def _calibration(dense: Rows, gain: list[tuple[float, float]]) -> str:
    rows = []
    for index, first in enumerate(dense[0]["calibration"]["calibrated"]):
        cells = [m["calibration"]["calibrated"][index] for m in dense]
        rows.append(
            [
                f"{first['calibrated_error']:.2f}",
                *(_mean_spread([c[name] for c in cells], 3) for name in ("density", "error")),
                _mean_spread(
                    [_uniform_density(m, c) for m, c in zip(dense, cells, strict=True)], 3
                ),
            ]
        )
    ratios = [ratio for _, ratio in gain if math.isfinite(ratio)]
    if not ratios:
        verdict = "No calibrated error lies between those of uniform ones: nothing to compare."
    elif statistics.mean(ratios) < 1 and max(ratios) < 1:
        verdict = (
            "At equal error of the velocity a top_p per layer and head needs fewer blocks than one "
            f"for all, in every case: {1 - statistics.mean(ratios):.0%} fewer on average, from "
            f"{1 - max(ratios):.0%} to {1 - min(ratios):.0%}."
        )
    else:
        verdict = (
            "A top_p per layer and head does not always need fewer blocks than one for all: the "
            f"ratio of densities at equal error is {min(ratios):.2f} to {max(ratios):.2f}, "
            f"{statistics.mean(ratios):.2f} on average."
        )
    header = ["calibrated for", "density", "error of the velocity", "density of one top_p there"]
    return "\n\n".join(
        [
            "## Calibrated",
            "The dense models, calibrated on training clips by `nabla.inspect.calibrate`: the "
            "top_p of each layer and head with the least density for an error of the attention. "
            "Judged on held-out windows by the error of the velocity against dense attention.",
            _table(header, rows),
            verdict,
            "![density over error](calibration.png)",
        ]
    )


def _uniform_density(model: dict[str, Any], cell: dict[str, Any]) -> float:
    """Density that one top_p for all needs for the error of a calibrated cell; NaN outside."""
    points = [(row["error"], row["density"]) for row in model["calibration"]["uniform"]]
    return _interpolate(cell["error"], sorted(points))


def _interpolate(x: float, points: list[tuple[float, float]]) -> float:
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= x <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return math.nan


def _draw_losses(by_arm: dict[str, Rows], sources: list[str], path: Path) -> None:
    figure = Figure(figsize=(9, 4.5))
    ax = figure.subplots()
    for arm, models in by_arm.items():
        cells = [cell for m in models for cell in m["sweep"]]
        xs = [cell["density"] for cell in cells]
        ys = [statistics.mean(cell["loss"].values()) for cell in cells]
        ax.scatter(xs, ys, s=14, alpha=0.7, color=COLOURS.get(arm), label=f"trained with {arm}")
    ax.set(xlabel="density: share of the blocks computed", ylabel="held-out loss", xlim=(0, 1))
    _finish(figure, ax, "Held-out loss over density: every model, top_p and window", path)


def _draw_calibration(dense: Rows, path: Path) -> list[tuple[float, float]]:
    """Draw density over error; return (error, calibrated density / uniform density) of all."""
    figure = Figure(figsize=(9, 4.5))
    ax = figure.subplots()
    gain = []
    for index, model in enumerate(dense):
        for name, colour in (("uniform", "#6b7a88"), ("calibrated", "#e4572e")):
            rows = sorted(model["calibration"][name], key=lambda row: row["error"])
            label = {"uniform": "one top_p", "calibrated": "top_p per layer and head"}[name]
            ax.plot(
                [row["error"] for row in rows],
                [row["density"] for row in rows],
                marker=".",
                color=colour,
                alpha=0.8,
                label=label if index == 0 else None,
            )
        for row in model["calibration"]["calibrated"]:
            gain.append((row["error"], row["density"] / _uniform_density(model, row)))
    ax.set(xlabel="relative error of the velocity, held-out windows", ylabel="density", ylim=(0, 1))
    _finish(figure, ax, "Blocks that an error takes, a line a seed", path)
    return gain


def _finish(figure: Figure, ax: Any, title: str, path: Path) -> None:
    ax.set_title(title, fontsize=11)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _own(models: Rows, source: str) -> list[float]:
    return [m["own"]["loss"][source] for m in models]


def _mean_spread(values: Iterable[float], digits: int) -> str:
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return "n/a"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])
