"""Training reduces the loss, on NABLA attention, and resumes exactly."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from kandinsky_model import CrossDiT, CrossDiTConfig, train
from kandinsky_model.checkpoint import load_checkpoint
from kandinsky_model.codec import CosineCodec
from kandinsky_model.sampler import empty_text, model_input
from kandinsky_model.train import (
    Recipe,
    Source,
    Trainer,
    Windows,
    flow_loss,
    initialize,
    learning_rate,
)

CONFIG = CrossDiTConfig(
    model_dim=64, ff_dim=128, time_dim=32, num_text_blocks=1, num_visual_blocks=2,
    axes_dims=(8, 12, 12), in_text_dim=8, in_text_dim2=8, top_p=0.6, window=(3, 1, 1),
)  # fmt: skip
RECIPE = Recipe(steps=20, frames=3, size=64, lr=4e-3, warmup=2)


@pytest.fixture(scope="module")
def windows() -> Windows:
    return Windows((Source("carphone_pristine", 0, 12, 96, 96, 1.0),), CosineCodec())


def trainer(windows: Windows, recipe: Recipe = RECIPE) -> Trainer:
    torch.manual_seed(recipe.seed)
    return Trainer(CrossDiT(CONFIG), windows, recipe)


def held_loss(model: CrossDiT, windows: Windows) -> float:
    """The loss on fixed windows, noise and times."""
    generator = torch.Generator().manual_seed(7)
    latents = windows.draw(replace(RECIPE, batch=8), generator)
    with torch.no_grad():
        return flow_loss(model, latents, generator, shift=RECIPE.shift).item()


def test_initialization_returns_the_noisy_latents_and_looks_at_its_own_place(windows):
    torch.manual_seed(0)
    model = initialize(CrossDiT(CONFIG))
    noise = torch.randn(1, 2, 16, 16, 16)
    calls = []

    def attention(q, k, v, grid):
        calls.append((q, k))
        return v

    with torch.no_grad():
        velocity = model(
            model_input(noise), *empty_text(CONFIG, 1), torch.ones(1), attention=attention
        )
    assert torch.cosine_similarity(velocity.flatten(), noise.flatten(), dim=0) > 0.9
    for q, k in calls:
        scores = (q @ k.transpose(-2, -1)).mean(1)[0].view(2, 64, 2, 64)  # the mean over heads
        own = scores.diagonal(dim1=1, dim2=3).mean()
        assert own > scores.mean() + scores.std()


def test_twenty_steps_reduce_the_loss(windows):
    run = trainer(windows)
    before = held_loss(run.model, windows)
    for _ in range(RECIPE.steps):
        run.advance()
    assert held_loss(run.model, windows) < 0.85 * before
    assert held_loss(run.average, windows) < 0.95 * before


def test_training_uses_nabla_attention(windows, monkeypatch):
    calls = []
    original = train.CrossDiT.default_attention
    monkeypatch.setattr(
        train.CrossDiT, "default_attention", lambda self: calls.append(original(self)) or calls[-1]
    )
    trainer(windows).advance()
    assert [call.top_p for call in calls] == [0.6]


def test_a_resumed_run_equals_an_uninterrupted_one(windows, tmp_path):
    whole = trainer(windows)
    losses = [whole.advance() for _ in range(4)]
    first = trainer(windows)
    assert [first.advance() for _ in range(2)] == losses[:2]
    first.save(tmp_path / "state.safetensors")
    second = trainer(windows, replace(RECIPE))
    second.resume(tmp_path / "state.safetensors")
    assert [second.advance() for _ in range(2)] == losses[2:]
    for a, b in zip(whole.average.parameters(), second.average.parameters(), strict=True):
        assert torch.equal(a, b)


def test_windows_stay_inside_their_source():
    source = Source("carphone_pristine", 40, 52, 64, 80, 1.0)
    windows = Windows((source,), CosineCodec())
    assert windows.latents[0].shape == (12, 16, 20, 16)
    drawn = windows.draw(replace(RECIPE, batch=5, frames=6), torch.Generator().manual_seed(0))
    assert drawn.shape == (5, 6, 16, 16, 16)
    for window in drawn:
        columns = [
            i
            for i in range(5)
            if any(torch.equal(frame[:, i : i + 16], window[0]) for frame in windows.latents[0])
        ]
        assert columns, "not a crop of the source"


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(step, Recipe(steps=100, warmup=10, lr=1.0)) for step in range(101)]
    assert rates[0] < rates[5] < rates[9] and rates[9] > rates[50] > rates[99] > rates[100]
    assert rates[100] == pytest.approx(0.0)


def test_the_command_writes_weights_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setitem(train.ARCHITECTURES, "tiny", CONFIG)
    monkeypatch.setattr(train, "SOURCES", (Source("carphone_pristine", 0, 6, 128, 128, 1.0),))
    app = train.typer.Typer()
    app.command()(train.main)
    output = tmp_path / "new" / "tiny.safetensors"
    options = [str(output), "--steps", "2", "--frames", "2"]
    result = CliRunner().invoke(app, [*options, "--until", "1"])
    assert result.exit_code == 0, result.output
    halfway = load_checkpoint(output)
    result = CliRunner().invoke(app, [*options, "--resume"])
    assert result.exit_code == 0, result.output
    finished = load_checkpoint(output)
    assert finished.config == CONFIG
    changed = [
        name
        for name, tensor in finished.state_dict().items()
        if not torch.equal(tensor, halfway.state_dict()[name])
    ]
    assert "out_layer.out_layer.weight" in changed


def test_held_out_frames_are_not_trained_on():
    for source in train.SOURCES:
        if source.clip == "carphone_pristine":
            assert source.stop <= train.HELD_OUT
