"""Stage 2: what each query block gives to each key block.

q_mean, k_mean = means over the tokens of a block                         [B, H, Nq, D], [B, H, Nk,
D] scores         = softmax(scale * q_mean k_mean^T) over the key blocks     [B, H, Nq, Nk], float32
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nabla import ops
from nabla.checks import (
    as_grid,
    cast_for_autocast,
    check_keys,
    check_scale,
    check_tensor,
    check_tensors,
    with_dense_layout,
)
from nabla.grid import TokenGrid


def block_mean(
    x: Tensor, grid: TokenGrid | Sequence[int], *, block_offset: int = 0, backend: str = "auto"
) -> Tensor:
    """Average each block over the tokens that it has.

    Args:
        x: Tokens in block order [B, H, S, D]: all of the grid's, or those of the blocks from
            `block_offset` on.
        grid: The grid of the tokens, or its (frames, height, width).
        block_offset: The block with which x begins.
        backend: "auto", or the name of a backend (see `nabla.backends`).

    Returns:
        Means [B, H, N, D], float32 (float64 for float64). They carry no gradient.

    Raises:
        ValueError: If x is not a whole number of blocks of the grid.
    """
    (x,) = cast_for_autocast(x=x)
    check_tensor("x", x)
    grid = as_grid(grid)
    grid.count_blocks(x.shape[2], block_offset)
    (x,) = with_dense_layout(x.detach())
    return ops.block_mean(x, grid.as_ints(), block_offset, backend)


def pooled_scores(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid | Sequence[int],
    *,
    scale: float | None = None,
    q_block_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention between the block means of q and k.

    Args:
        q: Queries in block order [B, Hq, Sq, D]: all of the grid's, or those of the blocks from
            `q_block_offset` on.
        k: Keys of the whole grid in block order [B, Hk, S, D]; Hk divides Hq.
        grid: The grid of the tokens, or its (frames, height, width).
        scale: Factor of the products; D^-0.5 if None.
        q_block_offset: The block with which q begins.
        backend: "auto", or the name of a backend (see `nabla.backends`).

    Returns:
        Scores [B, Hq, Nq, Nk], float32 (float64 for float64); they carry no gradient. +inf marks a
        block that is kept whatever its score and is left out of the softmax: the blocks of extra
        tokens, and those whose product of means is not finite. The other scores of a row sum to 1.

    Raises:
        ValueError: If the tensors do not go together or do not match the grid.
    """
    q, k = cast_for_autocast(q=q, k=k)
    check_tensors(q=q, k=k)
    grid = as_grid(grid)
    check_keys("k", k, grid)
    grid.count_blocks(q.shape[2], q_block_offset)
    q, k = with_dense_layout(q.detach(), k.detach())
    scale = check_scale(scale, q.shape[-1])
    return ops.pooled_scores(q, k, grid.as_ints(), q_block_offset, scale, backend)
