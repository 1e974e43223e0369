"""Block-sparse attention with the native kernels: the kept blocks only, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla.cpu import empty_like, launch
from nabla.grid import TokenGrid
from nabla.native import attention_fields, gradient_fields


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    grid: TokenGrid,
    q_block_offset: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Out [B, H, Sq, D] with the strides of q, and lse [B, H, Sq]; an empty row is 0 and -inf."""
    out = empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    fields = attention_fields(q, k, v, out, lse, bits, grid, q_block_offset, scale)
    launch("attention_forward", **fields)
    return out, lse


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bits: Tensor,
    grid: TokenGrid,
    q_block_offset: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (dq, dk, dv), with the strides of q, k and v."""
    dq, dk, dv = (empty_like(x) for x in (q, k, v))
    lse, delta = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    launch(
        "attention_backward",
        **attention_fields(q, k, v, out, lse, bits, grid, q_block_offset, scale),
        **gradient_fields(dout, dlse, delta, dq, dk, dv),
    )
    return dq, dk, dv
