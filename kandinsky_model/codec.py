"""A fixed codec in place of a VAE: frames [T, H, W, 3] <-> latents [T, H/4, W/4, C].

z = (basis p) / scale,   p = basis^T (scale * z),   p a patch of 3 colours x 4 rows x 4 columns
The basis is the orthonormal cosine basis in all three directions. With all 48 channels the codec
is lossless; the 16 of the default (10 of brightness, 3 and 3 of colour) keep what the eye sees.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

PATCH = 4


@dataclass(frozen=True)
class CosineCodec:
    """Keeps the lowest of the 16 frequencies of a patch, for brightness and two colours."""

    channels: tuple[int, int, int] = (10, 3, 3)

    @property
    def latent_dim(self) -> int:
        """Channels of the latents."""
        return sum(self.channels)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames, uint8 [T, H, W, 3], to float32 latents [T, H/4, W/4, C]."""
        if frames.shape[-3] % PATCH or frames.shape[-2] % PATCH:
            raise ValueError(
                f"frames of {frames.shape[-3]}x{frames.shape[-2]} do not divide into "
                f"{PATCH}x{PATCH} patches; crop them"
            )
        basis, scale = self._basis()
        pattern = "... (h p) (w q) c -> ... h w (c p q)"
        patches = rearrange(frames.float() / 127.5 - 1.0, pattern, p=PATCH, q=PATCH)
        return patches @ basis.T / scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [T, h, w, C] to frames, uint8 [T, 4h, 4w, 3]."""
        basis, scale = self._basis()
        pattern = "... h w (c p q) -> ... (h p) (w q) c"
        frames = rearrange((latents.float() * scale) @ basis, pattern, p=PATCH, q=PATCH, c=3)
        return ((frames + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def _basis(self) -> tuple[Tensor, Tensor]:
        """Kept rows of the 48x48 cosine basis [C, 48], and their scales [C]."""
        rows, scales = [], []
        frequencies = sorted(
            ((u, v) for u in range(PATCH) for v in range(PATCH)), key=lambda uv: (sum(uv), uv)
        )
        colour, pixel = cosine_basis(3), cosine_basis(PATCH)
        for plane, kept in enumerate(self.channels):
            for u, v in frequencies[:kept]:
                rows.append(torch.einsum("c,p,q->cpq", colour[plane], pixel[u], pixel[v]).flatten())
                scales.append(_SCALE[plane] * _DECAY ** (u + v))
        return torch.stack(rows), torch.tensor(scales)


def to_motion(latents: Tensor) -> Tensor:
    """Keep the first frame of latents [..., T, h, w, C]; turn the others into what they add to it.

    What stands still is zero then, and a model of motion need not draw it again.
    """
    first, later = latents.split((1, latents.shape[-4] - 1), dim=-4)
    return torch.cat([first, (later - first) / _MOTION_SCALE], dim=-4)


def from_motion(motion: Tensor) -> Tensor:
    """The latents [..., T, h, w, C] of which `motion` is `to_motion`."""
    first, later = motion.split((1, motion.shape[-4] - 1), dim=-4)
    return torch.cat([first, first + later * _MOTION_SCALE], dim=-4)


def cosine_basis(n: int) -> Tensor:
    """The orthonormal DCT-II of n points, rows are frequencies, [n, n]."""
    k = torch.arange(n)
    basis = torch.cos(math.pi / n * torch.outer(k, k + 0.5)) * math.sqrt(2.0 / n)
    basis[0] /= math.sqrt(2.0)
    return basis


# In natural frames the lowest brightness channel then has a standard deviation of about 2, the
# others of about 0.5: noise hides fine detail before coarse, as in pixels, and both are learnt.
_SCALE = (1.6, 0.5, 0.5)
_DECAY = 0.6
# What the later frames of the training clips add to the first then has about unit variance.
_MOTION_SCALE = 0.4
