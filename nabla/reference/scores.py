"""Block means and pooled scores.

mean_b = sum of the tokens of block b / their number
scores = softmax over the key blocks of scale * q_mean k_mean^T
"""

from __future__ import annotations

import torch
from torch import Tensor

from nabla.grid import TokenGrid


def block_mean(x: Tensor, grid: TokenGrid, block_offset: int) -> Tensor:
    """Means [B, H, N, D] of the blocks of x [B, H, S, D], the first of which is `block_offset`."""
    num_blocks = grid.count_blocks(x.shape[2], block_offset)
    starts = grid.starts(x.device)[block_offset : block_offset + num_blocks + 1].long()
    sizes = starts.diff()
    first = starts[:-1] - starts[0]
    total = x.new_zeros(*x.shape[:2], num_blocks, x.shape[3], dtype=torch.float64)
    for position in range(grid.block_size):
        token = x[:, :, (first + position).clamp(max=x.shape[2] - 1)].double()  # [B, H, N, D]
        total += torch.where((position < sizes)[:, None], token, 0)
    return (total / sizes[:, None]).to(_scores_dtype(x))


def pooled_scores(
    q: Tensor, k: Tensor, grid: TokenGrid, q_block_offset: int, scale: float
) -> Tensor:
    """Row-stochastic scores [B, H, Nq, Nk]; +inf where a block is always kept."""
    q_mean = block_mean(q, grid, q_block_offset).double()
    k_mean = block_mean(k, grid, 0).double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = (q_mean @ k_mean.transpose(-2, -1) * scale).to(_scores_dtype(q))
    always_kept = ~logits.isfinite()
    always_kept[..., grid.num_grid_blocks :] = True
    always_kept[..., max(grid.num_grid_blocks - q_block_offset, 0) :, :] = True
    probability = logits.masked_fill(always_kept, -torch.inf).softmax(-1)
    return probability.masked_fill(always_kept, torch.inf)


def _scores_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
