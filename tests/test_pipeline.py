"""Whole pipelines against those of diffusers on the same components, and resuming."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2IPipeline,
    Kandinsky5I2VPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
)
from diffusers.models.transformers import transformer_kandinsky as reference
from PIL import Image
from test_model import diffusers_model

from kandinsky_model import NablaAttention, presets
from kandinsky_model.magcache import RatioMeter
from kandinsky_model.memory import memory_plan
from kandinsky_model.pipeline import Part, Pipeline, normalize_first_frames
from kandinsky_model.request import Request
from kandinsky_model.sampler import timesteps
from kandinsky_model.text import IMAGE_TOKEN, TextEncoder

PIPELINES = {
    "text-to-video": Kandinsky5T2VPipeline,
    "image-to-video": Kandinsky5I2VPipeline,
    "text-to-image": Kandinsky5T2IPipeline,
    "image-to-image": Kandinsky5I2IPipeline,
}
PROMPT = "a cat in a hat, seen from above"
SIZE = 128, 128  # a frame is one block of 8 x 8 tokens
SECONDS = 0.7  # 5 latent frames


class UpstreamTimes(FlowMatchEulerDiscreteScheduler):
    """Upstream divides [1, 0] into N equal steps before the shift. The pipelines of diffusers leave
    their scheduler to its default, whose last step is shorter; upstream's times hold here."""

    def set_timesteps(self, num_inference_steps, device=None):
        sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        super().set_timesteps(sigmas=sigmas, device=device)


def upstream_normalized(latents):
    """The first 4 frames, each brought nearer to the 5 behind them, as upstream writes it."""
    normalized = latents.clone().numpy()
    for video in normalized:
        reference_frames = video[4:9]
        for frame in video[:4] if len(video) > 4 else ():
            mean, std = frame.mean(), frame.std(ddof=1)
            to_mean = np.clip(reference_frames.mean(), mean - 0.05, mean + 0.1)
            to_std = np.clip(reference_frames.std(ddof=1), std - 0.1, std + 0.25)
            frame[:] = (frame - mean) / std * to_std + to_mean
    return torch.from_numpy(normalized)


class Processor:
    """Tokenizer and image processor as the pipelines of diffusers call them."""

    def __init__(self, encoder):
        self.tokenizer, self.image_processor = encoder.tokenizer, encoder.image_processor
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def __call__(self, text, images=None, videos=None, **options):
        if images is None:
            return self.tokenizer(text, **options)
        patches = self.image_processor(images=images, return_tensors="pt")
        count = int(patches["image_grid_thw"].prod()) // 4
        tokens = self.tokenizer(
            [one.replace(IMAGE_TOKEN, count * IMAGE_TOKEN) for one in text], **options
        )
        tokens.update(patches)
        tokens["mm_token_type_ids"] = (tokens["input_ids"] == self.image_token_id).int()
        return tokens

    def decode(self, *args, **options):
        return self.tokenizer.decode(*args, **options)


class RecordedNabla:
    """NABLA that keeps the mask of every call."""

    def __init__(self, top_p, window):
        self.nabla, self.masks = NablaAttention(top_p, window), []

    def __call__(self, q, k, v, grid):
        self.masks.append(self.nabla.mask(q, k, grid).to_dense())
        return self.nabla(q, k, v, grid)


@pytest.fixture(scope="module")
def encoder():
    return tiny.text_encoder("diffusers", images=True)


@pytest.fixture
def rope_in_fp32(monkeypatch):
    """diffusers rounds q and k to bf16 after RoPE, whatever the model's dtype."""
    patched = type("torch", (), {"__getattr__": lambda self, name: getattr(torch, name)})()
    patched.bfloat16 = torch.float32
    monkeypatch.setattr(reference, "torch", patched)


def ours(row, encoder, **options) -> Pipeline:
    return Pipeline(
        row, lambda _: encoder, lambda _: tiny.cross_dit(row.model), lambda _: tiny.vae(row),
        **options,
    )  # fmt: skip


def theirs(row, encoder):
    """The pipeline of diffusers on the same components."""
    pipeline = PIPELINES[row.task](
        transformer=diffusers_model(tiny.cross_dit(row.model)),
        vae=tiny.video_vae() if row.is_video else tiny.image_vae(),
        text_encoder=tiny.qwen(),
        tokenizer=Processor(encoder),
        text_encoder_2=encoder.clip,
        tokenizer_2=encoder.clip_tokenizer,
        scheduler=UpstreamTimes(shift=row.shift),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.resolutions = [row.size[::-1]]  # of images: width, height
    return pipeline


def relative_error(actual, expected):
    assert torch.isfinite(actual).all() and actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def random_image(size=SIZE, seed=5) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def resized_by_pillow(frames, height, width):
    """What `fit` does in the pipelines of diffusers."""
    image = Image.fromarray(frames[0].numpy()).resize((width, height))
    return torch.from_numpy(np.array(image))[None]


FLASH = {"num_steps": 16, "guidance_scale": 1.0}
IMAGES = {"guidance_scale": 3.5, "shift": 3.0, "sizes": ((96, 176),)}
TILES = {"sizes": ((272, 288),), "num_steps": 2}  # larger than a tile of the VAE
CASES = {
    "text to video, dense": ("text-to-video", False, {}),
    "text to video, NABLA": ("text-to-video", True, {}),
    "text to video, flash": ("text-to-video", False, FLASH),
    "text to video, NABLA, flash": ("text-to-video", True, FLASH),
    "image to video, dense": ("image-to-video", False, {}),
    "image to video, NABLA": ("image-to-video", True, {}),
    "image to video, a first frame of many tiles": ("image-to-video", False, TILES),
    "text to image": ("text-to-image", False, IMAGES),
    "image to image": ("image-to-image", False, IMAGES),
}


@pytest.mark.usefixtures("rope_in_fp32")
@pytest.mark.parametrize(("task", "sparse", "changes"), CASES.values(), ids=CASES)
def test_equals_diffusers(task, sparse, changes, encoder, monkeypatch):
    row = tiny.preset(task, **{"sizes": (SIZE,)} | changes)
    attention = RecordedNabla(0.5, (3, 1, 1)) if sparse else None
    image = None
    if task.startswith("image"):
        image = random_image(row.size)
    if task == "image-to-image":  # Qwen2.5-VL sees half the size, which upstream makes otherwise
        monkeypatch.setattr("kandinsky_model.text.fit", resized_by_pillow)
    seconds = SECONDS if row.is_video else None
    request = Request(PROMPT, image=image, seconds=seconds, seed=7, attention=attention)
    actual = ours(row, encoder).latents(request, progress=False)

    pipeline = theirs(row, encoder)
    options = {} if image is None else {"image": image}
    if row.is_video:
        options["num_frames"] = request.resolve(row).frames
    if sparse:
        masks = iter(attention.masks)
        pipeline.get_sparse_params = lambda *_: {"to_fractal": True, "sta_mask": None, "P": None}

        # Eager flex attention ignores block lists, so diffusers gets the same masks as booleans.
        def masked_sdpa(query, key, value, attn_mask=None, **_):
            kept = attn_mask
            if kept is not None:
                kept = kept.repeat_interleave(64, -1).repeat_interleave(64, -2)
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=kept).transpose(1, 2)

        monkeypatch.setattr(reference, "nablaT_v2", lambda *args, **kwargs: next(masks))
        monkeypatch.setattr(reference, "dispatch_attention_fn", masked_sdpa)
        assert 0.2 < torch.cat(attention.masks).float().mean() < 0.9, "neither dense nor empty"
    if task == "image-to-video":
        pipeline.normalize_first_frame = upstream_normalized
    expected = pipeline(
        prompt=PROMPT, height=row.size[0], width=row.size[1], num_inference_steps=row.num_steps,
        guidance_scale=row.guidance_scale, generator=torch.Generator().manual_seed(7),
        output_type="latent", **options,
    )[0]  # fmt: skip
    assert relative_error(actual, expected) < 1e-3
    if sparse:
        assert next(masks, None) is None, "both called the attention as often"


def test_first_frames_are_normalized_as_upstream_does():
    latents = torch.randn(2, 11, 6, 8, 4, dtype=torch.float64)
    latents[:, 0] = 3 * latents[:, 0] + 2  # far off: the bounds hold it
    latents[:, 1] = 1.05 * latents[:, 1] + 0.02
    actual = normalize_first_frames(latents)
    torch.testing.assert_close(actual, upstream_normalized(latents))
    assert not torch.allclose(actual[:, :4], latents[:, :4])
    for frames in (1, 4):  # nothing to compare with
        assert torch.equal(normalize_first_frames(latents[:, :frames]), latents[:, :frames])


def test_what_the_pipelines_of_diffusers_do_otherwise(encoder):
    """Why `theirs` gets other times, and another normalization of the first frames."""
    ours, default = timesteps(50, shift=5.0), FlowMatchEulerDiscreteScheduler(shift=5.0)
    default.set_timesteps(50)
    upstream = UpstreamTimes(shift=5.0)
    upstream.set_timesteps(50)
    torch.testing.assert_close(upstream.sigmas, ours)
    assert default.sigmas[-2] < ours[-2] / 3, "the last step is shorter"
    latents = torch.randn(1, 11, 6, 8, 4)
    latents[:, 0] += 1.0
    together = theirs(tiny.preset("image-to-video"), encoder).normalize_first_frame(latents)
    assert not torch.allclose(together, normalize_first_frames(latents), atol=0.1)
    mean, std = latents[:, :4].mean(), latents[:, :4].std()
    to_mean = latents[:, 4:9].mean().clamp(mean - 0.05, mean + 0.1)
    to_std = latents[:, 4:9].std().clamp(std - 0.1, std + 0.25)
    expected = (latents[:, :4] - mean) / std * to_std + to_mean
    torch.testing.assert_close(together[:, :4], expected)


def test_the_first_frame_is_the_image(encoder):
    row = tiny.preset("image-to-video", sizes=((64, 64),))
    request = Request(PROMPT, image=random_image((64, 64)), seconds=0.5, num_steps=2)
    pipeline = ours(row, encoder)
    inputs = pipeline._inputs(request.resolve(row))
    latents = pipeline.latents(request, progress=False)
    assert latents.shape == (1, 4, 8, 8, 4)
    assert torch.equal(latents[:, :1], inputs["first_frame"])


def test_seeds(encoder):
    row = tiny.preset(sizes=((32, 32),))
    pipeline = ours(row, encoder)

    def latents(seed, **options):
        request = Request(PROMPT, seed=seed, seconds=0.2, num_steps=2, **options)
        return pipeline.latents(request, progress=False)

    assert torch.equal(latents(3), latents(3))
    assert not torch.equal(latents(3), latents(4))
    noise = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(
        pipeline._inputs(Request(PROMPT, seed=3, seconds=0.2).resolve(row))["latents"], noise
    )


class Counting:
    """A part's loader that counts how often the part is loaded."""

    def __init__(self, load):
        self.load, self.count = load, 0

    def __call__(self, device):
        self.count += 1
        return self.load()


@pytest.mark.parametrize("magcache", [False, True], ids=["plain", "magcache"])
@pytest.mark.parametrize("task", ["text-to-video", "image-to-video"])
@pytest.mark.parametrize("stop", [1, 6, 7, 8, 10])
def test_an_interrupted_run_goes_on_with_the_same_result(encoder, tmp_path, task, stop, magcache):
    row = tiny.preset(task, sizes=((32, 48),), num_steps=10)
    image = random_image((32, 48)) if task == "image-to-video" else None
    request = Request(PROMPT, image=image, seconds=0.9, magcache=tiny.RATIOS if magcache else None)
    expected = ours(row, encoder).latents(request, progress=False)
    state, steps = tmp_path / "state.safetensors", []

    def interrupt(step, latents):
        steps.append(step)
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours(row, encoder).latents(request, state=state, callback=interrupt, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == [state.name], "no half-written file"
    pipeline = Pipeline(row, text := Counting(lambda: encoder), lambda _: tiny.cross_dit(row.model),
                        lambda _: tiny.vae(row))  # fmt: skip
    actual = pipeline.latents(
        request, state=state, callback=lambda step, _: steps.append(step), progress=False
    )
    assert torch.equal(actual, expected)
    assert text.count == 0, "the features are in the state"
    assert steps == [*range(1, 11)], "no step is done twice"


def test_a_state_is_taken_up_with_the_same_arguments_only(encoder, tmp_path):
    row, state = tiny.preset(sizes=((32, 32),)), tmp_path / "state.safetensors"
    pipeline, request = ours(row, encoder), Request(PROMPT, seconds=0.2, num_steps=2)
    expected = pipeline.latents(request, state=state, progress=False)
    for change, words in [
        ({"seed": 1}, "seed 0, now 1"),
        ({"prompt": "a dog"}, "now 'a dog'"),
        ({"num_steps": 3}, "num_steps 2, now 3"),
        ({"size": (32, 48)}, "size"),
        ({"guidance_scale": 2.0}, "guidance_scale 5.0, now 2.0"),
        ({"attention": "nabla"}, "attention"),
        ({"negative_prompt": "red"}, "negative_prompt"),
    ]:
        with pytest.raises(ValueError, match=f"other arguments.*{words}.*delete"):
            pipeline.latents(replace(request, **change), state=state, progress=False)
    with pytest.raises(ValueError, match="vae/weights None, now 'others'"):
        others = ours(row, encoder, fingerprint=lambda: {"vae/weights": "others"})
        others.latents(request, state=state, progress=False)
    assert torch.equal(pipeline.latents(request, state=state, progress=False), expected)
    state.write_bytes(state.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot be read.*delete"):
        pipeline.latents(request, state=state, progress=False)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_ratios_are_those_of_the_run(encoder, tmp_path, guidance_scale):
    """Measuring changes nothing of the result; an interrupted measurement goes on."""
    row = tiny.preset(sizes=((32, 48),), guidance_scale=guidance_scale)
    request, state = Request(PROMPT, seconds=0.5), tmp_path / "state.safetensors"
    model, ends = tiny.cross_dit(row.model), [[], []]
    blocks = model.visual_transformer_blocks
    blocks[0].register_forward_pre_hook(lambda module, args: ends[0].append(args[0]))
    blocks[-1].register_forward_hook(lambda module, args, out: ends[1].append(out))
    pipeline = Pipeline(row, lambda _: encoder, lambda _: model, lambda _: tiny.vae(row))
    meter = RatioMeter()
    measured = pipeline.latents(request, meter=meter, progress=False)
    plain = ours(row, encoder).latents(request, progress=False)
    assert torch.equal(measured, plain)
    branches = 1 if guidance_scale == 1.0 else 2
    norms = [(out - x).norm(dim=-1) for x, out in zip(*ends, strict=True)]
    ratios = [(b / a).mean().item() for a, b in zip(norms, norms[branches:], strict=False)]
    if branches == 1:
        ratios = [x for ratio in ratios for x in (ratio, 0.0)]
    assert len(ratios) == 2 * (row.num_steps - 1)
    assert meter.ratios == pytest.approx(ratios, rel=1e-4)

    def interrupt(step, latents):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.latents(request, state=state, meter=RatioMeter(), callback=interrupt)
    with pytest.raises(ValueError, match="meter True, now False"):
        pipeline.latents(request, state=state)
    for _ in range(2):  # from the middle, then from the end
        rest = RatioMeter()
        pipeline.latents(request, state=state, meter=rest, progress=False)
        assert rest.ratios == meter.ratios
    with pytest.raises(ValueError, match="give one of them"):
        pipeline.latents(replace(request, magcache=ratios), meter=RatioMeter())


@pytest.mark.parametrize(("guidance_scale", "calls"), [(1.0, 3), (1.01, 6), (0.0, 6)])
def test_calls_of_the_model(encoder, guidance_scale, calls):
    row = tiny.preset(sizes=((32, 32),))
    count = []

    def attention(q, k, v, grid):
        count.append(grid)
        return F.scaled_dot_product_attention(q, k, v)

    request = Request(
        PROMPT, seconds=0.2, num_steps=3, guidance_scale=guidance_scale, attention=attention
    )
    ours(row, encoder).latents(request, progress=False)
    assert len(count) == calls * row.model.num_visual_blocks


@pytest.mark.parametrize("size", [(80, 112), (16, 16), (144, 48)])
def test_sizes_that_are_no_multiples_of_128(encoder, size):
    row = tiny.preset(sizes=(SIZE,))
    frames = ours(row, encoder)(
        Request(PROMPT, size=size, seconds=0.2, num_steps=1, attention="nabla", top_p=0.5),
        progress=False,
    )
    assert frames.shape == (5, *size, 3) and frames.dtype == torch.uint8


def test_offload_and_low_precision(encoder):
    row = tiny.preset(sizes=((32, 32),))
    request = Request(PROMPT, seconds=0.2, num_steps=2)
    expected = ours(row, encoder).latents(request, progress=False)
    load = Counting(lambda: tiny.cross_dit(row.model))
    pipeline = Pipeline(row, lambda _: encoder, load, lambda _: tiny.vae(row), mode="offload")
    for _ in range(2):
        assert torch.equal(pipeline.latents(request, progress=False), expected)
    assert load.count == 2, "on a CPU, a part is in memory only while it works"
    low = tiny.cross_dit(row.model).cast(torch.bfloat16)
    pipeline = Pipeline(row, lambda _: encoder, lambda _: low, lambda _: tiny.vae(row))
    actual = pipeline.latents(request, progress=False)
    assert actual.dtype == torch.float32 and 0 < relative_error(actual, expected) < 0.1


@pytest.mark.parametrize("mode", ["resident", "offload", "stream"])
def test_how_parts_get_to_a_device(encoder, monkeypatch, mode):
    row, streams = tiny.preset(), []

    @contextmanager
    def streamed(module, device, blocks):
        streams.append((module, device, blocks))
        yield module

    monkeypatch.setattr("kandinsky_model.pipeline.streamed", streamed)
    modules = encoder, tiny.cross_dit(row.model), tiny.vae(row)
    cuda, loaded = torch.device("cuda"), []
    for module in modules:
        part = Part(lambda device, module=module: loaded.append(device) or module, cuda)
        for _ in range(2):
            with part.at_work(mode) as there:
                assert there is module
    assert loaded == [cuda if mode == "resident" else torch.device("cpu")] * 3
    of_model = None if mode == "stream" else ()  # None: block by block
    wanted = zip(modules, [encoder.blocks, of_model, ()], strict=True)
    wanted = [(module, cuda, blocks) for module, blocks in wanted for _ in range(2)]
    assert streams == ([] if mode == "resident" else wanted)


def test_a_part_changes_how_it_gets_to_a_device(monkeypatch):
    """What lies on the device is of no use to a request that needs the room."""
    homes, model = [], tiny.cross_dit(tiny.CONFIG)
    monkeypatch.setattr("kandinsky_model.pipeline.streamed", lambda *_: nullcontext(model))
    part = Part(lambda device: homes.append(device.type) or model, torch.device("cuda"))
    for mode in ("resident", "resident", "offload", "stream", "resident"):
        with part.at_work(mode) as there:
            assert there is model
    assert homes == ["cuda", "cpu", "cuda"]


def test_the_memory_decides_for_every_request_how_parts_get_there(encoder, monkeypatch):
    row = presets.PRESETS["video-lite-10s"]
    peaks = memory_plan(row).peaks
    monkeypatch.setattr("kandinsky_model.pipeline.device_memory", lambda device: peaks["resident"])
    pipeline = Pipeline(row, None, None, None, device="cuda")
    assert pipeline.mode(pipeline.resolve("a cat")) == "resident"
    larger = pipeline.resolve(Request("a cat", size=(768, 1280)))
    assert pipeline.mode(larger) == "offload"
    cached = pipeline.resolve(Request("a cat", magcache=[1.0, 1.0]))
    assert pipeline.mode(cached) == "offload", "residuals take memory too"
    fixed = Pipeline(row, None, None, None, device="cuda", mode="stream")
    assert fixed.mode(fixed.resolve("a cat")) == "stream"
    too_large = Request("a cat", size=(4096, 4096))
    for pipe in (pipeline, fixed):
        with pytest.raises(ValueError, match="4096x4096 with 241 frames needs .* GB .* even when"):
            pipe(too_large)  # and nothing has been loaded
    monkeypatch.setattr("kandinsky_model.memory.host_memory", lambda: 10**6)
    with pytest.raises(ValueError, match="and this machine has 0.00 GB"):
        ours(tiny.preset(), None)("a cat")


def test_a_state_of_no_step_gives_way(encoder, tmp_path):
    """As when the model cannot be loaded: nothing but the features of a prompt is lost."""
    row, state = tiny.preset(sizes=((32, 32),)), tmp_path / "state.safetensors"
    request = Request(PROMPT, seconds=0.2, num_steps=2)
    broken = Pipeline(row, lambda _: encoder, lambda _: [][0], lambda _: tiny.vae(row))
    with pytest.raises(IndexError):
        broken.latents(request, state=state)
    assert state.exists()
    other = replace(request, seed=1)
    actual = ours(row, encoder).latents(other, state=state, progress=False)
    assert torch.equal(actual, ours(row, encoder).latents(other, progress=False))


def test_a_mode_or_templates_that_are_none():
    with pytest.raises(ValueError, match="mode 'fast' is none of resident, offload, stream"):
        ours(tiny.preset(), None, mode="fast")
    with pytest.raises(ValueError, match="variant 'ours' is none of original, diffusers"):
        TextEncoder.check(None, None, None, None, tiny.CONFIG, variant="ours")


@pytest.mark.parametrize("place", ["folder", "file/state"])
def test_a_state_that_cannot_be_written_is_noticed_before_any_work(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"{place} (is a folder|cannot be written)"):
        ours(tiny.preset(), None).latents("a cat", state=tmp_path / place)


IMAGES_THAT_ARE_NONE = {
    "floats": torch.zeros(8, 8, 3), "channels first": torch.zeros(3, 8, 8).byte(),
    "gray": torch.zeros(8, 8).byte(), "no pixels": torch.zeros(0, 0, 3).byte(),
    "no columns": torch.zeros(8, 0, 3).byte(), "a batch": torch.zeros(1, 8, 8, 3).byte(),
    "floats of numpy": np.zeros((8, 8, 3)), "gray of numpy": np.zeros((8, 8), np.uint8),
    "an empty one of Pillow": Image.new("RGB", (0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("image", IMAGES_THAT_ARE_NONE.values(), ids=IMAGES_THAT_ARE_NONE)
def test_images_that_are_none(image):
    with pytest.raises(ValueError, match=r"image \w+ \[.*\] must be uint8 \[H, W, 3\] with pixels"):
        Request("a", image=image).resolve(tiny.preset("image-to-video"))
    with pytest.raises(ValueError, match="image 5 is none: give a file"):
        Request("a", image=5).resolve(tiny.preset("image-to-video"))


def test_images_of_every_kind(tmp_path):
    row, image = tiny.preset("image-to-video"), random_image((40, 24))
    image.save(tmp_path / "in.png")
    pixels = np.array(image)
    flipped = np.ascontiguousarray(pixels[::-1])[::-1]  # the same with a negative stride
    kinds = [image, pixels, flipped, torch.tensor(pixels), tmp_path / "in.png"]
    jobs = [Request("a", image=kind).resolve(row).image for kind in kinds]
    assert all(torch.equal(job, jobs[0]) for job in jobs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": (48, 64, 3)}, r"size \(48, 64, 3\) must be \(height, width\) in whole pixels"),
        ({"size": 64}, "size 64 must be"),
        ({"size": "48x64"}, "size '48x64' must be"),
        ({"size": (48.5, 64)}, r"size \(48.5, 64\) must be"),
        ({"size": (float("nan"), 64)}, r"size \(nan, 64\) must be"),
        ({"size": (-16, 64)}, "size -16x64 must be of multiples"),
        ({"num_steps": float("nan")}, "num_steps nan must be a whole number from 1"),
        ({"num_steps": float("inf")}, "num_steps inf must be"),
        ({"num_steps": 2.5}, "num_steps 2.5 must be"),
        ({"num_steps": "4"}, "num_steps '4' must be"),
        ({"num_steps": True}, "num_steps True must be"),
        ({"num_steps": 10**12}, "num_steps 1000000000000 must be .* to 10000"),
        ({"seed": 1.5}, "seed 1.5 must be a whole number"),
        ({"seed": None}, "seed None must be"),
        ({"seed": 2**63}, "seed 9223372036854775808 must be"),
        ({"guidance_scale": "5"}, "guidance_scale '5' must be"),
        ({"shift": float("inf")}, "shift inf must be"),
        ({"seconds": "5"}, "seconds '5' make no video"),
        ({"seconds": 10**400}, "seconds 10+ make no video"),
        ({"top_p": "x", "attention": "nabla"}, "top_p 'x' must be"),
        ({"attention": 3}, "attention 3 is neither"),
        ({"attention": "flash"}, "attention 'flash' is neither"),
        ({"magcache": 3}, "magcache ratios 3 must be"),
        ({"magcache": []}, r"magcache ratios \[\] are 0: there must be two"),
        ({"prompt": None}, "prompt None must be one text"),
        ({"prompt": "a \udcff"}, "is no Unicode"),
    ],
)
def test_values_that_are_none(changes, words):
    """Whatever the type, a sentence that names it."""
    with pytest.raises(ValueError, match=words):
        replace(Request("a cat"), **changes).resolve(tiny.preset())


def test_whole_numbers_of_other_types():
    job = Request("a", num_steps=np.int64(4), seed=2.0, size=[np.int32(48), 64.0]).resolve(
        tiny.preset()
    )
    assert (job.num_steps, job.seed, job.size) == (4, 2, (48, 64))
    assert all(type(value) is int for value in (job.num_steps, job.seed, *job.size))
