"""CrossDiT: velocity of latents [B, T, H, W, C] at time t, given text.

text    text_embeddings -> refiner blocks (self-attention with 1-D RoPE, feed-forward)
visual  visual_embeddings -> block order -> blocks (self-attention with 3-D RoPE, cross-attention,
        feed-forward) -> raster order -> out_layer
branch  x + gate * f(norm(x) * (1 + scale) + shift),  shift, scale, gate from (t, pooled text)
Attribute names are the keys of the public checkpoints.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nabla
from kandinsky_model.attention import (
    Attention,
    CalibratedAttention,
    DenseAttention,
    NablaAttention,
    UlyssesAttention,
    VisualAttention,
)
from kandinsky_model.config import CrossDiTConfig
from kandinsky_model.layers import (
    FeedForward,
    Modulation,
    OutLayer,
    TextEmbeddings,
    TimeEmbeddings,
    VisualEmbeddings,
    gated,
    modulate,
    rotary_1d,
    rotary_3d,
)

Rope = tuple[Tensor, Tensor]
Blocks = Callable[[Tensor], Tensor]

# Modules whose parameters stay float32 in every checkpoint and every cast.
FLOAT32_MODULES = ("time_embeddings", "modulation", "text_modulation", "visual_modulation")


class TransformerEncoderBlock(nn.Module):
    """Refines text tokens: self-attention, feed-forward."""

    def __init__(self, config: CrossDiTConfig) -> None:
        super().__init__()
        dim = config.model_dim
        self.text_modulation = Modulation(config.time_dim, dim, 6)
        self.self_attention_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.self_attention = Attention(dim, config.head_dim)
        self.feed_forward_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.feed_forward = FeedForward(dim, config.ff_dim)

    def forward(self, text: Tensor, time_embed: Tensor, rope: Rope) -> Tensor:
        """Text tokens [B, L, C] to the same shape."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.text_modulation(time_embed)
        branch = modulate(self.self_attention_norm, text, shift, scale)
        text = gated(text, gate, self.self_attention(branch, rope=rope))
        branch = modulate(self.feed_forward_norm, text, ff_shift, ff_scale)
        return gated(text, ff_gate, self.feed_forward(branch))


class TransformerDecoderBlock(nn.Module):
    """Denoises visual tokens: self-attention, cross-attention to the text, feed-forward."""

    def __init__(self, config: CrossDiTConfig) -> None:
        super().__init__()
        dim = config.model_dim
        self.visual_modulation = Modulation(config.time_dim, dim, 9)
        self.self_attention_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.self_attention = Attention(dim, config.head_dim)
        self.cross_attention_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.cross_attention = Attention(dim, config.head_dim)
        self.feed_forward_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.feed_forward = FeedForward(dim, config.ff_dim)

    def forward(
        self,
        visual: Tensor,
        text: Tensor,
        time_embed: Tensor,
        rope: Rope,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Visual tokens [B, S, C] in block order to the same shape."""
        params = self.visual_modulation(time_embed)
        shift, scale, gate = params[:3]
        branch = modulate(self.self_attention_norm, visual, shift, scale)
        visual = gated(visual, gate, self.self_attention(branch, rope=rope, attend=attend))
        shift, scale, gate = params[3:6]
        branch = modulate(self.cross_attention_norm, visual, shift, scale)
        visual = gated(visual, gate, self.cross_attention(branch, text))
        shift, scale, gate = params[6:]
        branch = modulate(self.feed_forward_norm, visual, shift, scale)
        return gated(visual, gate, self.feed_forward(branch))


class CrossDiT(nn.Module):
    """The diffusion transformer of Kandinsky 5.

    Args:
        config: Architecture and default attention; `ARCHITECTURES` has the published ones.
    """

    def __init__(self, config: CrossDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        dim, time_dim = config.model_dim, config.time_dim
        self.time_embeddings = TimeEmbeddings(dim, time_dim)
        self.text_embeddings = TextEmbeddings(config.in_text_dim, dim)
        self.pooled_text_embeddings = TextEmbeddings(config.in_text_dim2, time_dim)
        self.visual_embeddings = VisualEmbeddings(config.input_dim, dim, config.patch_size)
        self.text_transformer_blocks = nn.ModuleList(
            TransformerEncoderBlock(config) for _ in range(config.num_text_blocks)
        )
        self.visual_transformer_blocks = nn.ModuleList(
            TransformerDecoderBlock(config) for _ in range(config.num_visual_blocks)
        )
        self.out_layer = OutLayer(dim, time_dim, config.out_visual_dim, config.patch_size)

    def forward(
        self,
        latents: Tensor,
        text: Tensor,
        pooled_text: Tensor,
        timestep: Tensor,
        *,
        attention: VisualAttention | CalibratedAttention | None = None,
        cache: Callable[[Blocks, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Predict the velocity that carries data (t = 0) to noise (t = 1).

        Args:
            latents: Noisy latents [B, T, H, W, input_dim], channels last; with `visual_cond` they
                are followed by the condition and its mask (see `sampler.model_input`).
            text: Text features [B, L, in_text_dim].
            pooled_text: Pooled text features [B, in_text_dim2].
            timestep: Times in [0, 1], [B].
            attention: How visual tokens attend to each other; None follows the config,
                CalibratedAttention(calibration) gives every layer and head its own top_p,
                MaskedAttention(mask) forces one mask on every layer, and UlyssesAttention shares
                the tokens out among several GPUs.
            cache: Runs the visual blocks on their tokens [B, S, model_dim], or knows better, as
                `magcache.MagCache` does; None runs them.

        Returns:
            The velocity [B, T, H, W, out_visual_dim].
        """
        self._check(latents, text, pooled_text, timestep)
        time_embed = self.time_embeddings(timestep) + self.pooled_text_embeddings(pooled_text)

        text = self.text_embeddings(text)
        rope = rotary_1d(text.shape[1], self.config.head_dim, device=text.device)
        for block in self.text_transformer_blocks:
            text = self._run(block, text, time_embed, rope)

        visual = self.visual_embeddings(latents)
        shape = visual.shape[1], visual.shape[2], visual.shape[3]
        grid = nabla.TokenGrid(*shape, self.config.block)
        visual = nabla.fractal_flatten(visual.flatten(1, 3), grid)
        cos, sin = rotary_3d(
            shape, self.config.axes_dims, scale=self.config.rope_scale, device=visual.device
        )
        rope = nabla.fractal_flatten(cos, grid), nabla.fractal_flatten(sin, grid)
        attention = attention or self.default_attention()
        if isinstance(attention, UlyssesAttention):
            visual = attention.shard(visual, grid)
            rope = attention.shard(rope[0], grid), attention.shard(rope[1], grid)
        num_layers = len(self.visual_transformer_blocks)
        if isinstance(attention, CalibratedAttention):
            attention.check(num_layers, self.config.model_dim // self.config.head_dim)
            layers: Sequence[VisualAttention] = attention.layers()
        else:
            layers = [attention] * num_layers

        def blocks(visual: Tensor) -> Tensor:
            for block, layer in zip(self.visual_transformer_blocks, layers, strict=True):
                attend = partial(layer, grid=grid)
                visual = self._run(block, visual, text, time_embed, rope, attend)
            return visual

        visual = blocks(visual) if cache is None else cache(blocks, visual)
        if isinstance(attention, UlyssesAttention):
            visual = attention.gather(visual, grid)
        visual = nabla.fractal_unflatten(visual, grid)
        return self.out_layer(visual, time_embed, shape)

    def default_attention(self) -> VisualAttention:
        """The attention that the config asks for."""
        if self.config.top_p is None:
            return DenseAttention()
        return NablaAttention(self.config.top_p, self.config.window)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of tokens; modulations and time embeddings are float32 in every model."""
        return self.visual_embeddings.in_layer.weight.dtype

    def cast(self, dtype: torch.dtype) -> "CrossDiT":
        """Cast the parameters in place, all but those of modulations and time embeddings."""
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if is_float32(name) else dtype)
        return self

    def _run(self, block: nn.Module, *args: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _check(self, latents: Tensor, text: Tensor, pooled_text: Tensor, timestep: Tensor) -> None:
        config, batch = self.config, latents.shape[0]
        if latents.ndim != 5 or latents.shape[-1] != config.input_dim:
            raise ValueError(
                f"latents {list(latents.shape)} must be [B, T, H, W, {config.input_dim}]"
                + (": noisy latents, condition, mask" if config.visual_cond else "")
            )
        if any(n % p for n, p in zip(latents.shape[1:4], config.patch_size, strict=True)):
            raise ValueError(
                f"latents of (T, H, W) {tuple(latents.shape[1:4])} do not divide into patches "
                f"{config.patch_size}; pad or crop them"
            )
        if text.ndim != 3 or text.shape[0] != batch or text.shape[-1] != config.in_text_dim:
            raise ValueError(f"text {list(text.shape)} must be [{batch}, L, {config.in_text_dim}]")
        if list(pooled_text.shape) != [batch, config.in_text_dim2]:
            raise ValueError(
                f"pooled_text {list(pooled_text.shape)} must be [{batch}, {config.in_text_dim2}]"
            )
        if list(timestep.shape) != [batch]:
            raise ValueError(f"timestep {list(timestep.shape)} must be [{batch}], in [0, 1]")


def is_float32(name: str) -> bool:
    """Whether the parameter of this name stays float32 whatever the model's dtype."""
    return not set(FLOAT32_MODULES).isdisjoint(name.split("."))
