"""The Euler sampler against the diffusers scheduler, and its bookkeeping."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from kandinsky_model import CrossDiT, CrossDiTConfig
from kandinsky_model.sampler import empty_text, euler, model_input, sample, timesteps

CONFIG = CrossDiTConfig(
    model_dim=32, ff_dim=32, time_dim=16, num_text_blocks=1, num_visual_blocks=1,
    axes_dims=(8, 12, 12), in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8,
)  # fmt: skip


class Recorder(nn.Module):
    """A stand-in for CrossDiT: its velocity is the first text channel, and it keeps its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.config = CONFIG
        self.inputs, self.times = [], []

    def forward(self, x, text, pooled_text, t, *, attention=None):
        self.inputs.append(x)
        self.times.append(t)
        return text[:, :1, :1, None, None].expand(*x.shape[:-1], CONFIG.out_visual_dim)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 10.0])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_equals_diffusers_scheduler(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    times = timesteps(steps, shift=shift)
    torch.testing.assert_close(times, scheduler.sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(1000 * times[:-1], scheduler.timesteps, rtol=0, atol=1e-3)

    def velocity(x, t):
        return torch.sin(3 * x) + t

    x = expected = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        expected = scheduler.step(velocity(expected, sigma), t, expected).prev_sample
    torch.testing.assert_close(euler(velocity, x, times), expected, rtol=0, atol=1e-5)


def test_times_fall_from_noise_to_data():
    times = timesteps(7, shift=5.0)
    assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()


def test_a_straight_path_is_followed_exactly():
    data, noise = torch.randn(2, 1, 3, 4, 4, 4).unbind()
    reached = euler(lambda x, t: noise - data, noise, timesteps(5, shift=3.0))
    torch.testing.assert_close(reached, data)


def test_guidance_mixes_both_texts():
    model, noise = Recorder(), torch.zeros(1, 2, 4, 4, 4)
    text, null_text = (tuple(x + v for x in empty_text(CONFIG, 1)) for v in (3.0, 1.0))
    guided = sample(model, noise, text, null_text=null_text, guidance_scale=5.0, num_steps=4)
    assert len(model.inputs) == 8
    torch.testing.assert_close(guided, torch.full_like(noise, -(1.0 + 5.0 * (3.0 - 1.0))))
    plain = sample(model, noise, text, null_text=null_text, guidance_scale=1.0, num_steps=4)
    assert len(model.inputs) == 12, "a scale of 1 calls the model once a step"
    torch.testing.assert_close(plain, torch.full_like(noise, -3.0))


def test_first_frame_is_given_clean_on_every_step_and_returned():
    model, generator = Recorder(), torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, 4, 4, 4, generator=generator)
    first = torch.randn(2, 1, 4, 4, 4, generator=generator)
    latents = sample(model, noise, empty_text(CONFIG, 2), first_frame=first, num_steps=3)
    assert torch.equal(latents[:, :1], first)
    for x in model.inputs:
        noisy, condition, mask = x.split([4, 4, 1], dim=-1)
        assert torch.equal(noisy[:, :1], first)
        assert (condition == 0).all()
        assert (mask[:, :1] == 1).all() and (mask[:, 1:] == 0).all()
    assert torch.equal(model.inputs[0][:, 1:, ..., :4], noise[:, 1:])


def test_without_a_first_frame_the_mask_is_zero():
    x = model_input(torch.ones(1, 2, 4, 4, 4))
    assert x.shape[-1] == CONFIG.input_dim and (x[..., 4:] == 0).all()


def test_sampling_a_model_is_reproducible(capsys):
    torch.manual_seed(0)
    model, noise = CrossDiT(CONFIG).eval(), torch.randn(1, 2, 6, 10, 4)
    runs = [
        sample(model, noise, empty_text(CONFIG, 1), num_steps=2, progress=bar)
        for bar in (None, "sampling")
    ]
    assert torch.equal(*runs) and torch.isfinite(runs[0]).all()
    assert "sampling" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 5.0}, "guidance_scale 5.0 needs null_text"),
        ({"num_steps": 0}, "num_steps 0"),
        ({"shift": -1.0}, "shift -1.0"),
    ],
    ids=["guidance", "steps", "shift"],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        sample(Recorder(), torch.zeros(1, 1, 2, 2, 4), empty_text(CONFIG, 1), **options)
