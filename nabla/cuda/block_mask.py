"""Block selection with the CUDA kernels: without a sort, and without a map of all heads."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla.cuda import launch
from nabla.cuda.scores import block_means
from nabla.grid import TokenGrid, Window
from nabla.native import given_score_fields, score_fields


def select_blocks(
    scores: Tensor, top_p: Tensor, grid: TokenGrid, window: Window | None, q_block_offset: int
) -> Tensor:
    """Bits [B, H, Nq, ceil(Nk / 32)]: fewest blocks of a row that hold top_p of its scores."""
    fields = given_score_fields(scores.contiguous(), grid, q_block_offset)
    return _block_mask(fields, top_p, window)


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
    fields = score_fields(*block_means(q, k, grid, q_block_offset), grid, q_block_offset, scale)
    return _block_mask(dict(fields, scores=None), top_p, window)


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
        grid=grid,
        bits=bits,
        bits_stride_b=bits.stride(0),
        bits_stride_h=bits.stride(1),
        columns=columns,
    )
    return columns.expand(*bits.shape[:2], -1, -1)


def _block_mask(fields: dict, top_p: Tensor, window: Window | None) -> Tensor:
    words = -(-fields["grid"].num_blocks // 32)
    shape = (fields["batch"], fields["heads"], fields["q_blocks"], words)
    top_p = top_p.contiguous()
    bits = top_p.new_empty(shape, dtype=torch.int32)
    launch(
        "block_mask",
        top_p.device,
        ["bits"],
        top_p=top_p,
        window=window or (0, 0, 0),
        bits=bits,
        **fields,
    )
    return bits
