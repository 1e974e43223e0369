"""Block-sparse attention with the CUDA kernels: blocks that meet the same ones share loads."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla.cuda import kernels_architecture, launch, with_aligned_rows
from nabla.cuda.block_mask import transposed_bits
from nabla.grid import TokenGrid
from nabla.native import attention_fields, gradient_fields, with_contiguous_rows


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
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    q, k, v = (with_aligned_rows(x) for x in (q, k, v))
    fields = attention_fields(q, k, v, out, lse, bits, grid, q_block_offset, scale)
    launch("attention_forward", q.device, ["out", "lse"], **fields)
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
    """The gradients (dq, dk, dv), with the strides of q, k and v.

    They have the same bits each time; dq on sm_80 to sm_89, if torch is asked for deterministic
    algorithms.
    """
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dout, q, k, v, out = (with_aligned_rows(x) for x in (dout, q, k, v, out))
    bits = with_contiguous_rows(bits)
    columns = transposed_bits(bits, grid)
    blocks = (*q.shape[:2], bits.shape[2])
    delta = lse.new_empty(*blocks, 2, grid.block_size)
    sums = None
    if kernels_architecture(q.device) < 90 and not torch.are_deterministic_algorithms_enabled():
        sums = lse.new_empty(*blocks, grid.block_size, q.shape[3])
    launch(
        "attention_backward",
        q.device,
        ["delta", "dq_sums", "dq", "dk", "dv"],
        columns=columns,
        columns_stride_b=columns.stride(0),
        columns_stride_h=columns.stride(1),
        dq_sums=sums,
        **attention_fields(q, k, v, out, lse.contiguous(), bits, grid, q_block_offset, scale),
        **gradient_fields(dout, dlse, delta, dq, dk, dv),
    )
    return dq, dk, dv
