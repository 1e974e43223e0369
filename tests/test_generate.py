"""`nabla generate` as a user meets it: files, interruptions, and what it refuses at once."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kandinsky_model import CrossDiT, DenseAttention, NablaAttention, generate, presets, state
from kandinsky_model.pipeline import Pipeline
from kandinsky_model.request import Request
from kandinsky_model.text import TextEncoder
from kandinsky_model.vae import VAE
from nabla.cli import main

ROWS = {
    "text-to-video": tiny.preset("text-to-video", sizes=((48, 64),)),
    "image-to-video": tiny.preset("image-to-video", sizes=((48, 64), (64, 48))),
    "text-to-image": tiny.preset("text-to-image", sizes=((48, 64),)),
    "image-to-image": tiny.preset("image-to-image", sizes=((48, 64), (64, 48))),
}
LORA = "lora.safetensors"
SCALING = '"scaling_factor": 0.476987'
# A process of its own that ends itself by a signal as soon as it has kept so many steps.
SCRIPT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
sys.path[:0] = {tests!r}, {root!r}
import torch
from kandinsky_model import pipeline, presets
from test_generate import ROWS
presets.PRESETS["tiny"] = ROWS["text-to-video"]
torch.set_num_threads(1)
save = pipeline.save_state
def save_state(path, tensors, step, arguments):
    save(path, tensors, step, arguments)
    if step == {step}:
        os.kill(os.getpid(), {signal})
pipeline.save_state = save_state
from nabla.cli import main
main()
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder for each task, in upstream's layout."""
    return {
        task: tiny.write_weights(tmp_path_factory.mktemp(task), row) for task, row in ROWS.items()
    }


@pytest.fixture
def nabla(monkeypatch, tmp_path, weights, capsys):
    """Runs `nabla generate` in a folder of its own; returns exit status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, task="text-to-video", prompt="a cat in a hat", folder=None):
        monkeypatch.setitem(presets.PRESETS, "tiny", ROWS[task])
        options = ["--preset", "tiny", "--weights", str(folder or weights[task])]
        monkeypatch.setattr(sys, "argv", ["nabla", "generate", prompt, *options, *arguments])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def image_file(path, size=(64, 48)) -> str:
    Image.effect_noise(size, 90).convert("RGB").save(path)
    return str(path)


def decoded(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return frames, stream.average_rate, stream.codec_context.name


def write_lora(folder: Path, config: object = None, **more: torch.Tensor) -> str:
    """An adapter of one layer, and its description."""
    layer, dim = "visual_transformer_blocks.0.feed_forward.in_layer", tiny.CONFIG.model_dim
    halves = {"A": torch.ones(2, dim), "B": torch.ones(tiny.CONFIG.ff_dim, 2)}
    tensors = {f"{layer}.lora_{half}.weight": value for half, value in halves.items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors | {f"{layer}.{key}": x for key, x in more.items()}, folder / LORA)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


# --- files -------------------------------------------------------------------------------------


def test_writes_a_video_that_a_player_opens(nabla, weights):
    status, printed = nabla("--out", "cat.mp4", "--steps", "2", "--seed", "3", "--seconds", "0.7")
    assert status == 0 and "wrote cat.mp4" in printed
    assert os.listdir() == ["cat.mp4"], "no state, no draft"
    frames, rate, codec = decoded("cat.mp4")
    assert len(frames) == 17 and frames[0].shape == (48, 64, 3) and rate == 24 and codec == "h264"
    pipeline = Pipeline.load(weights["text-to-video"], ROWS["text-to-video"])
    request = Request("a cat in a hat", num_steps=2, seed=3, seconds=0.7)
    expected = pipeline(request, progress=False)
    error = (torch.tensor(frames[8]).float() - expected[8].float()).abs().mean()
    assert error < 25, "what was decoded, but for what H.264 loses of noise"


@pytest.mark.parametrize(
    ("task", "out", "shape"),
    [
        ("text-to-video", "out/deep/cat.gif", (48, 64)),
        ("image-to-video", "cat.MP4", (48, 64)),
        ("text-to-image", "cat.png", (48, 64)),
        ("image-to-image", "cat.png", (48, 64)),
    ],
)
def test_every_task_and_ending(nabla, tmp_path, task, out, shape):
    image = ["--image", image_file(tmp_path / "in.png")] if task.startswith("image") else []
    length = ["--seconds", "0.2"] if task.endswith("video") else []
    status, printed = nabla("--out", out, "--steps", "1", *image, *length, task=task)
    assert status == 0, printed
    if out.lower().endswith(".mp4"):
        frames, _, _ = decoded(out)
        assert len(frames) == 5 and frames[0].shape == (*shape, 3)
    else:
        with Image.open(out) as picture:
            assert picture.size == shape[::-1]
            assert getattr(picture, "n_frames", 1) == (5 if length else 1)


def test_the_layout_of_diffusers(nabla, tmp_path):
    nabla("--out", "ours.mp4", "--steps", "1", "--seconds", "0.2")
    folder = tiny.write_weights(tmp_path / "d", ROWS["text-to-video"], layout="diffusers")
    status, printed = nabla("--out", "d.mp4", "--steps", "1", "--seconds", "0.2", folder=folder)
    assert status == 0, printed
    assert Path("d.mp4").read_bytes() == Path("ours.mp4").read_bytes()


def test_the_file_is_named_after_the_prompt(nabla):
    status, printed = nabla("--steps", "1", "--seconds", "0.2", "--seed", "7", prompt="A cat, ÖL!")
    assert status == 0 and os.listdir("out") == ["a-cat-öl-7.mp4"]


def test_a_name_that_is_taken_is_not_taken_again(nabla, monkeypatch):
    options, prompt = ["--steps", "1", "--seconds", "0.2"], "A cat"
    for name in ("a-cat-0.mp4", "a-cat-0-2.mp4", "a-cat-0-3.mp4"):
        status, printed = nabla(*options, prompt=prompt)
        assert status == 0 and f"wrote out/{name}" in printed
    old = {file: file.read_bytes() for file in Path("out").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(generate, "write_frames", interrupt)
        assert nabla(*options, prompt=prompt)[0] == generate.INTERRUPTED
    status, printed = nabla(*options, prompt=prompt)
    assert "goes on with out/a-cat-0-4.mp4.state.safetensors" in printed
    assert all(file.read_bytes() == content for file, content in old.items())
    assert len(os.listdir("out")) == 4


def interrupt(*args, **options):
    raise KeyboardInterrupt


def test_ratios_are_measured_and_used(nabla):
    options = ["--steps", "8", "--seconds", "0.2"]
    assert nabla("--out", "plain.mp4", *options)[0] == 0
    status, printed = nabla("--out", "cat.mp4", "--measure-magcache", "out/ratios.json", *options)
    assert status == 0 and "wrote out/ratios.json" in printed
    assert Path("cat.mp4").read_bytes() == Path("plain.mp4").read_bytes()
    status, printed = nabla("--out", "cat.mp4", "--magcache", "out/ratios.json", *options)
    assert status == 0, printed
    assert nabla("--out", "cat.mp4", "--magcache", "out/ratios.json", "--steps", "5")[0] == 0
    assert sorted(os.listdir()) == ["cat.mp4", "out", "plain.mp4"]
    for more in (["--magcache", "out/ratios.json"], ["--steps", "1"]):
        status, printed = nabla(*options, "--measure-magcache", "other.json", *more)
        assert status == 1 and "takes two steps or more, and no --magcache" in printed


def test_adapters_and_other_ratios(nabla, tmp_path):
    options = ["--out", "cat.mp4", "--steps", "4", "--seconds", "0.2"]
    layer = "visual_transformer_blocks.0.feed_forward.in_layer"
    dim = tiny.CONFIG.model_dim
    adapter = {
        f"{layer}.lora_A.weight": torch.randn(2, dim),
        f"{layer}.lora_B.weight": torch.randn(tiny.CONFIG.ff_dim, 2),
    }
    save_file(adapter, "lora.safetensors", {"trigger": "tiny style, "})
    Path("ratios.json").write_text("[" + ", ".join(["1.0"] * 6) + "]")
    files = {}
    for name, more in {
        "plain": [], "lora": ["--lora", "lora.safetensors"],
        "half": ["--lora", "lora.safetensors", "--lora-scale", "0.5"],
        "none": ["--lora", "lora.safetensors", "--lora-scale", "0"],
        "magcache": ["--magcache", "ratios.json"],
    }.items():  # fmt: skip
        status, printed = nabla(*options, *more)
        assert status == 0, printed
        files[name] = Path("cat.mp4").read_bytes()
    assert len(set(files.values())) == 5, "at scale 0 there is still the trigger"
    assert nabla(*options, prompt="tiny style, a cat in a hat")[0] == 0
    assert Path("cat.mp4").read_bytes() == files["none"]
    save_file({"blocks.0.lora_A.weight": torch.ones(2, 3)}, "lora.safetensors")
    Path("cat.mp4").unlink()
    status, printed = nabla(*options, "--lora", "lora.safetensors")
    assert status == 1 and "does not fit as a LoRA" in printed and not Path("cat.mp4").exists()


def test_the_readme(monkeypatch, tmp_path, weights):
    monkeypatch.chdir(tmp_path)
    Path("weights").symlink_to(weights["text-to-video"])
    row = ROWS["text-to-video"]
    monkeypatch.setitem(presets.PRESETS, "video-lite-10s", replace(row, num_steps=1))
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = re.findall(r"^```py\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if "Pipeline.load" in block]
    exec(code, {})
    assert len(decoded("cat.mp4")[0]) == row.frames


# --- interruptions -----------------------------------------------------------------------------


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_an_interrupted_run_resumed_writes_the_same_file(nabla, weights, tmp_path, end):
    Path("ratios.json").write_text(str([*tiny.RATIOS]))
    options = ["--steps", "5", "--seconds", "0.5", "--seed", "1", "--magcache", "ratios.json"]
    assert nabla("--out", "whole.mp4", *options)[0] == 0
    tests = Path(__file__).parent
    script = SCRIPT.format(tests=str(tests), root=str(tests.parent), step=3, signal=int(end))
    ended = subprocess.run(
        [sys.executable, "-c", script, "generate", "a cat in a hat", "--preset", "tiny",
         "--weights", str(weights["text-to-video"]), "--out", "cat.mp4", *options],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    if end == signal.SIGINT:
        assert ended.returncode == generate.INTERRUPTED, ended.stderr
        assert "the same command goes on with cat.mp4.state.safetensors" in ended.stdout
    else:
        assert ended.returncode == -end
    assert not Path("cat.mp4").exists()
    with safe_open("cat.mp4.state.safetensors", framework="pt") as state:
        assert state.metadata()["step"] == "3"
    Path(".12-cat.mp4.state.safetensors").touch()  # as when killed while it was written
    status, printed = nabla("--out", "cat.mp4", *options, "--seed", "2")
    assert status == 1 and "other arguments (seed 1, now 2)" in printed
    status, printed = nabla("--out", "cat.mp4", *options)
    assert status == 0 and "goes on with cat.mp4.state.safetensors" in printed
    assert Path("cat.mp4").read_bytes() == Path("whole.mp4").read_bytes()
    assert sorted(os.listdir()) == ["cat.mp4", "ratios.json", "whole.mp4"]


def raising(function, call):
    """`function`, but its call of this number is interrupted."""
    calls = count(1)

    def wrapped(*args, **options):
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **options)

    return wrapped


PHASES = {
    "text": (TextEncoder, "_pooled", 2, None),
    "image": (VAE, "encode", 1, None),
    "a step": (CrossDiT, "forward", 4, 1),
    "a state": (state, "save_file", 3, 1),
    "decoding": (VAE, "decode", 1, 4),
    "writing": (av.VideoFrame, "from_ndarray", 3, 4),
}


@pytest.mark.parametrize(("place", "name", "call", "done"), PHASES.values(), ids=PHASES)
def test_an_interruption_in_any_phase(nabla, tmp_path, monkeypatch, place, name, call, done):
    """Behind `done` steps: the same command goes on with them, to the same file."""
    options = ["--seconds", "0.5", "--image", image_file(tmp_path / "in.png")]
    run = partial(nabla, *options, task="image-to-video")
    assert run("--out", "whole.mp4")[0] == 0
    with monkeypatch.context() as patch:
        if place is av.VideoFrame:  # which takes no other attributes
            from_ndarray = raising(place.from_ndarray, call)
            patch.setattr(av, "VideoFrame", SimpleNamespace(from_ndarray=from_ndarray))
        else:
            patch.setattr(place, name, raising(getattr(place, name), call))
        status, printed = run("--out", "cat.mp4")
    assert status == generate.INTERRUPTED and "interrupted" in printed
    kept = "cat.mp4.state.safetensors"
    assert sorted(os.listdir()) == sorted(["in.png", "whole.mp4", *([kept] if done else [])])
    if done:
        with safe_open(kept, framework="pt") as file:
            assert file.metadata()["step"] == str(done)
    assert ("nothing is kept" in printed) == (not done)
    assert run("--out", "cat.mp4")[0] == 0
    assert Path("cat.mp4").read_bytes() == Path("whole.mp4").read_bytes()


def one_number_more(file: Path) -> None:
    """Another number, but name, size and time as they were."""
    before, tensors = file.stat(), load_file(file)
    tensors[min(tensors)].flatten()[0] += 1.0
    with safe_open(file, framework="pt") as opened:
        save_file(tensors, file, metadata=opened.metadata())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


def other_words(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


CHANGES = {
    "model/kandinsky5tiny_text-to-video.safetensors": one_number_more,
    "vae/diffusion_pytorch_model.safetensors": one_number_more,
    "vae/config.json": partial(other_words, old='"scaling_factor": 0.476986', new=SCALING),
    "text_encoder/model.safetensors": one_number_more,
    "text_encoder/config.json": partial(other_words, old="10000.0", new="20000.0"),
    "text_encoder/tokenizer.json": partial(other_words, old="<|im_end|>", new="<|im_over|>"),
    "text_encoder2/model.safetensors": one_number_more,
    "text_encoder2/tokenizer_config.json": partial(other_words, old="{", new='{"x": 1,'),
    "lora/lora.safetensors": one_number_more,
    "lora/adapter_config.json": partial(other_words, old='"lora_alpha": 2', new='"lora_alpha": 1'),
}


def test_weights_that_changed_are_noticed(nabla, weights, tmp_path, monkeypatch):
    """All files that are read count by what they hold; put back, the run goes on."""
    folder = shutil.copytree(weights["text-to-video"], tmp_path / "weights")
    write_lora(folder / "lora", config={"lora_alpha": 2})
    options = ["--out", "cat.mp4", "--steps", "2", "--seconds", "0.2"]
    options += ["--lora", str(folder / "lora")]
    with monkeypatch.context() as patch:
        patch.setattr(generate, "write_frames", interrupt)
        assert nabla(*options, folder=folder)[0] == generate.INTERRUPTED
    for name, change in CHANGES.items():
        content = (folder / name).read_bytes()
        change(folder / name)
        status, printed = nabla(*options, folder=folder)
        found = re.findall(r"(?<=[(;])\s*([^ ;]+) '\w{16}', now '\w{16}'", printed)
        assert status == 1 and found == [name], printed
        assert not Path("cat.mp4").exists()
        (folder / name).write_bytes(content)
    status, printed = nabla(*options, folder=folder)
    assert status == 0 and "goes on with" in printed


def test_another_prompt_of_the_same_first_words_gets_another_name(nabla, monkeypatch):
    """And each, when it is asked for again, goes on with what is its own."""
    options, words = ["--steps", "1", "--seconds", "0.2"], "one two three four five six"
    prompts = [f"{words} seven", f"{words} eight"]
    with monkeypatch.context() as patch:
        patch.setattr(generate, "write_frames", interrupt)
        for prompt in prompts:
            assert nabla(*options, prompt=prompt)[0] == generate.INTERRUPTED
    name = "one-two-three-four-five-six-0"
    names = [f"{name}.mp4", f"{name}-2.mp4"]
    assert sorted(os.listdir("out")) == sorted(f"{name}.state.safetensors" for name in names)
    for prompt, file in zip(prompts[::-1], names[::-1], strict=True):
        status, printed = nabla(*options, prompt=prompt)
        assert status == 0 and f"goes on with out/{file}.state" in printed, printed
        assert f"wrote out/{file}" in printed
    assert sorted(os.listdir("out")) == sorted(names)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "arguments", "words"),
    [
        ("text-to-video", ["--size", "500x770"], "500x770 must be.*16.*nearest is 496x768"),
        ("text-to-video", ["--size", "0x64"], "nearest is 16x64"),
        ("text-to-video", ["--size", "64"], "--size '64' is not a height and a width"),
        ("text-to-video", ["--seconds", "0"], "seconds 0.0 make no video"),
        ("text-to-video", ["--seconds", "nan"], "seconds nan make no video"),
        ("text-to-video", ["--seconds", "1e308"], "seconds 1e.308 make no video"),
        ("text-to-video", ["--seconds", "1e12"], "24000000000001 frames needs"),
        ("text-to-image", ["--seconds", "5"], "makes images"),
        ("text-to-video", ["--steps", "0"], "num_steps 0"),
        ("text-to-video", ["--guidance", "-1"], "guidance_scale -1"),
        ("text-to-video", ["--shift", "0"], "shift 0"),
        ("text-to-video", ["--guidance", "1", "--negative", "red"], "negative_prompt is not read"),
        ("text-to-video", ["--seed", "-1"], "seed -1"),
        ("text-to-video", ["--top-p", "0.5"], "top_p 0.5 is of NABLA"),
        ("text-to-video", ["--attention", "nabla", "--top-p", "50"], "top_p 50.0 must be in"),
        ("image-to-video", [], "image-to-video: it needs an image"),
        ("image-to-image", [], "image-to-image: it needs an image"),
        ("text-to-video", ["--image", "x.png"], "text-to-video: it takes no image"),
        ("image-to-video", ["--image", "absent.png"], "image absent.png cannot be read"),
        ("text-to-video", ["--out", "cat.avi"], "cat.avi must end in .mp4 or .gif"),
        ("text-to-video", ["--out", "cat.png"], "cat.png must end in .mp4 or .gif"),
        ("text-to-image", ["--out", "cat.mp4"], "cat.mp4 must end in .png"),
        ("text-to-video", ["--out", "/proc/no/cat.mp4"], "/proc/no/cat.mp4 cannot be written"),
        ("text-to-video", ["--out", "folder.mp4"], "folder.mp4 is a folder"),
        ("text-to-video", ["--preset", "video-huge"], "'video-huge' is none of.*video-lite-5s"),
        ("text-to-video", ["--weights", "nowhere"], "weights nowhere is no folder"),
        ("text-to-video", ["--size", "65536x65536"], "GB"),
        ("text-to-video", ["--device", "toaster"], "device 'toaster'"),
        ("text-to-video", ["--magcache", "yes"], "magcache yes does not exist.*--measure-magcache"),
        ("text-to-video", ["--measure-magcache", "/proc/no/a"], "/proc/no/a cannot be written"),
        ("text-to-video", ["--measure-magcache", "x", "--steps", "1"], "takes two steps or more"),
        ("text-to-video", ["--lora", "absent.safetensors"], "absent.safetensors does not exist"),
        ("text-to-video", ["--lora-scale", "nan"], "lora_scale nan is the strength of a lora"),
        ("text-to-video", ["--lora-scale", "0.5"], "lora_scale 0.5 is the strength of a lora"),
        ("text-to-video", ["--device", "cuda:99"], "device 'cuda:99' is not there"),
        ("text-to-video", ["--device", "cuda:99", "--plan"], "device 'cuda:99' is not there"),
        ("text-to-video", ["--device", "cpu:1"], "device 'cpu:1' is not there"),
        ("text-to-video", ["--device", "meta"], "device 'meta' is neither cpu nor cuda"),
        ("text-to-video", ["--steps", "999999999999"], "num_steps 999999999999 must be"),
        ("text-to-video", ["--out", "c.mp4", "--measure-magcache", "./c.mp4"], "name another"),
        (
            "text-to-video",
            ["--out", "c.mp4", "--measure-magcache", "c.mp4.state.safetensors"],
            "name another",
        ),
        # Its own name is short enough, that of the file beside it is not.
        ("text-to-video", ["--out", f"{'x' * 238}.mp4"], "safetensors cannot be written: .*long"),
    ],
)  # fmt: skip
def test_refuses_before_any_work(nabla, monkeypatch, task, arguments, words):
    monkeypatch.setattr(Pipeline, "__call__", None)
    Path("folder.mp4").mkdir()
    status, printed = nabla(*arguments, task=task)
    assert status == 1 and "Traceback" not in printed
    assert match(words, printed), printed
    assert sorted(os.listdir()) in (["folder.mp4"], ["folder.mp4", "out"])
    assert not Path("out").exists() or not os.listdir("out")


def match(words, printed):
    return re.search(words, printed, re.DOTALL)


@pytest.mark.parametrize(
    ("config", "scale", "words"),
    [
        (None, "nan", "scale nan must be a finite number"),
        (None, "inf", "scale inf must be a finite number"),
        (None, "1e308", r"at scale 1e.308 changes visual_.*in_layer by up to inf"),
        ({"lora_alpha": "8"}, "1", "adapter_config.json: lora_alpha '8' must be a finite number"),
        ({"lora_alpha": True}, "1", "lora_alpha True must be"),
        ({"lora_alpha": float("nan")}, "1", "lora_alpha nan must be"),
        ({"lora_alpha": [8]}, "1", r"lora_alpha \[8\] must be"),
        ({"alpha_pattern": ["in_layer"]}, "1", "alpha_pattern .'in_layer'. must be an object"),
        ({"alpha_pattern": {"in_layer": None}}, "1", "alpha_pattern 'in_layer' None must be"),
        ({"alpha_pattern": {"in_(layer": 1}}, "1", "alpha_pattern 'in_.layer' is no regular expr"),
        ({"use_rslora": "yes"}, "1", "use_rslora 'yes' must be true or false"),
        ({"use_dora": 1}, "1", "use_dora 1 must be true or false"),
        ("text", "1", "no readable description of a LoRA: it is no object"),
    ],
)
def test_refuses_a_bad_adapter_before_any_work(nabla, tmp_path, config, scale, words):
    options = ["--lora", write_lora(tmp_path / "lora", config), "--lora-scale", scale]
    status, printed = nabla("--out", "cat.mp4", "--steps", "1", *options)
    assert status == 1 and "Traceback" not in printed and match(words, printed), printed
    assert os.listdir() == ["lora"], "no state either"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("", "is empty"), ("  \n", "is empty"), ("a <|image_pad|>", "holds <|image_pad|>")],
)
def test_refuses_prompts_without_words_or_with_commands(nabla, prompt, words):
    status, printed = nabla(prompt=prompt)
    assert status == 1 and words in printed and os.listdir() == []
    with pytest.raises(ValueError, match="must be one text"):
        Request([prompt, prompt]).resolve(ROWS["text-to-video"])


def test_a_very_long_prompt_is_cut_off(nabla, caplog):
    status, _ = nabla("--out", "cat.mp4", "--steps", "1", "--seconds", "0.2", prompt="cat " * 999)
    assert status == 0 and "too long" in caplog.text


def truncated(file):
    file.write_bytes(file.read_bytes()[:-100])


def foreign(file):
    save_file({"x": torch.ones(3)}, file)


def pickled(file):
    torch.save({"x": torch.ones(3)}, file)


def one_less(file):
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file)


def reshaped(file):
    tensors = load_file(file)
    name = max(tensors)
    save_file(tensors | {name: torch.ones(3)}, file)


def of_another_size(file):
    """Whole in itself, but not what the model takes."""
    if file.parent.name == "vae":
        AutoencoderKLHunyuanVideo(
            latent_channels=8, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
            norm_num_groups=4, mid_block_add_attention=False,
        ).save_pretrained(file.parent)  # fmt: skip
        return
    model = tiny.qwen() if file.parent.name == "text_encoder" else tiny.clip()
    config = model.config.to_dict()
    text = config.get("text_config", config)
    text |= {"hidden_size": 48, "rope_parameters": None}
    if "vision_config" in config:
        config["vision_config"]["out_hidden_size"] = 48
    type(model)(type(model.config)(**config)).save_pretrained(file.parent)


def of_the_other_encoder(file):
    """Its words, but none that begin or end a text of CLIP."""
    shutil.copy(file.parent.parent / "text_encoder" / file.name, file)


def with_words_of_another(file):
    """A tokenizer of more words than the model knows."""
    tokenizer = tiny.qwen_tokenizer()
    tokenizer.add_tokens([f"word{number}" for number in range(999)])
    tokenizer.save_pretrained(file.parent)


MODEL = "model/kandinsky5tiny_text-to-video.safetensors"
QWEN = "text_encoder/model.safetensors"
CLIP = "text_encoder2/model.safetensors"
AUTOENCODER = "vae/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("file", "spoil", "words"),
    [
        (MODEL, truncated, "cannot be read as safetensors"),
        (MODEL, foreign, "looks like no CrossDiT"),
        (MODEL, pickled, "cannot be read as safetensors"),
        (MODEL, one_less, "1 missing keys"),
        (MODEL, Path.unlink, r"put kandinsky5tiny_text-to-video.safetensors"),
        (QWEN, truncated, "text_encoder.*cannot be read as safetensors"),
        (QWEN, one_less, "1 missing keys"),
        (QWEN, foreign, "missing keys"),
        (QWEN, reshaped, r"text_encoder is no Qwen2_5_VL.*1 other shapes: .* \[3\] instead of"),
        (QWEN, of_another_size, "text_encoder gives features of 48 channels.* takes 32"),
        (QWEN, with_words_of_another, "the tokenizer in .*text_encoder knows 1"),
        (QWEN, Path.unlink, "text_encoder holds no .safetensors"),
        (CLIP, one_less, "text_encoder2 is no CLIPTextModel: 1 missing keys"),
        ("text_encoder2/tokenizer.json", of_the_other_encoder, "text_encoder2 reads no text"),
        (CLIP, of_another_size, "text_encoder2 gives features of 48 channels.* takes 24"),
        ("text_encoder/config.json", Path.unlink, r"text encoder \(Qwen/Qwen2.5-VL-7B-Instruct\)"),
        ("text_encoder/tokenizer.json", Path.unlink, "tokenizer"),
        ("text_encoder2/config.json", Path.unlink, r"second text encoder \(openai/clip-vit-large"),
        ("text_encoder2/model.safetensors", truncated, "text_encoder2.*cannot be read"),
        ("vae/config.json", Path.unlink, r"video VAE \(hunyuanvideo-community"),
        (AUTOENCODER, truncated, "vae.*cannot be read as safetensors"),
        (AUTOENCODER, one_less, "1 missing keys"),
        (AUTOENCODER, foreign, "1 unexpected keys"),
        (AUTOENCODER, of_another_size, "latents of this VAE have 8 channels.* takes 4"),
    ],
)
def test_refuses_spoiled_weights(nabla, monkeypatch, weights, tmp_path, file, spoil, words):
    monkeypatch.setattr(TextEncoder, "load", None)  # nothing large is read
    monkeypatch.setattr("kandinsky_model.pipeline.load_checkpoint", None)
    folder = tmp_path / "spoiled"
    shutil.copytree(weights["text-to-video"], folder)
    spoil(folder / file)
    status, printed = nabla("--out", "cat.mp4", folder=folder)
    assert status == 1 and "Traceback" not in printed
    assert match(words, printed), printed
    assert os.listdir() == ["spoiled"], "no output, not even a half"


def test_refuses_the_weights_of_another_preset(nabla, weights, tmp_path):
    for task in ("image-to-video", "text-to-image"):
        words = f"put kandinsky5tiny_{task}.safetensors"
        image = ["--image", image_file(tmp_path / "in.png")] if task == "image-to-video" else []
        status, printed = nabla(*image, task=task, folder=weights["text-to-video"])
        assert status == 1 and match(words, printed), printed
    folder = tmp_path / "renamed"
    shutil.copytree(weights["text-to-image"], folder)
    (folder / "model" / "kandinsky5tiny_text-to-image.safetensors").rename(folder / MODEL)
    shutil.copytree(weights["text-to-video"] / "vae", folder / "vae")
    status, printed = nabla(folder=folder)
    assert status == 1 and "other shapes: visual_embeddings.in_layer.weight" in printed


# --- memory ------------------------------------------------------------------------------------


def test_the_plan_needs_no_weights(nabla):
    status, printed = nabla("--plan", "--preset", "video-pro-10s-hd", folder="nowhere")
    assert status == 0 and "768x1280" in printed and "GB" in printed


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_plan_needs_no_image(nabla, name):
    status, printed = nabla("--plan", "--preset", name, folder="nowhere")
    height, width = presets.PRESETS[name].size
    assert status == 0 and f"{height}x{width}" in printed
    status, printed = nabla("--plan", "--preset", name, "--size", "1040x1056", folder="nowhere")
    assert status == 0 and "1040x1056" in printed


def test_a_grid_too_large_for_memory_says_how_much_it_takes(nabla, monkeypatch):
    monkeypatch.setattr("kandinsky_model.memory.host_memory", lambda: 10**8)
    status, printed = nabla("--out", "cat.mp4")
    assert status == 1 and match(r"48x64 with 25 frames needs .* GB.* has 0.10 GB", printed)
    monkeypatch.setattr(generate, "device_memory", lambda device: 2 * 10**9)  # as if it were CUDA
    status, printed = nabla("--out", "cat.mp4")
    assert status == 1 and match(r"48x64 with 25 frames needs .* GB .* there are 2.00 GB", printed)
    assert os.listdir() == []


def test_an_image_is_not_scaled_to_a_size_that_is_too_large(nabla, monkeypatch, tmp_path):
    monkeypatch.setattr("kandinsky_model.request.fit", None)
    image = image_file(tmp_path / "in.png")
    status, printed = nabla("--image", image, "--size", "160000x160000", task="image-to-image")
    assert status == 1 and match(r"160000x160000 with 1 frames needs .* GB", printed)


@pytest.mark.parametrize(
    ("gigabytes", "options", "mode"),
    [(999, [], "resident"), (999, ["--offload"], "offload"), (14, [], "offload")],
)
def test_what_fits_decides_where_parts_are(nabla, monkeypatch, gigabytes, options, mode):
    monkeypatch.setattr(generate, "device_memory", lambda device: gigabytes * 10**9)
    status, printed = nabla("--out", "x.mp4", "--steps", "1", "--seconds", "0.2", *options)
    assert status == 0 and f"cpu ({mode})" in printed


@pytest.mark.parametrize("shape", [(480, 640), (1000, 100), (512, 768), (33, 35)])
def test_a_first_frame_keeps_its_shape(shape):
    row = presets.PRESETS["image-video-lite-5s"]
    job = Request("a", image=torch.zeros(*shape, 3, dtype=torch.uint8)).resolve(row)
    height, width = job.size
    assert job.image.shape == (height, width, 3) and height % 16 == width % 16 == 0
    assert abs(height * width / (512 * 768) - 1) < 0.06
    assert abs(height / width * shape[1] / shape[0] - 1) < 0.06


def test_all_of_a_first_frame_is_there():
    """Upstream scales it to the nearest size, and cuts nothing off, unless a size is asked for."""
    image = torch.full((500, 333, 3), 128, dtype=torch.uint8)
    image[:6], image[-6:], image[:, :4], image[:, -4:] = 0, 0, 255, 255
    row = presets.PRESETS["image-video-lite-5s"]
    whole = Request("a", image=image).resolve(row).image
    assert whole.shape == (768, 512, 3)
    assert whole[0, 256, 0] == whole[-1, 256, 0] == 0
    assert whole[384, 0, 0] == whole[384, -1, 0] == 255
    pixels = image.permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, (768, 512), mode="bilinear", antialias=True)
    assert torch.equal(whole, pixels[0].permute(1, 2, 0).round().byte())
    cut = Request("a", image=image, size=(512, 512)).resolve(row).image
    assert cut[0, 256, 0] == cut[-1, 256, 0] == 128 and cut[256, 0, 0] == 255


def test_an_edit_takes_the_published_size_nearest_in_shape():
    row = presets.PRESETS["image-to-image-lite"]
    assert Request("a", image=Image.new("RGB", (1280, 720))).resolve(row).size == (768, 1280)
    assert Request("a", image=Image.new("RGB", (500, 501))).resolve(row).size == (1024, 1024)


def test_refuses_the_vae_of_images_for_a_video(nabla, weights, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(weights["text-to-video"], folder)
    shutil.rmtree(folder / "vae")
    shutil.copytree(weights["text-to-image"] / "flux" / "vae", folder / "vae")
    status, printed = nabla(folder=folder)
    assert status == 1
    assert "class AutoencoderKL, where AutoencoderKLHunyuanVideo is wanted" in printed


@pytest.mark.parametrize("name", list(presets.PRESETS))
def test_every_preset_can_be_asked_for(name):
    row = presets.PRESETS[name]
    takes_image = row.task.startswith("image")
    image = torch.zeros(*row.size, 3, dtype=torch.uint8) if takes_image else None
    job = Request("a cat", image=image, size=row.size).resolve(row)
    assert (job.size, job.frames) == (row.size, row.frames)
    published = row.num_steps, row.guidance_scale, row.shift
    assert (job.num_steps, job.guidance_scale, job.shift) == published
    sparse = row.model.top_p and NablaAttention(row.model.top_p, row.model.window)
    assert job.attention == (sparse or DenseAttention())
    assert job.is_guided == (row.guidance_scale != 1)
