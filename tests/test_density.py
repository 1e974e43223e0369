"""The density report: its numbers against masks and attention computed whole, in any model."""

import json
import math

import pytest
import torch
from oracle import attention, token_mask
from test_block_mask import smooth_tokens

import nabla
from nabla.inspect import density, density_report
from nabla.inspect.observe import observing

GRID = nabla.TokenGrid(3, 12, 20, (1, 4, 4))  # 45 blocks, none short
RAGGED = nabla.TokenGrid(2, 11, 18, (1, 4, 4), extra=9)


class Model(torch.nn.Module):
    """Two layers of attention over the tokens of a grid, the second with other keys."""

    def __init__(self, grid, top_p=0.6, window=(3, 1, 1)):
        super().__init__()
        self.options = {"grid": grid, "top_p": top_p, "window": window, "order": "block"}

    def forward(self, q, k):
        x = nabla.attention(q, k, k, **self.options)
        return nabla.attention(x, k + q, k, **self.options)


def tokens(grid, batch=1):
    return [smooth_tokens(grid, batch=batch, heads=3, dtype=torch.float32) for _ in "qk"]


@pytest.mark.parametrize("grid", [GRID, RAGGED], ids=["whole", "ragged"])
def test_the_numbers_are_those_of_the_whole(grid, monkeypatch):
    """Over many forwards of one input the drawn query blocks average to all of them."""
    monkeypatch.setattr(density, "SEQUENCE", 1)
    q, k = tokens(grid)
    model = Model(grid)
    with density_report(model) as report:
        for _ in range(400):
            model(q, k)
    mask = nabla.create_block_mask(q, k, grid=grid, top_p=0.6, window=(3, 1, 1))
    keep = mask.to_dense()[0]
    assert torch.equal(report.table("density")[7, 0], keep.float().mean((1, 2)))

    scores = nabla.pooled_scores(q, k, grid)[0]
    ranked = scores.isfinite()
    mass = scores.where(ranked & keep, 0).sum(-1) / scores.where(ranked, 0).sum(-1)
    retained = mass.nan_to_num(1).mean(-1)  # a row of extra tokens ranks nothing and keeps all
    scale = q.shape[-1] ** -0.5
    _, lse = attention(q, k, k, token_mask(keep[None], grid), scale)
    _, full = attention(q, k, k, token_mask(torch.ones_like(keep)[None], grid), scale)
    starts = grid.starts().tolist()
    mass = (lse - full).exp()[0]  # [H, S]
    blocks = [mass[:, a:b].mean(-1) for a, b in zip(starts, starts[1:], strict=False)]
    recall = torch.stack(blocks, -1).mean(-1)
    assert (report.table("retained")[:, 0].mean(0) - retained).abs().max() < 0.02
    assert (report.table("recall")[:, 0].mean(0) - recall.float()).abs().max() < 0.02


def test_everything_kept_is_everything():
    q, k = tokens(GRID)
    model = Model(GRID, top_p=1.0)
    with density_report(model, seed=1) as report:
        for _ in range(20):
            model(q, k)
    for name in ("density", "retained", "recall"):
        table = report.table(name)
        assert table.shape == (20, 2, 3)
        known = table[table.isfinite()]
        assert known.numel() > 0
        torch.testing.assert_close(known, torch.ones_like(known))


def test_short_sequences_are_sampled_in_proportion(monkeypatch):
    monkeypatch.setattr(density, "SEQUENCE", 128)
    q, k = tokens(GRID)
    model = Model(GRID)
    with density_report(model) as report:
        for _ in range(100):
            model(q, k)
    known = report.table("recall").isfinite()
    assert known[0, 0].all()
    assert 0.25 < known.float().mean() < 0.45  # 45 blocks of 128
    assert report.table("density").isfinite().all()


def test_a_compiled_model_is_seen_and_not_changed():
    q, k = tokens(GRID, batch=2)
    model = Model(GRID)
    expected = model(q, k)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with density_report(compiled) as report:
        for _ in range(3):
            assert torch.equal(compiled(q, k), expected)
    assert (report.num_steps, report.num_layers) == (3, 2)
    with density_report(model) as eager:
        model(q, k)
    torch.testing.assert_close(report.table("density")[2], eager.table("density")[0])


def test_only_forwards_of_the_model_count():
    q, k = tokens(GRID)
    model, other = Model(GRID), Model(GRID)
    with density_report(model) as report:
        other(q, k)
        model(q, k)
        other(q, k)
    assert (report.num_steps, report.num_layers) == (1, 2)
    model(q, k)
    assert report.num_steps == 1


def test_json_has_null_where_nothing_is_known(tmp_path):
    q, k = tokens(GRID)
    model = Model(GRID)
    with density_report(model) as report:
        for _ in range(4):
            model(q, k)
    found = json.loads(report.save(tmp_path / "sub" / "report.json").read_text())
    assert found["steps"] == 4 and found["layers"] == 2 and found["heads"] == 3
    cells = [x for step in found["recall"] for layer in step for x in layer]
    assert None in cells and any(isinstance(x, float) for x in cells)
    assert not any(isinstance(x, float) and math.isnan(x) for x in cells)


def test_the_picture_is_drawn(tmp_path):
    q, k = tokens(GRID)
    model = Model(GRID)
    with density_report(model) as report:
        for _ in range(3):
            model(q, k)
    path = report.draw(tmp_path / "sub" / "report.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_run_that_fails_leaves_nothing_behind():
    q, k = tokens(GRID)
    model = Model(GRID)
    with pytest.raises(ValueError, match="has 240 tokens"), density_report(model) as report:
        model(q[:, :, :240], k)
    assert report.num_steps == 0
    with density_report(model) as second:
        model(q, k)
    assert (second.num_steps, report.num_steps) == (1, 0)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="torch.nn.Module"), observing(print, print):
        pass
    model = torch.nn.Linear(2, 2)
    with density_report(model) as report:
        model(torch.ones(2))
    with pytest.raises(ValueError, match="goes through nabla"):
        report.table("density")
