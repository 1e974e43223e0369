"""NABLA in transformers: an attention implementation by name, for vision and video encoders.

register("nabla", grid=(8, 14, 14))       self-attention over those tokens  ->  nabla.attention
model.set_attn_implementation("nabla")    every other call                  ->  "sdpa"
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nabla.grid import TokenGrid
from nabla.integrations.sdpa import SelfAttention

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(
        f"nabla.integrations.transformers needs transformers 5 or newer ({error}): "
        "pip install 'transformers>=5'"
    ) from error


def register(
    name: str = "nabla",
    *,
    grid: TokenGrid | Sequence[int],
    top_p: float | Sequence[float] | Tensor = 0.9,
    window: Sequence[int] | None = None,
    leading: int = 0,
    backend: str = "auto",
) -> None:
    """Make NABLA known under a name for `model.set_attn_implementation(name)`.

    It computes self-attention over the tokens of the grid where no mask, no dropout and no causal
    order is asked for; the implementation "sdpa" computes everything else, and a warning says so
    where only the number of tokens is another. Registering a name again
    replaces its settings.

    Args:
        name: The name of the attention implementation.
        grid: The grid of the tokens in raster order, or its (frames, height, width).
        top_p: The attention mass of the pooled map to keep, in (0, 1]; one value, or one per head.
        window: Odd extents (frames, height, width), in blocks, around each block that are kept too.
        leading: Tokens before those of the grid (a class token, registers). Like extra tokens, they
            attend to everything and are attended to by everything.
        backend: "auto", or the name of a backend (see `nabla.backends`).

    Raises:
        ValueError: If an argument is out of its range, or the name is one that transformers has.
    """
    if name in BUILT_IN:
        raise ValueError(f"name={name!r} is an implementation of transformers: give another")
    attend = SelfAttention(grid, top_p, window, leading, backend)

    def attention_forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend [B, H, S, D] tensors; returns [B, S, H, D] and no weights."""
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        changes_scores = any(
            kwargs.get(key) is not None for key in ("position_bias", "softcap", "cache")
        )
        call = (query, key, value, attention_mask, dropout, causal, scaling)
        if changes_scores or not attend.takes(*call, enable_gqa=True):
            length = query.shape[2]
            is_free = attention_mask is None and not causal and dropout == 0.0
            is_other = key.shape[2] == length != attend.num_tokens
            if is_free and is_other and not torch.compiler.is_compiling():
                warnings.warn(
                    f"self-attention over {length} tokens is not over the {attend.num_tokens} of "
                    f"{attend.grid} and `leading`: it runs as 'sdpa'",
                    stacklevel=2,
                )
            return sdpa_attention_forward(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                **kwargs,
            )
        return attend(query, key, value, scaling).transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)


BUILT_IN = (*AttentionInterface._global_mapping, "eager")
