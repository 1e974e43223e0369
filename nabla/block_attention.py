"""Stage 4: exact softmax attention over the kept blocks, forward and backward.

out[i] = softmax(scale * q[i] k[J]^T) v[J],  J = the tokens of the blocks that the block of i keeps
lse[i] = logsumexp(scale * q[i] k[J]^T)
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nabla import ops
from nabla.block_mask import BlockMask
from nabla.checks import (
    cast_for_autocast,
    check_keys,
    check_scale,
    check_tensors,
    with_dense_layout,
)


class AttentionOutput(NamedTuple):
    """Attention [B, H, S, D] and the logsumexp [B, H, S] of its scores (natural log, float32)."""

    out: Tensor
    lse: Tensor


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> AttentionOutput: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | AttentionOutput:
    """Softmax attention in which each query attends to the blocks that its own block keeps.

    Differentiable once in q, k and v, through out and lse. A query whose block keeps nothing has
    out 0, lse -inf and no gradient.

    Args:
        q: Queries in block order [B, Hq, Sq, D]: those of the rows of the mask. Any strides; D
            contiguous.
        k: Keys of the whole grid in block order [B, Hk, S, D]; Hk divides Hq.
        v: Values, as k.
        mask: The blocks to attend to: [B or 1, Hq or 1, Nq, Nk].
        scale: Factor of the products; D^-0.5 if None.
        return_lse: Whether to return (out, lse).
        backend: "auto", or the name of a backend (see `nabla.backends`).

    Returns:
        Attention [B, Hq, Sq, D] in the dtype and memory layout of q; or AttentionOutput(out, lse).

    Raises:
        ValueError: If the tensors do not match each other or the mask.
    """
    q, k, v = cast_for_autocast(q=q, k=k, v=v)
    check_tensors(q=q, k=k, v=v)
    _check_mask(mask, q, k)
    if any(forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v)):
        raise RuntimeError(
            "nabla attention has no forward-mode derivative: use torch.autograd.grad"
        )
    q, k, v = with_dense_layout(q, k, v)
    bits = mask.bits
    if bits.shape[:2] != q.shape[:2]:
        bits = bits.expand(q.shape[0], q.shape[1], -1, -1)
    scale = check_scale(scale, q.shape[-1])
    out, lse = ops.attention_fwd(
        q, k, v, bits, mask.grid.as_ints(), mask.q_block_offset, scale, backend
    )
    return AttentionOutput(out, lse) if return_lse else out


def _check_mask(mask: BlockMask, q: Tensor, k: Tensor) -> None:
    if not isinstance(mask, BlockMask):
        raise TypeError(
            f"mask is a {type(mask).__name__}: give a BlockMask, as create_block_mask makes"
        )
    check_keys("k", k, mask.grid)
    columns = mask.grid.num_blocks
    if (
        mask.bits.dtype != torch.int32
        or mask.bits.dim() != 4
        or mask.bits.shape[3] != -(-columns // 32)
    ):
        raise ValueError(
            f"mask.bits has shape {list(mask.bits.shape)} and dtype {mask.bits.dtype}: "
            f"{mask.grid} takes int32 [B, H, Nq, {-(-columns // 32)}]; BlockMask.from_dense makes "
            "it"
        )
    batch, heads, rows, _ = mask.bits.shape
    if mask.device != q.device:
        raise ValueError(
            f"mask is on {mask.device} and q on {q.device}: use mask.to({str(q.device)!r})"
        )
    if batch not in (1, q.shape[0]) or heads not in (1, q.shape[1]):
        raise ValueError(
            f"mask has batch size {batch} and {heads} heads, q has {q.shape[0]} and {q.shape[1]}: "
            "they must be the same, or 1 in the mask"
        )
    if mask.grid.count_blocks(q.shape[2], mask.q_block_offset) != rows:
        raise ValueError(
            f"mask has {rows} rows of query blocks from q_block_offset={mask.q_block_offset} on, "
            "but the "
            f"{q.shape[2]} tokens of q are "
            f"{mask.grid.count_blocks(q.shape[2], mask.q_block_offset)}: give the mask of these "
            "tokens"
        )
