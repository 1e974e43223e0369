"""The public Kandinsky 5 checkpoints: how each is sampled, as one table.

frames = 24 * seconds + 1       latent (T, H, W) = ((frames - 1) / 4 + 1, height / 8, width / 8)
model  = architecture + attention (top_p None: dense; else NABLA and a window) + rope scale
shift  = 5 for 5 s, 10 for 10 s and for image to video in SD, 3 for images
steps x guidance: 50 x 5; without guidance (nocfg) 50 x 1; flash 16 x 1; images 50 x 3.5
"""

from dataclasses import dataclass, replace
from typing import Literal

from kandinsky_model.config import ARCHITECTURES, CrossDiTConfig

Task = Literal["text-to-video", "image-to-video", "text-to-image", "image-to-image"]
Size = tuple[int, int]

# Of the public variational autoencoders.
FPS = 24
FRAMES_PER_LATENT = 4
PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class Preset:
    """One checkpoint and the settings it is published with.

    Attributes:
        name: What `--preset` takes.
        task: What goes in and what comes out.
        model: Architecture, attention and rope scale.
        sizes: Published (height, width) in pixels; the first is the default.
        seconds: Length of the video; None for images.
        num_steps: Euler steps.
        guidance_scale: 1 needs no second model call per step.
        shift: Of the times, see `sampler.timesteps`.
        file: Name of the public checkpoint file, without its extension.
    """

    name: str
    task: Task
    model: CrossDiTConfig
    sizes: tuple[Size, ...]
    seconds: int | None
    num_steps: int
    guidance_scale: float
    shift: float
    file: str

    @property
    def is_video(self) -> bool:
        """Whether frames come out, not one image."""
        return self.seconds is not None

    @property
    def takes_image(self) -> bool:
        """Whether it begins with an image: a first frame, or what to edit."""
        return self.task.startswith("image")

    @property
    def size(self) -> Size:
        """The default (height, width) in pixels."""
        return self.sizes[0]

    @property
    def frames(self) -> int:
        """Frames that come out; 1 for an image."""
        return 1 if self.seconds is None else FPS * self.seconds + 1

    @property
    def latent_frames(self) -> int:
        """Frames of the latents; 1 for an image."""
        return (self.frames - 1) // FRAMES_PER_LATENT + 1

    @property
    def size_multiple(self) -> Size:
        """What (height, width) in pixels have to be multiples of: a patch of latents."""
        _, rows, columns = self.model.patch_size
        return rows * PIXELS_PER_LATENT, columns * PIXELS_PER_LATENT

    @property
    def window(self) -> tuple[int, int, int] | None:
        """What NABLA keeps beside top_p, also where the preset is dense."""
        return WINDOW if self.model.top_p is None else self.model.window

    def latent_shape(self, size: Size | None = None) -> tuple[int, int, int]:
        """(T, H, W) of the latents of a (height, width) in pixels; None is the default size."""
        height, width = size or self.size
        return self.latent_frames, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT


T2V: Task = "text-to-video"
I2V: Task = "image-to-video"
T2I: Task = "text-to-image"
I2I: Task = "image-to-image"

LITE, PRO, IMG, EDIT = "video-lite", "video-pro", "image-lite", "image-lite-i2i"

SD = ((512, 768), (768, 512), (512, 512))
HD = ((768, 1280), (1280, 768), (640, 1408), (1408, 640), (896, 1152), (1152, 896), (1024, 1024))
IM = (HD[-1], *HD[:-1])

ROPE_SCALE = {SD: (1.0, 2.0, 2.0), HD: (1.0, 3.16, 3.16), IM: (1.0, 1.0, 1.0)}
WINDOW = (11, 3, 3)  # in blocks, beside every top_p

_Row = tuple[str, Task, str, tuple[Size, ...], int | None, float | None, int, float, float, str]
# In the columns: name, task, architecture, sizes, seconds, top_p, num_steps, guidance_scale, shift,
# and the file without "kandinsky5lite_" or "kandinsky5pro_". (That of nocfg-10s is the published
# one; upstream's configuration names the file of video-lite-10s there.)
_TABLE: list[_Row] = [
    ("video-lite-5s",           T2V, LITE, SD, 5,    None, 50, 5.0, 5,  "t2v_sft_5s"),
    ("video-lite-5s-pretrain",  T2V, LITE, SD, 5,    None, 50, 5.0, 5,  "t2v_pretrain_5s"),
    ("video-lite-5s-nocfg",     T2V, LITE, SD, 5,    None, 50, 1.0, 5,  "t2v_nocfg_5s"),
    ("video-lite-5s-flash",     T2V, LITE, SD, 5,    None, 16, 1.0, 5,  "t2v_distilled16steps_5s"),
    ("video-lite-10s",          T2V, LITE, SD, 10,   0.9,  50, 5.0, 10, "t2v_sft_10s"),
    ("video-lite-10s-pretrain", T2V, LITE, SD, 10,   0.9,  50, 5.0, 10, "t2v_pretrain_10s"),
    ("video-lite-10s-nocfg",    T2V, LITE, SD, 10,   0.9,  50, 1.0, 10, "t2v_nocfg_10s"),
    ("video-lite-10s-flash",    T2V, LITE, SD, 10,   0.9,  16, 1.0, 10, "t2v_distilled16steps_10s"),
    ("video-pro-5s",            T2V, PRO,  SD, 5,    None, 50, 5.0, 5,  "t2v_sft_5s"),
    ("video-pro-10s",           T2V, PRO,  SD, 10,   0.9,  50, 5.0, 10, "t2v_sft_10s"),
    ("video-pro-5s-hd",         T2V, PRO,  HD, 5,    0.8,  50, 5.0, 5,  "t2v_sft_5s"),
    ("video-pro-10s-hd",        T2V, PRO,  HD, 10,   0.7,  50, 5.0, 10, "t2v_sft_10s"),
    ("image-video-lite-5s",     I2V, LITE, SD, 5,    None, 50, 5.0, 10, "i2v_5s"),
    ("image-video-pro-5s",      I2V, PRO,  SD, 5,    None, 50, 5.0, 10, "i2v_sft_5s"),
    ("image-video-pro-5s-hd",   I2V, PRO,  HD, 5,    0.8,  50, 5.0, 5,  "i2v_sft_5s"),
    ("text-to-image-lite",      T2I, IMG,  IM, None, None, 50, 3.5, 3,  "t2i"),
    ("image-to-image-lite",     I2I, EDIT, IM, None, None, 50, 3.5, 3,  "i2i"),
]  # fmt: skip


def _preset(row: _Row) -> Preset:
    name, task, architecture, sizes, seconds, top_p, num_steps, guidance_scale, shift, file = row
    return Preset(
        name=name,
        task=task,
        model=replace(
            ARCHITECTURES[architecture],
            rope_scale=ROPE_SCALE[sizes],
            top_p=top_p,
            window=None if top_p is None else WINDOW,
        ),
        sizes=sizes,
        seconds=seconds,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        shift=float(shift),
        file=f"kandinsky5{architecture.split('-')[1]}_{file}",
    )


PRESETS = {row[0]: _preset(row) for row in _TABLE}


def preset(name: str) -> Preset:
    """The preset of this name; an unknown name is an error that lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is none of {', '.join(PRESETS)}")
    return PRESETS[name]
