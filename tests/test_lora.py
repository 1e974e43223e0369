"""LoRA files of every kind, against the formula, bit for bit; wrong ones name what does not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kandinsky_model import CrossDiT, CrossDiTConfig
from kandinsky_model.checkpoint import load_checkpoint, save_checkpoint
from kandinsky_model.lora import apply_lora, check_lora

CONFIG = CrossDiTConfig(
    model_dim=32, ff_dim=48, time_dim=16, num_text_blocks=1, num_visual_blocks=2,
    axes_dims=(8, 12, 12), in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8,
)  # fmt: skip
RANKS = {
    "visual_transformer_blocks.0.self_attention.to_query": 4,
    "visual_transformer_blocks.1.cross_attention.out_layer": 2,
    "visual_transformer_blocks.1.feed_forward.in_layer": 4,
    "visual_transformer_blocks.0.visual_modulation.out_layer": 3,
}
FORMS = {
    "peft": "base_model.model.{}.lora_{}.weight",
    "diffusers": "transformer.{}.lora_{}.weight",
    "upstream": "base_model.model.{}.lora_{}.default.weight",
    "bare": "{}.lora_{}.weight",
}


@pytest.fixture
def model() -> CrossDiT:
    torch.manual_seed(0)
    model = CrossDiT(CONFIG).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def factors(model: CrossDiT) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer, A [r, in] and B [out, r]."""
    torch.manual_seed(1)
    weights = {name: model.get_submodule(name).weight for name in RANKS}
    return {
        name: (torch.randn(rank, weights[name].shape[1]), torch.randn(weights[name].shape[0], rank))
        for name, rank in RANKS.items()
    }


def write(path, model: CrossDiT, form: str = "peft", *, metadata=None, **extra: Tensor) -> None:
    tensors = {}
    for name, pair in factors(model).items():
        for letter, tensor in zip("AB", pair, strict=True):
            tensors[FORMS[form].format(name, letter)] = tensor
    save_file(tensors | extra, path, metadata=metadata)


def expected(model: CrossDiT, scalings: dict[str, float]) -> dict[str, Tensor]:
    """W + scaling * B A in float32, in W's dtype."""
    merged = {name: value.clone() for name, value in model.state_dict().items()}
    for name, (down, up) in factors(model).items():
        weight = merged[f"{name}.weight"]
        merged[f"{name}.weight"] = (weight.float() + scalings[name] * (up @ down)).to(weight.dtype)
    return merged


def assert_equal(model: CrossDiT, tensors: dict[str, Tensor]) -> None:
    state = model.state_dict()
    for name, tensor in tensors.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_merges_by_the_formula(tmp_path, model, form, dtype):
    model.cast(dtype)
    write(tmp_path / "lora.safetensors", model, form)
    wanted = expected(model, dict.fromkeys(RANKS, 0.5))
    lora = apply_lora(model, tmp_path, scale=0.5)
    assert sorted(lora.layers) == sorted(RANKS)
    assert_equal(model, wanted)


def test_alpha_in_tensors(tmp_path, model):
    name = "visual_transformer_blocks.0.self_attention.to_query"
    alpha = {f"base_model.model.{name}.alpha": torch.tensor(8.0)}
    write(tmp_path / "lora.safetensors", model, **alpha)
    wanted = expected(model, dict.fromkeys(RANKS, 1.0) | {name: 8.0 / 4})
    apply_lora(model, tmp_path / "lora.safetensors")
    assert_equal(model, wanted)


CONFIGURED = {
    "plain": ({"r": 4, "lora_alpha": 6}, {name: 6 / rank for name, rank in RANKS.items()}),
    "rank-stabilized": (
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {name: 6 / rank**0.5 for name, rank in RANKS.items()},
    ),
    "pattern": (
        {
            "r": 4,
            "lora_alpha": 6,
            "alpha_pattern": {"feed_forward.in_layer": 1, r"0\..*": 2, "in_layer": 9},
        },
        {
            name: (1 if "feed_forward" in name else 2 if ".0." in name else 6) / rank
            for name, rank in RANKS.items()
        },
    ),
}


@pytest.mark.parametrize("case", CONFIGURED)
@pytest.mark.parametrize("place", ["adapter_config.json", "config_lora.json", "metadata"])
def test_alpha_in_a_description(tmp_path, model, place, case):
    values, scalings = CONFIGURED[case]
    metadata = None
    if place == "metadata":
        packed = {f"transformer.{key}": value for key, value in values.items()}
        metadata = {"lora_adapter_metadata": json.dumps(packed)}
    else:
        (tmp_path / place).write_text(json.dumps(values))
    write(tmp_path / "lora.safetensors", model, "diffusers", metadata=metadata)
    wanted = expected(model, scalings)
    apply_lora(model, tmp_path / "lora.safetensors")
    assert_equal(model, wanted)


def test_a_trigger_is_handed_on(tmp_path, model):
    write(tmp_path / "lora.safetensors", model, metadata={"trigger": "Camera turns left. "})
    assert apply_lora(model, tmp_path).trigger == "Camera turns left. "


def test_adapters_come_off_again_bit_for_bit(tmp_path, model):
    model.cast(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    write(tmp_path / "lora.safetensors", model)
    first = apply_lora(model, tmp_path, removable=True)
    between = {name: value.clone() for name, value in model.state_dict().items()}
    second = apply_lora(model, tmp_path, scale=-0.3, removable=True)
    with pytest.raises(ValueError, match="has changed since; remove what was applied later first"):
        first.remove()
    second.remove()
    assert_equal(model, between)
    first.remove()
    assert_equal(model, before)
    with pytest.raises(ValueError, match="apply it with removable=True"):
        apply_lora(model, tmp_path).remove()


def test_a_memory_mapped_file_stays_as_it_is(tmp_path, model):
    save_checkpoint(model, tmp_path / "model.safetensors", dtype=torch.bfloat16)
    content = (tmp_path / "model.safetensors").read_bytes()
    write(tmp_path / "lora.safetensors", model)
    loaded = load_checkpoint(tmp_path / "model.safetensors")
    wanted = expected(loaded, dict.fromkeys(RANKS, 1.0))
    apply_lora(loaded, tmp_path / "lora.safetensors")
    assert_equal(loaded, wanted)
    assert (tmp_path / "model.safetensors").read_bytes() == content


def test_the_merged_model_computes_what_the_adapter_means(tmp_path, model):
    """y = W x + b + scale * B (A x), layer by layer."""
    write(tmp_path / "lora.safetensors", model)
    inputs = {name: torch.randn(3, down.shape[1]) for name, (down, _) in factors(model).items()}
    with torch.no_grad():
        wanted = {
            name: model.get_submodule(name)(inputs[name]) + 0.7 * inputs[name] @ down.T @ up.T
            for name, (down, up) in factors(model).items()
        }
        apply_lora(model, tmp_path, scale=0.7)
        for name, value in wanted.items():
            torch.testing.assert_close(
                model.get_submodule(name)(inputs[name]), value, rtol=1e-5, atol=1e-4
            )


# --- what does not fit -------------------------------------------------------------------------

QUERY = "base_model.model.visual_transformer_blocks.0.self_attention.to_query"


@pytest.mark.parametrize(
    ("drop", "extra", "message"),
    [
        ([], {"x.lora_A.weight": (4, 32)}, r"1 layers are not in the model: x; 1 layers lack"),
        ([], {"transformer.visual_transformer_blocks.0.self_attention.query_norm.lora_A.weight":
              (4, 32)}, "query_norm"),
        ([f"{QUERY}.lora_B.weight"], {}, "1 layers lack lora_A or lora_B: visual_transformer_blo"),
        ([], {f"{QUERY}.lora_A.weight": (4, 33)}, r"to_query: B \[32, 4\] A \[4, 33\] is no"),
        ([], {f"{QUERY}.lora_A.weight": (5, 32)}, r"to_query: B \[32, 4\] A \[5, 32\] is no"),
        ([], {f"{QUERY}.lora_A.weight": (4, 32, 1)}, r"A \[4, 32, 1\] is no"),
        ([], {f"{QUERY}.lora_B.bias": (32,)}, r"1 keys are of no LoRA: .*to_query\.lora_B\.bias"),
        ([], {"out_layer.out_layer.weight": (16, 32)}, "1 keys are of no LoRA: out_layer"),
    ],
    ids=["layer", "norm", "half", "in", "rank", "dimensions", "bias", "whole weight"],
)  # fmt: skip
def test_what_fits_no_layer_is_named(tmp_path, model, drop, extra, message):
    path = tmp_path / "lora.safetensors"
    write(path, model)
    tensors = load_file(path) | {name: torch.zeros(shape) for name, shape in extra.items()}
    save_file({name: value for name, value in tensors.items() if name not in drop}, path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        apply_lora(model, path)
    assert_equal(model, before)
    with pytest.raises(ValueError, match=message):
        check_lora(path, CONFIG)


def test_a_good_file_passes_the_check(tmp_path, model):
    write(tmp_path / "lora.safetensors", model)
    check_lora(tmp_path, CONFIG)


def test_files_that_are_no_adapter(tmp_path, model):
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path)
    with pytest.raises(ValueError, match="keys are of no LoRA: .* Is it for another model?"):
        apply_lora(model, path)
    save_checkpoint(model, path, max_shard_size=20_000)
    with pytest.raises(ValueError, match="is a checkpoint in .* files, no LoRA"):
        apply_lora(model, tmp_path)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match="it is empty"):
        apply_lora(model, tmp_path / "empty.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        apply_lora(model, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        apply_lora(model, tmp_path / "lora.bin")


@pytest.mark.parametrize("content", ["{", "[]"], ids=["broken", "list"])
def test_a_bad_description(tmp_path, model, content):
    write(tmp_path / "lora.safetensors", model)
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match="adapter_config.json has no readable description"):
        apply_lora(model, tmp_path)


def test_dora_is_refused(tmp_path, model):
    write(tmp_path / "lora.safetensors", model)
    (tmp_path / "adapter_config.json").write_text('{"use_dora": true}')
    with pytest.raises(ValueError, match="it is a DoRA"):
        apply_lora(model, tmp_path)


ALPHA = f"{QUERY}.alpha"
BAD_TENSORS = {
    "rank 0": ({f"{QUERY}.lora_A.weight": torch.zeros(0, 32),
                f"{QUERY}.lora_B.weight": torch.zeros(32, 0)}, "to_query: its rank is 0"),
    "alphas": ({ALPHA: torch.ones(2)}, r"to_query\.alpha is not one number"),
    "an alpha of none": ({ALPHA: torch.tensor(float("nan"))}, "to_query by up to nan"),
    "whole numbers": ({f"{QUERY}.lora_A.weight": torch.ones(4, 32).int()}, r"quantized \(I32\)"),
    "8 bits": ({f"{QUERY}.lora_A.weight": torch.ones(4, 32).to(torch.float8_e4m3fn)}, "F8_E4M3"),
    "no number": ({f"{QUERY}.lora_A.weight": torch.full((4, 32), float("nan"))}, "by up to nan"),
    "infinity": ({f"{QUERY}.lora_B.weight": torch.full((32, 4), torch.inf)}, "by up to inf"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_tensors_that_make_no_sense(tmp_path, model, tensors, message):
    path = tmp_path / "lora.safetensors"
    write(path, model)
    save_file(load_file(path) | tensors, path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for use in (lambda: apply_lora(model, path), lambda: check_lora(path, CONFIG)):
        with pytest.raises(ValueError, match=message):
            use()
    assert_equal(model, before)


def test_a_description_without_values(tmp_path, model):
    """peft writes null for what is not set."""
    write(tmp_path / "lora.safetensors", model)
    nothing = dict.fromkeys(["lora_alpha", "alpha_pattern", "use_rslora", "use_dora"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(nothing))
    wanted = expected(model, dict.fromkeys(RANKS, 1.0))
    apply_lora(model, tmp_path)
    assert_equal(model, wanted)


def test_what_an_adapter_depends_on(tmp_path, model):
    file, config = tmp_path / "lora.safetensors", tmp_path / "config_lora.json"
    write(file, model, metadata={"trigger": "Zoom in. "})
    assert check_lora(tmp_path, CONFIG).files == (file,)
    config.write_text("{}")
    adapter = check_lora(file, CONFIG)
    assert adapter.files == (file, config) and adapter.trigger == "Zoom in. "
    write(file, model, metadata={"lora_adapter_metadata": "{}"})
    assert check_lora(file, CONFIG).files == (file,), "the file beside it is not read then"


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None, True])
def test_scale_must_be_finite(tmp_path, model, scale):
    write(tmp_path / "lora.safetensors", model)
    with pytest.raises(ValueError, match=f"scale {scale!r} must be a finite number"):
        apply_lora(model, tmp_path, scale=scale)
