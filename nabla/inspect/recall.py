"""How much of the exact attention a mask retains.

    recall = mean over queries of  sum over kept keys of p  =  exp(lse_mask - lse_full)

p is the softmax over all keys, so no [S, S] matrix is needed: two logsumexps tell it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nabla.block_attention import block_sparse_attention
from nabla.block_mask import BlockMask


@torch.no_grad()
def recall(
    q: Tensor, k: Tensor, mask: BlockMask, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Return the share of the attention probability that falls on the blocks a mask keeps.

    Costs one dense attention: it is for looking at masks, not for running models.

    Args:
        q: Queries [B, H, Sq, D], in block order.
        k: Keys [B, Hk, Sk, D], in block order.
        mask: The mask of these queries and keys.
        scale: Factor of q k^T; None is D^-0.5.
        backend: As in `block_sparse_attention`.

    Returns:
        The mean over the queries, [B, H] float32, in [0, 1]. NaN where a query's attention is.
    """
    every_block = dataclasses.replace(mask, bits=torch.full_like(mask.bits, -1))
    _, lse_kept = block_sparse_attention(
        q, k, k, mask, scale=scale, return_lse=True, backend=backend
    )
    _, lse_full = block_sparse_attention(
        q, k, k, every_block, scale=scale, return_lse=True, backend=backend
    )
    return (lse_kept - lse_full).exp().mean(-1)
