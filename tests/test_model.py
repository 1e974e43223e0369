"""CrossDiT against the diffusers model on the same weights, and on its own."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers import transformer_kandinsky as reference
from torch import Tensor

import nabla
from kandinsky_model import (
    ARCHITECTURES,
    CrossDiT,
    CrossDiTConfig,
    DenseAttention,
    MaskedAttention,
)
from kandinsky_model.attention import NablaAttention

CONFIG = CrossDiTConfig(
    model_dim=128, ff_dim=256, time_dim=64, num_text_blocks=2, num_visual_blocks=3,
    axes_dims=(16, 24, 24), in_visual_dim=4, out_visual_dim=4, in_text_dim=24, in_text_dim2=12,
)  # fmt: skip


def random_model(config: CrossDiTConfig = CONFIG, seed: int = 0) -> CrossDiT:
    """A model whose every parameter, modulations included, is random."""
    torch.manual_seed(seed)
    model = CrossDiT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3))
    return model


def random_inputs(shape=(3, 32, 32), config=CONFIG, batch=1, text=5, seed=1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    return (
        randn(batch, *shape, config.input_dim),
        randn(batch, text, config.in_text_dim),
        randn(batch, config.in_text_dim2),
        torch.rand(batch, generator=generator),
    )


def random_mask(grid: nabla.TokenGrid, heads: int, density: float = 0.3) -> nabla.BlockMask:
    n = grid.num_blocks
    kept = torch.rand(1, heads, n, n, generator=torch.Generator().manual_seed(2)) < density
    return nabla.BlockMask.from_dense(kept | torch.eye(n, dtype=torch.bool), grid=grid)


# --- parity with diffusers ---------------------------------------------------------------------


def diffusers_model(model: CrossDiT) -> torch.nn.Module:
    """The diffusers model with the parameters of `model`; every name must match."""
    c = model.config
    other = reference.Kandinsky5Transformer3DModel(
        in_visual_dim=c.in_visual_dim, out_visual_dim=c.out_visual_dim, in_text_dim=c.in_text_dim,
        in_text_dim2=c.in_text_dim2, time_dim=c.time_dim, patch_size=c.patch_size,
        model_dim=c.model_dim, ff_dim=c.ff_dim, num_text_blocks=c.num_text_blocks,
        num_visual_blocks=c.num_visual_blocks, axes_dims=c.axes_dims, visual_cond=c.visual_cond,
    )  # fmt: skip
    other.load_state_dict(model.state_dict(), strict=True)
    return other.eval()


def diffusers_forward(
    other: torch.nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    scale=(1.0, 1.0, 1.0),
    block_order: bool = False,
) -> Tensor:
    latents, text, pooled_text, timestep = inputs
    positions = [
        torch.arange(n // p) for n, p in zip(latents.shape[1:4], CONFIG.patch_size, strict=True)
    ]
    sparse = {"to_fractal": True, "sta_mask": torch.zeros(1), "P": 0.5} if block_order else None
    with torch.no_grad():
        return other(
            hidden_states=latents, encoder_hidden_states=text, timestep=1000 * timestep,
            pooled_projections=pooled_text, visual_rope_pos=positions,
            text_rope_pos=torch.arange(text.shape[1]), scale_factor=scale, sparse_params=sparse,
        ).sample  # fmt: skip


@pytest.fixture(params=["as it stands", "rope in fp32"])
def tolerance(request, monkeypatch) -> float:
    """Bound on max|difference| / max|reference|: diffusers rounds q and k to bf16 after RoPE."""
    if request.param == "as it stands":
        return 1e-3
    # Tensor.to(torch.bfloat16) in that module becomes Tensor.to(torch.float32).
    patched = type("torch", (), {"__getattr__": lambda self, name: getattr(torch, name)})()
    patched.bfloat16 = torch.float32
    monkeypatch.setattr(reference, "torch", patched)
    return 1e-5


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(actual).all()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 12, 20)], ids=["blocks", "ragged"])
@pytest.mark.parametrize("visual_cond", [True, False], ids=["video", "image"])
def test_dense_equals_diffusers(tolerance, shape, visual_cond):
    config = replace(CONFIG, visual_cond=visual_cond, rope_scale=(1.0, 2.0, 3.16))
    model = random_model(config)
    inputs = random_inputs(shape, config, batch=2)
    expected = diffusers_forward(diffusers_model(model), inputs, scale=config.rope_scale)
    with torch.no_grad():
        actual = model(*inputs)
    assert relative_error(actual, expected) < tolerance


def test_nabla_equals_diffusers_with_the_same_mask(tolerance, monkeypatch):
    model = random_model()
    inputs = random_inputs((3, 32, 32))
    grid = nabla.TokenGrid(3, 16, 16)
    mask = random_mask(grid, heads=2)
    tokens = mask.to_dense().repeat_interleave(64, -1).repeat_interleave(64, -2)

    # Eager flex attention ignores block lists, so diffusers gets the same mask as booleans.
    def masked_sdpa(query, key, value, attn_mask=None, **_):
        kept = tokens if attn_mask is not None else None
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=kept).transpose(1, 2)

    monkeypatch.setattr(reference, "nablaT_v2", lambda *args, **kwargs: "mask")
    monkeypatch.setattr(reference, "dispatch_attention_fn", masked_sdpa)
    expected = diffusers_forward(diffusers_model(model), inputs, block_order=True)
    with torch.no_grad():
        actual = model(*inputs, attention=MaskedAttention(mask))
        dense = model(*inputs)
    assert relative_error(actual, expected) < tolerance
    assert relative_error(dense, expected) > 10 * tolerance, "the mask makes no difference"


# --- on its own --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "billions"),
    [
        ("video-lite", "2.0077"),
        ("video-pro", "19.3113"),
        ("image-lite", "6.0221"),
        ("image-lite-i2i", "6.0223"),
        ("tiny", "0.0020"),
    ],
)
def test_parameter_count(architecture, billions):
    with torch.device("meta"):
        model = CrossDiT(ARCHITECTURES[architecture])
    assert f"{sum(p.numel() for p in model.parameters()) / 1e9:.4f}" == billions


def test_config_survives_json():
    for config in ARCHITECTURES.values():
        assert CrossDiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_dim": 100}, "model_dim 100 is not a multiple of the head dim 64"),
        ({"axes_dims": (15, 24, 25)}, "must be even"),
        ({"window": (3, 3, 3)}, "needs top_p"),
    ],
    ids=["model_dim", "axes_dims", "window"],
)
def test_config_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (1, 3, 32, 32, 4), r"must be \[B, T, H, W, 9\]: noisy latents, condition, mask"),
        (0, (1, 3, 31, 32, 9), "do not divide into patches"),
        (1, (2, 5, 24), r"text \[2, 5, 24\] must be \[1, L, 24\]"),
        (2, (1, 13), r"pooled_text \[1, 13\] must be \[1, 12\]"),
        (3, (), r"timestep \[\] must be \[1\]"),
    ],
    ids=["channels", "patches", "batch", "pooled", "timestep"],
)
def test_forward_rejects(position, shape, message):
    inputs = list(random_inputs())
    inputs[position] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        random_model()(*inputs)


@pytest.mark.parametrize(
    "shape", [(2, 16, 16), (2, 20, 36), (1, 2, 2)], ids=["full", "ragged", "token"]
)
def test_keeping_every_block_is_dense(shape):
    model, inputs = random_model(), random_inputs(shape)
    with torch.no_grad():
        dense = model(*inputs, attention=DenseAttention())
        sparse = model(*inputs, attention=NablaAttention(top_p=1.0))
    assert relative_error(sparse, dense) < 1e-5


def test_config_chooses_nabla():
    model = random_model(replace(CONFIG, top_p=0.4, window=(1, 1, 1)))
    inputs = random_inputs((2, 48, 40))
    with torch.no_grad():
        expected = model(*inputs, attention=NablaAttention(0.4, (1, 1, 1)))
        assert torch.equal(model(*inputs), expected)
        assert relative_error(model(*inputs, attention=DenseAttention()), expected) > 1e-3


@pytest.mark.parametrize("top_p", [None, 0.5], ids=["dense", "nabla"])
def test_batch_equals_one_by_one(top_p):
    model = random_model(replace(CONFIG, top_p=top_p))
    inputs = random_inputs((2, 20, 36), batch=3)
    with torch.no_grad():
        together = model(*inputs)
        for i in range(3):
            alone = model(*(x[i : i + 1] for x in inputs))
            assert relative_error(together[i : i + 1], alone) < 1e-5


@pytest.mark.parametrize("top_p", [None, 0.5], ids=["dense", "nabla"])
def test_every_parameter_gets_a_gradient(top_p):
    model = random_model(replace(CONFIG, top_p=top_p))
    model(*random_inputs((2, 20, 36))).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("top_p", [None, 0.5], ids=["dense", "nabla"])
def test_gradient_checkpointing_changes_nothing(top_p):
    model = random_model(replace(CONFIG, top_p=top_p))
    inputs = random_inputs((2, 16, 16))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(*inputs).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bfloat16_keeps_modulation_in_float32():
    model, inputs = random_model(), random_inputs((2, 16, 16))
    with torch.no_grad():
        exact = model(*inputs)
        model.cast(torch.bfloat16)
        low = model(*(x.bfloat16() for x in inputs[:3]), inputs[3])
    assert low.dtype == torch.bfloat16
    assert relative_error(low.float(), exact) < 0.1
    for name, parameter in model.named_parameters():
        kept = "modulation" in name or "time_embeddings" in name
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name


def test_a_new_model_is_a_linear_map_of_its_input():
    """Zero modulation closes every gate: text and time make no difference before training."""
    torch.manual_seed(0)
    model = CrossDiT(CONFIG)
    inputs = random_inputs((2, 16, 16))
    other = (inputs[0], inputs[1] + 1, inputs[2] + 1, 1 - inputs[3])
    with torch.no_grad():
        assert torch.equal(model(*inputs), model(*other))
