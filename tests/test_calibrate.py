"""`nabla calibrate` as a user meets it, and `nabla generate` with what it writes."""

import json
import sys
from dataclasses import replace

import pytest
import tiny
import torch

from kandinsky_model import presets
from kandinsky_model.attention import CalibratedAttention
from kandinsky_model.pipeline import Pipeline
from kandinsky_model.request import Request
from nabla.cli import main
from nabla.inspect import Calibration, Curves
from nabla.inspect.calibration import TOP_P

MODEL = replace(tiny.CONFIG, top_p=0.9, window=(1, 1, 1))
ROW = tiny.preset("text-to-video", sizes=((96, 128),), name="small", model=MODEL)
LAYERS, HEADS = ROW.model.num_visual_blocks, ROW.model.model_dim // ROW.model.head_dim


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny.write_weights(tmp_path_factory.mktemp("weights"), ROW)


@pytest.fixture
def nabla(monkeypatch, tmp_path, capsys):
    """Runs the command in a folder of its own; returns exit status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(presets.PRESETS, "small", ROW)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["nabla", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def test_the_tiny_model_needs_nothing(nabla, tmp_path):
    status, printed = nabla("calibrate", "--steps", 1, "--error", 0.2)
    assert status == 0, printed
    chosen = Calibration.load("out/calibration.json")
    assert (len(chosen), {len(layer) for layer in chosen}) == (5, {4})
    assert chosen.error <= 0.2 and chosen.window == (3, 1, 1)
    curves = Curves.load("out/calibration.curves.json")
    assert curves.top_p.tolist() == pytest.approx([*TOP_P, 1.0])
    assert curves.choose(0.2).top_p == chosen.top_p
    assert (tmp_path / "out" / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert f"{chosen.density:.3f}" in printed and "wrote out/calibration.json" in printed

    status, printed = nabla("calibrate", "--curves", "out/calibration.curves.json", "--error", 0.4,
                            "--out", "looser.json")  # fmt: skip
    assert status == 0, printed
    assert Calibration.load("looser.json").density < chosen.density


def test_a_preset_is_calibrated_and_generates(nabla, weights, tmp_path):
    options = ("--preset", "small", "--weights", weights, "--seconds", 0.5)
    prompts = ("a cat in a hat", "a dog")
    status, printed = nabla("calibrate", *prompts, *options, "--steps", 2, "--error", 0.3)
    assert status == 0, printed
    calibration = Calibration.load("out/calibration.json")
    assert (len(calibration), {len(layer) for layer in calibration}) == (LAYERS, {HEADS})
    assert calibration.window == (1, 1, 1) and calibration.density < 1

    request = Request("a cat", seconds=0.5, num_steps=2, attention=CalibratedAttention(calibration))
    expected = Pipeline.load(weights, ROW).latents(request, progress=False)
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        latents = Pipeline._latents
        patch.setattr(
            Pipeline, "_latents", lambda *a, **k: kept.append(latents(*a, **k)) or kept[0]
        )
        status, printed = nabla("generate", "a cat", *options, "--steps", 2, "--out", "cat.mp4",
                                "--calibration", "out/calibration.json")  # fmt: skip
    assert status == 0, printed
    assert torch.equal(kept[0], expected)
    own = Pipeline.load(weights, ROW).latents(Request("a cat", seconds=0.5, num_steps=2))
    assert not torch.equal(kept[0], own)


def test_what_is_measured_is_the_dense_path(weights):
    """Both prompts, all steps, with and without text: whatever the attention of the preset."""
    requests = [Request(word, seconds=0.5, num_steps=2) for word in ("a", "b")]
    pipeline, calls = Pipeline.load(weights, ROW), []
    curves = pipeline.calibrate(requests, top_p=(0.5,), progress=calls.append)
    assert len(calls) == 2 * 2 * 2 * LAYERS
    assert curves.shape == (LAYERS, HEADS) and curves.window == (1, 1, 1)
    assert all(call.mask.density() == 1 for call in calls)


def test_a_dense_preset_is_calibrated_with_the_window_of_others():
    assert tiny.preset("text-to-video").window == presets.WINDOW


BAD = {
    "error": (["calibrate", "--error", "0"], "error=0.0 is not a positive number"),
    "out": (["calibrate", "--out", "x.png"], "--out x.png must end in .json"),
    "preset": (["calibrate", "a cat", "--preset", "nope"], "preset 'nope' is none of"),
    "prompts": (["calibrate", "--preset", "small"], "preset small samples prompts"),
    "weights": (["calibrate", "a cat", "--preset", "small"], "--weights is missing"),
    "clip": (["calibrate", "no-such-clip"], "clip 'no-such-clip' is no file"),
    "curves": (["calibrate", "--curves", "other.json"], "other.json holds no calibration curves"),
    "calibration": (
        ["generate", "a cat", "--preset", "small", "--calibration", "other.json"],
        "other.json holds no calibration",
    ),
    "both": (
        ["generate", "a", "--preset", "small", "--calibration", "c.json", "--top-p", "0.9"],
        "--calibration c.json says how to attend: no --attention, --top-p",
    ),
}


@pytest.mark.parametrize("arguments, words", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_comes_first(arguments, words, nabla, monkeypatch, tmp_path):
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pytest.fail("began"))
    (tmp_path / "other.json").write_text(json.dumps({"format": "other"}))
    status, printed = nabla(*arguments)
    assert status == 1
    assert printed.startswith("nabla: ") and words in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    "top_p, words",
    [
        (((0.5, 0.5),) * (LAYERS + 1), f"{LAYERS + 1} layers and the model {LAYERS}"),
        (((0.5,) * (HEADS + 1),) * LAYERS, f"{HEADS + 1} heads in a layer and the model {HEADS}"),
    ],
    ids=["layers", "heads"],
)
def test_a_calibration_of_another_model_is_refused_before_weights_are_read(
    top_p, words, nabla, monkeypatch, weights, tmp_path
):
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pytest.fail("began"))
    Calibration(top_p, None, 0.1, 0.5).save(tmp_path / "c.json")
    status, printed = nabla("generate", "a cat", "--preset", "small", "--weights", weights,
                            "--calibration", "c.json")  # fmt: skip
    assert status == 1 and words in printed
