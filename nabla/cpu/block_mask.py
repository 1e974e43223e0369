"""Block selection with the native kernels: without a sort, and without a map of all heads."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla.cpu import launch
from nabla.cpu.scores import block_means
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


def _block_mask(fields: dict, top_p: Tensor, window: Window | None) -> Tensor:
    words = -(-fields["grid"].num_blocks // 32)
    bits = torch.empty(
        fields["batch"], fields["heads"], fields["q_blocks"], words, dtype=torch.int32
    )
    top_p = top_p.contiguous()
    launch("block_mask", top_p=top_p, window=window or (0, 0, 0), bits=bits, **fields)
    return bits
