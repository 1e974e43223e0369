"""`nabla demo`: NABLA attention at work on a real clip, on any machine, in about two minutes.

1. Continues frames the tiny model never saw, dense and with NABLA, from the same noise.
2. Times dense against NABLA attention on q, k, v of that model at a longer sequence.
3. Says what it wrote and which backend ran.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

import nabla
from kandinsky_model.attention import DenseAttention, NablaAttention, VisualAttention
from kandinsky_model.checkpoint import load_checkpoint
from kandinsky_model.clip import centre, read_clip, side_by_side, write_gif, write_mp4
from kandinsky_model.codec import CosineCodec, from_motion, to_motion
from kandinsky_model.model import CrossDiT
from kandinsky_model.sampler import empty_text, model_input, sample
from kandinsky_model.train import HELD_OUT, Recipe
from nabla.dispatch import resolve
from nabla.inspect import draw_mask, recall

WEIGHTS = Path(__file__).parent / "weights" / "tiny.safetensors"
CLIP = "carphone_pristine"
FRAMES, STRIDE, SIZE = Recipe.frames, Recipe.stride, Recipe.size
FPS = 12
STEPS, SHIFT = 12, 8.0
LONG_FRAMES = (16, 64)
SPARSER, DENSER = 0.35, 0.9  # top_p beside the model's own: a density near 0.1, and K5's
REPEATS = 3


@dataclass
class Recorder:
    """An attention that keeps what it was called with, one (q, k, v, grid) per layer."""

    attention: VisualAttention
    calls: list[tuple[Tensor, Tensor, Tensor, nabla.TokenGrid]] = field(default_factory=list)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: nabla.TokenGrid) -> Tensor:
        """Attend as `attention` does."""
        self.calls.append((q, k, v, grid))
        return self.attention(q, k, v, grid)


@dataclass(frozen=True)
class Comparison:
    """Dense against NABLA attention on the same q, k and v; seconds are medians."""

    tokens: int
    top_p: float
    density: float
    dense_seconds: float
    nabla_seconds: float
    retained_mass: float
    relative_error: float

    @property
    def speedup(self) -> float:
        """How many times faster NABLA attention is, its mask included."""
        return self.dense_seconds / self.nabla_seconds


def run(
    out: Path | str = "out", *, steps: int = STEPS, long_frames: tuple[int, ...] = LONG_FRAMES
) -> None:
    """Run the demo.

    Args:
        out: Folder for the videos and the picture.
        steps: Euler steps of each sample.
        long_frames: Lengths of the sequences to time, in frames of 256 tokens.
    """
    out, console = Path(out), Console()
    model = load_checkpoint(WEIGHTS, dtype=torch.float32)
    sparse = model.default_attention()
    assert isinstance(sparse, NablaAttention), "the tiny preset attends with NABLA"
    backend = resolve(
        "auto",
        device="cpu",
        head_dim=model.config.head_dim,
        dtype=torch.float32,
        block_size=math.prod(model.config.block),
    )
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(
        f"[bold]nabla demo[/]: CrossDiT of {millions:.1f} M parameters, top_p {sparse.top_p}, "
        f"window {sparse.window}, backend [bold]{backend}[/], {torch.get_num_threads()} threads"
    )

    real = centre(read_clip(CLIP, start=HELD_OUT, frames=FRAMES, stride=STRIDE), SIZE, SIZE)
    dense = continue_clip(model, real, DenseAttention(), steps=steps, progress="dense")
    ours = continue_clip(model, real, sparse, steps=steps, progress="NABLA")
    beside = side_by_side(
        [("real", real), ("dense attention", dense), ("NABLA attention", ours)], zoom=2
    )
    written = [
        write_mp4(beside, out / "side_by_side.mp4", fps=FPS),
        write_gif(beside, out / "side_by_side.gif", fps=FPS),
    ]
    console.print(
        f"{CLIP}, every {STRIDE}nd frame from {HELD_OUT}: never trained on, only the first given. "
        f"PSNR of the later frames: dense {psnr(dense[1:], real[1:]):.1f} dB, NABLA "
        f"{psnr(ours[1:], real[1:]):.1f} dB, the first frame repeated "
        f"{psnr(real[:1].expand_as(real)[1:], real[1:]):.1f} dB; "
        f"NABLA against dense {psnr(ours[1:], dense[1:]):.1f} dB."
    )

    comparisons = []
    for frames in long_frames:
        q, k, v, grid = long_attention(model, frames)
        if frames == long_frames[0]:
            picture = out / "block_masks.png"
            written.append(draw_mask(sparse.mask(q, k, grid), picture, heads=range(q.shape[1])))
        for top_p in (SPARSER, sparse.top_p, DENSER):
            comparisons.append(compare(q, k, v, grid, replace(sparse, top_p=top_p)))
    console.print(_table(comparisons, title=f"Attention of layer {_middle(model)} on this clip"))
    if any(comparison.speedup < 1 for comparison in comparisons):
        console.print(
            "[yellow]A speed-up below 1 means that NABLA is slower there.[/] `nabla info` lists "
            "the backends, and why one is missing."
        )
    for path in written:
        console.print(f"wrote {path}")


def continue_clip(
    model: CrossDiT,
    frames: Tensor,
    attention: VisualAttention,
    *,
    steps: int,
    progress: str | None = None,
) -> Tensor:
    """Sample what follows the first of `frames` [T, H, W, 3], always from the same noise."""
    codec = CosineCodec()
    latents = to_motion(codec.encode(frames)[None])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    sampled = sample(
        model, noise, empty_text(model.config, 1), first_frame=latents[:, :1], num_steps=steps,
        shift=SHIFT, attention=attention, progress=progress,
    )  # fmt: skip
    return codec.decode(from_motion(sampled[0]))


@torch.no_grad()
def long_attention(model: CrossDiT, frames: int) -> tuple[Tensor, Tensor, Tensor, nabla.TokenGrid]:
    """q, k, v of the middle layer for the last `frames` frames of the clip, half way to noise."""
    clip = centre(read_clip(CLIP)[-frames:], SIZE, SIZE)
    latents = to_motion(CosineCodec().encode(clip)[None])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    x, t = model_input(latents.lerp(noise, 0.5), latents[:, :1]), torch.tensor([0.5])
    recorder = Recorder(model.default_attention())
    model(x, *empty_text(model.config, 1), t, attention=recorder)
    return recorder.calls[_middle(model)]


@torch.no_grad()
def compare(
    q: Tensor, k: Tensor, v: Tensor, grid: nabla.TokenGrid, sparse: NablaAttention
) -> Comparison:
    """Time dense and NABLA attention in turn, and measure what NABLA leaves out."""
    top_p, window = sparse.top_p, sparse.window
    assert isinstance(top_p, float), "the demo compares one top_p for all heads"

    def dense_attention() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def nabla_attention() -> Tensor:
        out, _ = nabla.attention(
            q, k, v, grid=grid, top_p=top_p, window=window, order="block", return_lse=True
        )
        return out

    dense, ours = dense_attention(), nabla_attention()
    times: list[tuple[float, float]] = []
    for _ in tqdm(range(REPEATS), desc=f"timing {grid.num_tokens:,} tokens, top_p {top_p}"):
        times.append((_seconds(dense_attention), _seconds(nabla_attention)))
    dense_seconds, nabla_seconds = (statistics.median(t) for t in zip(*times, strict=True))
    mask = sparse.mask(q, k, grid)
    return Comparison(
        tokens=grid.num_tokens,
        top_p=top_p,
        density=mask.density().item(),
        dense_seconds=dense_seconds,
        nabla_seconds=nabla_seconds,
        retained_mass=recall(q, k, mask).mean().item(),
        relative_error=((ours - dense).norm() / dense.norm()).item(),
    )


def psnr(actual: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio of uint8 frames in dB."""
    error = ((actual.float() - expected.float()) / 255).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def _table(comparisons: list[Comparison], *, title: str) -> Table:
    caption = f"NABLA with its mask; medians of {REPEATS}, taken in turn"
    table = Table(title=title, caption=caption, box=None, pad_edge=False)
    for heading in ("tokens", "top_p", "density", "dense ms", "NABLA ms", "speed-up"):
        table.add_column(heading, justify="right")
    table.add_column("retained mass", justify="right")
    table.add_column("relative error", justify="right")
    for row in comparisons:
        table.add_row(
            f"{row.tokens:,}",
            f"{row.top_p}",
            f"{row.density:.2f}",
            f"{1e3 * row.dense_seconds:.0f}",
            f"{1e3 * row.nabla_seconds:.0f}",
            f"{row.speedup:.2f}x",
            f"{row.retained_mass:.3f}",
            f"{row.relative_error:.3f}",
        )
    return table


def _seconds(function: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _middle(model: CrossDiT) -> int:
    return model.config.num_visual_blocks // 2
