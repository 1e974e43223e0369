"""Block means and pooled scores with the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla.cpu import launch
from nabla.grid import TokenGrid
from nabla.native import block_mean_fields, score_fields


def block_mean(x: Tensor, grid: TokenGrid, block_offset: int) -> Tensor:
    """Means [B, H, N, D] of the blocks of x [B, H, S, D], the first of which is `block_offset`."""
    num_blocks = grid.count_blocks(x.shape[2], block_offset)
    mean = x.new_empty(*x.shape[:2], num_blocks, x.shape[3], dtype=torch.float32)
    _block_mean(x, grid, block_offset, mean)
    return mean


def pooled_scores(
    q: Tensor, k: Tensor, grid: TokenGrid, q_block_offset: int, scale: float
) -> Tensor:
    """Row-stochastic scores [B, H, Nq, Nk]; +inf where a block is always kept."""
    q_mean, k_mean = block_means(q, k, grid, q_block_offset)
    scores = q_mean.new_empty(*q_mean.shape[:3], grid.num_blocks)
    launch(
        "pooled_scores",
        scores=scores,
        **score_fields(q_mean, k_mean, grid, q_block_offset, scale),
    )
    return scores


def block_means(
    q: Tensor, k: Tensor, grid: TokenGrid, q_block_offset: int
) -> tuple[Tensor, Tensor]:
    """Means of q [B, Hq, Nq, D] and, transposed, of k [B, Hk, D, N rounded up to 32 with zeros]."""
    k_mean = k.new_zeros(
        *k.shape[:2], k.shape[3], -(-grid.num_blocks // 32) * 32, dtype=torch.float32
    )
    _block_mean(k, grid, 0, k_mean, is_transposed=True)
    return block_mean(q, grid, q_block_offset), k_mean


def _block_mean(
    x: Tensor, grid: TokenGrid, block_offset: int, mean: Tensor, *, is_transposed: bool = False
) -> None:
    fields = block_mean_fields(x, grid, block_offset, mean, is_transposed=is_transposed)
    launch("block_mean", **fields)
