"""Checkpoints survive a round trip in every layout, and broken ones say what is wrong."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel
from safetensors.torch import load_file, save_file

from kandinsky_model import ARCHITECTURES, PRESETS, CrossDiT, CrossDiTConfig, checkpoint
from kandinsky_model.checkpoint import (
    check_checkpoint,
    find_checkpoint,
    load_checkpoint,
    read_header,
    save_checkpoint,
)

CONFIG = CrossDiTConfig(
    model_dim=32, ff_dim=32, time_dim=16, num_text_blocks=1, num_visual_blocks=2,
    axes_dims=(8, 12, 12), in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8,
    rope_scale=(1.0, 2.0, 2.0), top_p=0.6, window=(5, 1, 3),
)  # fmt: skip
SHARD = 20_000  # bytes; the model has about 150,000


@pytest.fixture
def model() -> CrossDiT:
    torch.manual_seed(0)
    model = CrossDiT(CONFIG)
    for parameter in model.parameters():  # modulations too, which start at zero
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def path(tmp_path, model):
    save_checkpoint(model, tmp_path / "new" / "model.safetensors")
    return tmp_path / "new" / "model.safetensors"


def assert_same(first: torch.nn.Module, second: torch.nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def output(model: CrossDiT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shapes = (1, 2, 16, 16, CONFIG.input_dim), (1, 3, CONFIG.in_text_dim), (1, CONFIG.in_text_dim2)
    dtype = model.visual_embeddings.in_layer.weight.dtype
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    with torch.no_grad():
        return model(*inputs, torch.tensor([0.5]))


# --- round trips -------------------------------------------------------------------------------


def public_file(model: CrossDiT, path) -> None:
    """Write the file as upstream does: bfloat16, modulations and time embeddings in float32."""
    tensors = {
        name: value.detach().to(
            torch.float32 if "modulation" in name or "time_embed" in name else torch.bfloat16
        )
        for name, value in model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("max_shard_size", [None, SHARD], ids=["one file", "sharded"])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_public_file_runs_and_returns_bit_for_bit(tmp_path, model, layout, max_shard_size):
    source, copy = tmp_path / "model" / "public.safetensors", tmp_path / "copy.safetensors"
    public_file(model, source)
    loaded = load_checkpoint(source, config=CONFIG)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16, torch.float32}
    expected = output(loaded)
    assert torch.isfinite(expected).all() and expected.dtype == torch.bfloat16

    between = tmp_path / ("transformer" if layout == "diffusers" else "between.safetensors")
    save_checkpoint(loaded, between, layout=layout, max_shard_size=max_shard_size)
    if layout == "original" and max_shard_size is not None:
        between = tmp_path / "between.safetensors.index.json"
    assert len(read_header(between).parts) == 1 or max_shard_size is not None
    again = load_checkpoint(between)
    assert again.config == CONFIG
    assert_same(again, loaded)
    save_checkpoint(again, copy)
    assert copy.read_bytes() == source.read_bytes()
    assert torch.equal(output(load_checkpoint(copy)), expected)


def test_shards_are_as_large_as_asked_for(tmp_path, model):
    save_checkpoint(model, tmp_path / "model.safetensors", max_shard_size=SHARD)
    header = read_header(tmp_path / "model.safetensors.index.json")
    sizes = [sum(t.nbytes for t in load_file(part).values()) for part in header.parts]
    assert len(sizes) > 5 and max(sizes) <= SHARD
    largest = max(value.nbytes for value in model.state_dict().values())
    assert min(sizes[:-1]) > SHARD - largest, "a shard ends where the next tensor has no room"
    assert sum(sizes) == sum(value.nbytes for value in model.state_dict().values())
    assert header.nbytes > sum(sizes)
    assert load_checkpoint(tmp_path).config == CONFIG, "the folder stands for its only checkpoint"


def test_one_tensor_larger_than_a_shard(tmp_path, model):
    save_checkpoint(model, tmp_path / "model.safetensors", max_shard_size=1)
    assert len(read_header(tmp_path).parts) == len(model.state_dict())
    assert_same(load_checkpoint(tmp_path), model)


@pytest.mark.parametrize("max_shard_size", [None, SHARD], ids=["one file", "sharded"])
def test_diffusers_reads_what_we_write(tmp_path, model, max_shard_size):
    save_checkpoint(model, tmp_path, layout="diffusers", max_shard_size=max_shard_size)
    other, report = Kandinsky5Transformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same(other, model)
    c = other.config
    assert (c.attention_type, c.attention_P) == ("nabla", 0.6)
    assert (c.attention_wT, c.attention_wH, c.attention_wW) == (5, 1, 3)


@pytest.mark.parametrize("size", ["10GB", "30KB"], ids=["one file", "sharded"])
@pytest.mark.parametrize("sparse", [True, False], ids=["nabla", "dense"])
def test_we_read_what_diffusers_writes(tmp_path, model, sparse, size):
    config = CONFIG if sparse else replace(CONFIG, top_p=None, window=None)
    values = {k: v for k, v in config.to_diffusers().items() if not k.startswith("_")}
    other = Kandinsky5Transformer3DModel(**values)
    other.load_state_dict(model.state_dict())
    other.save_pretrained(tmp_path / "transformer", max_shard_size=size)
    assert ("index" in " ".join(p.name for p in (tmp_path / "transformer").iterdir())) == (
        size == "30KB"
    )
    loaded = load_checkpoint(tmp_path / "transformer")
    assert loaded.config == replace(config, rope_scale=(1.0, 1.0, 1.0)), "they do not store it"
    assert_same(loaded, model)


def test_saving_replaces_every_file_of_that_name(tmp_path, model):
    neighbour = tmp_path / "model-2.safetensors"
    public_file(model, neighbour)
    for size in (SHARD, None, 5 * SHARD):
        save_checkpoint(model, tmp_path / "model.safetensors", max_shard_size=size)
        names = {path.name for path in tmp_path.iterdir()} - {"model.json", neighbour.name}
        if size is None:
            assert names == {"model.safetensors"}
        else:
            index = tmp_path / "model.safetensors.index.json"
            assert names == {index.name, *(part.name for part in read_header(index).parts)}
            assert_same(load_checkpoint(index), model)


def test_a_model_can_be_saved_over_the_file_it_is_mapped_from(model, path):
    loaded, content = load_checkpoint(path), path.read_bytes()
    with torch.no_grad():
        loaded.out_layer.out_layer.bias.add_(1)
    with path.open("rb") as opened:
        save_checkpoint(loaded, path)
        assert opened.read() == content, "who reads the old file keeps it"
    assert_same(load_checkpoint(path), loaded)
    assert torch.equal(
        load_checkpoint(path).out_layer.out_layer.bias, model.out_layer.out_layer.bias + 1
    )


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk", "^C"])
@pytest.mark.parametrize("exists", [True, False], ids=["over a file", "new"])
def test_an_interrupted_save_leaves_nothing_behind(tmp_path, model, monkeypatch, exists, error):
    path = tmp_path / "model.safetensors"
    if exists:
        save_checkpoint(model, path, max_shard_size=SHARD)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    written = []

    def failing(tensors, file, metadata):
        save_file(tensors, file, metadata)
        written.append(file)
        if len(written) == 3:
            raise error

    monkeypatch.setattr(checkpoint, "save_file", failing)
    with pytest.raises(type(error)):
        save_checkpoint(model.cast(torch.bfloat16), path, max_shard_size=SHARD)
    assert len(written) == 3
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


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


def test_a_file_all_in_bfloat16_gets_float32_modulations(tmp_path, model):
    save_file(
        {name: value.bfloat16() for name, value in model.state_dict().items()},
        tmp_path / "low.safetensors",
    )
    loaded = load_checkpoint(tmp_path / "low.safetensors", config=CONFIG)
    assert loaded.out_layer.modulation.out_layer.weight.dtype == torch.float32
    assert torch.isfinite(output(loaded)).all()


def test_loading_costs_no_second_copy(tmp_path):
    """The peak of a process that loads and reads every weight grows by the file, not by two."""
    config = replace(CONFIG, model_dim=1024, ff_dim=4096, time_dim=64)
    path = tmp_path / "large.safetensors"
    public_file(CrossDiT(config), path)
    size = path.stat().st_size
    assert size > 90e6
    script = f"""
import torch
from pathlib import Path
from kandinsky_model import CrossDiTConfig
from kandinsky_model.checkpoint import load_checkpoint
config = CrossDiTConfig.from_dict({config.to_dict()!r})
def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
load_checkpoint({str(path)!r}, config=config)  # what a first call imports is not counted
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = kilobytes("VmRSS")
model = load_checkpoint({str(path)!r}, config=config)
for parameter in model.parameters():
    parameter.view(-1).view(torch.uint8)[::4096].max()
print(1024 * (kilobytes("VmHWM") - before))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0.9 * size < int(run.stdout) < 1.2 * size


# --- the config of a file that has none --------------------------------------------------------


def test_config_can_be_passed_for_a_bare_file(path):
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"of another size .*model\.json is missing; pass config"):
        load_checkpoint(path)
    assert load_checkpoint(path, config=CONFIG).config == CONFIG


def test_shapes_tell_the_architecture():
    for name, architecture in ARCHITECTURES.items():
        with torch.device("meta"):
            tensors = CrossDiT(architecture).state_dict()
        config = CrossDiTConfig.from_shapes({name: value.shape for name, value in tensors.items()})
        assert config.has_shapes_of(architecture), name
        others = {key for key, other in ARCHITECTURES.items() if config.has_shapes_of(other)}
        assert others == {name}
    with pytest.raises(ValueError, match="not the tensors of a CrossDiT"):
        CrossDiTConfig.from_shapes({"patch_embedding.weight": (5120, 16, 1, 2, 2)})


@pytest.fixture
def small_presets(monkeypatch):
    """Every preset with the shapes of CONFIG, so that files of it stand for public ones."""
    shapes = {"rope_scale", "top_p", "window"}
    small = {
        name: replace(
            row, model=replace(CONFIG, **{field: getattr(row.model, field) for field in shapes})
        )
        for name, row in PRESETS.items()
        if row.name.startswith("video-lite")
    }
    monkeypatch.setattr(checkpoint, "PRESETS", small)
    return small


def test_a_public_name_tells_attention(tmp_path, model, small_presets):
    for row in small_presets.values():
        public_file(model, tmp_path / f"{row.file}.safetensors")
        assert load_checkpoint(tmp_path / f"{row.file}.safetensors").config == row.model


def test_a_public_architecture_under_another_name_warns(tmp_path, model, small_presets):
    public_file(model, tmp_path / "mine.safetensors")
    with pytest.warns(
        UserWarning, match=r"dense attention and rope_scale \(1.0, 2.0, 2.0\) are as"
    ):
        config = load_checkpoint(tmp_path / "mine.safetensors").config
    assert config == small_presets["video-lite-5s"].model


def test_rope_scale_of_a_model_of_diffusers_is_the_presets(tmp_path, model, monkeypatch):
    """They do not store it; of Pro, attention tells the preset."""
    small = {
        row.name: replace(
            row,
            model=replace(
                CONFIG,
                rope_scale=row.model.rope_scale,
                top_p=row.model.top_p,
                window=row.model.window,
            ),
        )
        for row in PRESETS.values()
        if row.name.startswith("video-pro")
    }
    monkeypatch.setattr(checkpoint, "PRESETS", small)
    assert len({row.model.rope_scale for row in small.values()}) == 2
    for row in small.values():
        model.config = row.model
        save_checkpoint(model, tmp_path, layout="diffusers")
        values = json.loads((tmp_path / "config.json").read_text())
        del values["_rope_scale"]
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert load_checkpoint(tmp_path).config == row.model


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_dim": 32}', "is no config of a CrossDiT"),
        ("{", "is no config of a CrossDiT"),
        ("[]", "is no config of a CrossDiT"),
        ('{"colour": 1}', r"unknown config fields \['colour'\]"),
    ],
    ids=["incomplete", "broken", "list", "unknown"],
)
def test_bad_config(path, content, message):
    path.with_suffix(".json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "WanTransformer3DModel"}, "a WanTransformer3DModel is no Kandinsky5"),
        ({"attention_type": "sage"}, "attention_type 'sage' is neither"),
        ({"model_dim": 33}, "model_dim 33 is not a multiple"),
    ],
    ids=["class", "attention", "value"],
)
def test_bad_config_of_diffusers(tmp_path, model, change, message):
    save_checkpoint(model, tmp_path, layout="diffusers")
    source = tmp_path / "config.json"
    source.write_text(json.dumps(json.loads(source.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path)


# --- files that are wrong: one clear error, from headers alone ----------------------------------


@pytest.fixture
def headers_only(monkeypatch):
    """No tensor may be read."""

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(CrossDiT, "load_state_dict", refuse)


@pytest.fixture(params=["load", "check"])
def read(request, headers_only):
    """Both ways to find out; the second needs a config."""
    if request.param == "load":
        return lambda path, config=CONFIG: load_checkpoint(path, config=config)
    return lambda path, config=CONFIG: check_checkpoint(path, config)


def test_missing_and_unexpected_keys_are_named(path, read):
    tensors = load_file(path)
    tensors["extra.weight"] = tensors.pop("out_layer.out_layer.bias")
    save_file(tensors, path)
    with pytest.raises(
        ValueError, match=r"1 missing keys: out_layer\.out_layer\.bias; 1 unexpected keys: extra"
    ):
        read(path)


def test_another_size_is_recognised(path, read):
    with pytest.raises(ValueError, match="unexpected keys: visual_transformer_blocks.1.*2 visual"):
        read(path, replace(CONFIG, num_visual_blocks=1))
    with pytest.raises(ValueError, match=r"other shapes: .* \[32, 8\] instead of \[32, 9\]"):
        read(path, replace(CONFIG, in_text_dim=9))


@pytest.mark.parametrize("wanted", ["video-pro-5s", "text-to-image-lite"])
def test_another_preset_is_recognised(tmp_path, monkeypatch, read, wanted):
    """A file of the shapes of video-lite, but without the storage."""
    with torch.device("meta"):
        tensors = CrossDiT(ARCHITECTURES["video-lite"]).state_dict()
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    path = tmp_path / "kandinsky5lite_t2v_sft_5s.safetensors"
    header = checkpoint.Header(path, (path,), shapes, dict.fromkeys(shapes, "BF16"))
    monkeypatch.setattr(checkpoint, "read_header", lambda path: header)
    with pytest.raises(ValueError, match="It looks like video-lite, the architecture of video-li"):
        read(path, PRESETS[wanted].model)


def test_an_adapter_is_recognised(path, read):
    save_file({"transformer.out_layer.out_layer.lora_A.weight": torch.zeros(4, 32)}, path)
    with pytest.raises(ValueError, match="looks like a LoRA adapter"):
        read(path)


def test_a_foreign_model_is_recognised(path, read):
    save_file({"patch_embedding.weight": torch.zeros(4, 32)}, path)
    with pytest.raises(ValueError, match="looks like no CrossDiT of Kandinsky 5"):
        read(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="looks like no CrossDiT of Kandinsky 5.*pass config"):
        load_checkpoint(path)


def test_quantized_tensors_are_refused(path, read):
    tensors = load_file(path)
    tensors["out_layer.out_layer.weight"] = tensors["out_layer.out_layer.weight"].to(torch.int8)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 quantized tensors \(I8\): out_layer.out_layer.weight"):
        read(path)


@pytest.mark.parametrize("size", [0, 4, 1000, -1], ids=["empty", "4 bytes", "header", "last byte"])
def test_truncated_file(path, read, size):
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
        read(path)


def test_a_renamed_pickle(path, read):
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        read(path)


@pytest.mark.parametrize("name", ["none.safetensors", "none.safetensors.index.json"])
def test_absent_file(tmp_path, read, name):
    with pytest.raises(ValueError, match=f"{name} does not exist; fetch or write it first"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model"])
def test_pickles_are_refused(tmp_path, model, read, name):
    with pytest.raises(ValueError, match="must end in .safetensors"):
        read(tmp_path / name)
    with pytest.raises(ValueError, match="must end in .safetensors"):
        save_checkpoint(model, tmp_path / name)


def test_what_cannot_be_saved(tmp_path, model):
    with pytest.raises(ValueError, match="must end in .safetensors"):
        save_checkpoint(model, tmp_path / "model.safetensors.index.json")
    with pytest.raises(ValueError, match="layout 'hub' is none of original, diffusers"):
        save_checkpoint(model, tmp_path / "model.safetensors", layout="hub")
    with pytest.raises(ValueError, match="max_shard_size 0 must be positive"):
        save_checkpoint(model, tmp_path / "model.safetensors", max_shard_size=0)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def index(tmp_path, model):
    save_checkpoint(model, tmp_path / "model.safetensors", max_shard_size=SHARD)
    return tmp_path / "model.safetensors.index.json"


def test_a_missing_shard_is_named(index, read):
    lost = read_header(index).parts[2]
    lost.unlink()
    with pytest.raises(ValueError, match=f"of which 1 are missing: {lost.name}; fetch"):
        read(index)
    with pytest.raises(ValueError, match="are missing"):
        read(index.parent)


def test_a_truncated_shard_is_named(index, read):
    part = read_header(index).parts[2]
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{part.name} cannot be read as safetensors"):
        read(index)


def test_a_shard_of_another_checkpoint_is_named(index, read):
    part = read_header(index).parts[0]
    save_file({"other": torch.zeros(3)}, part)
    with pytest.raises(ValueError, match="and its files disagree on where other, "):
        read(index)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'],
    ids=["broken", "list", "empty", "number", "file"],
)
def test_a_bad_index(index, read, content):
    index.write_text(content)
    with pytest.raises(ValueError, match="is no index of safetensors"):
        read(index)


def test_an_index_stays_in_its_folder(index, read):
    index.write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(ValueError, match="lists files outside its folder"):
        read(index)


def test_a_folder_without_or_with_several_checkpoints(tmp_path, path, read):
    with pytest.raises(ValueError, match="holds no .safetensors; name the file"):
        read(tmp_path)
    public_file(CrossDiT(CONFIG), path.with_stem("second"))
    with pytest.raises(ValueError, match=r"several checkpoints \(model\.safetensors, second\.saf"):
        read(path.parent)


# --- weights of a preset -----------------------------------------------------------------------


def test_find_checkpoint(tmp_path):
    row = PRESETS["video-lite-10s"]
    with pytest.raises(
        ValueError, match="no weights for preset 'video-lite-10s': put kandinsky5lite_t2v_sft_10s.s"
    ):
        find_checkpoint(tmp_path, row)
    file = tmp_path / "anything.safetensors"
    assert find_checkpoint(file, row) == file
    file.touch()
    assert find_checkpoint(tmp_path, row) == tmp_path
    for place in (
        tmp_path / "transformer",
        tmp_path / f"{row.file}.safetensors.index.json",
        tmp_path / f"{row.file}.safetensors",
        tmp_path / "model" / f"{row.file}.safetensors",
    ):
        place.parent.mkdir(exist_ok=True)
        place.mkdir() if place.suffix == "" else place.write_text('{"weight_map": {}}')
        assert find_checkpoint(tmp_path, row) == place, "nearer than what was there before"


@pytest.mark.parametrize("folder", ["", "model"])
def test_weights_of_another_preset_are_not_taken_for_it(tmp_path, folder):
    """5 s and 10 s have the same shapes: only the name tells them apart."""
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / f"{PRESETS['video-lite-5s'].file}.safetensors").touch()
    with pytest.raises(ValueError, match=r"It has kandinsky5lite_t2v_sft_5s$"):
        find_checkpoint(tmp_path, PRESETS["video-lite-10s"])
