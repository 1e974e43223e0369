"""A picture of a density report.

top      a square for each head of each layer: density, retained mass, recall, mean of the steps
bottom   the same three over the steps, mean of the heads, a line a layer
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nabla.inspect.picture import INK, QUIET, figure_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

    from nabla.inspect.density import DensityReport

TITLES = {
    "density": "computed: share of the blocks",
    "retained": "kept of the pooled map",
    "recall": "kept of the exact attention",
}


def draw_density(report: DensityReport, path: str | Path) -> Path:
    """Write the picture of a report; the folder is made if it is not there."""
    tables = {name: report.table(name) for name in TITLES}  # [steps, layers, heads]
    _, layers, heads = tables["density"].shape
    height = min(max(0.22 * layers, 1.6), 7.0)
    figure: Figure = figure_class()(figsize=(12, height + 3.6), facecolor="white")
    axes = figure.subplots(2, 3, height_ratios=[height, 2.0])
    for (name, table), top, bottom in zip(tables.items(), *axes, strict=True):
        draw_heads(top, table.nanmean(0), TITLES[name], "Blues" if name == "density" else "Greens")
        _draw_steps(bottom, table.nanmean(-1))
    mean = {name: float(table.nanmean()) for name, table in tables.items()}
    figure.suptitle(
        f"{layers} layers, {heads} heads, {report.num_steps} steps: "
        f"{mean['density']:.1%} of the blocks computed, "
        f"{mean['recall']:.1%} of the attention kept",
        fontsize=13,
        weight="bold",
        color=INK,
    )
    figure.tight_layout(h_pad=2.0)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def draw_heads(ax: Axes, values: Tensor, title: str, colours: str) -> None:
    """Draw values [layers, heads] from 0 to 1 as squares of a map of colours."""
    image = ax.imshow(
        values.numpy(), aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest"
    )
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.05, pad=0.03)
    bar.ax.tick_params(labelsize=7)
    ax.set_title(title, fontsize=10, color=INK)
    ax.set_xlabel("head", fontsize=8, color=QUIET)
    ax.set_ylabel("layer", fontsize=8, color=QUIET)
    ax.xaxis.set_major_locator(_whole_numbers())
    ax.yaxis.set_major_locator(_whole_numbers())
    ax.tick_params(labelsize=7, colors=QUIET)
    if values.numel() <= 64:
        for (layer, head), value in _items(values):
            ax.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=7,
                    color="white" if value > 0.55 else INK)  # fmt: skip


def _draw_steps(ax: Axes, values: Tensor) -> None:
    """Draw values [steps, layers] as lines from light (first layer) to dark (last)."""
    from matplotlib import colormaps

    steps, layers = values.shape
    colours = colormaps["viridis_r"](torch.linspace(0.1, 1.0, layers).numpy())
    for layer, colour in enumerate(colours):
        known = values[:, layer].isfinite()
        ax.plot(
            torch.arange(steps)[known].numpy(),
            values[known, layer].numpy(),
            color=colour,
            linewidth=1.2,
            marker="." if steps < 40 else None,
            label=f"layer {layer}",
        )
    ax.set(ylim=(0, 1.02), xlim=(-0.5, max(steps - 0.5, 0.5)))
    ax.xaxis.set_major_locator(_whole_numbers())
    ax.set_xlabel("step", fontsize=8, color=QUIET)
    ax.tick_params(labelsize=7, colors=QUIET)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    handles, labels = ax.get_legend_handles_labels()
    if layers > 6:  # the ends tell the order
        handles, labels = [handles[0], handles[-1]], [labels[0], labels[-1]]
    ax.legend(handles, labels, fontsize=7, frameon=False, loc="lower right")


def _whole_numbers() -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _items(values: Tensor):
    for layer, row in enumerate(values.tolist()):
        for head, value in enumerate(row):
            if value == value:
                yield (layer, head), value
