"""Flow-matching Euler sampler: noise at t = 1 becomes latents at t = 0.

x_t = (1 - t) x_0 + t noise,   velocity dx/dt = noise - x_0
t_i = s u / (1 + (s - 1) u),   u = 1 - i / N,   s = shift
guided  v = v_null + guidance_scale (v_text - v_null)
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from kandinsky_model.attention import CalibratedAttention, VisualAttention
from kandinsky_model.config import CrossDiTConfig
from kandinsky_model.magcache import Cache
from kandinsky_model.model import CrossDiT

Text = tuple[Tensor, Tensor]
Velocity = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, Tensor], None]


def timesteps(num_steps: int, *, shift: float = 1.0) -> Tensor:
    """The N + 1 times from 1 to 0, float32; a larger `shift` stays longer near the noise."""
    if num_steps < 1 or shift <= 0:
        raise ValueError(f"num_steps {num_steps} and shift {shift} must be positive")
    u = torch.linspace(1.0, 0.0, num_steps + 1)
    return shift * u / (1.0 + (shift - 1.0) * u)


def model_input(
    latents: Tensor, first_frame: Tensor | None = None, *, source: Tensor | None = None
) -> Tensor:
    """Append the condition's channels and its mask, as the public checkpoints expect them.

    Args:
        latents: Noisy latents [B, T, H, W, C].
        first_frame: Clean latents [B, 1, H, W, C] of a known first frame. They replace the noisy
            ones and set the mask; the condition's channels stay zero.
        source: Clean latents [B, T, H, W, C] of an image to edit. They are the condition, and the
            mask is set everywhere.

    Returns:
        [B, T, H, W, 2 C + 1].
    """
    condition, mask = torch.zeros_like(latents), torch.zeros_like(latents[..., :1])
    if first_frame is not None:
        latents = torch.cat([first_frame.to(latents), latents[:, 1:]], dim=1)
        mask[:, :1] = 1.0
    if source is not None:
        condition, mask = source.to(latents), torch.ones_like(mask)
    return torch.cat([latents, condition, mask], dim=-1)


def empty_text(config: CrossDiTConfig, batch: int) -> Text:
    """Text that says nothing, for models trained without: zero features of one token."""
    return torch.zeros(batch, 1, config.in_text_dim), torch.zeros(batch, config.in_text_dim2)


@torch.no_grad()
def sample(
    model: CrossDiT,
    noise: Tensor,
    text: Text,
    *,
    first_frame: Tensor | None = None,
    null_text: Text | None = None,
    guidance_scale: float = 1.0,
    num_steps: int = 50,
    shift: float = 5.0,
    attention: VisualAttention | CalibratedAttention | None = None,
    progress: str | None = None,
) -> Tensor:
    """Sample latents.

    Args:
        model: Predicts the velocity.
        noise: Standard normal [B, T, H, W, C]; its dtype is the dtype of the path.
        text: Text features [B, L, in_text_dim] and pooled text features [B, in_text_dim2].
        first_frame: Clean latents [B, 1, H, W, C] to continue from.
        null_text: Features of the negative prompt; needed when guidance_scale is not 1.
        guidance_scale: 1 follows the text alone, in one model call per step instead of two.
        num_steps: Euler steps.
        shift: See `timesteps`.
        attention: See `CrossDiT.forward`.
        progress: Label of the progress bar; None shows no bar.

    Returns:
        Latents [B, T, H, W, C].
    """
    velocity = guided_velocity(
        model, text, first_frame=first_frame, null_text=null_text, guidance_scale=guidance_scale,
        attention=attention,
    )  # fmt: skip
    times = timesteps(num_steps, shift=shift).to(noise.device)
    latents = euler(velocity, noise, times, progress=progress)
    if first_frame is not None:
        latents[:, :1] = first_frame.to(latents)
    return latents


def guided_velocity(
    model: CrossDiT,
    text: Text,
    *,
    first_frame: Tensor | None = None,
    source: Tensor | None = None,
    null_text: Text | None = None,
    guidance_scale: float = 1.0,
    attention: VisualAttention | CalibratedAttention | None = None,
    cache: Cache | None = None,
) -> Velocity:
    """The velocity that `euler` follows: (latents [B, T, H, W, C], time) to [B, T, H, W, C].

    The arguments are those of `sample`, `model_input` and `CrossDiT.forward`. The model is called
    in the dtype of `text`; with guidance first for `text`, then for `null_text`.
    """
    is_guided = guidance_scale != 1.0
    if is_guided and null_text is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs null_text")
    if not model.config.visual_cond and (first_frame is not None or source is not None):
        raise ValueError("first_frame and source need a model with visual_cond")
    predict = partial(model, attention=attention)
    if cache is not None:
        predict = partial(predict, cache=cache)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if model.config.visual_cond:
            x = model_input(x, first_frame, source=source)
        x, t = x.to(text[0]), t.expand(x.shape[0])
        v = predict(x, *text, t)
        if is_guided and null_text is not None:
            v_null = predict(x, *null_text, t)
            v = v_null + guidance_scale * (v - v_null)
        return v

    return velocity


def euler(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    *,
    start: int = 0,
    callback: Callback | None = None,
    progress: str | None = None,
) -> Tensor:
    """Integrate dx/dt = velocity(x, t) along `times` [N + 1].

    Args:
        velocity: Maps x and a time to the velocity.
        x: Where the path is at times[start].
        times: From 1 to 0.
        start: Steps that were done before.
        callback: Called after each step with the number of steps done and x.
        progress: Label of the progress bar; None shows no bar.
    """
    steps = list(pairwise(times))
    bar = tqdm(total=len(steps), initial=start, desc=progress, disable=progress is None)
    with bar:
        for step, (t, t_next) in enumerate(steps[start:], start=start + 1):
            x = x + (t_next - t) * velocity(x, t).to(x)
            bar.update()
            if callback is not None:
                callback(step, x)
    return x
