"""NABLA in any model: F.scaled_dot_product_attention, within a context.

with override(grid=(frames, height, width)):   attention over those tokens  ->  nabla.attention
    model(...)                                 every other call             ->  as it was
"""

from __future__ import annotations

import contextlib
import numbers
import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nabla.checks import DTYPES, as_grid, check_top_p, check_window
from nabla.dispatch import check_backend
from nabla.functional import attention
from nabla.grid import TokenGrid, Window

SDPA = F.scaled_dot_product_attention


class override(TorchFunctionMode):  # noqa: N801
    """Compute self-attention over the tokens of a grid as NABLA, within a `with` statement.

    Takes the calls of F.scaled_dot_product_attention, on [B, H, S, D], that have as many queries
    and keys as there are tokens, no mask, no dropout, and are not causal; all other calls stay what
    they are. What it takes is differentiable once, in reverse, and not under vmap. Cross-attention
    between two sequences of just this length looks the same, and is taken too. Applies to the
    thread that enters the context. Of nested contexts the inner one is first. A context that took
    no call warns on exit.

    Args:
        grid: The grid of the tokens in raster order, or its (frames, height, width).
        top_p: The attention mass of the pooled map to keep, in (0, 1]; one value, or one per head.
        window: Odd extents (frames, height, width), in blocks, around each block that are kept too.
        leading: Tokens before those of the grid (a class token, registers). Like extra tokens, they
            attend to everything and are attended to by everything.
        backend: "auto", or the name of a backend (see `nabla.backends`).

    Attributes:
        taken: How many calls NABLA computed; of a compiled model, those that were traced.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        grid: TokenGrid | Sequence[int],
        *,
        top_p: float | Sequence[float] | Tensor = 0.9,
        window: Sequence[int] | None = None,
        leading: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.attend = SelfAttention(grid, top_p, window, leading, backend)
        self.taken = self._taken_before = 0

    def __enter__(self):
        self._taken_before = self.taken
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self._within_function():
                return func(*args, **kwargs)
        if func is not SDPA:
            return func(*args, **kwargs)
        return self._attention(SDPA, *args, **kwargs)

    def _attention(self, otherwise, *args, **kwargs):
        """NABLA, or another function where it does not fit."""
        call = _named(*args, **kwargs)
        if not self.attend.takes(**call):
            return otherwise(*args, **kwargs)
        self.taken += 1
        return self.attend(call["query"], call["key"], call["value"], call["scale"])

    @contextlib.contextmanager
    def _within_function(self):
        """What a mode does not see: calls from within a function that it was shown."""
        thread, before = threading.get_ident(), F.scaled_dot_product_attention

        def attention_here(*args, **kwargs):
            if threading.get_ident() != thread:
                return before(*args, **kwargs)
            return self._attention(before, *args, **kwargs)

        F.scaled_dot_product_attention = attention_here
        try:
            yield
        finally:
            F.scaled_dot_product_attention = before

    def __exit__(self, exc_type, exc_value, traceback):
        super().__exit__(exc_type, exc_value, traceback)
        if exc_type is None and self.taken == self._taken_before:
            warnings.warn(
                f"no self-attention over {self.attend.num_tokens} tokens ran within override(): "
                f"NABLA computed nothing; {self.attend.grid} is not the grid of the model's tokens",
                stacklevel=2,
            )


class SelfAttention:
    """NABLA over the tokens of one grid, with `leading` ones before them."""

    def __init__(self, grid, top_p, window, leading, backend):
        self.grid: TokenGrid = as_grid(grid)
        self.window: Window | None = check_window(window)
        if not isinstance(leading, int) or isinstance(leading, bool) or leading < 0:
            raise ValueError(f"leading={leading!r} is not a number of tokens: give 0 or more")
        if not isinstance(top_p, Tensor):
            is_listed = isinstance(top_p, Sequence) and not isinstance(top_p, str)
            check_top_p(top_p, len(top_p) if is_listed else 1, torch.device("cpu"))
        check_backend(backend)
        self.leading = leading
        self.num_tokens = self.grid.num_tokens + leading
        self.options = {"top_p": top_p, "window": self.window, "backend": backend}

    def takes(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> bool:
        """Whether a call, which is right for SDPA, is self-attention over these tokens."""
        return (
            attn_mask is None
            and dropout_p == 0.0
            and not is_causal
            and (scale is None or isinstance(scale, numbers.Real))
            and not query.is_nested
            and query.dim() == 4
            and query.numel() > 0
            and query.shape[2] == key.shape[2] == self.num_tokens
            and query.shape[0] == key.shape[0]
            and query.shape[3] == key.shape[3]
            and (enable_gqa or key.shape[1] in (1, query.shape[1]))
            and key.shape == value.shape
            and query.dtype in DTYPES
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention [B, H, S, D] with the tokens where they were."""
        grid = replace(self.grid, extra=self.grid.extra + self.leading)
        q, k, v = (_roll(x, self.leading) for x in (query, key, value))
        out: Any = attention(q, k, v, scale=scale, enable_gqa=True, grid=grid, **self.options)
        return _roll(out, self.num_tokens - self.leading)


def _roll(x: Tensor, first: int) -> Tensor:
    """Tokens [B, H, S, D] with the `first` ones at the end."""
    return torch.cat([x[:, :, first:], x[:, :, :first]], 2) if 0 < first < x.shape[2] else x


def _named(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    """The arguments of F.scaled_dot_product_attention by name."""
    return dict(locals())
