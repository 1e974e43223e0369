"""Block means and pooled scores with the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla.cuda import DTYPES, launch, view, with_aligned_rows
from nabla.grid import TokenGrid


def block_mean(x: Tensor, grid: TokenGrid, block_offset: int) -> Tensor:
    """Means [B, H, N, D] of the blocks of x [B, H, S, D], the first of which is `block_offset`."""
    num_blocks = grid.count_blocks(x.shape[2], block_offset)
    mean = x.new_empty(*x.shape[:2], num_blocks, x.shape[3], dtype=torch.float32)
    _block_mean(x, grid, block_offset, num_blocks, mean, 0)
    return mean


def pooled_scores(
    q: Tensor, k: Tensor, grid: TokenGrid, q_block_offset: int, scale: float
) -> Tensor:
    """Row-stochastic scores [B, H, Nq, Nk]; +inf where a block is always kept."""
    means = block_means(q, k, grid, q_block_offset)
    q_mean, _ = means
    scores = q_mean.new_empty(*q_mean.shape[:3], grid.num_blocks)
    fields = score_fields(means, grid, q_block_offset, scale)
    launch("pooled_scores", q.device, ["scores"], scores=scores, **fields)
    return scores


def block_means(
    q: Tensor, k: Tensor, grid: TokenGrid, q_block_offset: int
) -> tuple[Tensor, Tensor]:
    """Means of q [B, Hq, Nq, D] and, transposed, of k [B, Hk, D, N rounded up to 32 with zeros]."""
    k_mean = k.new_zeros(
        *k.shape[:2], k.shape[3], -(-grid.num_blocks // 32) * 32, dtype=torch.float32
    )
    _block_mean(k, grid, 0, grid.num_blocks, k_mean, k_mean.shape[3])
    return block_mean(q, grid, q_block_offset), k_mean


def score_fields(
    means: tuple[Tensor, Tensor], grid: TokenGrid, q_block_offset: int, scale: float
) -> dict:
    """Fields of ScoresParams without the scores."""
    q_mean, k_mean = means
    batch, heads, q_blocks, head_dim = q_mean.shape
    return dict(
        batch=batch,
        heads=heads,
        kv_heads=k_mean.shape[1],
        head_dim=head_dim,
        q_blocks=q_blocks,
        q_block_offset=q_block_offset,
        grid=tuple(grid.as_ints()),
        scale=scale,
        q_mean=q_mean,
        k_mean=k_mean,
        k_mean_stride=k_mean.shape[3],
    )


def _block_mean(
    x: Tensor, grid: TokenGrid, block_offset: int, num_blocks: int, mean: Tensor, mean_stride: int
) -> None:
    batch, heads, _, head_dim = x.shape
    launch(
        "block_mean",
        x.device,
        ["mean"],
        dtype=DTYPES[x.dtype],
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        x_blocks=num_blocks,
        block_offset=block_offset,
        grid=tuple(grid.as_ints()),
        x=view(with_aligned_rows(x)),
        mean=mean,
        mean_stride=mean_stride,
    )
