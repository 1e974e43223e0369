"""NABLA attention: the four stages composed.

tokens -> reorder -> block mask of the pooled scores -> attention over the kept blocks -> reorder
back
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nabla.block_attention import AttentionOutput, block_sparse_attention
from nabla.block_mask import create_block_mask
from nabla.checks import as_grid, cast_for_autocast, check_keys, check_tensors
from nabla.grid import TokenGrid
from nabla.reorder import fractal_flatten, fractal_unflatten


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    grid: TokenGrid | Sequence[int] | None = None,
    top_p: float | Sequence[float] | Tensor = 0.9,
    window: Sequence[int] | None = None,
    order: str = "raster",
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | AttentionOutput:
    """Attend to the blocks that matter: scaled_dot_product_attention with an adaptive mask.

    Self-attention over the tokens of a grid. Each block of 64 queries attends, exactly, to the
    fewest blocks of keys that hold `top_p` of its attention between block means, and to those
    within `window` (Mikhailov et al., arXiv 2507.13546). Differentiable once in query, key and
    value; the choice of blocks carries no gradient. Casts under autocast as
    F.scaled_dot_product_attention does.

    Args:
        query: Queries [B, H, S, D]. Any strides; D contiguous.
        key: Keys [B, H, S, D], or [B, Hk, S, D] with enable_gqa, where Hk divides H.
        value: Values, as key.
        attn_mask: Not supported, must be None.
        dropout_p: Not supported, must be 0.
        is_causal: Not supported, must be False.
        scale: Factor of the products; D^-0.5 if None.
        enable_gqa: Whether key and value may have fewer heads than query.
        grid: The grid of the tokens, or its (frames, height, width); None is one row of 64-token
            blocks.
        top_p: The attention mass of the pooled map to keep, in (0, 1]; one value, or one per query
            head. The values of a tensor are not inspected: at or below 0 one block is kept, at or
            above 1 all.
        window: Odd extents (frames, height, width), in blocks, around each block that are kept too.
        order: "raster" if the tokens are in raster order, "block" if they are already in block
            order (see `fractal_flatten`; cheaper when done once per model forward).
        return_lse: Whether to return (out, lse).
        backend: "auto", or the name of a backend (see `nabla.backends`).

    Returns:
        Attention [B, H, S, D] in the order of the tokens; or AttentionOutput(out, lse) with
        lse [B, H, S].

    Raises:
        ValueError: If an argument is out of its range or not supported, or the tensors do not
            match each other or the grid.
    """
    _check_unsupported(attn_mask, dropout_p, is_causal)
    query, key, value = cast_for_autocast(query=query, key=key, value=value)
    check_tensors(query=query, key=key, value=value)
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(
            f"query has {query.shape[1]} heads and key has {key.shape[1]}: pass enable_gqa=True"
        )
    if grid is None and window is not None:
        raise ValueError(
            f"window={window!r} needs a grid: pass grid=(frames, height, width) of the tokens"
        )
    if order not in ("raster", "block"):
        raise ValueError(f"order={order!r} is unknown: give 'raster' or 'block'")
    grid = TokenGrid.sequence(key.shape[2]) if grid is None else as_grid(grid)
    check_keys("key", key, grid)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"query has {query.shape[2]} tokens and key has {key.shape[2]}: attention() is "
            "self-attention; "
            "for a slice of the queries use create_block_mask and block_sparse_attention with "
            "q_block_offset"
        )
    if order == "raster":
        query, key, value = (fractal_flatten(x, grid) for x in (query, key, value))
    mask = create_block_mask(
        query, key, grid=grid, top_p=top_p, window=window, scale=scale, backend=backend
    )
    out, lse = block_sparse_attention(
        query, key, value, mask, scale=scale, return_lse=True, backend=backend
    )
    if order == "raster":
        out = fractal_unflatten(out, grid)
    if not return_lse:
        return out
    return AttentionOutput(out, fractal_unflatten(lse, grid, -1) if order == "raster" else lse)


def _check_unsupported(attn_mask: Tensor | None, dropout_p: float, is_causal: bool) -> None:
    if attn_mask is not None:
        raise ValueError(
            "attn_mask is not supported: for a mask of blocks use "
            "block_sparse_attention(q, k, v, BlockMask.from_dense(keep, grid=grid))"
        )
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p={dropout_p} is not supported: pass 0.0")
    if is_causal:
        raise ValueError(
            "is_causal=True is not supported: NABLA attends in both directions; pass False"
        )
