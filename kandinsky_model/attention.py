"""Attention of the CrossDiT: one layer, and the ways in which visual tokens attend to each other.

q, k = rope(rmsnorm(x W))      in fp32, then cast to the model's dtype (upstream always to bf16)
DenseAttention                 softmax(q k^T / sqrt(D)) v over all tokens
NablaAttention                 the same over the blocks that nabla.create_block_mask keeps
CalibratedAttention            NablaAttention with a top_p of its own in every layer and head
MaskedAttention                the same over the blocks of one given mask
UlyssesAttention               NablaAttention of tokens that several GPUs share
All take q, k, v [B, H, S, D] in block order and return [B, H, S, D].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import nabla
from nabla import distributed
from nabla.inspect import Calibration


class VisualAttention(Protocol):
    """How visual tokens attend to each other; any callable of this shape will do."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: nabla.TokenGrid) -> Tensor:
        """Attend over tokens [B, H, S, D] that lie on `grid` in block order."""


@dataclass(frozen=True)
class DenseAttention:
    """Every token attends to every token."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: nabla.TokenGrid) -> Tensor:
        """Attend over tokens [B, H, S, D]."""
        return F.scaled_dot_product_attention(q, k, v)


@dataclass(frozen=True)
class NablaAttention:
    """Attend to the key blocks that hold `top_p` of a query block's pooled map, or a window."""

    top_p: float | Sequence[float]  # one value, or one per head
    window: tuple[int, int, int] | None = None
    backend: str = "auto"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: nabla.TokenGrid) -> Tensor:
        """Attend over tokens [B, H, S, D] that lie on `grid` in block order."""
        return nabla.block_sparse_attention(q, k, v, self.mask(q, k, grid), backend=self.backend)

    def mask(self, q: Tensor, k: Tensor, grid: nabla.TokenGrid) -> nabla.BlockMask:
        """The blocks that these q and k [B, H, S, D] attend over."""
        return nabla.create_block_mask(
            q, k, grid=grid, top_p=self.top_p, window=self.window, backend=self.backend
        )


@dataclass(frozen=True)
class CalibratedAttention:
    """NablaAttention with a top_p per layer and head, as `nabla.inspect.calibrate` finds it."""

    calibration: Calibration
    backend: str = "auto"

    def check(self, num_layers: int, num_heads: int) -> None:
        """Raise an error if the calibration is of another model than one of this size."""
        top_p = self.calibration.top_p
        if len(top_p) != num_layers:
            raise ValueError(
                f"the calibration has {len(top_p)} layers and the model {num_layers}: "
                "calibrate this model"
            )
        if heads := {len(layer) for layer in top_p} - {num_heads}:
            raise ValueError(
                f"the calibration has {heads.pop()} heads in a layer and the model {num_heads}: "
                "calibrate this model"
            )

    def layers(self) -> list[NablaAttention]:
        """The attention of each layer."""
        top_p, window = self.calibration.top_p, self.calibration.window
        return [NablaAttention(layer, window, self.backend) for layer in top_p]


@dataclass(frozen=True)
class MaskedAttention:
    """Every layer attends over the blocks of one mask, [1 or B, 1 or H, Nq, Nk]."""

    mask: nabla.BlockMask
    backend: str = "auto"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: nabla.TokenGrid) -> Tensor:
        """Attend over tokens [B, H, S, D] that lie on `grid` in block order."""
        if self.mask.grid != grid:
            raise ValueError(f"mask is of {self.mask.grid}, but the tokens are on {grid}")
        return nabla.block_sparse_attention(q, k, v, self.mask, backend=self.backend)


@dataclass(frozen=True)
class UlyssesAttention:
    """NablaAttention of tokens that the ranks of `group` share; dense with top_p=1.0.

    CrossDiT shards and gathers the tokens: every rank has the same inputs, weights and result.
    Averaged over the ranks, as DDP does, the gradients are those of one process.
    """

    top_p: float
    window: tuple[int, int, int] | None = None
    backend: str = "auto"
    group: distributed.Group | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: nabla.TokenGrid) -> Tensor:
        """Attend over the tokens of this rank [B, H, S_rank, D]; `grid` is that of all ranks."""
        out = distributed.ulysses_attention(
            q,
            k,
            v,
            grid=grid,
            top_p=self.top_p,
            window=self.window,
            order="block",
            backend=self.backend,
            group=self.group,
            sizes=distributed.shard_sizes(grid, self.group),
        )
        assert isinstance(out, Tensor)
        return out

    def shard(self, x: Tensor, grid: nabla.TokenGrid) -> Tensor:
        """The tokens [..., S, C] of this rank, in block order."""
        return distributed.shard(x, -2, distributed.shard_sizes(grid, self.group), group=self.group)

    def gather(self, x: Tensor, grid: nabla.TokenGrid) -> Tensor:
        """The tokens of all ranks [..., S, C], in block order."""
        return distributed.gather(
            x, -2, distributed.shard_sizes(grid, self.group), group=self.group
        )


def apply_rotary(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighbouring channel pairs of x [B, S, H, D] by tables [S, D / 2], in float32."""
    cos, sin = (table[:, None, :] for table in rope)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class Attention(nn.Module):
    """Multi-head attention with RMS-normalized, optionally rotated queries and keys."""

    def __init__(self, model_dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_query = nn.Linear(model_dim, model_dim)
        self.to_key = nn.Linear(model_dim, model_dim)
        self.to_value = nn.Linear(model_dim, model_dim)
        self.query_norm = nn.RMSNorm(head_dim)
        self.key_norm = nn.RMSNorm(head_dim)
        self.out_layer = nn.Linear(model_dim, model_dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention,
    ) -> Tensor:
        """Attend from x [B, S, C] to `context` [B, L, C], or to x itself.

        Args:
            x: Tokens that ask.
            context: Tokens that answer; None for self-attention.
            rope: Tables (cos, sin) [S, D / 2] for self-attention; None leaves positions out.
            attend: Maps q, k, v [B, H, S, D] to the heads' outputs [B, H, S, D].
        """
        context = x if context is None else context
        heads = "b s (h d) -> b s h d"
        q = rearrange(self.to_query(x), heads, d=self.head_dim)
        k = rearrange(self.to_key(context), heads, d=self.head_dim)
        v = rearrange(self.to_value(context), heads, d=self.head_dim)
        q, k = _normalize(self.query_norm, q), _normalize(self.key_norm, k)
        if rope is not None:
            q, k = apply_rotary(q, rope), apply_rotary(k, rope)
        q, k = q.type_as(v), k.type_as(v)
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out_layer(rearrange(out, "b h s d -> b s (h d)"))


def _normalize(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), norm.normalized_shape, norm.weight.float())
