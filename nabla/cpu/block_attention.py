"""Block-sparse attention with the native kernels: the kept blocks only, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla.cpu import DTYPES, blocks, empty_like, launch, view
from nabla.grid import TokenGrid


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
    bits = _with_contiguous_rows(bits)
    launch("attention_forward", **_fields(q, k, v, out, lse, bits, grid, q_block_offset, scale))
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
    gradients = [empty_like(x) for x in (q, k, v)]
    lse, delta = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    dlse = None if dlse is None else dlse.contiguous()
    bits = _with_contiguous_rows(bits)
    launch(
        "attention_backward",
        dout=view(dout),
        dlse=dlse,
        delta=delta,
        **{name: view(x) for name, x in zip(("dq", "dk", "dv"), gradients, strict=True)},
        **_fields(q, k, v, out, lse, bits, grid, q_block_offset, scale),
    )
    dq, dk, dv = gradients
    return dq, dk, dv


def _fields(q, k, v, out, lse, bits, grid, q_block_offset, scale) -> dict:
    """Fields of AttentionParams."""
    return dict(
        dtype=DTYPES[q.dtype],
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[3],
        q_blocks=bits.shape[2],
        q_block_offset=q_block_offset,
        scale=scale,
        q=view(q),
        k=view(k),
        v=view(v),
        out=view(out),
        lse=lse,
        bits=bits,
        bits_stride_b=bits.stride(0),
        bits_stride_h=bits.stride(1),
        **blocks(grid),
    )


def _with_contiguous_rows(bits: Tensor) -> Tensor:
    """The bits, copied unless the words of one head are contiguous; B and H may be expanded."""
    words = bits.shape[3]
    return bits if bits.stride()[2:] == (words, 1) else bits.contiguous()
