"""Whole pipelines against those of diffusers on the same components, and resuming."""

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
from kandinsky_model.pipeline import Pipeline
from kandinsky_model.request import Request

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


class Processor:
    """The tokenizer as the pipelines of diffusers call it."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, images=None, videos=None, **options):
        return self.tokenizer(text, **options)

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
        vae=tiny.vae(row).model,
        text_encoder=encoder.qwen,
        tokenizer=Processor(encoder.tokenizer),
        text_encoder_2=encoder.clip,
        tokenizer_2=encoder.clip_tokenizer,
        scheduler=UpstreamTimes(shift=row.shift),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.resolutions = [SIZE]
    return pipeline


def relative_error(actual, expected):
    assert torch.isfinite(actual).all() and actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def random_image(size=SIZE, seed=5) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


CASES = {
    "text to video, dense": ("text-to-video", False, {}),
    "text to video, NABLA": ("text-to-video", True, {}),
    "text to video, flash": ("text-to-video", False, {"num_steps": 16, "guidance_scale": 1.0}),
    "text to video, NABLA, flash": (
        "text-to-video",
        True,
        {"num_steps": 16, "guidance_scale": 1.0},
    ),
    "image to video, dense": ("image-to-video", False, {}),
    "image to video, NABLA": ("image-to-video", True, {}),
    "text to image": ("text-to-image", False, {"guidance_scale": 3.5, "shift": 3.0}),
}


@pytest.mark.usefixtures("rope_in_fp32")
@pytest.mark.parametrize(("task", "sparse", "changes"), CASES.values(), ids=CASES)
def test_equals_diffusers(task, sparse, changes, encoder, monkeypatch):
    row = tiny.preset(task, sizes=(SIZE,), **changes)
    attention = RecordedNabla(0.5, (3, 1, 1)) if sparse else None
    image = random_image() if task.startswith("image") else None
    seconds = SECONDS if row.is_video else None
    request = Request(PROMPT, image=image, seconds=seconds, seed=7, attention=attention)
    # diffusers takes the statistics of the first 4 frames together where upstream takes those of
    # each: they are compared before, and `normalize_first_frames` has a test of its own.
    monkeypatch.setattr("kandinsky_model.pipeline.normalize_first_frames", lambda x: x)
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
        pipeline.normalize_first_frame = lambda x: x
    expected = pipeline(
        prompt=PROMPT, height=SIZE[0], width=SIZE[1], num_inference_steps=row.num_steps,
        guidance_scale=row.guidance_scale, generator=torch.Generator().manual_seed(7),
        output_type="latent", **options,
    )[0]  # fmt: skip
    assert relative_error(actual, expected) < 1e-3
    if sparse:
        assert next(masks, None) is None, "both called the attention as often"
