"""`nabla generate`: a request from the command line to a file, checked before any long work starts.

Beside the file lies <file>.state.safetensors until it is done: the same command goes on from there.
"""

import re
from pathlib import Path

import torch
from rich.console import Console

from kandinsky_model import presets
from kandinsky_model.clip import check_suffix, write_frames
from kandinsky_model.files import replacing
from kandinsky_model.pipeline import Pipeline
from kandinsky_model.presets import FPS
from kandinsky_model.request import Job, Request
from kandinsky_model.text import Variant

INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended


def run(
    request: Request,
    preset_name: str,
    weights: Path,
    *,
    out: Path | None = None,
    device: str | None = None,
    offload: bool = False,
    variant: Variant = "original",
) -> Path:
    """Generate a video or an image.

    Args:
        request: What to generate.
        preset_name: One of `PRESETS`.
        weights: Folder, see `kandinsky_model.folder`.
        out: The file to write; None makes a name of the prompt and the seed.
        device: See `Pipeline.load`.
        offload: See `Pipeline.load`.
        variant: See `Pipeline.load`.

    Returns:
        The file.
    """
    console = Console(highlight=False)
    preset = presets.preset(preset_name)
    job = request.resolve(preset)
    out = out or default_path(job)
    check_suffix(out, is_video=preset.is_video)
    check_writable(out)
    pipeline = Pipeline.load(weights, preset, device=device, offload=offload, variant=variant)
    state = out.with_name(f"{out.name}.state.safetensors")
    height, width = job.size
    console.print(
        f"{preset.name}: {job.frames} frames of {height} x {width} pixels, "
        f"{job.num_steps} steps, guidance {job.guidance_scale:g}, seed {job.seed}, "
        f"on {pipeline.device}" + (f"; goes on with {state}" if state.exists() else "")
    )
    try:
        frames = pipeline(request, state=state)
    except KeyboardInterrupt:
        note = f"the same command goes on with {state}" if state.exists() else "nothing is kept"
        console.print(f"interrupted: {note}")
        raise SystemExit(INTERRUPTED) from None
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{pipeline.device} is out of memory: {error}") from error
    write_frames(frames, out, fps=FPS)
    state.unlink(missing_ok=True)
    console.print(f"wrote {out}")
    return out


def default_path(job: Job) -> Path:
    """A name of the first words of the prompt and the seed."""
    words = "-".join(re.findall(r"\w+", job.prompt.lower())[:6])[:60] or "prompt"
    return Path("out") / f"{words}-{job.seed}.{'mp4' if job.preset.is_video else 'png'}"


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
