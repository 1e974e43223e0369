"""Pixels to latents and back: frames uint8 [T, H, W, 3] <-> latents [1, T', H / 8, W / 8, C].

latents = scaling_factor * z,   z ~ posterior(frames / 127.5 - 1),   T' = (T - 1) / 4 + 1
frames  = (clamp(decoder(latents / scaling_factor), -1, 1) + 1) * 127.5, cut to whole numbers
Videos take the VAE of HunyuanVideo, images (T = 1) that of FLUX, whose shift upstream leaves out.
As upstream does, a first frame is encoded whole, and a video is decoded tile by tile. Images whose
sides are published ones are whole, as upstream's are; larger ones go tile by tile both ways.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kandinsky_model.config import CrossDiTConfig
from kandinsky_model.number import is_number
from kandinsky_model.presets import FRAMES_PER_LATENT, PIXELS_PER_LATENT, PRESETS
from kandinsky_model.pretrained import read_model, require

# Pixels of a tile, and from one tile to the next. Upstream's frames; it cuts rows and columns as
# the free memory allows, which would make the result depend on the machine.
TILE_FRAMES, STRIDE_FRAMES = 16, 8
TILE_SIZE, STRIDE_SIZE = 256, 192
IMAGE_TILE, IMAGE_STRIDE = 1024, 768
IMAGE_WHOLE = max(max(size) for row in PRESETS.values() if not row.is_video for size in row.sizes)


class VAE(nn.Module):
    """A variational autoencoder of diffusers.

    Args:
        model: An `AutoencoderKLHunyuanVideo` or an `AutoencoderKL`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.eval()
        self.scaling_factor: float = model.config.scaling_factor
        self.is_video = hasattr(model, "temporal_compression_ratio")
        if self.is_video:
            model.enable_tiling(
                tile_sample_min_height=TILE_SIZE,
                tile_sample_min_width=TILE_SIZE,
                tile_sample_min_num_frames=TILE_FRAMES,
                tile_sample_stride_height=STRIDE_SIZE,
                tile_sample_stride_width=STRIDE_SIZE,
                tile_sample_stride_num_frames=STRIDE_FRAMES,
            )
        else:
            model.tile_sample_min_size = IMAGE_TILE
            model.tile_latent_min_size = IMAGE_TILE // PIXELS_PER_LATENT
            model.tile_overlap_factor = 1 - IMAGE_STRIDE / IMAGE_TILE

    @classmethod
    def load(cls, folder: Path, *, is_video: bool, dtype: torch.dtype) -> "VAE":
        """Read a VAE from a local folder with its config.json and its safetensors."""
        library = require("diffusers")
        kind = library.AutoencoderKLHunyuanVideo if is_video else library.AutoencoderKL
        return cls(read_model(kind, folder, torch_dtype=dtype))

    def check(self, config: CrossDiTConfig) -> None:
        """Raise an error if its latents are not those that a model of `config` takes."""
        found = self.model.config
        name = found.get("_name_or_path", type(self.model).__name__)
        if not (is_number(self.scaling_factor) and self.scaling_factor > 0):
            raise ValueError(
                f"scaling_factor {self.scaling_factor!r} of this VAE must be a positive number: "
                f"{name}"
            )
        if self.is_video:
            ratios = found.spatial_compression_ratio, found.temporal_compression_ratio
        else:
            ratios = 2 ** (len(found.block_out_channels) - 1), FRAMES_PER_LATENT
        wanted = config.out_visual_dim, PIXELS_PER_LATENT, FRAMES_PER_LATENT
        if (latents := (found.latent_channels, *ratios)) != wanted:
            raise ValueError(
                f"latents of this VAE have {latents[0]} channels, one for {latents[1]} pixels and "
                f"{latents[2]} frames, where the model takes {wanted[0]}, {wanted[1]} and "
                f"{wanted[2]}: {name}"
            )

    @torch.no_grad()
    def encode(self, frames: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Sample latents [1, T', H / 8, W / 8, C] of frames [T, H, W, 3].

        Args:
            frames: uint8; T is 1 or, for videos, a multiple of 4 plus 1.
            generator: Draws the sample, on the CPU, so that it is the same for every device.
        """
        pixels = frames.permute(3, 0, 1, 2)[None].to(self.model.device).float() / 127.5 - 1.0
        pixels = pixels.to(self.model.dtype)
        self.model.use_tiling = False  # of rows and columns
        if not self.is_video:
            pixels = pixels[:, :, 0]
            self.model.use_tiling = is_tiled(*frames.shape[1:3])
        posterior = self.model.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        z = posterior.mean + posterior.std * noise.to(posterior.mean)
        z = z if self.is_video else z[:, :, None]
        return (z * self.scaling_factor).permute(0, 2, 3, 4, 1)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, progress: str | None = None) -> Tensor:
        """Frames [T, H, W, 3], uint8 on the CPU, of latents [1, T', H / 8, W / 8, C].

        Args:
            latents: Of one video or image.
            progress: Label of the progress bar; None shows no bar.
        """
        z = latents.to(self.model.device, self.model.dtype).permute(0, 4, 1, 2, 3)
        z = z / self.scaling_factor
        tiles = self.tiles(*latents.shape[1:4])
        self.model.use_tiling = self.is_video or tiles > 1
        if not self.is_video:
            z = z[:, :, 0]
        with tqdm(total=tiles, desc=progress, disable=progress is None) as bar:
            hook = self.model.decoder.register_forward_hook(lambda *_: bar.update() and None)
            try:
                pixels = self.model.decode(z).sample
            finally:
                hook.remove()
        pixels = pixels if self.is_video else pixels[:, :, None]
        pixels = pixels[0].float().clamp_(-1.0, 1.0).add_(1.0).mul_(127.5).to(torch.uint8)
        return pixels.permute(1, 2, 3, 0).cpu().contiguous()

    def tiles(self, frames: int, height: int, width: int) -> int:
        """How many tiles latents of this size are decoded in."""
        if not self.is_video:
            stride = IMAGE_STRIDE // PIXELS_PER_LATENT
            tiled = is_tiled(height * PIXELS_PER_LATENT, width * PIXELS_PER_LATENT)
            return -(-height // stride) * -(-width // stride) if tiled else 1
        in_time, in_space = (
            self.model.temporal_compression_ratio,
            self.model.spatial_compression_ratio,
        )
        count = 1
        if frames > TILE_FRAMES // in_time:
            count *= -(-frames // (STRIDE_FRAMES // in_time))
        if max(height, width) > TILE_SIZE // in_space:
            stride = STRIDE_SIZE // in_space
            count *= -(-height // stride) * -(-width // stride)
        return count


def is_tiled(height: int, width: int) -> bool:
    """Whether an image of this size in pixels is too large to be encoded and decoded whole."""
    return max(height, width) > IMAGE_WHOLE
