"""`nabla generate`: a request from the command line to a file, checked before any long work starts.

Beside the file lies <file>.state.safetensors until it is done: the same command goes on from there.
"""

import os
import re
from itertools import chain, count
from pathlib import Path

import torch
from rich.console import Console

from kandinsky_model import presets
from kandinsky_model.clip import check_suffix, write_frames
from kandinsky_model.files import remove_drafts, replacing
from kandinsky_model.magcache import RatioMeter, write_ratios
from kandinsky_model.memory import MemoryPlan, Mode, device_memory, memory_plan
from kandinsky_model.pipeline import Pipeline, pick_device
from kandinsky_model.presets import FPS
from kandinsky_model.request import Job, Request
from kandinsky_model.text import Variant

INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended


def run(
    request: Request,
    preset_name: str,
    weights: Path | None,
    *,
    out: Path | None = None,
    device: str | None = None,
    offload: bool = False,
    lora: Path | None = None,
    lora_scale: float = 1.0,
    variant: Variant = "original",
    measure_magcache: Path | None = None,
    plan_only: bool = False,
) -> Path | None:
    """Generate a video or an image.

    Args:
        request: What to generate.
        preset_name: One of `PRESETS`.
        weights: Folder, see `kandinsky_model.folder`.
        out: The file to write; None makes a new name of the prompt and the seed.
        device: None takes CUDA where there is a device, else the CPU.
        offload: Keep parts on the device only while they work, also where all would fit.
        lora: See `Pipeline.load`.
        lora_scale: See `Pipeline.load`.
        variant: See `Pipeline.load`.
        measure_magcache: A file to write the run's ratios of MagCache to, see `magcache`.
        plan_only: Print the memory plan and stop; needs no weights and no image.

    Returns:
        The file, or None with `plan_only`.
    """
    console = Console(highlight=False, soft_wrap=True)
    preset = presets.preset(preset_name)
    place = pick_device(device)
    plan = memory_plan(
        preset,
        request.size_of(preset),
        request.seconds,
        device_memory(place),
        residuals=0 if request.magcache is None else 2,
    )
    if plan_only:
        console.print(plan.describe())
        return None
    if weights is None:
        raise ValueError("--weights is missing: the folder that holds the weights")
    check_memory(plan, place)  # before an image is brought to the size
    job = request.resolve(preset)
    out = out or default_path(job)
    check_suffix(out, is_video=preset.is_video)
    if measure_magcache is not None and (job.num_steps == 1 or job.schedule is not None):
        raise ValueError(
            f"--measure-magcache {measure_magcache} takes two steps or more, and no --magcache"
        )
    mode: Mode = plan.mode or "stream"
    if offload and mode == "resident":
        mode = "offload"
    pipeline = Pipeline.load(
        weights, preset, device=place, mode=mode, lora=lora, lora_scale=lora_scale, variant=variant
    )
    for path in filter(None, (out, measure_magcache)):
        check_writable(path)
    state = out.with_name(f"{out.name}.state.safetensors")
    height, width = job.size
    what = "image" if job.frames == 1 else f"{job.frames} frames"
    console.print(
        f"{preset.name}: {what} of {height} x {width} pixels in {job.num_steps} steps, guidance "
        f"{job.guidance_scale:g}, seed {job.seed}, {place} ({mode})"
    )
    if state.exists():
        console.print(f"goes on with {state}")
    meter = None if measure_magcache is None else RatioMeter()
    try:
        frames = pipeline(request, state=state, meter=meter)
        write_frames(frames, out, fps=FPS)
    except KeyboardInterrupt:
        what = f"the same command goes on with {state}" if state.exists() else "nothing is kept"
        console.print(f"interrupted: {what}")
        raise SystemExit(INTERRUPTED) from None
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{place} is out of memory; try --offload: {error}") from error
    if meter is not None and measure_magcache is not None:
        write_ratios(meter.ratios, measure_magcache)
        console.print(f"wrote {measure_magcache}")
    state.unlink(missing_ok=True)
    for path in (out, state):
        remove_drafts(path)
    console.print(f"wrote {out}")
    return out


def check_memory(plan: MemoryPlan, device: torch.device) -> None:
    """Raise an error with the figures if the device cannot hold the work.

    On a CPU, weights are files mapped into memory, so that only what is computed counts.
    """
    plan.check()
    if device.type == "cpu":
        needed, there = max(phase.activations for phase in plan.phases), host_memory()
        if needed > there:
            raise ValueError(
                f"{plan.preset} at {plan.size[0]}x{plan.size[1]} with {plan.frames} frames needs "
                f"{needed / 1e9:.2f} GB beside its weights, and this machine has "
                f"{there / 1e9:.2f} GB; take a smaller size or fewer seconds"
            )


def host_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def default_path(job: Job) -> Path:
    """A name of the first words of the prompt and the seed, of no file that is there."""
    words = "-".join(re.findall(r"\w+", job.prompt.lower())[:6])
    words = words.encode()[:60].decode(errors="ignore") or "prompt"  # names are limited in bytes
    suffix = "mp4" if job.preset.is_video else "png"
    names = chain([""], (f"-{number}" for number in count(2)))
    paths = (Path("out") / f"{words}-{job.seed}{name}.{suffix}" for name in names)
    return next(path for path in paths if not path.exists())


def parse_size(text: str) -> tuple[int, int]:
    """512x768 to (512, 768): height, then width, in pixels."""
    match = re.fullmatch(r"(\d+)[xX×](\d+)", text.strip())
    if match is None:
        raise ValueError(f"--size {text!r} is not a height and a width such as 512x768")
    return int(match[1]), int(match[2])


def check_writable(path: Path) -> None:
    """Raise an error now if `path` cannot be written later."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    probe = path.with_name(f"{path.name}.probe")
    try:
        with replacing(probe) as draft:
            draft.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error
