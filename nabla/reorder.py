"""Stage 1: raster order to block order and back.

    fractal_flatten    [..., S, ...] raster -> blocks of (1, 8, 8) tokens, one after the other
    fractal_unflatten  the inverse

Slabs, rows and columns of blocks come in two runs, the whole ones and the ragged rest, so at most
eight reshapes (one, if nothing is ragged) move every token. Once per model forward, not per layer.
It is torch.unflatten, since Tensor.unflatten does not compile where a default device is set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nabla.checks import as_grid
from nabla.grid import TokenGrid


def fractal_flatten(x: Tensor, grid: TokenGrid | Sequence[int], dim: int = -2) -> Tensor:
    """Reorder tokens from raster to block order.

    Args:
        x: Any tensor with grid.num_tokens tokens along `dim`, for example [B, H, S, D].
        grid: The grid of the tokens, or its (frames, height, width). Extra tokens stay at the end.
        dim: The dimension of the tokens.

    Returns:
        A tensor of the shape of x. Differentiable.

    Raises:
        ValueError: If `dim` does not hold grid.num_tokens tokens.
    """
    grid = as_grid(grid)
    dim = _token_dim(x, grid, dim)
    if _in_block_order(grid):
        return x
    video = x.narrow(dim, 0, grid.num_grid_tokens)
    video = torch.unflatten(video, dim, (grid.frames, grid.height, grid.width))
    slabs = []
    for slab, frames in _runs(video, dim, grid.frames, grid.block[0]):
        rows = []
        for row, height in _runs(slab, dim + 1, grid.height, grid.block[1]):
            cells = []
            for cell, width in _runs(row, dim + 2, grid.width, grid.block[2]):
                for axis, extent in ((dim + 2, width), (dim + 1, height), (dim, frames)):
                    cell = torch.unflatten(cell, axis, (-1, extent))
                cell = cell.movedim(
                    (dim + 2, dim + 4), (dim + 1, dim + 2)
                )  # t f h y w x -> t h w f y x
                cells.append(cell.flatten(dim + 2, dim + 5))
            rows.append(_join(cells, dim + 2).flatten(dim + 1, dim + 2))
        slabs.append(_join(rows, dim + 1).flatten(dim, dim + 1))
    return _with_extra(_join(slabs, dim), x, grid, dim)


def fractal_unflatten(x: Tensor, grid: TokenGrid | Sequence[int], dim: int = -2) -> Tensor:
    """Reorder tokens from block order back to raster: the inverse of `fractal_flatten`.

    Args:
        x: Any tensor with grid.num_tokens tokens along `dim`, for example [B, H, S, D].
        grid: The grid of the tokens, or its (frames, height, width). Extra tokens stay at the end.
        dim: The dimension of the tokens.

    Returns:
        A tensor of the shape of x. Differentiable.

    Raises:
        ValueError: If `dim` does not hold grid.num_tokens tokens.
    """
    grid = as_grid(grid)
    dim = _token_dim(x, grid, dim)
    if _in_block_order(grid):
        return x
    video = x.narrow(dim, 0, grid.num_grid_tokens)
    slabs = []
    for slab, frames in _runs(video, dim, grid.frames, grid.block[0], grid.height * grid.width):
        slab = torch.unflatten(slab, dim, (-1, frames * grid.height * grid.width))
        rows = []
        for row, height in _runs(slab, dim + 1, grid.height, grid.block[1], frames * grid.width):
            row = torch.unflatten(row, dim + 1, (-1, frames * height * grid.width))
            cells = []
            for cell, width in _runs(row, dim + 2, grid.width, grid.block[2], frames * height):
                cell = torch.unflatten(cell, dim + 2, (-1, frames, height, width))
                cell = cell.movedim(
                    (dim + 3, dim + 4), (dim + 1, dim + 3)
                )  # t h w f y x -> t f h y w x
                for axis in (dim, dim + 1, dim + 2):
                    cell = cell.flatten(axis, axis + 1)
                cells.append(cell)
            rows.append(_join(cells, dim + 2))
        slabs.append(_join(rows, dim + 1))
    return _with_extra(_join(slabs, dim).flatten(dim, dim + 2), x, grid, dim)


def _token_dim(x: Tensor, grid: TokenGrid, dim: int) -> int:
    """The dimension of the tokens, counted from the front."""
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim={dim} is not a dimension of x, which has {x.dim()}")
    if x.shape[dim] != grid.num_tokens:
        raise ValueError(
            f"x has {x.shape[dim]} tokens along dim={dim}, but {grid} has {grid.num_tokens}: "
            "give the grid of these tokens, or the dim that holds them"
        )
    return dim % x.dim()


def _in_block_order(grid: TokenGrid) -> bool:
    """Whether raster order is block order: blocks are runs of a row, as in a plain sequence."""
    return grid.height == 1 and (grid.frames == 1 or grid.block[0] == 1)


def _runs(
    x: Tensor, dim: int, extent: int, block: int, unit: int = 1
) -> Iterator[tuple[Tensor, int]]:
    """The whole blocks along `dim` with the block's extent, then the ragged rest with its own."""
    rest = extent % block
    if extent >= block:
        yield x.narrow(dim, 0, (extent - rest) * unit), block
    if rest:
        yield x.narrow(dim, (extent - rest) * unit, rest * unit), rest


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _with_extra(video: Tensor, x: Tensor, grid: TokenGrid, dim: int) -> Tensor:
    if grid.extra == 0:
        return video
    return torch.cat([video, x.narrow(dim, grid.num_grid_tokens, grid.extra)], dim)
