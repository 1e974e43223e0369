"""`nabla demo`: NABLA attention at work on a real clip, on any machine, in about two minutes.

1. Continues frames the tiny model never saw, dense and with NABLA, from the same noise.
2. Times dense against NABLA attention on q, k, v of that model at a longer sequence.
3. Says what it wrote and which backend ran.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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
from kandinsky_model.codec import CosineCodec
from kandinsky_model.model import CrossDiT
from kandinsky_model.sampler import empty_text, model_input, sample
from kandinsky_model.train import HELD_OUT, Recipe
from nabla.dispatch import resolve
from nabla.inspect import draw_mask, recall

WEIGHTS = Path(__file__).parent / "weights" / "tiny.safetensors"
CLIP = "carphone_pristine"
FRAMES, STRIDE, SIZE = Recipe.frames, Recipe.stride, Recipe.size
FPS = 12
STEPS = 24
LONG_FRAMES = (16, 64)
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
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    sparse = model.default_attention()
    assert isinstance(sparse, NablaAttention), "the tiny preset attends with NABLA"
    backend = resolve("auto", device="cpu", head_dim=model.config.head_dim, dtype=torch.float32,
                      block_size=math.prod(model.config.block))  # fmt: skip
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
        f"{CLIP}, frames {HELD_OUT} to {HELD_OUT + (FRAMES - 1) * STRIDE}, not trained on; "
        "only the first is given.\n"
        f"PSNR against the real frames: dense {psnr(dense, real):.1f} dB, "
        f"NABLA {psnr(ours, real):.1f} dB; NABLA against dense {psnr(ours, dense):.1f} dB"
    )

    table = Table(
        "tokens", "density", "dense ms", "NABLA ms", "speed-up", "retained mass", "relative error",
        title=f"Layer {_middle(model)} on this clip; NABLA with its mask; medians of {REPEATS}",
    )  # fmt: skip
    for frames in long_frames:
        q, k, v, grid = long_attention(model, frames)
        mask = sparse.mask(q, k, grid)
        row, speedup = compare(q, k, v, mask, sparse)
        table.add_row(*row)
    written.append(draw_mask(mask, out / "block_masks.png", heads=range(q.shape[1])))
    console.print(table)
    if speedup < 1:
        console.print(
            f"[yellow]NABLA is slower than dense attention here[/]: the {backend} backend shows "
            "the meaning, not the speed. `nabla info` lists the others and why one is missing."
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
    latents = codec.encode(frames)[None]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    sampled = sample(
        model, noise, empty_text(model.config, 1), first_frame=latents[:, :1], num_steps=steps,
        shift=Recipe.shift, attention=attention, progress=progress,
    )  # fmt: skip
    return codec.decode(sampled[0])


@torch.no_grad()
def long_attention(model: CrossDiT, frames: int) -> tuple[Tensor, Tensor, Tensor, nabla.TokenGrid]:
    """q, k, v of the middle layer for the last `frames` frames of the clip, half way to noise."""
    clip = centre(read_clip(CLIP)[-frames:], SIZE, SIZE)
    latents = CosineCodec().encode(clip)[None]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    x, t = model_input(latents.lerp(noise, 0.5), latents[:, :1]), torch.tensor([0.5])
    recorder = Recorder(DenseAttention())
    model(x, *empty_text(model.config, 1), t, attention=recorder)
    return recorder.calls[_middle(model)]


@torch.no_grad()
def compare(
    q: Tensor, k: Tensor, v: Tensor, mask: nabla.BlockMask, sparse: NablaAttention
) -> tuple[list[str], float]:
    """One row of the table, and the speed-up."""

    def dense_attention() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def nabla_attention() -> Tensor:
        top_p, window = sparse.top_p, sparse.window
        out, _ = nabla.attention(
            q, k, v, grid=mask.grid, top_p=top_p, window=window, order="block", return_lse=True
        )
        return out

    functions = {"dense": dense_attention, "NABLA": nabla_attention}
    times, outputs = interleaved(functions, label=f"timing {mask.grid.num_tokens} tokens")
    error = (outputs["NABLA"] - outputs["dense"]).norm() / outputs["dense"].norm()
    speedup = times["dense"] / times["NABLA"]
    row = [
        f"{mask.grid.num_tokens:,}", f"{mask.density().item():.2f}", f"{1e3 * times['dense']:.0f}",
        f"{1e3 * times['NABLA']:.0f}", f"{speedup:.2f}x", f"{recall(q, k, mask).mean().item():.3f}",
        f"{error.item():.3f}",
    ]  # fmt: skip
    return row, speedup


def interleaved(
    functions: dict[str, Callable[[], Tensor]], *, label: str
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Median seconds of each function, called in turn after one warm-up, and the outputs."""
    outputs = {name: function() for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in tqdm(range(REPEATS), desc=label):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}, outputs


def psnr(actual: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio of uint8 frames in dB."""
    error = ((actual.float() - expected.float()) / 255).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def _middle(model: CrossDiT) -> int:
    return model.config.num_visual_blocks // 2
