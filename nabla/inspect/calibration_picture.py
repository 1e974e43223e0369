"""A picture of a calibration beside all that was measured for it.

top      density over error: one top_p for all layers and heads, and one for each; what was chosen
bottom   a square for each head of each layer: its top_p, its density, the attention that it keeps
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nabla.inspect.calibration import Calibration, Curves
from nabla.inspect.density_picture import draw_heads
from nabla.inspect.picture import INK, QUERY, QUIET, SELECTED, figure_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 24  # of the curve of calibrations


def draw_calibration(curves: Curves, chosen: Calibration, path: str | Path) -> Path:
    """Write a picture; the folder is made if it is not there.

    Args:
        curves: All that was measured.
        chosen: What `curves.choose` took of it.
        path: The file to write.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    layers, heads = curves.shape
    height = min(max(0.22 * layers, 1.6), 7.0)
    figure: Figure = figure_class()(figsize=(12, height + 4.2), facecolor="white")
    ratios = [3.4, height + 0.8]
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=ratios)[:, 0]
    _draw_tradeoff(above.subplots(), curves, chosen)
    top_p = torch.full(curves.shape, math.nan)
    for layer, values in enumerate(chosen):
        top_p[layer, : len(values)] = torch.tensor(values)
    found = curves.at(chosen)
    tables = {
        "top_p": (top_p, "Purples"),
        "computed: share of the blocks": (found["density"], "Blues"),
        "kept of the exact attention": (found["retained"], "Greens"),
    }
    for ax, (title, (table, colours)) in zip(below.subplots(1, 3), tables.items(), strict=True):
        draw_heads(ax, table, title, colours)
    figure.suptitle(
        f"{layers} layers, {heads} heads: {chosen.density:.1%} of the blocks for an error of "
        f"{chosen.error:.1%}",
        fontsize=13,
        weight="bold",
        color=INK,
    )
    above.subplots_adjust(top=0.84, bottom=0.2, left=0.07, right=0.96)
    below.subplots_adjust(top=0.9, bottom=0.16, left=0.07, right=0.96, wspace=0.25)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _draw_tradeoff(ax: Axes, curves: Curves, chosen: Calibration) -> None:
    """Draw density over error."""
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

    uniform = [one for one in curves.uniform() if one.error > 0]
    if uniform:
        low, high = uniform[-1].error, uniform[0].error
        errors = torch.logspace(math.log10(low), math.log10(high), POINTS).tolist()
        calibrated = [curves.choose(error) for error in errors]
        for name, points, colour in (
            ("one top_p for all", uniform, QUIET),
            ("a top_p for each layer and head", calibrated, SELECTED),
        ):
            xs, ys = [one.error for one in points], [one.density for one in points]
            ax.plot(xs, ys, marker=".", linewidth=1.2, color=colour, label=name)
        for one, top_p in zip(uniform, curves.top_p.tolist(), strict=False):
            ax.annotate(f"{top_p:.3g}", (one.error, one.density), fontsize=7, color=QUIET,
                        xytext=(3, 4), textcoords="offset points")  # fmt: skip
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.plot([chosen.error], [chosen.density], "o", color=QUERY, markersize=8, label="chosen")
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("error of a layer's output, relative", fontsize=8, color=QUIET)
    ax.set_ylabel("share of the blocks computed", fontsize=8, color=QUIET)
    ax.tick_params(labelsize=7, colors=QUIET)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, frameon=False)
