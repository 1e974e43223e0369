"""Checkpoints survive a round trip, and broken ones say what is wrong."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky_model import CrossDiT, CrossDiTConfig
from kandinsky_model.checkpoint import load_checkpoint, save_checkpoint

CONFIG = CrossDiTConfig(
    model_dim=32, ff_dim=32, time_dim=16, num_text_blocks=1, num_visual_blocks=2,
    axes_dims=(8, 12, 12), in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8,
    top_p=0.6, window=(3, 1, 1),
)  # fmt: skip


@pytest.fixture
def model() -> CrossDiT:
    torch.manual_seed(0)
    return CrossDiT(CONFIG)


@pytest.fixture
def path(tmp_path, model):
    save_checkpoint(model, tmp_path / "new" / "model.safetensors")
    return tmp_path / "new" / "model.safetensors"


def test_round_trip_is_exact(model, path):
    loaded = load_checkpoint(path)
    assert loaded.config == CONFIG and not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_stored_dtypes_are_kept(model, path):
    save_checkpoint(model, path, dtype=torch.bfloat16)
    for name, tensor in load_checkpoint(path).state_dict().items():
        kept = "modulation" in name or "time_embeddings" in name
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
        torch.testing.assert_close(tensor.float(), model.state_dict()[name], rtol=4e-3, atol=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "saving left the model alone"


def test_dtype_can_be_chosen(path):
    assert {p.dtype for p in load_checkpoint(path, dtype=torch.float32).parameters()} == {
        torch.float32
    }
    loaded = load_checkpoint(path, dtype=torch.bfloat16)
    assert loaded.visual_embeddings.in_layer.weight.dtype == torch.bfloat16
    assert loaded.out_layer.modulation.out_layer.weight.dtype == torch.float32


def test_config_can_be_passed_for_a_bare_file(path):
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"model\.json is missing; write it or pass config"):
        load_checkpoint(path)
    assert load_checkpoint(path, config=CONFIG).config == CONFIG


def test_missing_and_unexpected_keys_are_named(path):
    tensors = load_file(path)
    tensors["lora.weight"] = tensors.pop("out_layer.out_layer.bias")
    save_file(tensors, path)
    with pytest.raises(
        ValueError, match=r"1 missing keys: out_layer\.out_layer\.bias; 1 unexpected keys: lora"
    ):
        load_checkpoint(path)


def test_another_preset_is_recognised(path):
    with pytest.raises(
        ValueError, match="unexpected keys: visual_transformer_blocks.1.*another preset"
    ):
        load_checkpoint(path, config=replace(CONFIG, num_visual_blocks=1))
    with pytest.raises(ValueError, match=r"other shapes: .* \[32, 8\] instead of \[32, 9\]"):
        load_checkpoint(path, config=replace(CONFIG, in_text_dim=9))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_dim": 32}', "is no CrossDiTConfig"),
        ("{", "is no CrossDiTConfig"),
        ('{"colour": 1}', r"unknown config fields \['colour'\]"),
    ],
    ids=["incomplete", "broken", "unknown"],
)
def test_bad_config(path, content, message):
    path.with_suffix(".json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def test_truncated_file(path):
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_checkpoint(path)


def test_absent_file(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_checkpoint(tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model"])
def test_pickles_are_refused(tmp_path, model, name):
    with pytest.raises(ValueError, match="must end in .safetensors"):
        load_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match="must end in .safetensors"):
        save_checkpoint(model, tmp_path / name)
