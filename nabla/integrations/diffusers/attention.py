"""The attention of a forward: what processors and `set_attention_backend("nabla")` call.

out[B, S, H, D] = nabla.attention of the tokens of a Plan, or under a mask of blocks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _templated_context_parallel_attention,
)
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.nn.attention.flex_attention import noop_mask

from nabla.block_attention import block_sparse_attention
from nabla.block_mask import BlockMask
from nabla.functional import attention
from nabla.grid import TokenGrid, Window


@dataclass(frozen=True)
class Plan:
    """How self-attention runs in one forward; it travels where the host passes a mask.

    Args:
        grid: The tokens of the video.
        order: "block"; or "raster" where the host cuts the sequence among processes.
        top_p: The attention mass to keep.
        window: The sliding tile window in blocks, or None.
        backend: The backend of nabla.
        text_lengths: How many of the text tokens behind the video count: for all, or per sample.
    """

    grid: TokenGrid
    order: str
    top_p: float | Sequence[float] | Tensor
    window: Window | None
    backend: str
    text_lengths: tuple[int, ...] = (0,)


def nabla_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Plan | BlockMask | FlexBlockMask | Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """Attention backend of diffusers: sparse under a mask of blocks, native without one.

    Args:
        query: Queries [B, S, H, D], with a mask of blocks in block order.
        key: Keys, as query.
        value: Values, as query.
        attn_mask: The BlockMask that Kandinsky 5 builds, of whole blocks and without a mask_mod; or
            a nabla.BlockMask. Anything else goes to the native backend of diffusers.
        dropout_p: Must be 0 with a mask of blocks.
        is_causal: Must be False with a mask of blocks.
        scale: Factor of the products; D^-0.5 if None.
        enable_gqa: Whether key and value may have fewer heads.
        _parallel_config: Context parallelism of diffusers; takes no mask of blocks (see `enable`).

    Returns:
        Attention [B, S, H, D].

    Raises:
        ValueError: If the mask has partial blocks or a mask_mod, or an argument goes with no mask
            of blocks.
    """
    if not isinstance(attn_mask, Plan | BlockMask | FlexBlockMask):
        native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
        return native(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            _parallel_config=_parallel_config,
        )
    if dropout_p != 0.0 or is_causal:
        raise ValueError(
            f"dropout_p={dropout_p} and is_causal={is_causal} are not supported with a mask of "
            "blocks: pass 0.0 and False"
        )
    if isinstance(attn_mask, Plan):
        if _parallel_config is not None:
            return _ulysses(query, key, value, attn_mask, scale, _parallel_config)
        return _planned_attention(query, key, value, attn_mask, scale)
    if _parallel_config is not None:
        raise ValueError(
            "attn_mask is a mask of the tokens of one process: under context parallelism use "
            "nabla.integrations.diffusers.enable(pipe), which builds it from all of them"
        )
    mask = attn_mask if isinstance(attn_mask, BlockMask) else _from_flex(attn_mask, key.shape[1])
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return block_sparse_attention(query, key, value, mask, scale=scale).transpose(1, 2)


def _from_flex(mask: FlexBlockMask, num_tokens: int) -> BlockMask:
    if mask.mask_mod is not noop_mask:
        raise ValueError(
            f"attn_mask has mask_mod={getattr(mask.mask_mod, '__name__', mask.mask_mod)!r}: only "
            "masks of whole blocks without a mask_mod can be used; for others use the backend "
            "'flex', or pass a nabla.BlockMask (not its to_flex())"
        )
    block_size = mask.BLOCK_SIZE[1]
    return BlockMask.from_flex(mask, grid=TokenGrid(1, 1, num_tokens, block=(1, 1, block_size)))


def _planned_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float | None
) -> Tensor:
    """Attention [B, S, H, D] of the video, and of the text tokens that count; 0 in the others."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out: list[Tensor] = []
    for sample, length in enumerate(plan.text_lengths):
        batch = slice(None) if len(plan.text_lengths) == 1 else slice(sample, sample + 1)
        grid = replace(plan.grid, extra=length)
        q, k, v = (x[batch, :, : grid.num_tokens] for x in (query, key, value))
        x: Any = attention(
            q,
            k,
            v,
            scale=scale,
            grid=grid,
            top_p=plan.top_p,
            window=plan.window,
            order=plan.order,
            backend=plan.backend,
        )
        ignored = query.shape[2] - grid.num_tokens
        out.append(F.pad(x, (0, 0, 0, ignored)) if ignored else x)
    return (out[0] if len(out) == 1 else torch.cat(out)).transpose(1, 2)


def _ulysses(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float | None, config: Any
) -> Tensor:
    """Attention [B, S / n, H, D] in the template of diffusers, which trades tokens for heads.

    The mask is built between its all-to-alls, from all tokens of this process's heads.
    """
    degree = config.context_parallel_config.ring_degree
    if degree > 1:
        raise ValueError(
            f"ring_degree={degree} shows attention one part of the keys at a time, but NABLA "
            "chooses among all: use ulysses_degree"
        )

    def forward_op(ctx, query, key, value, *_, _save_ctx=True, **__) -> Tensor:
        if not _save_ctx or not any(ctx.needs_input_grad[:3]):
            return _planned_attention(query, key, value, plan, scale)
        ctx.nabla_inputs = tuple(x.detach().requires_grad_() for x in (query, key, value))
        with torch.enable_grad():
            query, key, value = ctx.nabla_inputs
            ctx.nabla_out = _planned_attention(query, key, value, plan, scale)
        return ctx.nabla_out.detach()

    def backward_op(ctx, grad_out, *_, **__):
        return torch.autograd.grad(ctx.nabla_out, ctx.nabla_inputs, grad_out)

    return _templated_context_parallel_attention(
        query,
        key,
        value,
        forward_op=forward_op,
        backward_op=backward_op,
        _parallel_config=config,
    )


def _register_backend(name: str) -> Any:
    """The member `name` of the enumeration of attention backends, added if it is not there."""
    members: Any = AttentionBackendName
    if name not in members._value2member_map_:
        member = str.__new__(AttentionBackendName, name)
        member._name_, member._value_ = name.upper(), name
        members._member_map_[member._name_] = member
        members._member_names_.append(member._name_)
        members._value2member_map_[name] = member
        type.__setattr__(AttentionBackendName, member._name_, member)
    member = AttentionBackendName(name)
    _AttentionBackendRegistry.register(member, supports_context_parallel=True)(nabla_attention)
    return member


NABLA = _register_backend("nabla")
