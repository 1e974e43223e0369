"""Softmax attention over the kept blocks, one query block at a time.

    s = scale * q k^T over the tokens of the kept blocks;  out = softmax(s) v;  lse = logsumexp(s)

Keys and values that a row does not keep are zeroed before any product, so that a NaN in them stays
there. The forward is differentiable PyTorch; attention_bwd is the formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nabla.bits import unpack_bits
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
    outs, lses = [], []
    key, value = _per_query_head(q, k, v)
    for rows, keep in _query_blocks(q, bits, grid, q_block_offset):
        query = q[:, :, rows].to(key.dtype)
        scores = _scores(query, key, keep, scale)
        outs.append(_probability(scores) @ value.where(keep[..., None], 0))
        lses.append(scores.logsumexp(-1))
    out = torch.empty_like(q).copy_(torch.cat(outs, 2))
    return out, torch.cat(lses, 2)


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
    key, value = _per_query_head(q, k, v)
    dkey, dvalue = torch.zeros_like(key), torch.zeros_like(value)
    dqueries = []
    delta = (dout.to(key.dtype) * out.to(key.dtype)).sum(-1)  # [B, H, Sq]
    if dlse is not None:
        delta = delta - dlse
    for rows, keep in _query_blocks(q, bits, grid, q_block_offset):
        query, dblock = q[:, :, rows].to(key.dtype), dout[:, :, rows].to(key.dtype)
        probability = _probability(_scores(query, key, keep, scale))
        dprobability = dblock @ value.where(keep[..., None], 0).transpose(-2, -1)
        dscores = probability * (dprobability - delta[:, :, rows, None]) * scale
        kept = keep[..., None]
        dqueries.append(torch.where(kept.any(-2, keepdim=True), dscores @ key.where(kept, 0), 0))
        dkey += torch.where(kept, dscores.transpose(-2, -1) @ query, 0)
        dvalue += torch.where(kept, probability.transpose(-2, -1) @ dblock, 0)
    heads = (k.shape[1], q.shape[1] // k.shape[1])
    return (
        torch.empty_like(q).copy_(torch.cat(dqueries, 2)),
        torch.empty_like(k).copy_(dkey.unflatten(1, heads).sum(2)),
        torch.empty_like(v).copy_(dvalue.unflatten(1, heads).sum(2)),
    )


def _per_query_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v [B, H, Sk, D], one for each query head, in the precision that is computed in."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    return k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)


def _query_blocks(q: Tensor, bits: Tensor, grid: TokenGrid, q_block_offset: int):
    """The rows of each query block, and the key tokens [B, H, Sk] that it keeps."""
    sizes = grid.starts(q.device).diff().long()
    block_of_key = torch.arange(grid.num_blocks, device=q.device).repeat_interleave(
        sizes, output_size=grid.num_tokens
    )
    first = grid.block_start(q_block_offset)
    for block in range(bits.shape[2]):
        start = grid.block_start(q_block_offset + block) - first
        stop = grid.block_start(q_block_offset + block + 1) - first
        keep = unpack_bits(bits[:, :, block], grid.num_blocks)
        yield slice(start, stop), keep[..., block_of_key]


def _scores(query: Tensor, key: Tensor, keep: Tensor, scale: float) -> Tensor:
    scores = query @ key.where(keep[..., None], 0).transpose(-2, -1) * scale
    return scores.masked_fill(~keep[..., None, :], -torch.inf)


def _probability(scores: Tensor) -> Tensor:
    """softmax(scores); 0 in a row that keeps nothing."""
    keeps_nothing = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill(keeps_nothing, 0)
