"""The checks of the public functions: each message names the argument, its value and the remedy."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from nabla.grid import TokenGrid, Window

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def as_grid(grid: TokenGrid | Sequence[int]) -> TokenGrid:
    """The grid, given as one or as (frames, height, width)."""
    if isinstance(grid, TokenGrid):
        return grid
    if isinstance(grid, Sequence) and not isinstance(grid, str) and len(grid) == 3:
        frames, height, width = grid
        return TokenGrid(frames, height, width)
    raise ValueError(f"grid={grid!r} is neither a TokenGrid nor (frames, height, width) in tokens")


def check_window(window: Sequence[int] | None) -> Window | None:
    """The window as a tuple; its extents must be odd, in blocks."""
    if window is None:
        return None
    if (
        not isinstance(window, Sequence)
        or len(window) != 3
        or any(not isinstance(extent, int) or extent < 1 or extent % 2 == 0 for extent in window)
    ):
        raise ValueError(
            f"window={window!r} is not three odd extents (frames, height, width) in blocks: "
            "a window reaches equally far to both sides, as in (11, 3, 3)"
        )
    frames, height, width = (min(extent, 2**30 + 1) for extent in window)  # beyond any grid
    return frames, height, width


def check_top_p(
    top_p: float | Sequence[float] | Tensor, num_heads: int, device: torch.device
) -> Tensor:
    """top_p as a tensor [H] on the device; a tensor is not inspected, as that would synchronise."""
    if isinstance(top_p, Tensor):
        if top_p.shape not in ((), (num_heads,)):
            raise ValueError(
                f"top_p has shape {list(top_p.shape)}: give one value, or one for each of "
                f"{num_heads} heads"
            )
        return top_p.to(device, torch.float32, non_blocking=True).expand(num_heads)
    if isinstance(top_p, Sequence) and not isinstance(top_p, str):
        if len(top_p) != num_heads:
            raise ValueError(
                f"top_p has {len(top_p)} values: give one for each of {num_heads} heads"
            )
        for value in top_p:
            _check_probability(value)
        # Filled on the device: a copy from the host would synchronise, and no graph captures it.
        return torch.stack([_filled(value, (), device) for value in top_p])
    _check_probability(top_p)
    return _filled(top_p, (num_heads,), device)


def _filled(value: float, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.full(shape, value, dtype=torch.float32, device=device)


def _check_probability(top_p: float) -> None:
    if not isinstance(top_p, numbers.Real):
        raise ValueError(f"top_p={top_p!r} is not a number: give the attention mass to keep")
    if not 0 < top_p <= 1:  # so is NaN; math.isnan cannot be traced
        remedy = "give the attention mass to keep, in (0, 1]"
        if 1 < top_p <= 100:
            remedy = f"it looks like a percentage; {remedy}, here {top_p / 100:g}"
        raise ValueError(f"top_p={top_p} is not in (0, 1]: {remedy}")


def check_tensor(name: str, x: Tensor) -> None:
    """A 4-D tensor [B, H, S, D] with something in it, of a dtype that some backend takes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}: give a tensor [B, H, S, D]")
    if x.dim() != 4:
        raise ValueError(f"{name} has shape {list(x.shape)}: give a tensor [B, H, S, D]")
    if min(x.shape) == 0:
        raise ValueError(
            f"{name} has shape {list(x.shape)}, which is empty: there is nothing to attend to"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}: supported are {', '.join(map(str, DTYPES))}")


def check_tensors(**named: Tensor) -> None:
    """Queries, keys (and values), in this order, that go together."""
    (q_name, q), (k_name, k), *values = named.items()
    for name, x in named.items():
        check_tensor(name, x)
        for quantity, ours, theirs in (
            ("device", x.device, q.device),
            ("dtype", x.dtype, q.dtype),
            ("batch size", x.shape[0], q.shape[0]),
            ("head_dim", x.shape[3], q.shape[3]),
        ):
            if ours != theirs:
                raise ValueError(
                    f"{name} has {quantity} {ours} and {q_name} has {theirs}: they must be the same"
                )
    for name, v in values:
        if v.shape != k.shape:
            raise ValueError(
                f"{name} has shape {list(v.shape)} and {k_name} has {list(k.shape)}: they must be "
                "the same"
            )
    if q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"{q_name} has {q.shape[1]} heads and {k_name} has {k.shape[1]}: "
            f"the heads of {k_name} must divide those of {q_name}"
        )


def check_keys(name: str, k: Tensor, grid: TokenGrid) -> None:
    """Keys of the whole grid."""
    if k.shape[2] != grid.num_tokens:
        raise ValueError(
            f"{name} has {k.shape[2]} tokens, but {grid} has {grid.num_tokens}: "
            "give the grid of these tokens as grid=(frames, height, width), or a TokenGrid with "
            "extra tokens"
        )


def cast_for_autocast(**named: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast, as F.scaled_dot_product_attention casts them."""
    tensors = tuple(named.values())
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    # Which devices have autocast at all, torch.compile of torch 2.11 cannot ask.
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    for name, x in named.items():
        check_tensor(name, x)
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def with_dense_layout(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied where D is not contiguous or rows overlap; other strides are kept.

    What is allocated like such a tensor has contiguous D too, which is what kernels write.
    """
    return tuple(x if _has_dense_rows(x) else x.contiguous() for x in tensors)


def _has_dense_rows(x: Tensor) -> bool:
    if x.stride(3) != 1:
        return False
    return all(
        size == 1 or stride == 0 or stride >= x.shape[3]
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    )


def check_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the products; head_dim^-0.5 if None."""
    if scale is None:
        return head_dim**-0.5
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(
            f"scale={scale!r} is not a finite number: give the factor of q k^T, or None"
        )
    return float(scale)
