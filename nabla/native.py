"""What the native backends share: the fields of each launch of csrc/params.h, from tensors.

A launch turns them into what C++ takes: tensors into pointers, the grid into integers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nabla.grid import TokenGrid

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType


def with_tensors_as(convert: Callable[[Tensor], int], field):
    """Return a field with its tensor converted, or those of its tuple."""
    if isinstance(field, Tensor):
        return convert(field)
    return tuple(with_tensors_as(convert, x) for x in field) if isinstance(field, tuple) else field


def view(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Return a tensor [B, H, S, D] with contiguous D as View."""
    batch, head, token, channel = x.stride()
    assert channel == 1 or x.shape[3] == 1, "the kernels read D as contiguous"
    return x, batch, head, token


def with_contiguous_rows(bits: Tensor) -> Tensor:
    """Return bits, copied unless the words of one head are contiguous; B and H may be expanded."""
    words = bits.shape[3]
    return bits if bits.stride()[2:] == (words, 1) else bits.contiguous()


def block_mean_fields(
    x: Tensor, grid: TokenGrid, block_offset: int, mean: Tensor, *, is_transposed: bool
) -> dict:
    """Fields of BlockMeanParams; the means are [B, H, N, D], or [B, H, D, more than N]."""
    batch, heads, tokens, head_dim = x.shape
    return dict(
        dtype=DTYPES[x.dtype],
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        x_blocks=grid.count_blocks(tokens, block_offset),
        block_offset=block_offset,
        grid=grid,
        x=view(x),
        mean=mean,
        mean_stride=mean.shape[3] if is_transposed else 0,
    )


def score_fields(
    q_mean: Tensor, k_mean: Tensor, grid: TokenGrid, q_block_offset: int, scale: float
) -> dict:
    """Fields of ScoresParams without the scores; k_mean is transposed."""
    batch, heads, q_blocks, head_dim = q_mean.shape
    return dict(
        batch=batch,
        heads=heads,
        kv_heads=k_mean.shape[1],
        head_dim=head_dim,
        q_blocks=q_blocks,
        q_block_offset=q_block_offset,
        grid=grid,
        scale=scale,
        q_mean=q_mean,
        k_mean=k_mean,
        k_mean_stride=k_mean.shape[3],
    )


def given_score_fields(scores: Tensor, grid: TokenGrid, q_block_offset: int) -> dict:
    """Fields of ScoresParams where the scores are the input."""
    batch, heads, q_blocks, _ = scores.shape
    return dict(
        batch=batch,
        heads=heads,
        kv_heads=heads,
        head_dim=0,
        q_blocks=q_blocks,
        q_block_offset=q_block_offset,
        grid=grid,
        scale=1.0,
        q_mean=None,
        k_mean=None,
        k_mean_stride=0,
        scores=scores,
    )


def attention_fields(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bits: Tensor,
    grid: TokenGrid,
    q_block_offset: int,
    scale: float,
) -> dict:
    """Fields of AttentionParams."""
    bits = with_contiguous_rows(bits)
    return dict(
        dtype=DTYPES[q.dtype],
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[3],
        q_blocks=bits.shape[2],
        q_block_offset=q_block_offset,
        grid=grid,
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


def gradient_fields(
    dout: Tensor, dlse: Tensor | None, delta: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> dict:
    """Fields of AttentionBackwardParams, beside those of AttentionParams."""
    return dict(
        dout=view(dout),
        dlse=None if dlse is None else dlse.contiguous(),
        delta=delta,
        dq=view(dq),
        dk=view(dk),
        dv=view(dv),
    )
