"""What a preset needs on a device, and how it runs on one that does not hold all of it.

peak = reserve + max over phases (text, model, VAE) of weights on the device + activations
  resident   all weights stay                           offload   only those of the phase are there
  stream     and of the CrossDiT only two blocks: one computes, the next one comes
model, S tokens of C channels, H heads, N blocks of keys:  bfloat16 2 bytes, float32 4 bytes
  rotation   26 S C     tokens, branch, v: 2 each; q, k: normalized 4 each, rotated 4, half 8
  selection  10 S C + 4 H N^2                          tokens, branch, q, k, v; the pooled map
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from kandinsky_model.config import CrossDiTConfig
from kandinsky_model.model import CrossDiT, is_float32
from kandinsky_model.presets import FPS, FRAMES_PER_LATENT, PIXELS_PER_LATENT, Preset, Size
from kandinsky_model.vae import IMAGE_TILE, is_tiled

M = TypeVar("M", bound=nn.Module)

Mode = Literal["resident", "offload", "stream"]

MODES: dict[Mode, str] = {
    "resident": "everything stays on the device",
    "offload": "text encoders, model and VAE take turns; Qwen2.5-VL layer by layer",
    "stream": "as offload, and the model block by block",
}
GB = 10**9
# An allowance, not a measurement: the context of CUDA, its libraries, and gaps between tensors.
RESERVE = 1 * GB


# The plan.


@dataclass(frozen=True)
class Part:
    """Bytes of one part's weights.

    Attributes:
        name: What it is.
        weights: All of them.
        streamed: The most that is on the device at a time when its blocks come one by one.
    """

    name: str
    weights: int
    streamed: int


@dataclass(frozen=True)
class Phase:
    """Parts that work together, and the bytes they need beside their weights."""

    parts: tuple[Part, ...]
    activations: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a preset needs at a size.

    Attributes:
        preset: Its name.
        size: Height and width in pixels.
        frames: Frames, 1 for an image.
        tokens: Visual tokens of the model.
        phases: Text, model, VAE.
        device_memory: Bytes that there are; None when nobody asked.
    """

    preset: str
    size: Size
    frames: int
    tokens: int
    phases: tuple[Phase, Phase, Phase]
    device_memory: int | None = None

    @property
    def peaks(self) -> dict[Mode, int]:
        """Bytes on the device at the worst moment, in every mode."""
        text, model, vae = self.phases
        everything = sum(part.weights for phase in self.phases for part in phase.parts)
        streamed_text = text.activations + sum(part.streamed for part in text.parts)
        decode = vae.activations + sum(part.weights for part in vae.parts)
        (crossdit,) = model.parts
        return {
            "resident": RESERVE + everything + max(phase.activations for phase in self.phases),
            "offload": RESERVE + max(streamed_text, crossdit.weights + model.activations, decode),
            "stream": RESERVE + max(streamed_text, crossdit.streamed + model.activations, decode),
        }

    @property
    def mode(self) -> Mode | None:
        """The fastest mode that fits, or None."""
        for mode, peak in self.peaks.items():
            if self.device_memory is None or peak <= self.device_memory:
                return mode
        return None

    @property
    def fits(self) -> bool:
        """Whether any mode does."""
        return self.mode is not None

    def check(self, device: torch.device | str = "cuda") -> Mode:
        """The fastest mode that fits; if none does, a ValueError with the figures.

        Args:
            device: On a CPU, weights are files mapped into memory: only what is computed counts.
        """
        mode, height, width = self.mode, *self.size
        job = f"{self.preset} at {height}x{width} with {self.frames} frames"
        if mode is None and self.device_memory is not None:
            raise ValueError(
                f"{job} needs {_gb(min(self.peaks.values()))} of device memory even when streamed, "
                f"and there are {_gb(self.device_memory)}; take a smaller size or fewer seconds"
            )
        needed, there = max(phase.activations for phase in self.phases), host_memory()
        if torch.device(device).type == "cpu" and needed > there:
            raise ValueError(
                f"{job} needs {_gb(needed)} beside its weights, and this machine has {_gb(there)}; "
                "take a smaller size or fewer seconds"
            )
        return mode or "resident"

    def describe(self) -> str:
        """A table for people, in GB (10^9 bytes)."""
        height, width = self.size
        frames = "1 image" if self.frames == 1 else f"{self.frames} frames"
        lines = [
            f"{self.preset}: {frames} of {height}x{width}, {self.tokens:,} tokens",
            "",
            f"{'':28}{'weights':>12}{'activations':>14}",
        ]
        for phase in self.phases:
            activations = f"{_gb(phase.activations):>14}"
            for part in phase.parts:
                lines.append(f"{part.name:28}{_gb(part.weights):>12}{activations}")
                activations = ""
        lines += ["", f"{'on the device at most':28}{'':12}"]
        for mode, peak in self.peaks.items():
            chosen = "  <- fits" if self.device_memory and mode == self.mode else ""
            lines.append(f"{mode:28}{_gb(peak):>12}  {MODES[mode]}{chosen}")
        if self.device_memory is not None:
            verdict = "" if self.fits else "  <- too little"
            lines.append(f"{'there are':28}{_gb(self.device_memory):>12}{verdict}")
        return "\n".join(lines)


def memory_plan(
    preset: Preset,
    size: Size | None = None,
    seconds: float | None = None,
    device_memory: int | None = None,
    *,
    residuals: int = 0,
) -> MemoryPlan:
    """What a preset needs, its weights in the public dtypes, its attention by a kernel of `nabla`.

    Args:
        preset: What to generate.
        size: Height and width in pixels; None is the preset's.
        seconds: Length of a video; None is the preset's.
        device_memory: Bytes of the device; None leaves open what fits.
        residuals: Those that MagCache keeps, one for each model call of a step: 2 with guidance.
    """
    height, width = size = size or preset.size
    frames, rows, columns = preset.latent_shape(size)
    if seconds is not None and preset.is_video:
        frames = int(FPS * seconds) // FRAMES_PER_LATENT + 1
    tokens = math.prod(
        extent // patch
        for extent, patch in zip((frames, rows, columns), preset.model.patch_size, strict=True)
    )
    if tokens < 1 or (device_memory is not None and device_memory < 1):
        raise ValueError(
            f"size {size}, seconds {seconds} and device_memory {device_memory} must be positive"
        )
    output_frames = (frames - 1) * FRAMES_PER_LATENT + 1
    pixels = output_frames * height * width
    frame = height * width if preset.takes_image else 0
    vae = video_vae(pixels, frame) if preset.is_video else image_vae(height, width)
    activations = model_activations(preset.model, tokens)
    if residuals:  # kept, and a new one beside the tokens it comes from
        activations += (residuals + 1) * 2 * tokens * preset.model.model_dim
    return MemoryPlan(
        preset=preset.name,
        size=size,
        frames=output_frames,
        tokens=tokens,
        phases=(
            Phase((QWEN, CLIP), TEXT_ACTIVATIONS),
            Phase((crossdit(preset.model),), activations),
            vae,
        ),
        device_memory=device_memory,
    )


# Parameters of the public text encoders: Qwen2.5-VL-7B in bfloat16, of which the vision tower and
# the token embedding are the largest parts that can follow each other; CLIP ViT-L/14 in float32.
QWEN = Part("Qwen2.5-VL-7B, bfloat16", 2 * 8_292_166_656, 2 * (676_550_144 + 544_997_376))
CLIP = Part("CLIP ViT-L/14, float32", 4 * 123_060_480, 4 * 123_060_480)
# Of up to 1024 tokens: the gate, the branch and their product in a layer of 18,944 channels, and
# four times the 3,584 channels of a token.
TEXT_ACTIVATIONS = 1024 * (3 * 18_944 + 4 * 3_584) * 2


@cache
def crossdit(config: CrossDiTConfig) -> Part:
    """The model, in bfloat16 with float32 modulations and time embeddings."""
    with torch.device("meta"):
        model = CrossDiT(config)
    sizes = {
        name: value.numel() * (4 if is_float32(name) else 2)
        for name, value in model.named_parameters()
    }
    blocks: dict[str, int] = {}
    for name, size in sizes.items():
        if "_blocks." in name:
            block = ".".join(name.split(".")[:2])
            blocks[block] = blocks.get(block, 0) + size
    weights = sum(sizes.values())
    rest = weights - sum(blocks.values())
    return Part("CrossDiT, bfloat16 / float32", weights, rest + sum(sorted(blocks.values())[-2:]))


def model_activations(config: CrossDiTConfig, tokens: int) -> int:
    """Bytes at the worst moment of a step; the formulas are at the top of this file.

    Beside a block there are the tables of the positions, 8 S D, and the sampler's latents: four of
    float32 and two inputs of the model.
    """
    heads = config.model_dim // config.head_dim
    rotation = 26 * tokens * config.model_dim
    selection = 0
    if config.top_p is not None:
        keys = -(-tokens // math.prod(config.block))
        selection = 10 * tokens * config.model_dim + 4 * heads * keys**2
    latents = 4 * 4 * config.out_visual_dim + 2 * 2 * config.input_dim
    return (
        max(rotation, selection)
        + 8 * tokens * config.head_dim
        + tokens * config.patch_volume * latents
    )


def video_vae(pixels: int, first_frame: int = 0) -> Phase:
    """HunyuanVideo's, in float16, decoding tile by tile into frames of that many pixels in all.

    A tile of 17 x 256 x 256 pixels takes 2,350 bytes each. All frames exist twice in float16 while
    tiles are joined, later thrice in float32 and once in float16. A first frame is counted if there
    is one of so many pixels.
    """
    tile = 17 * 256 * 256 * 2350
    part = Part("VAE of HunyuanVideo, float16", 2 * 246_478_803, 2 * 246_478_803)
    decoding = max(tile + 2 * 2 * 3 * pixels, (2 + 3 * 4) * 3 * pixels)
    return Phase((part,), max(decoding, first_frame_activations(first_frame)))


def first_frame_activations(pixels: int) -> int:
    """Bytes for encoding a first frame, whole.

    A pixel takes 1,800 bytes. In the middle, 64 pixels are a token of 1,024 channels, and attend
    under a mask that exists in float32 and in float16.
    """
    tokens = pixels // PIXELS_PER_LATENT**2
    return max(1800 * pixels, (4 + 2) * tokens**2 + 2 * 1024 * tokens)


def image_vae(height: int, width: int) -> Phase:
    """FLUX's, in bfloat16: the last layers hold three times 256 channels of every pixel of a tile.

    A large image exists almost twice while its tiles are decoded, and twice more while they are
    joined.
    """
    part = Part("VAE of FLUX, bfloat16", 2 * 83_819_683, 2 * 83_819_683)
    image, decoder = 3 * 2 * height * width, 3 * 256 * 2
    if not is_tiled(height, width):
        return Phase((part,), decoder * height * width)
    tile = decoder * min(height, IMAGE_TILE) * min(width, IMAGE_TILE)
    return Phase((part,), max(tile + 2 * image, 4 * image))


def device_memory(device: torch.device | str) -> int | None:
    """Bytes that are free on a CUDA device; None for others."""
    device = torch.device(device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def host_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB"


# Streaming.


@contextmanager
def streamed(
    module: M, device: torch.device | str, blocks: Sequence[nn.Module] | None = None
) -> Iterator[M]:
    """Run a module on a device that need not hold all of it.

    Its weights stay where they are, usually on the CPU, where they may be a memory-mapped file.
    Copies of all but the blocks are on the device within the context. A block's copy comes when it
    is called, or while the block before it computes, and goes when it is done; so the device holds
    two blocks at most. Weights must not change meanwhile. Not for training.

    Args:
        module: What will be called.
        device: Where.
        blocks: Submodules in the order they are called in; None takes those of a CrossDiT, and an
            empty sequence none: then all of the module is on the device.
    """
    if blocks is None:
        if not isinstance(module, CrossDiT):
            raise ValueError(f"blocks of a {type(module).__name__} are not known; pass them")
        blocks = [*module.text_transformer_blocks, *module.visual_transformer_blocks]
    inside = {id(tensor) for block in blocks for tensor in _tensors(block)}
    rest = [tensor for tensor in _tensors(module) if id(tensor) not in inside]
    stream = _Stream([_Visitor(_tensors(block)) for block in blocks], torch.device(device))
    with ExitStack() as undo:
        visitor = _Visitor(rest)
        undo.callback(visitor.leave)
        visitor.enter(visitor.copies(stream.device))
        undo.callback(stream.clear)
        for index, block in enumerate(blocks):
            before = block.register_forward_pre_hook(partial(stream.before, index))
            undo.callback(before.remove)
            after = block.register_forward_hook(partial(stream.after, index))
            undo.callback(after.remove)
        yield module


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]


class _Visitor:
    """Tensors whose data are copies on a device for a while."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.home = [tensor.data for tensor in tensors]

    def copies(self, device: torch.device) -> list[Tensor]:
        """Copies on the device; to CUDA through pinned memory, so that the host need not wait."""
        pinned = device.type == "cuda"
        return [
            (home.pin_memory() if pinned and home.device.type == "cpu" else home).to(
                device, non_blocking=pinned, copy=True
            )
            for home in self.home
        ]

    def enter(self, copies: list[Tensor]) -> None:
        for tensor, copy in zip(self.tensors, copies, strict=True):
            tensor.data = copy

    def leave(self) -> None:
        for tensor, home in zip(self.tensors, self.home, strict=True):
            tensor.data = home


class _Stream:
    """Blocks that come one ahead, on a side stream of CUDA, and go when they are done."""

    def __init__(self, visitors: list[_Visitor], device: torch.device) -> None:
        self.visitors, self.device = visitors, device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.coming: tuple[int, list[Tensor]] | None = None  # the next block
        self.present: list[Tensor] = []  # the block that computes, or was the last to
        self.done: torch.cuda.Event | None = None  # when it has

    def before(self, index: int, *_: Any) -> None:
        """Block `index` is called."""
        if self.coming is None or self.coming[0] != index:
            self.coming = None
            self.coming = index, self.fetch(index)
        if self.side is not None:
            main = torch.cuda.current_stream(self.device)
            main.wait_stream(self.side)
            # Copies are made on the side stream alone: it takes over the memory of the block
            # before this one when that has computed.
            if self.done is not None:
                self.side.wait_event(self.done)
        self.present, self.coming = self.coming[1], None
        self.visitors[index].enter(self.present)

    def after(self, index: int, *_: Any) -> None:
        """The work of block `index` is under way; meanwhile the next one comes."""
        self.visitors[index].leave()
        if self.side is not None:
            self.done = torch.cuda.current_stream(self.device).record_event()
        following = (index + 1) % len(self.visitors)
        self.coming = following, self.fetch(following)

    def fetch(self, index: int) -> list[Tensor]:
        with nullcontext() if self.side is None else torch.cuda.stream(self.side):
            return self.visitors[index].copies(self.device)

    def clear(self) -> None:
        if self.side is not None:
            torch.cuda.current_stream(self.device).synchronize()
        self.coming, self.present = None, []
        for visitor in self.visitors:
            visitor.leave()
