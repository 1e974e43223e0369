"""Masks of a stated density.

random       each block is kept with probability `density`, independently
nabla-like   the window, or per head an adaptive part: over the frames t of the queries of one place
             keep_t = keep_(t-1) with probability c, else a new draw    (correlation c along time)
captured     what the trained tiny model keeps on a real clip
dilated      blocks of 128 tokens that cover a mask of 64, for kernels that know no smaller ones
"""

from __future__ import annotations

import torch
from torch import Tensor

import nabla
from nabla import BlockMask, TokenGrid

CORRELATIONS = (0.0, 0.5, 0.8)
LARGEST_SPREAD = 0.5  # heads differ: the adaptive share of a head is 0.5 to 1.5 times the mean


def random_mask(grid: TokenGrid, heads: int, density: float, device: torch.device) -> BlockMask:
    """Keep each block with probability `density`, and in each row at least one."""
    draws = torch.rand(1, heads, grid.num_blocks, grid.num_blocks, device=device)
    keep = (draws < density).scatter_(-1, draws.argmin(-1, keepdim=True), True)
    return BlockMask.from_dense(keep, grid=grid)


def nabla_like_mask(
    grid: TokenGrid,
    heads: int,
    density: float,
    *,
    window: tuple[int, int, int] | None,
    correlation: float,
    device: torch.device,
) -> BlockMask:
    """Keep a window or, per head, blocks that recur along time.

    Args:
        grid: The grid of the tokens.
        heads: Heads; the sparsest has a third of the adaptive blocks of the densest.
        density: Of the whole mask, in expectation; that of the window alone if it is larger.
        window: In blocks; None keeps the diagonal.
        correlation: Of the adaptive part between a frame of queries and the next, in [0, 1).
        device: Where the mask is made.
    """
    near = nabla.sliding_tile_mask(grid, window or (1, 1, 1), device=device).to_dense()[0, 0]
    mean = (density - near.float().mean()).clamp(min=0) / (1 - near.float().mean())
    spread = torch.linspace(-1, 1, heads, device=device) if heads > 1 else torch.zeros(1)
    shares = (mean * (1 + LARGEST_SPREAD * spread.to(device))).clamp(max=1).view(heads, 1, 1)
    frames, num_blocks = grid.blocks[0], grid.num_blocks
    places = num_blocks // frames
    keep = torch.empty(heads, frames, places, num_blocks, dtype=torch.bool, device=device)
    for t in range(frames):
        drawn = torch.rand(heads, places, num_blocks, device=device) < shares
        if t:
            recurs = torch.rand(heads, places, num_blocks, device=device) < correlation
            drawn = torch.where(recurs, keep[:, t - 1], drawn)
        keep[:, t] = drawn
    return BlockMask.from_dense((keep.flatten(1, 2) | near)[None], grid=grid)


def captured(frames: int) -> tuple[Tensor, Tensor, Tensor, BlockMask]:
    """q, k, v [1, 4, 256 * frames, 32] of the tiny model on a real clip, and the mask they give.

    Raises:
        ModuleNotFoundError: If what reads the clip is not installed.
    """
    from kandinsky_model.attention import NablaAttention
    from kandinsky_model.checkpoint import load_checkpoint
    from kandinsky_model.demo import WEIGHTS, long_attention

    model = load_checkpoint(WEIGHTS, dtype=torch.float32)
    q, k, v, grid = long_attention(model, frames)
    attention = model.default_attention()
    assert isinstance(attention, NablaAttention)
    return q, k, v, attention.mask(q, k, grid)


def union(mask: BlockMask, rows: int, *, of_keys: bool = False) -> float:
    """Blocks that a group of query blocks loads, per block that one of them keeps.

    With `of_keys`, query blocks that a group of key blocks loads, as gradients do. Groups are of
    so many blocks of one place in successive frames; of a grid with fewer frames, successive
    blocks. What is left over at the end counts in no group.

    Returns:
        From 1, if all of a group keep the same, to `rows`, if they share none.
    """
    keep = mask.to_dense().mT if of_keys else mask.to_dense()
    places = mask.grid.num_blocks // mask.grid.blocks[0] if mask.grid.blocks[0] >= rows else 1
    keep = keep[..., : keep.shape[-2] // (rows * places) * rows * places, :]
    loaded = keep.unflatten(-2, (-1, rows, places)).any(-3).sum()
    return float(rows * loaded / keep.sum())


def dilated(mask: BlockMask) -> tuple[Tensor, BlockMask]:
    """Cover a mask with blocks of two by two.

    Returns:
        Booleans [B, H, ceil(N / 2), ceil(N / 2)] of the large blocks, and the mask of the small
        blocks that they hold.
    """
    keep = mask.to_dense()
    num = keep.shape[-1]
    padded = torch.nn.functional.pad(keep, (0, num % 2, 0, num % 2))
    large = padded.unflatten(-1, (-1, 2)).any(-1).unflatten(-2, (-1, 2)).any(-2)
    small = large.repeat_interleave(2, -1).repeat_interleave(2, -2)[..., :num, :num]
    return large, BlockMask.from_dense(small, grid=mask.grid)
