"""What a user asks for, and what that means for a preset: known and checked, nothing loaded.

latent frames T' = floor(24 seconds) / 4 + 1, rounded down;   frames = 4 (T' - 1) + 1
latents [1, T', height / 8, width / 8, 16];   height and width are multiples of 16
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kandinsky_model.attention import (
    CalibratedAttention,
    DenseAttention,
    NablaAttention,
    VisualAttention,
)
from kandinsky_model.clip import fit, read_image, rgb, stretch
from kandinsky_model.magcache import Schedule, skip_schedule
from kandinsky_model.memory import MemoryPlan, memory_plan
from kandinsky_model.number import is_number, is_whole
from kandinsky_model.presets import FPS, FRAMES_PER_LATENT, PIXELS_PER_LATENT, Preset, Size
from kandinsky_model.text import CONTENT, NEGATIVE_PROMPTS

MAX_STEPS = 10_000  # far more than help
TOP_P = 0.9  # of `attention="nabla"` where the preset is dense


@dataclass(frozen=True)
class Request:
    """What to generate; None takes what the preset says.

    Attributes:
        prompt: What to show.
        image: The first frame of image to video, the source of image to image: a file, an image of
            PIL, or uint8 [H, W, 3] of torch or NumPy. It is scaled to cover the size, and its
            centre is cut out.
        size: (height, width) in pixels, multiples of 16. None with an image takes what is nearest
            to its shape: of a first frame, all of it is scaled to that, as upstream does.
        seconds: Length of the video.
        num_steps: Euler steps.
        guidance_scale: 1 calls the model once per step, any other scale twice.
        shift: Of the times, see `sampler.timesteps`.
        negative_prompt: What to guide away from.
        seed: Of the noise; the same on every device.
        attention: "nabla", "dense", or how visual tokens attend to each other, for example
            CalibratedAttention(calibration).
        top_p: Attention mass that NABLA keeps.
        magcache: Ratios of MagCache, which leaves out model calls that hardly differ from the one
            before; see `magcache.skip_schedule`.
    """

    prompt: str
    image: str | Path | Image.Image | Tensor | np.ndarray | None = None
    size: Size | None = None
    seconds: float | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    negative_prompt: str | None = None
    seed: int = 0
    attention: Literal["nabla", "dense"] | VisualAttention | CalibratedAttention | None = None
    top_p: float | None = None
    magcache: Sequence[float] | None = None

    def resolve(self, preset: Preset) -> "Job":
        """Check everything, and fill in what the preset says."""
        self._check_prompt()
        image = self._image(preset)
        if image is None and preset.takes_image:
            raise ValueError(f"preset {preset.name} is {preset.task}: it needs an image")
        height, width = self._size(preset, image)
        num_steps = preset.num_steps if self.num_steps is None else self.num_steps
        guidance = preset.guidance_scale if self.guidance_scale is None else self.guidance_scale
        shift = preset.shift if self.shift is None else self.shift
        if not (is_whole(num_steps) and 1 <= num_steps <= MAX_STEPS):
            raise ValueError(
                f"num_steps {num_steps!r} must be a whole number from 1 to {MAX_STEPS}"
            )
        if not (is_number(guidance) and guidance >= 0):
            raise ValueError(
                f"guidance_scale {guidance!r} must be a number from 0; 1 is no guidance"
            )
        if not (is_number(shift) and shift > 0):
            raise ValueError(f"shift {shift!r} must be a positive number")
        if guidance == 1.0 and self.negative_prompt is not None:
            raise ValueError(
                "negative_prompt is not read at guidance_scale 1: leave one of them out"
            )
        if not (is_whole(self.seed) and 0 <= self.seed < 2**63):
            raise ValueError(f"seed {self.seed!r} must be a whole number from 0 to 2^63 - 1")
        if image is not None:
            keeps_all = preset.is_video and self.size is None
            image = (stretch if keeps_all else fit)(image[None], height, width)[0]
        content = CONTENT[preset.task]
        negative = self.negative_prompt
        return Job(
            preset=preset,
            prompt=self.prompt,
            negative_prompt=NEGATIVE_PROMPTS[content] if negative is None else negative,
            image=image,
            latent_shape=(
                self._latent_frames(preset),
                height // PIXELS_PER_LATENT,
                width // PIXELS_PER_LATENT,
            ),
            num_steps=int(num_steps),
            guidance_scale=float(guidance),
            shift=float(shift),
            seed=int(self.seed),
            attention=self._attention(preset),
            schedule=self._schedule(int(num_steps), guidance),
        )

    def plan(self, preset: Preset, device_memory: int | None = None) -> MemoryPlan:
        """What memory it takes; a preset that needs an image has a plan without it too."""
        self._latent_frames(preset)
        size, residuals = self._size(preset, self._image(preset)), 0 if self.magcache is None else 2
        return memory_plan(preset, size, self.seconds, device_memory, residuals=residuals)

    def _check_prompt(self) -> None:
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            if not isinstance(text, str) and (text is not None or name == "prompt"):
                raise ValueError(f"{name} {text!r} must be one text: one request, one result")
            if re.search(r"[\ud800-\udfff]", text or ""):
                raise ValueError(f"{name} {text!r} holds what is no Unicode: write it as UTF-8")
            if command := re.search(r"<\|\w+\|>", text or ""):
                raise ValueError(
                    f"{name} holds {command[0]}, which Qwen2.5-VL does not read as words"
                )
        if not self.prompt.strip():
            raise ValueError(f"prompt {self.prompt!r} is empty: say in words what to show")

    def _image(self, preset: Preset) -> Tensor | None:
        if self.image is None:
            return None
        if not preset.takes_image:
            raise ValueError(f"preset {preset.name} is {preset.task}: it takes no image")
        image = self.image
        if isinstance(image, str | Path):
            image = read_image(image)
        elif isinstance(image, Image.Image):
            image = rgb(image)
        elif not isinstance(image, Tensor | np.ndarray):
            raise ValueError(
                f"image {image!r} is none: give a file, an image of PIL, or uint8 [H, W, 3]"
            )
        dtype, shape = str(image.dtype).removeprefix("torch."), tuple(image.shape)
        if dtype != "uint8" or shape[2:] != (3,) or 0 in shape:
            raise ValueError(
                f"image {dtype} {list(shape)} must be uint8 [H, W, 3] with pixels in it"
            )
        return image.cpu() if isinstance(image, Tensor) else torch.from_numpy(np.array(image))

    def _size(self, preset: Preset, image: Tensor | None) -> Size:
        multiples = preset.size_multiple
        if self.size is None:
            if image is None:
                return preset.size
            if preset.is_video:
                return _same_shape(image, max(h * w for h, w in preset.sizes), multiples)
            shape = image.shape[0] / image.shape[1]
            return min(preset.sizes, key=lambda size: abs(size[0] / size[1] - shape))
        if not (isinstance(self.size, Sequence) and len(self.size) == 2) or not all(
            map(is_whole, self.size)
        ):
            raise ValueError(f"size {self.size!r} must be (height, width) in whole pixels")
        nearest = _round(self.size, multiples)
        if nearest != tuple(self.size):
            raise ValueError(
                f"size {_text(self.size)} must be of multiples of {multiples[0]} pixels; the "
                f"nearest is {_text(nearest)} (height x width)"
            )
        return nearest

    def _latent_frames(self, preset: Preset) -> int:
        if not preset.is_video:
            if self.seconds is not None:
                raise ValueError(f"preset {preset.name} makes images: seconds {self.seconds}")
            return 1
        if self.seconds is None:
            return preset.latent_frames
        shortest = FRAMES_PER_LATENT / FPS
        if not (
            is_number(self.seconds) and shortest <= self.seconds and FPS * self.seconds < math.inf
        ):
            raise ValueError(
                f"seconds {self.seconds!r} make no video: give at least {shortest:.2f}, such as "
                f"the preset's {preset.seconds}"
            )
        return int(FPS * self.seconds) // FRAMES_PER_LATENT + 1

    def _attention(self, preset: Preset) -> VisualAttention | CalibratedAttention:
        model = preset.model
        kind = self.attention or ("dense" if model.top_p is None else "nabla")
        if kind != "nabla" and self.top_p is not None:
            raise ValueError(f"top_p {self.top_p} is of NABLA: give attention 'nabla' too")
        if kind == "dense":
            return DenseAttention()
        if isinstance(kind, str) and kind != "nabla":
            raise ValueError(f"attention {kind!r} is neither 'nabla' nor 'dense'")
        if isinstance(kind, CalibratedAttention):
            kind.check(model.num_visual_blocks, model.model_dim // model.head_dim)
        if not isinstance(kind, str):
            if not (isinstance(kind, CalibratedAttention) or callable(kind)):
                raise ValueError(f"attention {kind!r} is neither 'nabla' nor 'dense' nor callable")
            return kind
        top_p = self.top_p if self.top_p is not None else (model.top_p or TOP_P)
        if not (is_number(top_p) and 0 < top_p <= 1):
            raise ValueError(f"top_p {top_p!r} must be in (0, 1]: the attention mass to keep")
        return NablaAttention(top_p, preset.window)

    def _schedule(self, num_steps: int, guidance_scale: float) -> Schedule | None:
        if self.magcache is None:
            return None
        branches = 1 if guidance_scale == 1.0 else 2
        return skip_schedule(self.magcache, num_steps, branches=branches)


@dataclass(frozen=True)
class Job:
    """A request in full: what the result depends on, beside the weights."""

    preset: Preset
    prompt: str
    negative_prompt: str
    image: Tensor | None
    latent_shape: tuple[int, int, int]
    num_steps: int
    guidance_scale: float
    shift: float
    seed: int
    attention: VisualAttention | CalibratedAttention
    schedule: Schedule | None

    @property
    def frames(self) -> int:
        """Frames that come out."""
        return FRAMES_PER_LATENT * (self.latent_shape[0] - 1) + 1

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""
        _, height, width = self.latent_shape
        return PIXELS_PER_LATENT * height, PIXELS_PER_LATENT * width

    @property
    def is_guided(self) -> bool:
        """Whether the model is called twice a step."""
        return self.guidance_scale != 1.0

    def plan(self, device_memory: int | None = None) -> MemoryPlan:
        """What memory it takes."""
        residuals = 0 if self.schedule is None else len(self.schedule[0])
        seconds = self.frames / FPS
        return memory_plan(self.preset, self.size, seconds, device_memory, residuals=residuals)

    def arguments(self) -> dict[str, Any]:
        """Everything as JSON values, the image by its hash."""
        image = None if self.image is None else self.image.contiguous().numpy().tobytes()
        return {
            "preset": self.preset.name,
            "model": self.preset.model.to_dict(),
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt if self.is_guided else None,
            "image": None if image is None else hashlib.sha256(image).hexdigest(),
            "size": self.size,
            "frames": self.frames,
            "num_steps": self.num_steps,
            "guidance_scale": self.guidance_scale,
            "shift": self.shift,
            "seed": self.seed,
            "attention": repr(self.attention),
            "magcache": None if self.schedule is None else str(self.schedule),
        }


def _same_shape(image: Tensor, area: int, multiples: Size) -> Size:
    """The size of about `area` pixels in the shape of an image [H, W, 3]."""
    scale = math.sqrt(area / (image.shape[0] * image.shape[1]))
    return _round((image.shape[0] * scale, image.shape[1] * scale), multiples)


def _round(size: tuple[float, float], multiples: Size) -> Size:
    height, width = (
        max(1, round(extent / multiple)) * multiple
        for extent, multiple in zip(size, multiples, strict=True)
    )
    return height, width


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
