"""`nabla calibrate`: the top_p of each layer and head of a model, measured while it samples.

model   a preset with its weights, which samples prompts;  or the tiny one, which continues clips
files   NAME.json         the calibration: what `nabla generate --calibration` reads
        NAME.curves.json  all that was measured, of which another error is chosen without a new run
        NAME.png          a picture of both
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from kandinsky_model.attention import NablaAttention
from kandinsky_model.checkpoint import load_checkpoint
from kandinsky_model.clip import fit, read_clip
from kandinsky_model.demo import CLIP, FRAMES, SIZE, STRIDE, WEIGHTS, continue_clip
from kandinsky_model.files import check_writable
from kandinsky_model.memory import device_memory
from kandinsky_model.pipeline import Pipeline, pick_device
from kandinsky_model.presets import Preset
from kandinsky_model.request import Request
from nabla.inspect import Calibration, Curves, calibrate
from nabla.inspect.calibration import TOP_P, check_error
from nabla.inspect.calibration_picture import draw_calibration
from nabla.inspect.picture import figure_class

TINY = "tiny"  # the name of a model that is no preset


def check(out: Path, error: float) -> None:
    """Raise an error now if what `write` is to do cannot be done later."""
    check_error(error)
    if out.suffix != ".json":
        raise ValueError(f"--out {out} must end in .json")
    figure_class()
    for path in files(out):
        check_writable(path)


def of_preset(
    requests: Sequence[Request],
    preset: Preset,
    weights: Path | None,
    *,
    device: str | None = None,
    offload: bool = False,
) -> Curves:
    """Measure a preset while it samples requests of one size.

    Args:
        requests: What to sample.
        preset: Of the weights.
        weights: Folder, see `kandinsky_model.folder`.
        device: None takes CUDA where there is a device, else the CPU.
        offload: Keep parts on the device only while they work, also where all would fit.
    """
    if not requests:
        raise ValueError(f"preset {preset.name} samples prompts: give one or more")
    if weights is None:
        raise ValueError("--weights is missing: the folder that holds the weights")
    place = pick_device(device)
    jobs = [request.resolve(preset) for request in requests]
    mode = jobs[0].plan(device_memory(place)).check(place)
    if offload and mode == "resident":
        mode = "offload"
    pipeline = Pipeline.load(weights, preset, device=place, mode=mode)
    calls = sum(job.num_steps * (1 + job.is_guided) for job in jobs)
    try:
        with _bar(preset.model.num_visual_blocks * calls) as bar:
            return pipeline.calibrate(requests, top_p=TOP_P, progress=lambda _: bar.update())
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{place} is out of memory; try --offload, or fewer --seconds: {error}"
        ) from error


def of_tiny(clips: Sequence[str], steps: int) -> Curves:
    """Measure the tiny model while it continues clips, by name or path, from their first frame."""
    read = [read_clip(clip, frames=FRAMES, stride=STRIDE) for clip in clips or [CLIP]]
    model = load_checkpoint(WEIGHTS, dtype=torch.float32)
    config = model.config
    with _bar(len(read) * steps * config.num_visual_blocks) as bar:

        def run() -> None:
            for frames in read:
                continue_clip(model, fit(frames, SIZE, SIZE), NablaAttention(1.0), steps=steps)

        return calibrate(model, run, window=config.window, progress=lambda _: bar.update())


def write(curves: Curves, error: float, out: Path) -> Calibration:
    """Choose a calibration, print what it costs and spares, and write the files.

    Args:
        curves: What was measured.
        error: See `Curves.choose`.
        out: The calibration; the other files are named after it.
    """
    console = Console(highlight=False, soft_wrap=True)
    chosen = curves.choose(error)
    console.print(_table(curves, chosen))
    calibration, table, picture = files(out)
    chosen.save(calibration)
    curves.save(table)
    draw_calibration(curves, chosen, picture)
    for path in files(out):
        console.print(f"wrote {path}")
    return chosen


def files(out: Path) -> tuple[Path, Path, Path]:
    """The calibration, the curves and the picture."""
    return out, out.with_suffix(".curves.json"), out.with_suffix(".png")


def _bar(calls: int) -> tqdm:
    return tqdm(total=calls, desc="attention calls")


def _table(curves: Curves, chosen: Calibration) -> Table:
    """What one top_p for all does, and beneath it the calibration."""
    title = f"{len(chosen)} layers, window {chosen.window}"
    caption = "error: of a layer's output, relative; mass: of the exact attention, kept"
    table = Table(title=title, caption=caption, box=None, pad_edge=False)
    for heading in ("top_p", "density", "mass", "error"):
        table.add_column(heading, justify="right")
    values = sorted({value for layer in chosen for value in layer})
    own = f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
    rows = [
        (f"{top_p:.3g}", one) for top_p, one in zip(curves.top_p, curves.uniform(), strict=True)
    ]
    for name, one in (*rows, (own, chosen)):
        mass = float(curves.at(one)["retained"].nanmean())
        cells = (name, f"{one.density:.3f}", f"{mass:.3f}", f"{one.error:.3f}")
        table.add_row(*cells, style="bold" if one is chosen else None)
    return table
