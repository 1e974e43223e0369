"""The parts of a CrossDiT that are not attention.

time      t in [0, 1] -> sinusoid(1000 t) -> MLP                         [B, time_dim], fp32
rope      angle = position / scale * 10000^(-2i/d) per axis -> cos, sin   [S, D/2] each, fp32
modulate  norm(x) * (1 + scale) + shift;  gated: x + gate * branch                computed in fp32
Attribute names are the keys of the public checkpoints.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn


def rotary_frequencies(dim: int, *, device: torch.device | None = None) -> Tensor:
    """10000^(-i / dim) for i < dim, float32 [dim]."""
    return torch.exp(-math.log(10000.0) / dim * torch.arange(dim, device=device).float())


class TimeEmbeddings(nn.Module):
    """Embeds t in [0, 1] (1 is noise) as float32 [B, time_dim]."""

    def __init__(self, model_dim: int, time_dim: int) -> None:
        super().__init__()
        self.model_dim = model_dim
        self.in_layer = nn.Linear(model_dim, time_dim)
        self.activation = nn.SiLU()
        self.out_layer = nn.Linear(time_dim, time_dim)

    def forward(self, timestep: Tensor) -> Tensor:
        """Timesteps [B] to embeddings [B, time_dim]."""
        frequencies = rotary_frequencies(self.model_dim // 2, device=timestep.device)
        angles = torch.outer(1000.0 * timestep.float(), frequencies)
        with torch.autocast(timestep.device.type, enabled=False):
            waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
            return self.out_layer(self.activation(self.in_layer(waves)))


class TextEmbeddings(nn.Module):
    """Projects and normalizes text features."""

    def __init__(self, text_dim: int, model_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(text_dim, model_dim)
        self.norm = nn.LayerNorm(model_dim)

    def forward(self, text: Tensor) -> Tensor:
        """Features [..., text_dim] to [..., model_dim]."""
        return self.norm(self.in_layer(text))


class VisualEmbeddings(nn.Module):
    """Turns each patch of latents into one token."""

    def __init__(self, input_dim: int, model_dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.in_layer = nn.Linear(math.prod(patch_size) * input_dim, model_dim)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [B, T, H, W, C] to tokens [B, T/pt, H/ph, W/pw, model_dim]."""
        pt, ph, pw = self.patch_size
        pattern = "b (t pt) (h ph) (w pw) c -> b t h w (pt ph pw c)"
        return self.in_layer(rearrange(latents, pattern, pt=pt, ph=ph, pw=pw))


def rotary_1d(
    length: int, dim: int, *, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a text sequence, float32 [length, dim / 2] each."""
    positions = torch.arange(length, device=device).float()
    angles = torch.outer(positions, rotary_frequencies(dim // 2, device=device))
    return angles.cos(), angles.sin()


def rotary_3d(
    shape: tuple[int, int, int],
    axes_dims: tuple[int, int, int],
    *,
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a (T, H, W) grid in raster order, float32 [T * H * W, D / 2] each."""
    angles = []
    for axis, (length, dim, divisor) in enumerate(zip(shape, axes_dims, scale, strict=True)):
        positions = torch.arange(length, device=device).float()
        angle = torch.outer(positions, rotary_frequencies(dim // 2, device=device)) / divisor
        view = [1, 1, 1, dim // 2]
        view[axis] = length
        angles.append(angle.view(view).expand(*shape, dim // 2))
    table = torch.cat(angles, dim=-1).flatten(0, 2)
    return table.cos(), table.sin()


class Modulation(nn.Module):
    """Turns the time embedding into shifts, scales and gates, in float32; zero at the start."""

    def __init__(self, time_dim: int, model_dim: int, num_params: int) -> None:
        super().__init__()
        self.num_params = num_params
        self.activation = nn.SiLU()
        self.out_layer = nn.Linear(time_dim, num_params * model_dim)
        nn.init.zeros_(self.out_layer.weight)
        nn.init.zeros_(self.out_layer.bias)

    def forward(self, time_embed: Tensor) -> tuple[Tensor, ...]:
        """Embeddings [B, time_dim] to `num_params` tensors [B, 1, model_dim]."""
        with torch.autocast(time_embed.device.type, enabled=False):
            params = self.out_layer(self.activation(time_embed)).float()
        return params.unsqueeze(1).chunk(self.num_params, dim=-1)


def modulate(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift in float32, returned in x's dtype [B, S, C]."""
    return (norm(x.float()) * (1.0 + scale) + shift).type_as(x)


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch in float32, returned in x's dtype [B, S, C]."""
    return (x.float() + gate * branch.float()).type_as(x)


class FeedForward(nn.Module):
    """Two linear layers without biases around an exact GELU."""

    def __init__(self, model_dim: int, ff_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(model_dim, ff_dim, bias=False)
        self.activation = nn.GELU()
        self.out_layer = nn.Linear(ff_dim, model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, S, model_dim] to the same shape."""
        return self.out_layer(self.activation(self.in_layer(x)))


class OutLayer(nn.Module):
    """Turns tokens into patches of velocity, in which, unlike at the input, channels come first."""

    def __init__(
        self, model_dim: int, time_dim: int, visual_dim: int, patch_size: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.modulation = Modulation(time_dim, model_dim, 2)
        self.norm = nn.LayerNorm(model_dim, elementwise_affine=False)
        self.out_layer = nn.Linear(model_dim, math.prod(patch_size) * visual_dim)

    def forward(self, tokens: Tensor, time_embed: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Tokens [B, T*H*W, model_dim] of a (T, H, W) grid to velocity [B, T*pt, H*ph, W*pw, C]."""
        shift, scale = self.modulation(time_embed)
        patches = self.out_layer(modulate(self.norm, tokens, shift, scale))
        (t, h, w), (pt, ph, pw) = shape, self.patch_size
        pattern = "b (t h w) (c pt ph pw) -> b (t pt) (h ph) (w pw) c"
        return rearrange(patches, pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)
