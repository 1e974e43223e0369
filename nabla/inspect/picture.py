"""A picture of a block mask, one row a head.

    left    the mask itself, [Nq, Nk]: a dot is a query block that attends to a key block
    right   what one query block attends to, on the token grid: one small frame a slab of time

Colours tell blocks of the sliding tile window from blocks that were selected for their scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nabla.block_mask import BlockMask, sliding_tile_mask
from nabla.grid import TokenGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

DROPPED, SELECTED, IN_WINDOW, QUERY = "#eceff3", "#1d4e89", "#7fb2e5", "#e4572e"
INK, QUIET = "#22303c", "#6b7a88"
MAX_FRAMES = 16
BITMAP_INCHES = 3.0


def draw_mask(
    mask: BlockMask,
    path: str | Path,
    *,
    heads: Sequence[int] | None = None,
    query_block: int | None = None,
    batch: int = 0,
) -> Path:
    """Write a picture of a mask, as PNG or in another format that the suffix of `path` names.

    Args:
        mask: Any mask.
        path: The file to write; its folder is made if it is not there.
        heads: The heads to draw, a row each; None draws the first four.
        query_block: The block of the grid whose key blocks are drawn on the grid; None takes one in
            the middle of the mask's rows.
        batch: The batch element to draw.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If the mask has no such head, batch element or query block.
    """
    new_figure = figure_class()
    grid, (num_batches, num_heads, num_rows, _) = mask.grid, mask.shape
    heads = list(range(min(4, num_heads)) if heads is None else heads)
    first, stop = mask.q_block_offset, min(mask.q_block_offset + num_rows, grid.num_grid_blocks)
    if query_block is None:
        query_block = _middle_block(grid, first, stop)
    _check_choice("batch", batch, range(num_batches))
    _check_choice("query_block", query_block, range(first, stop))
    for head in heads:
        _check_choice("heads", head, range(num_heads))

    keep = mask.to_dense()[batch].cpu()  # [H, Nq, Nk]
    window = torch.zeros_like(keep[0])
    if mask.window is not None:
        window = (
            sliding_tile_mask(grid, mask.window).to_dense()[0, 0, first : first + num_rows].cpu()
        )

    panels = _Panels(grid, query_block)
    figure: Figure = new_figure(
        figsize=(BITMAP_INCHES + panels.width + 1.3, len(heads) * panels.row_height + 0.8),
        facecolor="white",
    )
    heights = [0.75] + [panels.row_height] * len(heads)
    heading, *rows = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flat
    _draw_heading(heading, mask)
    for row, head in zip(rows, heads, strict=True):
        bitmap, frames = row.subfigures(1, 2, width_ratios=[BITMAP_INCHES + 0.7, panels.width])
        _draw_bitmap(bitmap, head, keep[head], window, grid, query_block - first)
        panels.draw(frames, keep[head, query_block - first], window[query_block - first])

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


class _Panels:
    """The frames of one query block: how many, how they are laid out, and how each is drawn."""

    def __init__(self, grid: TokenGrid, query_block: int) -> None:
        self.grid = grid
        self.shape = grid.blocks
        _, height, width = self.shape
        self.query = (
            query_block // (height * width),
            query_block // width % height,
            query_block % width,
        )
        self.slabs = _pick(self.shape[0], self.query[0])
        self.aspect = min(max(grid.width / grid.height, 0.4), 4.0)
        columns = round(math.sqrt(len(self.slabs) * 1.9 / self.aspect))
        self.rows = -(-len(self.slabs) // max(columns, 1))
        self.columns = -(-len(self.slabs) // self.rows)
        self.row_height = BITMAP_INCHES + 0.5
        panel_height = min((self.row_height - 0.5) / self.rows, 2.4)
        self.width = max(self.columns * panel_height * self.aspect, 3.0)

    def draw(self, figure: SubFigure, keep: Tensor, window: Tensor) -> None:
        """Draw the key blocks keep [Nk] of the query block, one frame a slab."""
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Rectangle

        kind = (keep.int() + (keep & window).int())[: self.grid.num_grid_blocks].view(self.shape)
        column_edges = _edges(self.grid.width, self.grid.block[2])
        row_edges = _edges(self.grid.height, self.grid.block[1])
        panels = list(figure.subplots(self.rows, self.columns, squeeze=False).flat)
        for ax in panels:
            ax.set_axis_off()
        for ax, slab in zip(panels, self.slabs, strict=False):  # the last row may have room left
            ax.pcolormesh(
                column_edges,
                row_edges,
                kind[slab],
                cmap=ListedColormap([DROPPED, SELECTED, IN_WINDOW]),
                vmin=0,
                vmax=2,
                edgecolors="white",
                linewidth=0.4,
            )
            if slab == self.query[0]:
                left, top = column_edges[self.query[2]], row_edges[self.query[1]]
                ax.add_patch(
                    Rectangle(
                        (left, top),
                        column_edges[self.query[2] + 1] - left,
                        row_edges[self.query[1] + 1] - top,
                        fill=False,
                        edgecolor=QUERY,
                        linewidth=2,
                    )
                )
            ax.set(ylim=(self.grid.height, 0), box_aspect=1 / self.aspect)
            ax.set_title(
                f"t = {slab}", fontsize=7, pad=2.5, color=QUERY if slab == self.query[0] else QUIET
            )
        title = f"query block {self.query}: {int(keep.sum())} of {len(keep)} blocks kept"
        if len(self.slabs) < self.shape[0]:
            title += f" ({len(self.slabs)} of {self.shape[0]} frames shown)"
        figure.suptitle(
            title,
            fontsize=9,
            color=INK,
            y=0.965,
        )
        figure.subplots_adjust(
            left=0.02, right=0.98, top=0.86, bottom=0.02, wspace=0.08, hspace=0.2
        )


def _draw_heading(figure: SubFigure, mask: BlockMask) -> None:
    from matplotlib.patches import Patch

    grid = mask.grid
    extra = f" + {grid.extra} extra" if grid.extra else ""
    figure.text(
        0.02,
        0.66,
        f"NABLA block mask: {grid.frames} × {grid.height} × {grid.width}{extra} tokens, "
        f"{grid.num_blocks} blocks of {grid.block_size}",
        fontsize=12,
        weight="bold",
        color=INK,
    )
    selected = "kept for its score" + (", or extra tokens" if grid.extra else "")
    legend = [Patch(facecolor=SELECTED, label=selected)]
    if mask.window is not None:
        legend.append(Patch(facecolor=IN_WINDOW, label=f"in the window {tuple(mask.window)}"))
    legend += [
        Patch(facecolor=DROPPED, label="not computed"),
        Patch(facecolor="white", edgecolor=QUERY, linewidth=1.5, label="query block"),
    ]
    figure.legend(
        handles=legend,
        loc="lower left",
        bbox_to_anchor=(0.013, 0.0),
        ncols=len(legend),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=1.1,
        handleheight=1.1,
        borderpad=0.2,
    )


def _draw_bitmap(
    figure: SubFigure, head: int, keep: Tensor, window: Tensor, grid: TokenGrid, query_row: int
) -> None:
    from matplotlib.colors import to_rgb

    palette = (
        torch.tensor([to_rgb(c) for c in (DROPPED, SELECTED, IN_WINDOW)]).mul(255).to(torch.uint8)
    )
    ax: Axes = figure.subplots()
    ax.imshow(
        palette[keep.int() + (keep & window).int()].numpy(),
        aspect="auto",
        interpolation_stage="rgba",
    )
    ax.axhline(query_row, color=QUERY, linewidth=1)
    figure.suptitle(
        f"head {head}   density {keep.float().mean():.3f}", fontsize=9, color=INK, y=0.965
    )
    ax.set_xlabel(f"key block (of {keep.shape[1]})", fontsize=7.5, color=QUIET, labelpad=2)
    ax.set_ylabel(f"query block (of {keep.shape[0]})", fontsize=7.5, color=QUIET, labelpad=2)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    figure.subplots_adjust(left=0.14, right=0.9, top=0.88, bottom=0.08)


def _middle_block(grid: TokenGrid, first: int, stop: int) -> int:
    frames, height, width = grid.blocks
    middle = (frames // 2 * height + height // 2) * width + width // 2
    return middle if first <= middle < stop else (first + stop) // 2


def _pick(count: int, must: int) -> list[int]:
    """At most MAX_FRAMES of `count` slabs, evenly spread, `must` among them."""
    if count <= MAX_FRAMES:
        return list(range(count))
    step = (count - 1) / (MAX_FRAMES - 1)
    slabs = [round(i * step) for i in range(MAX_FRAMES)]
    slabs[min(range(MAX_FRAMES), key=lambda i: abs(slabs[i] - must))] = must
    return slabs


def _edges(extent: int, block: int) -> list[int]:
    """Token positions at which blocks begin, and the end: a ragged block is drawn smaller."""
    return [*range(0, extent, block), extent]


def _check_choice(name: str, value: int, choices: range) -> None:
    if value not in choices:
        raise ValueError(
            f"{name}: {value} is not there, the mask has {choices.start} to {choices.stop - 1}"
        )


def figure_class() -> type[Figure]:
    """A Figure that draws without a display, and without pyplot's global state."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures need matplotlib: pip install 'nabla-attention[demo]'", name="matplotlib"
        ) from error
    return Figure
