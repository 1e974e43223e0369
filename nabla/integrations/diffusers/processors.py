"""Attention processors: what takes the host's place in one self-attention.

q, k, v  ->  nabla_attention under the plan of the forward  ->  output projection
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nabla.integrations.diffusers.attention import NABLA, Plan, nabla_attention

PLAN = "nabla_plan"  # the key of the plan in sparse_params


class NablaProcessor:
    """Stands before the host's processor, which keeps what is set on it meanwhile.

    Args:
        host: The host's processor.
        top_p: Of this layer, one value a head; None is that of the plan.
    """

    def __init__(self, host: Any, top_p: Sequence[float] | None = None) -> None:
        self.host = host
        self.top_p = top_p

    def plan_of(self, plan: Any) -> Plan:
        """The plan of the forward, as this layer follows it."""
        if not isinstance(plan, Plan):
            raise RuntimeError(
                "NABLA attention ran without the forward of its transformer, which tells it the "
                "grid: call the transformer, not one of its blocks; after changing its processors "
                "or hooks call nabla.integrations.diffusers.enable(pipe) again"
            )
        return plan if self.top_p is None else replace(plan, top_p=self.top_p)

    @property
    def _attention_backend(self):
        return getattr(self.host, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, backend):
        self.host._attention_backend = backend

    @property
    def _parallel_config(self):
        return getattr(self.host, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config):
        self.host._parallel_config = config


class _KandinskyProcessor(NablaProcessor):
    """Self-attention of Kandinsky; the plan is in its sparse_params."""

    rope_dtype: torch.dtype | None = None  # what q and k are rounded to; None: their own

    def attend(self, attn: Any, hidden_states: Tensor, rope: Any, sparse_params: Any) -> Tensor:
        """Attend hidden_states [B, S, C] under RoPE [..., S, 1, D / 2, 2, 2]."""
        plan = self.plan_of((sparse_params or {}).get(PLAN))
        heads = (attn.num_heads, -1)
        query = attn.to_query(hidden_states).unflatten(-1, heads)
        key = attn.to_key(hidden_states).unflatten(-1, heads)
        value = attn.to_value(hidden_states).unflatten(-1, heads)
        query = self.rotate(attn.query_norm(query.float()).type_as(query), rope)
        key = self.rotate(attn.key_norm(key.float()).type_as(key), rope)
        out = nabla_attention(
            query, key, value, attn_mask=plan, _parallel_config=self._parallel_config
        )
        return attn.out_layer(out.flatten(-2))

    def rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """Apply RoPE to x [B, S, H, D], in float32."""
        pairs = x.float().unflatten(-1, (-1, 1, 2))
        rotated = (rope.float() * pairs).sum(-1).flatten(-2)
        return rotated.to(self.rope_dtype or x.dtype).type_as(x)


class Kandinsky5NablaProcessor(_KandinskyProcessor):
    """Self-attention of Kandinsky 5, which rounds q and k to bfloat16 in any model."""

    rope_dtype = torch.bfloat16

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, rotary_emb=None, sparse_params=None
    ):
        """Attend, called as the host calls its Kandinsky5AttnProcessor."""
        return self.attend(attn, hidden_states, rotary_emb, sparse_params)


class Kandinsky6SRNablaProcessor(_KandinskyProcessor):
    """Self-attention of Kandinsky 6 SR."""

    def __call__(self, attn, hidden_states, rotary_emb, sparse_params):
        """Attend, called as the host calls its Kandinsky6SRAttnProcessor."""
        return self.attend(attn, hidden_states, rotary_emb, sparse_params)


class WanNablaProcessor(NablaProcessor):
    """Self-attention of Wan: the host's processor, with a plan for a mask."""

    def __init__(self, host: Any, top_p: Sequence[float] | None = None) -> None:
        super().__init__(host, top_p)
        self.inner = copy.copy(host)
        self.inner._attention_backend = NABLA

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Any, ...] | None = None,
    ) -> Tensor:
        """Attend hidden_states [B, S, C]; the plan is behind the cosines and sines of RoPE."""
        *rope, plan = rotary_emb or (None,)
        self.inner._parallel_config = self._parallel_config
        plan = self.plan_of(plan)
        return self.inner(attn, hidden_states, encoder_hidden_states, plan, tuple(rope))


class HunyuanVideoNablaProcessor(WanNablaProcessor):
    """Joint self-attention of HunyuanVideo: video, then text."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Any, ...] | None = None,
    ) -> Any:
        """Attend hidden_states [B, S, C]; the plan is behind the cosines and sines of RoPE."""
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )
