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


def transposed_bits(bits: Tensor, grid: TokenGrid) -> Tensor:
    """Bits [B, H, Nk, ceil(Nq / 32)] of bits [B, H, Nq, ceil(Nk / 32)]; those past Nq are 0.

    Rows of a head are contiguous; what B and H share, by a stride of 0, the result shares too.
    """
    shared = tuple(slice(1) if stride == 0 else slice(None) for stride in bits.stride()[:2])
    batch, heads, q_blocks, _ = bits[shared].shape
    columns = bits.new_empty(batch, heads, grid.num_blocks, -(-q_blocks // 32))
    launch(
        "transpose",
        bits.device,
        ["columns"],
        batch=batch,
        heads=heads,
        q_blocks=q_blocks,
        grid=tuple(grid.as_ints()),
        bits=bits,
        bits_stride_b=bits.stride(0),
        bits_stride_h=bits.stride(1),
        columns=columns,
    )
    return columns.expand(*bits.shape[:2], -1, -1)


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
