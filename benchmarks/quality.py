"""Does NABLA cost quality? `python -m benchmarks.quality OUT`, in under 40 minutes on two cores.

train      the tiny CrossDiT on real clips: dense and NABLA, the same seeds, data and noise
loss       flow-matching loss on held-out windows: as trained, and with other attention
frames     PSNR and SSIM of sampled frames after the first
calibrate  top_p per layer and head on training clips, judged on held-out ones

OUT gets the models, results.json, and the page that benchmarks.quality_page makes of it. What is
there already is not computed again, so an interrupted study goes on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.multiprocessing
import torch.nn.functional as F
import typer
from torch import Tensor
from tqdm import tqdm

from benchmarks.machine import commit
from benchmarks.quality_page import write_page
from kandinsky_model.attention import (
    CalibratedAttention,
    DenseAttention,
    NablaAttention,
    VisualAttention,
)
from kandinsky_model.checkpoint import load_checkpoint, save_checkpoint
from kandinsky_model.clip import centre, fit, read_clip, side_by_side, write_gif
from kandinsky_model.codec import CosineCodec
from kandinsky_model.config import ARCHITECTURES
from kandinsky_model.demo import continue_clip, psnr
from kandinsky_model.model import CrossDiT
from kandinsky_model.sampler import empty_text, model_input
from kandinsky_model.train import (
    HELD_OUT,
    SOURCES,
    Recipe,
    Source,
    Trainer,
    Windows,
    flow_loss,
    initialize,
)
from nabla.inspect import calibrate, density_report, environment

WINDOW = (3, 1, 1)
ARMS: dict[str, VisualAttention] = {
    "dense": DenseAttention(),
    "NABLA 0.5": NablaAttention(0.5, WINDOW),
    "NABLA 0.8": NablaAttention(0.8, WINDOW),
}
# What the trained models are judged with, beside their own attention.
SWEEP = {
    (top_p, window): NablaAttention(top_p, window)
    for top_p, window in product((0.3, 0.5, 0.7, 0.9), (None, WINDOW, (3, 3, 3)))
}
# Never trained on: later frames of a clip that was, and a clip that was not.
HELD_OUT_SOURCES = {
    "later frames": Source("carphone_pristine", HELD_OUT, 120, 144, 176, 1.0),
    "other clip": Source("bikes", 0, 60, 136, 320, 1.0),
}


@dataclass(frozen=True)
class Study:
    """How much is done.

    Args:
        seeds: Of the trainings of each arm.
        small: Steps on small windows, which come first.
        large: Steps on windows of the size that is judged.
        draws: Windows, noises and times of each held-out source that make a loss.
        sweep_draws: The same, for each attention of the sweep.
        sample_steps: Euler steps of a sampled clip.
        errors: Errors that calibrations are made for.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    small: int = 500
    large: int = 200
    draws: int = 24
    sweep_draws: int = 8
    sample_steps: int = 12
    errors: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)


# What the command --quick does: everything once, on models that have learnt little.
QUICK = Study((0, 1), 6, 3, 2, 1, 2, (0.1, 0.3))


def train(study: Study, arm: str, seed: int, path: Path) -> None:
    """Train one model from its seed and write its averaged weights."""
    stages = (
        Recipe(steps=study.small, batch=2, frames=8, size=64, lr=3e-3),
        Recipe(steps=study.large, lr=1.5e-3),
    )
    windows = Windows(SOURCES, CosineCodec())
    torch.manual_seed(seed)
    model = initialize(CrossDiT(ARCHITECTURES["tiny"]))
    for recipe in stages:
        trainer = Trainer(model, windows, replace(recipe, seed=seed, attention=ARMS[arm]))
        for _ in range(recipe.steps):
            trainer.advance()
        model = trainer.average.requires_grad_(True)
    save_checkpoint(model, path, dtype=torch.float32)


def judge(study: Study, arm: str, seed: int, path: Path) -> dict[str, Any]:
    """Measure one trained model."""
    model = load_checkpoint(path, dtype=torch.float32).eval()
    own = ARMS[arm]
    row: dict[str, Any] = {"arm": arm, "seed": seed}
    row["loss"] = {name: loss(model, attention, study.draws) for name, attention in ARMS.items()}
    row["own"] = row["loss"][arm]
    row["frames"] = {
        name: frame_quality(model, attention, study.sample_steps)
        for name, attention in ARMS.items()
    }
    row["sweep"] = [
        {"top_p": top_p, "window": window, **loss(model, attention, study.sweep_draws)}
        for (top_p, window), attention in SWEEP.items()
    ]
    if isinstance(own, DenseAttention):
        row["calibration"] = calibration(model, study)
    return row


@torch.no_grad()
def loss(model: CrossDiT, attention: VisualAttention, draws: int) -> dict[str, Any]:
    """Flow-matching loss by held-out source, the same draws for every model; and the density."""
    losses = {}
    with density_report(model) as report:
        for name, source in HELD_OUT_SOURCES.items():
            windows = Windows([source], CosineCodec())
            values = []
            for draw in range(draws):
                generator = torch.Generator().manual_seed(draw)
                latents = windows.draw(Recipe(), generator)
                shift = Recipe.shift
                value = flow_loss(model, latents, generator, shift=shift, attention=attention)
                values.append(value.item())
            losses[name] = sum(values) / draws
    dense = isinstance(attention, DenseAttention)
    density = 1.0 if dense else float(report.table("density").mean())
    return {"loss": losses, "density": density}


def frame_quality(model: CrossDiT, attention: VisualAttention, steps: int) -> dict[str, Any]:
    """PSNR in dB and SSIM of the frames after the first, by held-out source."""
    found = {}
    for name in HELD_OUT_SOURCES:
        real = held_out_clip(name)
        with torch.no_grad():
            ours = continue_clip(model, real, attention, steps=steps)
        found[name] = {"psnr": psnr(ours[1:], real[1:]), "ssim": ssim(ours[1:], real[1:])}
    return found


def held_out_clip(name: str) -> Tensor:
    """The clip whose frames are to be continued, uint8 [T, H, W, 3]."""
    source, recipe = HELD_OUT_SOURCES[name], Recipe()
    clip = read_clip(source.clip, start=source.start, frames=recipe.frames, stride=recipe.stride)
    return centre(fit(clip, source.height, source.width), recipe.size, recipe.size)


def ssim(actual: Tensor, expected: Tensor) -> float:
    """Mean structural similarity of the brightness of uint8 frames [T, H, W, 3].

    Wang et al., Image Quality Assessment, 2004: Gaussian windows of 11 x 11, sigma 1.5.
    """
    weights = torch.tensor([0.299, 0.587, 0.114])
    x, y = ((frames.float() / 255) @ weights for frames in (actual, expected))
    at = torch.arange(11) - 5.0
    line = torch.exp(-(at**2) / (2 * 1.5**2))
    kernel = (line[:, None] * line / line.sum() ** 2)[None, None]

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(image[:, None], kernel)

    mx, my = blur(x), blur(y)
    vx, vy, covariance = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mx * my + c1) * (2 * covariance + c2)
    return (similarity / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean().item()


def calibration(model: CrossDiT, study: Study) -> dict[str, Any]:
    """Densities and errors of the velocity on held-out windows, calibrated and uniform."""
    inputs = list(noisy_inputs(SOURCES, study.sweep_draws))
    curves = calibrate(
        model,
        lambda: [model(*x, attention=NablaAttention(1.0)) for x in inputs],
        window=WINDOW,
    )
    held_out = list(noisy_inputs(list(HELD_OUT_SOURCES.values()), 2 * study.sweep_draws))
    with torch.no_grad():
        exact = [model(*x, attention=DenseAttention()) for x in held_out]

    def judged(calibrations: Iterable) -> list[dict[str, Any]]:
        rows = []
        for chosen in calibrations:
            attention = CalibratedAttention(chosen)
            with torch.no_grad(), density_report(model) as report:
                ours = [model(*x, attention=attention) for x in held_out]
            wrong = sum((a - b).square().sum() for a, b in zip(ours, exact, strict=True))
            norm = sum(b.square().sum() for b in exact)
            rows.append(
                {
                    "top_p": chosen.top_p,
                    "calibrated_error": chosen.error,
                    "error": math.sqrt(wrong / norm),
                    "density": float(report.table("density").mean()),
                }
            )
        return rows

    return {
        "uniform": judged(curves.uniform()),
        "calibrated": judged(curves.choose(error) for error in study.errors),
    }


@torch.no_grad()
def noisy_inputs(sources: Sequence[Source], draws: int) -> Iterable[tuple[Tensor, ...]]:
    """Inputs of the model: windows of the sources, each at a time and with noise of its own."""
    windows, config = Windows(sources, CosineCodec()), ARCHITECTURES["tiny"]
    for draw in range(draws):
        generator = torch.Generator().manual_seed(1000 + draw)
        latents = windows.draw(Recipe(), generator)
        noise = torch.randn(latents.shape, generator=generator)
        t = torch.tensor([(draw + 0.5) / draws])
        noisy = latents.lerp(noise, t.view(-1, 1, 1, 1, 1))
        yield model_input(noisy, latents[:, :1]), *empty_text(config, 1), t


def clips(study: Study, out: Path) -> None:
    """Write a gif: a held-out clip, and its continuations by the models of the first seed."""
    name = next(iter(HELD_OUT_SOURCES))
    real = held_out_clip(name)
    columns = [("real", real)]
    for arm, attention in ARMS.items():
        model = load_checkpoint(model_path(out, arm, study.seeds[0]), dtype=torch.float32)
        ours = continue_clip(model, real, attention, steps=study.sample_steps)
        columns.append((arm, ours))
    write_gif(side_by_side(columns), out / "clips.gif", fps=8)


def model_path(out: Path, arm: str, seed: int) -> Path:
    """Where the weights of a model are."""
    return out / "models" / f"{arm.lower().replace(' ', '-')}-seed{seed}.safetensors"


def _on_one_core(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Run a part of the study; return its result and its CPU seconds."""
    torch.set_num_threads(1)
    began = time.process_time()
    return function(*args), time.process_time() - began


def _in_parallel(
    name: str, processes: int, tasks: dict[Any, tuple[Any, ...]]
) -> dict[Any, tuple[Any, float]]:
    """Run tasks (function, *arguments) in processes of one thread each."""
    context = torch.multiprocessing.get_context("spawn")
    done = {}
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = {pool.submit(_on_one_core, *task): key for key, task in tasks.items()}
        for future in tqdm(as_completed(futures), total=len(futures), desc=name):
            done[futures[future]] = future.result()
    return done


def main(
    out: Annotated[Path, typer.Argument(help="Folder for models, results and the page.")],
    processes: Annotated[int, typer.Option(help="Models at a time, one core each.")] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="Everything once, in two minutes.")
    ] = False,
) -> None:
    """Train, judge, and write the page."""
    study = QUICK if quick else Study()
    out.mkdir(parents=True, exist_ok=True)
    runs = list(product(ARMS, study.seeds))
    untrained = {
        run: (train, study, *run, path)
        for run in runs
        if not (path := model_path(out, *run)).exists()
    }
    seconds = [spent for _, spent in _in_parallel("training", processes, untrained).values()]
    judged = _in_parallel(
        "judging", processes, {run: (judge, study, *run, model_path(out, *run)) for run in runs}
    )
    seconds += [spent for _, spent in judged.values()]
    clips(study, out)
    results = {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": environment()["cpu"]["name"],
        "torch": torch.__version__,
        "study": study.__dict__,
        "trained_now": len(untrained),
        "cpu_seconds": round(sum(seconds)),
        "models": [judged[run][0] for run in runs],
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {write_page(results, out)}")


if __name__ == "__main__":
    typer.run(main)
