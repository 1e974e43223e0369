"""Block selection with the CUDA kernels: without a sort, and without a map of all heads."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla.cuda import launch
from nabla.cuda.scores import block_means, score_fields
from nabla.grid import TokenGrid, Window


def select_blocks(
    scores: Tensor, top_p: Tensor, grid: TokenGrid, window: Window | None, q_block_offset: int
) -> Tensor:
    """Bits [B, H, Nq, ceil(Nk / 32)]: fewest blocks of a row that hold top_p of its scores."""
    scores = scores.contiguous()
    batch, heads, q_blocks, _ = scores.shape
    fields = dict(
        batch=batch,
        heads=heads,
        kv_heads=heads,
        head_dim=0,
        q_blocks=q_blocks,
        q_block_offset=q_block_offset,
        grid=tuple(grid.as_ints()),
        scale=1.0,
        q_mean=None,
        k_mean=None,
        k_mean_stride=0,
    )
    return _block_mask(fields, scores, top_p, grid, window)


def create_block_mask(
    q: Tensor,
    k: Tensor,
    top_p: Tensor,
    grid: TokenGrid,
    window: Window | None,
    q_block_offset: int,
    scale: float,
) -> Tensor:
    """Bits [B, H, Nq, ceil(Nk / 32)] of the NABLA mask of q and k."""
    means = block_means(q, k, grid, q_block_offset)
    return _block_mask(score_fields(means, grid, q_block_offset, scale), None, top_p, grid, window)


def _block_mask(
    fields: dict, scores: Tensor | None, top_p: Tensor, grid: TokenGrid, window: Window | None
) -> Tensor:
    shape = (fields["batch"], fields["heads"], fields["q_blocks"], -(-grid.num_blocks // 32))
    top_p = top_p.contiguous()
    bits = top_p.new_empty(shape, dtype=torch.int32)
    launch(
        "block_mask",
        top_p.device,
        ["bits"],
        scores=scores,
        top_p=top_p,
        window=window or (0, 0, 0),
        bits=bits,
        **fields,
    )
    return bits
