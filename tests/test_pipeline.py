"""Whole pipelines against those of diffusers on the same components, and resuming."""

from contextlib import contextmanager
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

from kandinsky_model import NablaAttention
from kandinsky_model.magcache import RatioMeter
from kandinsky_model.pipeline import Part, Pipeline, normalize_first_frames
from kandinsky_model.request import Request
from kandinsky_model.sampler import timesteps
from kandinsky_model.text import IMAGE_TOKEN

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
        row, lambda: encoder, lambda: tiny.cross_dit(row.model), lambda: tiny.vae(row), **options
    )


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

    def __call__(self):
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
    pipeline = Pipeline(row, text := Counting(lambda: encoder), lambda: tiny.cross_dit(row.model),
                        lambda: tiny.vae(row))  # fmt: skip
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
    pipeline = Pipeline(row, lambda: encoder, lambda: model, lambda: tiny.vae(row))
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
    pipeline = Pipeline(row, lambda: encoder, load, lambda: tiny.vae(row), mode="offload")
    for _ in range(2):
        assert torch.equal(pipeline.latents(request, progress=False), expected)
    assert load.count == 2, "on a CPU, a part is in memory only while it works"
    low = tiny.cross_dit(row.model).cast(torch.bfloat16)
    pipeline = Pipeline(row, lambda: encoder, lambda: low, lambda: tiny.vae(row))
    actual = pipeline.latents(request, progress=False)
    assert actual.dtype == torch.float32 and 0 < relative_error(actual, expected) < 0.1


@pytest.mark.parametrize("mode", ["resident", "offload", "stream"])
def test_how_parts_get_to_a_device(encoder, monkeypatch, mode):
    row, moved, streams = tiny.preset(), [], []

    @contextmanager
    def streamed(module, device, blocks):
        streams.append((module, device, blocks))
        yield module

    monkeypatch.setattr("kandinsky_model.pipeline.streamed", streamed)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: moved.append(self) or self)
    model, autoencoder = tiny.cross_dit(row.model), tiny.vae(row)
    cuda = torch.device("cuda")
    for module in (encoder, model, autoencoder):
        part = Part(lambda module=module: module, cuda, mode)
        for _ in range(2):
            with part.at_work() as there:
                assert there is module
    if mode == "resident":
        assert moved == [encoder, encoder, model, model, autoencoder, autoencoder] and not streams
        return
    assert not moved and {device for _, device, _ in streams} == {cuda}
    modules, blocks = [module for module, _, _ in streams], [blocks for _, _, blocks in streams]
    assert modules == [encoder, encoder, model, model, autoencoder, autoencoder]
    of_model = None if mode == "stream" else ()  # None: block by block
    assert blocks == [encoder.blocks] * 2 + [of_model] * 2 + [()] * 2


@pytest.mark.parametrize(
    "image", [torch.zeros(8, 8, 3), torch.zeros(3, 8, 8).byte(), torch.zeros(8, 8).byte()]
)
def test_images_that_are_none(image):
    with pytest.raises(ValueError, match=r"must be uint8 \[H, W, 3\]"):
        Request("a", image=image).resolve(tiny.preset("image-to-video"))
