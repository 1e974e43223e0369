"""The demo runs, writes what it says, and measures what it claims."""

import pytest
import torch
from PIL import Image

import nabla
from kandinsky_model import ARCHITECTURES, DenseAttention, demo
from kandinsky_model.checkpoint import load_checkpoint
from kandinsky_model.clip import read_clip
from kandinsky_model.model import CrossDiT


@pytest.fixture(scope="module")
def model() -> CrossDiT:
    return load_checkpoint(demo.WEIGHTS, dtype=torch.float32)


def test_demo_writes_videos_and_masks_and_prints_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "REPEATS", 1)
    monkeypatch.setattr(demo, "FRAMES", 4)
    monkeypatch.setenv("COLUMNS", "200")
    demo.run(tmp_path / "out", steps=2, long_frames=(2, 4))
    printed = capsys.readouterr().out
    for text in ("backend", "retained mass", "speed-up", "512", "1,024", "PSNR", "wrote"):
        assert text in printed, text
    video = read_clip(str(tmp_path / "out" / "side_by_side.mp4"))
    assert video.shape == (4, 2 * demo.SIZE + 20, 3 * 2 * demo.SIZE, 3)
    with Image.open(tmp_path / "out" / "side_by_side.gif") as gif:
        assert gif.n_frames == 4
    with Image.open(tmp_path / "out" / "block_masks.png") as picture:
        assert min(picture.size) > 100


def test_weights_are_small_and_of_the_tiny_preset(model):
    assert model.config == ARCHITECTURES["tiny"]
    assert demo.WEIGHTS.stat().st_size < 9e6


def test_trained_weights_continue_held_out_frames(model):
    real = demo.centre(read_clip(demo.CLIP, start=demo.HELD_OUT, frames=4, stride=2), 128, 128)
    sampled = demo.continue_clip(model, real, DenseAttention(), steps=4)
    noise = torch.randint(0, 256, real.shape, dtype=torch.uint8)
    assert demo.psnr(sampled[1:], real[1:]) > demo.psnr(noise[1:], real[1:]) + 10


def test_recorder_keeps_every_layer_and_changes_nothing(model):
    q, k, v, grid = demo.long_attention(model, 2)
    assert grid == nabla.TokenGrid(2, 16, 16)
    assert q.shape == k.shape == v.shape == (1, 4, 512, 32)
    recorder = demo.Recorder(DenseAttention())
    assert torch.equal(recorder(q, k, v, grid), DenseAttention()(q, k, v, grid))
    assert recorder.calls == [(q, k, v, grid)]


def test_compare_measures_against_dense(model):
    q, k, v, grid = demo.long_attention(model, 2)
    everything = demo.NablaAttention(top_p=1.0)
    all_blocks = demo.compare(q, k, v, grid, everything)
    assert all_blocks.tokens == 512 and all_blocks.density == 1.0
    assert all_blocks.retained_mass == pytest.approx(1.0, abs=1e-5)
    assert all_blocks.relative_error < 1e-5
    few_blocks = demo.compare(q, k, v, grid, demo.NablaAttention(top_p=0.3))
    assert few_blocks.density < 0.7 and 0.2 < few_blocks.retained_mass < 1.0
    assert few_blocks.relative_error > 1e-3


def test_psnr():
    black, white = torch.zeros(2, 2), torch.full((2, 2), 255)
    assert demo.psnr(black, white) == 0 and demo.psnr(white, white) == float("inf")
