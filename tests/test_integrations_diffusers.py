"""NABLA in diffusers, on tiny random transformers, against dense attention under boolean masks.

The reference is diffusers itself: its own mask builder, and F.scaled_dot_product_attention under
the mask expanded to tokens in the place of flex_attention, which reads block lists only if
compiled.
"""

import contextlib
import copy
import inspect
import pickle
import types

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers import transformer_kandinsky, transformer_kandinsky6_sr
from oracle import assert_as_accurate_as
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.nn.attention.flex_attention import create_block_mask

import nabla
from nabla.inspect import Calibration, calibrate
from nabla.inspect.observe import observing
from nabla.integrations.diffusers import disable, enable, nabla_attention

HEADS, D = 2, 32
AXES = (8, 12, 12)


def shuffled(model):
    """The model with weights that make attention sharp and let it show in the output."""
    for name, parameter in model.named_parameters():
        if "modulation" in name or "scale_shift_table" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        if "query_norm" in name or "key_norm" in name or "norm_q" in name or "norm_k" in name:
            torch.nn.init.constant_(parameter, 2.0)
    return model.eval()


def kandinsky5(layers=1, sparse=True, text_layers=1):
    nabla_config = {
        "attention_type": "nabla",
        "attention_P": 0.5,
        "attention_wT": 3,
        "attention_wH": 1,
        "attention_wW": 1,
        "attention_add_sta": True,
        "attention_method": "topcdf",
    }
    return shuffled(
        diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=16,
            time_dim=32,
            model_dim=HEADS * D,
            ff_dim=64,
            num_text_blocks=text_layers,
            num_visual_blocks=layers,
            axes_dims=AXES,
            **(nabla_config if sparse else {}),
        )
    )


def kandinsky6_sr(layers=2):
    return shuffled(
        diffusers.Kandinsky6SRTransformer3DModel(
            in_visual_dim=4,
            out_visual_dim=8,
            time_dim=32,
            model_dim=HEADS * D,
            ff_dim=64,
            num_visual_blocks=layers,
            axes_dims=AXES,
        )
    )


def wan(layers=2):
    return shuffled(
        diffusers.WanTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=D,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=64,
            num_layers=layers,
            rope_max_seq_len=64,
        )
    )


def hunyuan_video(layers=1, single_layers=1, **options):
    return shuffled(
        diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=HEADS,
            attention_head_dim=D,
            num_layers=layers,
            num_single_layers=single_layers,
            num_refiner_layers=1,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=AXES,
            **options,
        )
    )


def kandinsky5_inputs(frames=4, height=32, width=48, batch=1, sparse=True, dtype=torch.float32):
    """Latents of height and width, a token for 2 x 2; what the pipeline passes beside."""
    rows, columns = height // 2, width // 2
    inputs = {
        "hidden_states": torch.randn(batch, frames, height, width, 4, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, 5, 16, dtype=dtype),
        "timestep": torch.full((batch,), 500.0, dtype=dtype),
        "pooled_projections": torch.randn(batch, 16, dtype=dtype),
        "visual_rope_pos": [torch.arange(frames), torch.arange(rows), torch.arange(columns)],
        "text_rope_pos": torch.arange(5),
        "return_dict": False,
    }
    if sparse:
        sta = diffusers.Kandinsky5T2VPipeline.fast_sta_nabla(
            frames, rows // 8, columns // 8, 3, 1, 1, device="cpu"
        )
        inputs["sparse_params"] = {"sta_mask": sta[None, None], "to_fractal": True, "P": 0.5}
    return inputs


def kandinsky6_sr_inputs(frames=1, height=16, width=96, batch=1):
    return {
        "hidden_states": torch.randn(batch, frames, height, width, 9),
        "timestep": torch.full((batch,), 500.0),
        "return_dict": False,
    }


def wan_inputs(frames=3, height=20, width=36, batch=2, timesteps=()):
    return {
        "hidden_states": torch.randn(batch, 4, frames, height, width),
        "timestep": torch.randint(0, 1000, (batch, *timesteps)),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "return_dict": False,
    }


def hunyuan_video_inputs(lengths=(70, 70), **options):
    text = torch.arange(70) < torch.tensor(lengths)[:, None]
    return {
        **wan_inputs(batch=len(lengths), **options),
        "encoder_hidden_states": torch.randn(len(lengths), 70, 16),
        "encoder_attention_mask": text.long(),
        "pooled_projections": torch.randn(len(lengths), 8),
        "guidance": torch.full((len(lengths),), 6.0),
    }


MODELS = {
    "kandinsky5": (kandinsky5, kandinsky5_inputs),
    "kandinsky6_sr": (kandinsky6_sr, kandinsky6_sr_inputs),
    "wan": (wan, wan_inputs),
    "hunyuan_video": (hunyuan_video, hunyuan_video_inputs),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def example(request):
    """A transformer and its inputs."""
    make, make_inputs = request.param
    return make(), make_inputs()


@pytest.fixture(autouse=True)
def _native_attention():
    """set_attention_backend sets a backend for the whole process."""
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def boolean_mask(flex):
    """Booleans of tokens [B, H, S, S] of a flex BlockMask with full blocks."""
    counts, lists = flex.full_kv_num_blocks, flex.full_kv_indices
    keep = torch.zeros(lists.shape, dtype=torch.bool)
    for row in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)):
        at = tuple(row.tolist())
        keep[at][lists[at][: counts[at]].long()] = True
    return keep.repeat_interleave(64, -1).repeat_interleave(64, -2)


@contextlib.contextmanager
def boolean_attention(densities=None, dtype=torch.float32):
    """Diffusers with dense attention under boolean masks in the place of flex_attention."""

    def attend(query, key, value, attn_mask=None, **_):
        if isinstance(attn_mask, FlexBlockMask):
            attn_mask = boolean_mask(attn_mask)
            if densities is not None:
                densities.append(attn_mask.float().mean().item())
        q, k, v = (x.transpose(1, 2).to(dtype) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return out.transpose(1, 2).type_as(query)

    with pytest.MonkeyPatch.context() as patch:
        for module in (transformer_kandinsky, transformer_kandinsky6_sr):
            patch.setattr(module, "dispatch_attention_fn", attend)
        yield


def boolean_reference(model, inputs):
    densities = []
    with boolean_attention(densities):
        out = run(model, inputs)
    assert 0.02 < sum(densities) / len(densities) < 0.9
    return out


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def assert_differs(actual, other):
    assert (actual - other).abs().max() > 1e-2 * other.abs().max()


# Against the boolean mask


@pytest.mark.parametrize("batch", [1, 2])
def test_kandinsky5_is_sparse_in_eager_mode(batch):
    model, inputs = kandinsky5(), kandinsky5_inputs(batch=batch)
    dense = run(model, {**inputs, "sparse_params": None})
    with enable(model):
        sparse = run(model, inputs)
    assert_close(sparse, boolean_reference(model, inputs))
    assert_differs(sparse, dense)


def test_eager_flex_attention_is_dense():
    """Why enable() is there: the same model, as diffusers tells to run it, but not compiled."""
    model, inputs = kandinsky5(), kandinsky5_inputs()
    dense = run(model, {**inputs, "sparse_params": None})
    model.set_attention_backend("flex")
    assert_close(run(model, inputs), dense)


def kandinsky5_pipeline(transformer):
    return diffusers.Kandinsky5T2VPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )


def generate(pipe, height=256, width=384, dtype=torch.float32):
    """Latents [1, 4, height / 8, width / 8, 4] after two steps with guidance."""
    generator = torch.Generator().manual_seed(1)
    embeds = {
        f"{sign}prompt_embeds_{name}": torch.randn(*shape, 16, generator=generator).to(dtype)
        for sign in ("", "negative_")
        for name, shape in (("qwen", (1, 5)), ("clip", (1,)))
    }
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_cu_seqlens=torch.tensor([0, 5]),
        negative_prompt="",
        negative_prompt_cu_seqlens=torch.tensor([0, 5]),
        height=height,
        width=width,
        num_frames=13,
        num_inference_steps=2,
        generator=generator,
        output_type="latent",
        **embeds,
    ).frames


def test_kandinsky5_pipeline():
    pipe = kandinsky5_pipeline(kandinsky5())
    pipe.transformer.set_attention_backend("flex")
    processors = pipe.transformer.attn_processors
    dense = generate(pipe)
    enable(pipe)
    sparse = generate(pipe)
    assert_differs(sparse, dense)
    disable(pipe)
    assert pipe.transformer.attn_processors == processors
    assert torch.equal(generate(pipe), dense)
    with boolean_attention():
        assert_close(sparse, generate(pipe))


def test_kandinsky5_pipeline_in_bfloat16(tmp_path):
    kandinsky5().save_pretrained(tmp_path)
    model = diffusers.Kandinsky5Transformer3DModel.from_pretrained(
        tmp_path, torch_dtype=torch.bfloat16
    )
    pipe = kandinsky5_pipeline(model)
    with enable(pipe):
        sparse = generate(pipe, dtype=torch.bfloat16)
    with enable(pipe, top_p=1.0):
        dense = generate(pipe, dtype=torch.bfloat16)
    assert sparse.dtype == torch.bfloat16
    assert_differs(sparse, dense)
    with enable(pipe, backend="reference"):
        exact = generate(pipe, dtype=torch.bfloat16)
    assert (sparse - exact).abs().mean() < 0.1 * (sparse - dense).abs().mean()


def test_kandinsky5_pipeline_of_any_size():
    """208 x 272 pixels are 13 x 17 tokens, where diffusers needs multiples of 8."""
    pipe, size = kandinsky5_pipeline(kandinsky5()), {"height": 208, "width": 272}
    with pytest.raises(RuntimeError, match="shape"):
        generate(pipe, **size)
    with enable(pipe):
        sparse = generate(pipe, **size)
    with enable(pipe, top_p=1.0):
        dense = generate(pipe, **size)
    assert sparse.shape == (1, 4, 26, 34, 4)
    assert_differs(sparse, dense)


def compiled(model, inputs):
    torch.compiler.reset()
    return run(torch.compile(model, backend="eager", fullgraph=True), inputs)


def test_kandinsky5_compiles_into_one_graph():
    model, inputs = kandinsky5(text_layers=0), kandinsky5_inputs()
    reference = boolean_reference(model, inputs)
    enable(model)
    assert_close(compiled(model, inputs), reference)


@pytest.mark.parametrize("run", [run, compiled], ids=["eager", "compiled"])
def test_kandinsky6_sr(run):
    model, inputs = kandinsky6_sr(layers=1), kandinsky6_sr_inputs()
    assert model.config.nabla_threshold == 0.8
    assert model.config.nabla_window == (11, 7, 7)
    reference = boolean_reference(model, inputs)
    with enable(model):
        assert_close(run(model, inputs), reference)
    with enable(model, top_p=1.0):
        assert_differs(run(model, inputs), reference)


# Against dense attention


DENSE = {
    "kandinsky5": (kandinsky5, kandinsky5_inputs(sparse=False)),
    "kandinsky5_ragged": (kandinsky5, kandinsky5_inputs(2, 26, 34, sparse=False)),
    "kandinsky5_of_dense": (lambda: kandinsky5(sparse=False), kandinsky5_inputs(sparse=False)),
    "wan": (wan, wan_inputs()),
    "wan_timestep_per_token": (wan, wan_inputs(timesteps=[540])),
    "hunyuan_video": (hunyuan_video, hunyuan_video_inputs()),
    "hunyuan_video_padded": (hunyuan_video, hunyuan_video_inputs((50, 50))),
    "hunyuan_video_lengths": (hunyuan_video, hunyuan_video_inputs((50, 66))),
    "hunyuan_video_single_only": (lambda: hunyuan_video(0, 2), hunyuan_video_inputs()),
    "hunyuan_video_dual_only": (lambda: hunyuan_video(2, 0), hunyuan_video_inputs()),
    "hunyuan_video_from_image": (
        lambda: hunyuan_video(image_condition_type="token_replace"),
        hunyuan_video_inputs(),
    ),
}


@pytest.mark.parametrize("make, inputs", DENSE.values(), ids=DENSE)
def test_keeping_everything_is_dense(make, inputs):
    model = make()
    dense = run(model, inputs)
    with enable(model, top_p=1.0):
        assert_close(run(model, inputs), dense)
    with enable(model, top_p=0.3, window=(1, 1, 1)):
        assert_differs(run(model, inputs), dense)
    assert torch.equal(run(model, inputs), dense)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_tokens_change_order_once(name, monkeypatch):
    """Hidden states and RoPE's cosines and sines before the layers, the output behind them."""
    from nabla.integrations.diffusers import models

    make, make_inputs = MODELS[name]
    moved = []
    for reorder in ("fractal_flatten", "fractal_unflatten"):
        original = getattr(models, reorder)

        def counting(x, *args, original=original):
            moved.append(original.__name__)
            return original(x, *args)

        monkeypatch.setattr(models, reorder, counting)
    model = make()
    enable(model)
    run(model, make_inputs())
    assert moved == ["fractal_flatten"] * 3 + ["fractal_unflatten"]


def test_wan_compiles_into_one_graph():
    model, inputs = wan(layers=1), wan_inputs()
    enable(model, top_p=0.4)
    assert_close(compiled(model, inputs), run(model, inputs))


def test_text_of_hunyuan_video_is_attended_to():
    model, inputs = hunyuan_video(), hunyuan_video_inputs((40, 40))
    enable(model, top_p=0.3)
    out = run(model, inputs)
    text = inputs["encoder_hidden_states"].clone()
    text[:, 40:] = 7.0
    assert_close(run(model, {**inputs, "encoder_hidden_states": text}), out)
    text[:, :40] = 7.0
    assert_differs(run(model, {**inputs, "encoder_hidden_states": text}), out)


# Gradients


class LoRA(torch.nn.Module):
    """x -> linear(x) + x down^T up^T, where down and up learn."""

    def __init__(self, linear, rank=4):
        super().__init__()
        self.linear = linear
        self.down = torch.nn.Parameter(torch.randn(rank, linear.in_features) * 0.1)
        self.up = torch.nn.Parameter(torch.randn(linear.out_features, rank) * 0.1)

    def forward(self, x):
        return self.linear(x) + x @ self.down.T @ self.up.T


def with_lora(model):
    model.requires_grad_(False)
    for layer in model.visual_transformer_blocks:
        for name in ("to_query", "to_key", "to_value", "out_layer"):
            setattr(layer.self_attention, name, LoRA(getattr(layer.self_attention, name)))
    return model


def gradients(model, inputs):
    """Of what learns, after a step on a fixed target."""
    model.zero_grad()
    model.train()
    (model(**inputs)[0] - 1).square().mean().backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", ["kandinsky5", "kandinsky6_sr"])
def test_lora_training_step(name, checkpointing):
    make, make_inputs = MODELS[name]
    model, inputs = with_lora(make()), make_inputs()
    with boolean_attention():
        low = gradients(model, inputs)
    with boolean_attention(dtype=torch.float64):
        exact = gradients(model, inputs)
    if checkpointing:
        model.enable_gradient_checkpointing()
    with enable(model):
        actual = gradients(model, inputs)
    assert len(actual) == 8 * len(model.visual_transformer_blocks)
    for parameter, gradient in actual.items():
        assert exact[parameter].abs().max() > 0, parameter
        truth = exact[parameter].double()
        summed = 20 * truth  # of what a gradient of weights sums over the tokens, much cancels
        assert_as_accurate_as(gradient, low[parameter], truth, factor=3, values=summed)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_checkpointing_recomputes_the_same(name):
    make, make_inputs = MODELS[name]
    model, inputs = make(), make_inputs()
    enable(model, top_p=0.4)
    expected = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    out = model(**inputs)[0]
    run(model, make_inputs(frames=1, height=8))  # another size, before the layers are recomputed
    model.zero_grad()
    (out - 1).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            assert_close(parameter.grad, expected[name])


# The backend for set_attention_backend


@pytest.mark.parametrize("run", [run, compiled], ids=["eager", "compiled"])
def test_backend_takes_the_mask_of_diffusers(run):
    model, inputs = kandinsky5(text_layers=0), kandinsky5_inputs(batch=2)
    reference = boolean_reference(model, inputs)
    model.set_attention_backend("nabla")
    assert_close(run(model, inputs), reference)


def test_backend_within_a_context():
    model, inputs = kandinsky5(), kandinsky5_inputs()
    with diffusers.models.attention_dispatch.attention_backend("nabla"):
        out = run(model, inputs)
    assert_close(out, boolean_reference(model, inputs))


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_backend_is_native_without_a_mask_of_blocks(name):
    make, make_inputs = MODELS[name]
    model, inputs = make(), make_inputs()
    dense = run(model, inputs)
    model.set_attention_backend("nabla")
    assert torch.equal(run(model, inputs), dense)


def whole_blocks(**options):
    """A flex mask of 4 x 4 blocks, and their lists as partial blocks."""
    counts, lists = torch.full((1, 1, 4), 2), torch.arange(4).expand(1, 1, 4, 4)
    return FlexBlockMask.from_kv_blocks(
        *(x.int() for x in (torch.zeros_like(counts), lists, counts, lists)),
        BLOCK_SIZE=64,
        **options,
    )


def partial_blocks():
    counts, lists = torch.full((1, 1, 4), 2), torch.arange(4).expand(1, 1, 4, 4)
    return FlexBlockMask.from_kv_blocks(counts.int(), lists.int(), BLOCK_SIZE=64)


def mixed_blocks():
    counts, lists = torch.full((1, 1, 4), 2).int(), torch.arange(4).expand(1, 1, 4, 4).int()
    return FlexBlockMask.from_kv_blocks(counts, lists, counts, lists, BLOCK_SIZE=64)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


REFUSED = {
    "causal": (
        {"attn_mask": create_block_mask(causal, None, None, 256, 256, "cpu", BLOCK_SIZE=64)},
        "mask_mod='causal': only masks of whole blocks",
    ),
    "mask_mod": ({"attn_mask": whole_blocks(mask_mod=causal)}, "mask_mod='causal'"),
    "partial": ({"attn_mask": partial_blocks()}, "the flex mask has partial blocks"),
    "mixed": ({"attn_mask": mixed_blocks()}, "the flex mask has partial blocks"),
    "length": (
        {"attn_mask": create_block_mask(lambda b, h, q, k: q >= 0, None, None, 192, 192, "cpu")},
        "mask_mod='<lambda>'",
    ),
    "dropout": ({"attn_mask": whole_blocks(), "dropout_p": 0.1}, "dropout_p=0.1"),
    "is_causal": ({"attn_mask": whole_blocks(), "is_causal": True}, "is_causal=True"),
    "parallel": (
        {"attn_mask": whole_blocks(), "_parallel_config": "any"},
        "attn_mask is a mask of the tokens of one process",
    ),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED)
def test_backend_refuses(arguments, message):
    q = torch.randn(1, 256, HEADS, D)
    with pytest.raises(ValueError, match=message):
        nabla_attention(q, q, q, **arguments)


def test_backend_refuses_partial_blocks_when_compiled():
    q = torch.randn(1, 256, HEADS, D)
    attend = torch.compile(nabla_attention, backend="eager", fullgraph=True)
    assert_close(attend(q, q, q, whole_blocks()), nabla_attention(q, q, q, whole_blocks()))
    with pytest.raises(RuntimeError, match="the flex mask has partial blocks"):
        attend(q, q, q, mixed_blocks())


def test_backend_takes_a_mask_of_nabla():
    grid = nabla.TokenGrid(3, 12, 20)
    q, k, v = torch.randn(3, 2, grid.num_tokens, HEADS, D).unbind()
    bhsd = [x.transpose(1, 2) for x in (q, k, v)]
    mask = nabla.create_block_mask(*bhsd[:2], grid=grid, top_p=0.5)
    expected = nabla.block_sparse_attention(*bhsd, mask)
    assert torch.equal(nabla_attention(q, k, v, mask), expected.transpose(1, 2))


# Enabling and disabling


def test_disable_restores(example):
    model, _ = example
    processors, state = model.attn_processors, vars(model).copy()
    hooks = {name: list(module._forward_pre_hooks) for name, module in model.named_modules()}
    enable(model)
    enable(model, top_p=0.3)
    assert model.attn_processors != processors
    disable(model)
    assert all(model.attn_processors[name] is host for name, host in processors.items())
    assert vars(model) == state
    assert hooks == {name: list(m._forward_pre_hooks) for name, m in model.named_modules()}
    assert not any(module._forward_hooks for module in model.modules())
    disable(model)


def test_enabling_again_replaces_the_settings(example):
    model, inputs = example
    once = [run_with(model, inputs, top_p=top_p) for top_p in (0.3, 0.7)]
    for top_p, out in zip((0.3, 0.7, 0.3), (*once, once[0]), strict=True):
        enable(model, top_p=top_p)
        assert torch.equal(run(model, inputs), out)
    assert not torch.equal(*once)


def run_with(model, inputs, **options):
    with enable(model, **options):
        return run(model, inputs)


def test_contexts_nest_and_restore_after_an_error():
    model, inputs = wan(), wan_inputs()
    dense = run(model, inputs)
    with enable(model, top_p=0.5):
        outer = run(model, inputs)
        with pytest.raises(KeyError), enable(model, top_p=0.2):
            assert not torch.equal(run(model, inputs), outer)
            raise KeyError
        assert torch.equal(run(model, inputs), outer)
    assert torch.equal(run(model, inputs), dense)


def test_an_error_within_a_forward_leaves_nothing_behind():
    model, inputs = wan(), wan_inputs()
    enable(model, top_p=0.5)
    out = run(model, inputs)
    with pytest.raises(TypeError):
        run(model, {**inputs, "encoder_hidden_states": None})
    assert torch.equal(run(model, inputs), out)


def test_positional_arguments():
    for make, make_inputs in MODELS.values():
        model, inputs = make(), make_inputs()
        enable(model, top_p=0.5)
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        last = max(names.index(name) for name in inputs if name != "return_dict")
        given = [inputs.get(name, DEFAULTS.get(name)) for name in names[: last + 1]]
        with torch.no_grad():
            out = model(*given, return_dict=False)[0]
        assert torch.equal(out, run(model, inputs))


DEFAULTS = {"scale_factor": (1.0, 1.0, 1.0)}


def test_copies_and_pickles_stay_enabled(example):
    model, inputs = example
    enable(model, top_p=0.4)
    out = run(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        disable(model)
        assert torch.equal(run(other, inputs), out)
        disable(other)
        enable(model, top_p=0.4)
        assert torch.equal(run(model, inputs), out)
        with enable(model, top_p=1.0), enable(other, top_p=1.0):
            assert torch.equal(run(other, inputs), run(model, inputs))


def test_saving_is_not_changed(tmp_path):
    model, inputs = wan(), wan_inputs()
    dense = run(model, inputs)
    model.save_pretrained(tmp_path / "plain")
    enable(model, top_p=0.3)
    model.save_pretrained(tmp_path / "enabled")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        plain, enabled = (tmp_path / folder / name for folder in ("plain", "enabled"))
        assert plain.read_bytes() == enabled.read_bytes()
    loaded = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "enabled")
    assert torch.equal(run(loaded, inputs), dense)


def test_processors_set_afterwards_are_used():
    model, inputs = kandinsky5(), kandinsky5_inputs()
    reference = boolean_reference(model, inputs)
    enable(model, top_p=0.9)
    theirs = transformer_kandinsky.Kandinsky5AttnProcessor()
    model.set_attn_processor(theirs)
    with boolean_attention():
        assert_close(run(model, inputs), reference)
    disable(model)
    assert all(processor is theirs for processor in model.attn_processors.values())


def test_some_processors_set_afterwards_are_an_error():
    model, inputs = wan(), wan_inputs()
    enable(model)
    model.blocks[1].attn1.set_processor(type(model.blocks[1].attn2.processor)())
    with pytest.raises(RuntimeError, match="1 of 2 self-attentions have a processor that was set"):
        run(model, inputs)
    disable(model)
    run(model, inputs)


def test_a_layer_alone_says_what_is_missing():
    model = kandinsky5()
    enable(model)
    with pytest.raises(RuntimeError, match="without the forward of its transformer"):
        model.visual_transformer_blocks[0].self_attention(torch.randn(1, 64, HEADS * D))


def test_settings_of_the_host_pass_through():
    """set_attention_backend while enabled: for the other attentions, and after disable."""
    model, inputs = kandinsky5(), kandinsky5_inputs(sparse=False)
    enable(model)
    out = run(model, inputs)
    model.set_attention_backend("_native_math")
    assert_close(run(model, inputs), out)
    disable(model)
    backends = {processor._attention_backend for processor in model.attn_processors.values()}
    assert backends == {AttentionBackendName._NATIVE_MATH}


@pytest.mark.parametrize("name", ["wan", "kandinsky6_sr"])
def test_a_compiled_transformer_notices(name):
    """Layers compiled before enable(), which only some hooks concern, and other settings."""
    make, make_inputs = MODELS[name]
    model, inputs = make(), make_inputs()
    expected = {top_p: run_with(model, inputs, top_p=top_p) for top_p in (0.4, 0.7)}
    torch.compiler.reset()
    model.compile_repeated_blocks(backend="eager")
    dense = run(model, inputs) if name == "wan" else None
    for top_p, out in expected.items():
        enable(model, top_p=top_p)
        assert_close(run(model, inputs), out)
    disable(model)
    if dense is not None:
        assert torch.equal(run(model, inputs), dense)


def test_a_wrapped_transformer_is_found():
    model, inputs = wan(), wan_inputs()
    pipe = types.SimpleNamespace(
        transformer=torch.compile(model, backend="eager"), transformer_2=wan()
    )
    enable(pipe, top_p=0.5)
    out = run(pipe.transformer, inputs)
    assert_close(out, run_with(model, inputs, top_p=0.5))
    assert any("Nabla" in type(p).__name__ for p in pipe.transformer_2.attn_processors.values())
    disable(torch.nn.Sequential(model))
    assert not any("Nabla" in type(p).__name__ for p in model.attn_processors.values())


def other_processor():
    model = wan()
    model.blocks[0].attn1.set_processor(transformer_kandinsky.Kandinsky5AttnProcessor())
    return model


BAD = {
    "module": (
        lambda: torch.nn.Linear(2, 2),
        {},
        "Linear has Linear: supported are Kandinsky5Tran",
    ),
    "pipeline": (lambda: types.SimpleNamespace(unet=1), {}, "SimpleNamespace has no transformer"),
    "transformer": (
        lambda: types.SimpleNamespace(transformer=torch.nn.Linear(2, 2)),
        {},
        "SimpleNamespace has Linear: supported are .*WanTransformer3DModel",
    ),
    "processor": (other_processor, {}, "has a Kandinsky5AttnProcessor, which enable"),
    "percentage": (wan, {"top_p": 90}, "top_p=90 .* looks like a percentage"),
    "heads": (wan, {"top_p": [0.5] * 3}, "top_p has 3 values: give one for each of 2 heads"),
    "window": (wan, {"window": (2, 1, 1)}, "three odd extents"),
    "backend": (wan, {"backend": "flex"}, "backend='flex' is unknown: give 'auto' or one of"),
}


@pytest.mark.parametrize("make, options, message", BAD.values(), ids=BAD)
def test_bad_input(make, options, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        enable(model, **options)
    assert not hasattr(model, "_nabla")


def test_per_head_top_p():
    model, inputs = wan(1), wan_inputs()
    same = run_with(model, inputs, top_p=0.5)
    assert torch.equal(run_with(model, inputs, top_p=[0.5, 0.5]), same)
    assert not torch.equal(run_with(model, inputs, top_p=[0.5, 0.9]), same)
    assert torch.equal(run_with(model, inputs, top_p=torch.tensor([0.5, 0.5])), same)


# Several processes


def ulysses_worker(rank, directory):
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers counts, and a CPU is none
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2
    )
    config = diffusers.ContextParallelConfig(ulysses_degree=2)
    split, gather = ContextParallelInput, ContextParallelOutput
    of_kandinsky5 = {
        "visual_transformer_blocks.0": {
            "visual_embed": split(split_dim=1, expected_dims=3),
            "rope": split(split_dim=1, expected_dims=6),
        },
        "visual_transformer_blocks.*": gather(gather_dim=1, expected_dims=3),
    }
    for make, make_inputs, cp_plan in (
        (wan, lambda: wan_inputs(height=24), None),
        (
            kandinsky5,
            lambda: kandinsky5_inputs(2, 26, 36, sparse=False),
            of_kandinsky5,
        ),
    ):
        torch.manual_seed(0)
        model, inputs = make(), make_inputs()
        enable(model, top_p=0.4, window=(1, 3, 1))
        alone = gradients(model, inputs)
        out = run(model, inputs)
        model.enable_parallelism(config=config, cp_plan=cp_plan)
        assert_close(run(model, inputs), out)
        if cp_plan is not None:  # the template has no backward for cross-attention to all text
            continue
        for name, gradient in gradients(model, inputs).items():
            torch.distributed.all_reduce(gradient)
            error = (gradient - alone[name]).abs().max()
            assert error <= 1e-4 * alone[name].abs().max(), name
    torch.distributed.destroy_process_group()


def test_ulysses(tmp_path):
    """Two processes of diffusers' context parallelism compute what one does."""
    torch.multiprocessing.spawn(ulysses_worker, (str(tmp_path),), nprocs=2)


@pytest.mark.parametrize("make", [kandinsky5, kandinsky6_sr], ids=["kandinsky5", "kandinsky6-sr"])
def test_a_calibration_gives_every_layer_its_own_top_p(make):
    transformer = make(layers=2)
    inputs = (kandinsky5_inputs if make is kandinsky5 else kandinsky6_sr_inputs)()
    with enable(transformer, top_p=1.0), torch.no_grad():
        curves = calibrate(transformer, lambda: transformer(**inputs), window=(3, 1, 1))
    chosen = curves.choose(0.1)
    assert [len(layer) for layer in chosen] == [HEADS, HEADS]
    seen = []
    with enable(transformer, top_p=chosen):
        with observing(transformer, lambda call: seen.append((call.q, call.k, call.mask))):
            transformer(**inputs)
    for (q, k, mask), top_p in zip(seen, chosen, strict=True):
        expected = nabla.create_block_mask(q, k, grid=mask.grid, top_p=top_p, window=(3, 1, 1))
        assert torch.equal(mask.to_dense(), expected.to_dense())
    with pytest.raises(ValueError, match="calibration of 1 layers"):
        enable(transformer, top_p=Calibration(chosen.top_p[:1], None, 0.1, 1.0))
