"""Folders of weights: what is found where, and of which preset it is."""

import re
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from kandinsky_model import folder as module
from kandinsky_model import presets
from kandinsky_model.folder import PIPELINES, digest, find_parts

LITE_5S = "Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers"
SPARSE = {"top_p": 0.9, "window": (11, 3, 3)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The parts of text to video in both layouts."""
    return {
        layout: tiny.write_weights(tmp_path_factory.mktemp(layout), tiny.preset(), layout=layout)
        for layout in ("original", "diffusers")
    }


def with_model(row, **changes):
    return replace(row, model=replace(row.model, **changes), file="another")


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_parts(folders, layout):
    parts, root = find_parts(folders[layout], tiny.preset()), folders[layout]
    other = layout == "diffusers"
    file = f"{tiny.preset().file}.safetensors"
    assert parts.model == root / ("transformer" if other else f"model/{file}")
    assert parts.tokenizer == root / ("tokenizer" if other else "text_encoder")
    assert parts.text_encoder_2 == root / ("text_encoder_2" if other else "text_encoder2")
    assert parts.tokenizer_2 == root / ("tokenizer_2" if other else "text_encoder2")
    assert parts.vae == root / "vae"


def test_the_attention_of_another_preset_is_noticed(folders, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", replace(tiny.preset(), name="tiny-dense"))
    for row in (with_model(tiny.preset(), **SPARSE), with_model(tiny.preset(), top_p=0.9)):
        with pytest.raises(ValueError, match="is of top_p None.*it looks like tiny-dense"):
            find_parts(folders["diffusers"], row)


def test_presets_of_one_file_may_attend_otherwise(folders, monkeypatch):
    """As the files of Pro, dense in SD and sparse in HD."""
    sparse = replace(with_model(tiny.preset(), **SPARSE), file=tiny.preset().file)
    monkeypatch.setitem(presets.PRESETS, "tiny", tiny.preset())
    find_parts(folders["diffusers"], sparse)


def test_the_task_of_another_preset_is_noticed(folders):
    with pytest.raises(ValueError, match=r"T2VPipeline \(text-to-video\).*image-to-video"):
        find_parts(folders["diffusers"], tiny.preset("image-to-video"))


def test_a_pipeline_of_another_kind_is_noticed(folders, tmp_path):
    root = shutil.copytree(folders["diffusers"], tmp_path / "weights")
    (root / "model_index.json").unlink()
    find_parts(root, tiny.preset())  # parts put together by hand have no index
    for text, words in (('{"_class_name": "WanPipeline"}', "is of WanPipeline"), ("[]", "no obj")):
        (root / "model_index.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            find_parts(root, tiny.preset())


@pytest.mark.parametrize(
    "name", [LITE_5S, LITE_5S.lower(), f"models--kandinskylab--{LITE_5S}/snapshots/0123"]
)
def test_the_name_of_the_folder_tells_the_rest(tmp_path, name):
    """Four presets have one shape, one attention and one task."""
    row = replace(tiny.preset(), file=presets.PRESETS["video-lite-5s"].file)
    root = tiny.write_weights(tmp_path / name, row, layout="diffusers")
    find_parts(root, row)
    for other in ("video-lite-5s-nocfg", "video-lite-5s-flash", "video-lite-5s-pretrain"):
        with pytest.raises(ValueError, match="is by its name of preset video-lite-5s"):
            find_parts(root, replace(row, file=presets.PRESETS[other].file))


def test_every_public_repository_has_its_preset():
    """Upstream's names, as its download script has them."""
    names = {
        "video-lite-10s-flash": "Kandinsky-5.0-T2V-Lite-distilled16steps-10s",
        "video-lite-5s-pretrain": "Kandinsky-5.0-T2V-Lite-pretrain-5s-Diffusers",
        "video-pro-10s-hd": "Kandinsky-5.0-T2V-Pro-sft-10s-Diffusers",
        "image-video-lite-5s": "Kandinsky-5.0-I2V-Lite-5s-Diffusers",
        "image-video-pro-5s-hd": "Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers",
        "text-to-image-lite": "Kandinsky-5.0-T2I-Lite",
        "image-to-image-lite": "Kandinsky-5.0-I2I-Lite-Diffusers",
    }
    for preset, name in names.items():
        assert presets.PRESETS[preset].file == module.file_of(name)
    assert module.file_of("Wan2.1") is None


def test_every_task_has_its_pipeline():
    assert PIPELINES.keys() == {row.task for row in presets.PRESETS.values()}


def test_digests(tmp_path, monkeypatch):
    """One number among many tells files apart, wherever it is."""
    monkeypatch.setattr(module, "_CHUNK", 1000)
    file = tmp_path / "a.safetensors"
    tensors, found = {"x": torch.zeros(999)}, set()
    for index in (None, 0, 500, 998):
        changed = {"x": tensors["x"].clone()}
        if index is not None:
            changed["x"][index] = 1.0
        save_file(changed, file)
        found.add(digest(file))
    assert len(found) == 4
    last = digest(file)
    save_file(load_file(file), file)
    assert digest(file) == last, "when it was written is all the same"


def test_digests_of_text_encoders_are_of_samples(tmp_path, monkeypatch):
    """Of each tensor the beginning of every chunk, and what the header says of all of it."""
    monkeypatch.setattr(module, "_CHUNK", 400)  # 100 numbers
    monkeypatch.setattr(module, "_SAMPLE", 40)
    file, found = tmp_path / "a.safetensors", {}

    def changed(name, index):
        tensors = {"x": torch.zeros(250), "y": torch.zeros(3)}
        if index is not None:
            tensors[name][index] = 1.0
        save_file(tensors, file)
        return module._digest_of_samples(file)

    plain = changed("x", None)
    for name, index in [("x", 0), ("x", 9), ("x", 100), ("x", 209), ("y", 0), ("y", 2)]:
        found[name, index] = changed(name, index)
    assert plain not in found.values() and len(set(found.values())) == len(found)
    assert changed("x", 10) == changed("x", 249) == plain, "what is not looked at"
    save_file({"x": torch.zeros(25, 10), "y": torch.zeros(3)}, file)
    assert module._digest_of_samples(file) != plain


def test_a_fingerprint_is_of_every_file_that_is_read(folders):
    for layout, root in folders.items():
        found = module.fingerprint(find_parts(root, tiny.preset()))
        files = {
            f"{file.parent.name}/{file.name}"
            for file in root.glob("*/*")
            if file.parent.name != "transformer" or file.suffix == ".safetensors"
        }
        model = "transformer/" if layout == "diffusers" else "model/"
        assert {re.sub("^model/", model, name) for name in found} == files
