"""Block-sparse attention with the CUDA kernels: forward, query blocks share loads of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla.cuda import DTYPES, launch, view, with_aligned_rows
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
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    q, k, v = (with_aligned_rows(x) for x in (q, k, v))
    words = bits.shape[3]
    if bits.stride()[2:] != (words, 1):  # B and H may be expanded
        bits = bits.contiguous()
    launch(
        "attention_forward",
        q.device,
        ["out", "lse"],
        dtype=DTYPES[q.dtype],
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[3],
        q_blocks=bits.shape[2],
        q_block_offset=q_block_offset,
        grid=tuple(grid.as_ints()),
        scale=scale,
        q=view(q),
        k=view(k),
        v=view(v),
        out=view(out),
        lse=lse,
        bits=bits,
        bits_stride_b=bits.stride(0),
        bits_stride_h=bits.stride(1),
    )
    return out, lse
