"""`nabla generate`: a request from the command line to a file, checked before any long work starts.

Beside the file lies <file>.state.safetensors until it is done: the same command goes on from there.
"""

import re
from itertools import chain, count
from pathlib import Path

import torch
from rich.console import Console

from kandinsky_model import presets
from kandinsky_model.clip import check_suffix, write_frames
from kandinsky_model.files import check_writable, remove_drafts
from kandinsky_model.magcache import RatioMeter, write_ratios
from kandinsky_model.memory import device_memory
from kandinsky_model.pipeline import Pipeline, pick_device
from kandinsky_model.presets import FPS
from kandinsky_model.request import Job, Request
from kandinsky_model.state import Arguments, is_state_of
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
    plan = request.plan(preset, device_memory(place))
    if plan_only:
        console.print(plan.describe())
        return None
    if weights is None:
        raise ValueError("--weights is missing: the folder that holds the weights")
    mode = plan.check(place)  # before an image is brought to the size
    job = request.resolve(preset)
    if measure_magcache is not None and (job.num_steps == 1 or job.schedule is not None):
        raise ValueError(
            f"--measure-magcache {measure_magcache} takes two steps or more, and no --magcache"
        )
    if out is not None:
        check_suffix(out, is_video=preset.is_video)
    if offload and mode == "resident":
        mode = "offload"
    pipeline = Pipeline.load(
        weights, preset, device=place, mode=mode, lora=lora, lora_scale=lora_scale, variant=variant
    )
    if out is not None:
        check_outputs(out, measure_magcache)
    height, width = job.size
    what = "image" if job.frames == 1 else f"{job.frames} frames"
    console.print(
        f"{preset.name}: {what} of {height} x {width} pixels in {job.num_steps} steps, guidance "
        f"{job.guidance_scale:g}, seed {job.seed}, {place} ({mode})"
    )
    arguments = pipeline.arguments(job, measures=measure_magcache is not None)
    if out is None:
        out = free_path(job, arguments)
        check_outputs(out, measure_magcache)
    state = state_path(out)
    if is_state_of(state, arguments):
        console.print(f"goes on with {state}")
    meter = None if measure_magcache is None else RatioMeter()
    try:
        frames = pipeline(request, state=state, meter=meter)
        write_frames(frames, out, fps=FPS)
    except KeyboardInterrupt:
        kept = is_state_of(state, arguments)
        what = f"the same command goes on with {state}" if kept else "nothing is kept"
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


def state_path(out: Path) -> Path:
    """Where an interrupted run to a file is kept."""
    return out.with_name(f"{out.name}.state.safetensors")


def check_outputs(out: Path, measure_magcache: Path | None) -> None:
    """Raise an error now if a file cannot be written later, or would be written twice."""
    files = [out, state_path(out)]
    if measure_magcache is not None:
        if measure_magcache.resolve() in [file.resolve() for file in files]:
            raise ValueError(f"--measure-magcache {measure_magcache} is of the video; name another")
        files.append(measure_magcache)
    for file in files:
        check_writable(file)


def free_path(job: Job, arguments: Arguments) -> Path:
    """A name of the first words of the prompt and the seed, of no file that is there.

    If a run with these arguments was interrupted, its name; never that of another one.
    """
    words = "-".join(re.findall(r"\w+", job.prompt.lower())[:6])
    words = words.encode()[:60].decode(errors="ignore") or "prompt"  # names are limited in bytes
    suffix = "mp4" if job.preset.is_video else "png"
    names = chain([""], (f"-{number}" for number in count(2)))
    paths = (Path("out") / f"{words}-{job.seed}{name}.{suffix}" for name in names)

    def is_free(path: Path) -> bool:
        state = state_path(path)
        return not path.exists() and (not state.exists() or is_state_of(state, arguments))

    return next(filter(is_free, paths))


def parse_size(text: str) -> tuple[int, int]:
    """512x768 to (512, 768): height, then width, in pixels."""
    match = re.fullmatch(r"(\d+)[xX×](\d+)", text.strip())
    if match is None:
        raise ValueError(f"--size {text!r} is not a height and a width such as 512x768")
    return int(match[1]), int(match[2])
