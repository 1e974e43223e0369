"""Calibration: its curves against attention computed whole, and what it chooses."""

import itertools
import json
import math

import pytest
import torch
from test_density import GRID, RAGGED, Model, tokens

import nabla
from kandinsky_model.attention import CalibratedAttention, NablaAttention
from kandinsky_model.config import ARCHITECTURES
from kandinsky_model.model import CrossDiT
from kandinsky_model.sampler import empty_text
from nabla.inspect import Calibration, calibrate
from nabla.inspect.calibration import Curves

WINDOW = (3, 1, 1)


def curves(grid=GRID, forwards=1, **options):
    model = Model(grid, top_p=1.0, window=None)
    inputs = [tokens(grid) for _ in range(forwards)]
    return calibrate(model, lambda: [model(*x) for x in inputs], **options), inputs


@pytest.mark.parametrize("grid", [GRID, RAGGED], ids=["whole", "ragged"])
def test_the_curves_are_those_of_the_first_layer(grid):
    found, inputs = curves(grid, forwards=2, top_p=(0.3, 0.7), window=WINDOW)
    assert found.top_p.tolist() == pytest.approx([0.3, 0.7, 1.0])
    for index, top_p in enumerate((0.3, 0.7, 1.0)):
        density, wrong, norm = 0, 0, 0
        for q, k in inputs:
            mask = nabla.create_block_mask(q, k, grid=grid, top_p=top_p, window=WINDOW)
            density = density + mask.to_dense().float().mean((0, 2, 3)) / 2
            out = nabla.block_sparse_attention(q, k, k, mask).double()
            full = nabla.attention(q, k, k, grid=grid, top_p=1.0, order="block").double()
            wrong = wrong + (out - full).square().sum((0, 2, 3))
            norm = norm + full.square().sum()
        torch.testing.assert_close(found.density[0, :, index], density)
        torch.testing.assert_close(found.error[0, :, index], (wrong / norm).float())
    assert torch.equal(found.error[..., -1], torch.zeros(2, 3))
    assert torch.equal(found.density[..., -1], torch.ones(2, 3))


def test_no_choice_is_better():
    """Against every combination of three top_p for two layers of three heads."""
    found, _ = curves(top_p=(0.2, 0.6))
    for error in (0.05, 0.15, 0.3, 0.6):
        chosen = found.choose(error)
        assert chosen.error <= error
        best = math.inf
        for at in itertools.product(range(3), repeat=6):
            at = torch.tensor(at).view(2, 3, 1)
            cost = found.error.gather(-1, at).sum().item() / 2
            if math.sqrt(cost) <= error:
                best = min(best, found.density.gather(-1, at).mean().item())
        assert chosen.density <= best + 1 / 6  # one head of six may be left at a step
        assert chosen.density >= best - 1e-6


def test_a_chosen_calibration_does_what_it_says():
    found, [(q, k)] = curves(window=WINDOW)
    chosen = found.choose(0.2)
    mask = nabla.create_block_mask(q, k, grid=GRID, top_p=chosen[0], window=chosen.window)
    out = nabla.block_sparse_attention(q, k, k, mask)
    full = nabla.attention(q, k, k, grid=GRID, top_p=1.0, order="block")
    layer_error = ((out - full).norm() / full.norm()).item()
    at = [found.top_p.tolist().index(pytest.approx(p)) for p in chosen[0]]
    expected = sum(found.error[0, head, p].item() for head, p in enumerate(at))
    assert layer_error == pytest.approx(math.sqrt(expected), rel=1e-3)


def test_more_error_never_takes_more_blocks():
    found, _ = curves()
    densities = [found.choose(error).density for error in (0.01, 0.03, 0.1, 0.3, 1.0)]
    assert densities == sorted(densities, reverse=True)
    assert found.choose(1e-9).density == 1.0
    uniform = found.uniform()
    assert [c.density for c in uniform] == sorted(c.density for c in uniform)
    for one in uniform:
        if 0 < one.error:
            assert found.choose(one.error + 1e-6).density <= one.density


def test_layers_with_different_heads():
    class Uneven(torch.nn.Module):
        def forward(self, q, k):
            nabla.attention(q, k, k, grid=GRID, top_p=1.0, order="block")
            return nabla.attention(q[:, :2], k[:, :2], k[:, :2], grid=GRID, order="block")

    model = Uneven()
    chosen = calibrate(model, lambda: model(*tokens(GRID))).choose(0.2)
    assert [len(layer) for layer in chosen] == [3, 2]
    assert math.isfinite(chosen.error) and 0 < chosen.density < 1


def test_it_is_saved_and_loaded(tmp_path):
    chosen = curves(window=WINDOW)[0].choose(0.1)
    path = chosen.save(tmp_path / "sub" / "calibration.json")
    loaded = Calibration.load(path)
    assert loaded == chosen and loaded.window == WINDOW
    assert len(loaded) == 2 and list(loaded)[1] == loaded[1]
    for change in ({"format": "x"}, {"top_p": []}, {"top_p": [[1.5]]}, {"window": [2, 1, 1]}):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(ValueError, match=r"calibration\.json holds no calibration"):
            Calibration.load(path)
        chosen.save(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="nabla calibrate"):
        Calibration.load(path)


def test_the_cross_dit_takes_it():
    torch.manual_seed(0)
    model = CrossDiT(ARCHITECTURES["tiny"]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    config = model.config
    latents = torch.randn(1, 3, 32, 32, config.input_dim)
    inputs = (latents, *empty_text(config, 1), torch.tensor([0.5]))
    found = calibrate(model, lambda: model(*inputs, attention=NablaAttention(1.0)))
    chosen = found.choose(0.2)
    assert len(chosen) == config.num_visual_blocks
    with torch.no_grad():
        ours = model(*inputs, attention=CalibratedAttention(chosen))
        layers = iter(chosen.top_p)

        def layer_by_layer(q, k, v, grid):
            return NablaAttention(next(layers))(q, k, v, grid)

        assert torch.equal(ours, model(*inputs, attention=layer_by_layer))
    with pytest.raises(ValueError, match="1 layers and the model 5"):
        model(*inputs, attention=CalibratedAttention(Calibration(chosen.top_p[:1], None, 0.1, 1)))


def test_errors_say_what_to_do():
    model = Model(GRID)
    with pytest.raises(ValueError, match="goes? through nabla|go through nabla"):
        calibrate(model, lambda: None)
    with pytest.raises(ValueError, match=r"top_p=\(0.5, 1.5\)"):
        calibrate(model, lambda: None, top_p=(0.5, 1.5))
    with pytest.raises(ValueError, match="window"):
        calibrate(model, lambda: None, window=(2, 2, 2))
    found, _ = curves(top_p=(0.5,))
    for error in (0, -0.1, math.nan, math.inf, "0.1"):
        with pytest.raises(ValueError, match="error="):
            found.choose(error)
    assert isinstance(found, Curves)


def test_the_model_runs_as_it_is():
    """What calibrate computes beside changes nothing of what the model returns."""
    model, (q, k) = Model(GRID, top_p=0.4), tokens(GRID)
    expected, seen = model(q, k), []
    calibrate(model, lambda: seen.append(model(q, k)), top_p=(0.5,))
    assert torch.equal(seen[0], expected)
