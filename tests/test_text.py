"""The text encoders: templates, crops, truncation, and strict reading."""

import logging
import shutil
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from kandinsky_model.memory import streamed
from kandinsky_model.presets import PRESETS
from kandinsky_model.text import (
    CONTENT,
    IMAGE_TOKEN,
    NEGATIVE_PROMPTS,
    TEMPLATES,
    TextEncoder,
)

PROMPT = "a cat in a hat"


@pytest.fixture(scope="module")
def encoder():
    return tiny.text_encoder(images=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_weights(tmp_path_factory.mktemp("weights"), tiny.preset())


def load(folder, **options):
    return TextEncoder.load(
        folder / "text_encoder", folder / "text_encoder", folder / "text_encoder2",
        folder / "text_encoder2", **options,
    )  # fmt: skip


def check(folder, **options):
    TextEncoder.check(
        folder / "text_encoder", folder / "text_encoder", folder / "text_encoder2",
        folder / "text_encoder2", tiny.CONFIG, **options,
    )  # fmt: skip


# --- templates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", TEMPLATES)
@pytest.mark.parametrize("content", ["video", "image", "image-edit"])
def test_crops_begin_with_the_prompt(variant, content):
    template = TEMPLATES[variant][content]
    assert template.text.count("{}") == 1
    before = tiny.qwen_tokenizer()(template.text.split("{}")[0])["input_ids"]
    dropped = {"original": 3, "diffusers": 5}[variant] if content == "image-edit" else 0
    assert template.crop == len(before) + dropped


def test_every_task_has_its_templates():
    assert {row.task for row in PRESETS.values()} == set(CONTENT)
    assert NEGATIVE_PROMPTS["image"] == NEGATIVE_PROMPTS["image-edit"] == ""
    assert NEGATIVE_PROMPTS["video"].startswith("Static, 2D cartoon")


@pytest.mark.parametrize("content", ["video", "image"])
def test_features_are_those_of_the_padded_text_upstream_encodes(encoder, content):
    """Upstream pads to crop + max_tokens, reads the last hidden states, and masks the padding."""
    template = TEMPLATES["original"][content]
    inputs = encoder.tokenizer(
        template.text.replace("{}", PROMPT), return_tensors="pt", padding="max_length",
        max_length=template.crop + template.max_tokens, truncation=True,
    )  # fmt: skip
    with torch.no_grad():
        states = tiny.qwen()(inputs["input_ids"], output_hidden_states=True).hidden_states[-1]
        pooled = encoder.clip(
            **encoder.clip_tokenizer([PROMPT], padding="max_length", max_length=77,
                                     return_tensors="pt")
        ).pooler_output  # fmt: skip
    kept = inputs["attention_mask"][0, template.crop :].bool()
    expected = states[:, template.crop :][:, kept]
    text, actual_pooled = encoder(PROMPT, content)
    assert text.shape[1] < template.max_tokens
    torch.testing.assert_close(text, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual_pooled, pooled, rtol=0, atol=1e-6)


def test_a_long_prompt_is_cut_off_with_a_warning(encoder, caplog):
    with caplog.at_level(logging.WARNING):
        text, pooled = encoder("cat " * 300 + "dog", "video")
    assert text.shape == (1, 256, tiny.CONFIG.in_text_dim)
    assert pooled.shape == (1, tiny.CONFIG.in_text_dim2)
    assert "too long" in caplog.text and "dog" in caplog.text


def test_the_empty_prompt_has_features(encoder):
    text, pooled = encoder("", "image")
    assert text.shape[1] == 1, "the token that ends the turn"
    assert torch.isfinite(text).all() and torch.isfinite(pooled).all()


def test_braces_and_entities():
    original, other = tiny.text_encoder(), tiny.text_encoder("diffusers")
    with torch.no_grad():
        assert original("{} {0} {x}", "image")[0].shape[1] > 3
        for a, b in zip(other(" a &amp;  b ", "image"), other("a & b", "image"), strict=True):
            assert torch.equal(a, b)
        assert original(" a  b ", "image")[0].shape != original("a b", "image")[0].shape
    with pytest.raises(ValueError, match="variant 'upstream'"):
        tiny.text_encoder("upstream")


def test_an_edit_sees_the_image(encoder):
    red, blue = (torch.zeros(32, 48, 3, dtype=torch.uint8) for _ in range(2))
    red[..., 0], blue[..., 2] = 255, 255
    text, pooled = encoder(PROMPT, "image-edit", red)
    other, same_pooled = encoder(PROMPT, "image-edit", blue)
    assert torch.equal(pooled, same_pooled) and not torch.allclose(text, other)
    tokens = (32 // 2) * (48 // 2) // 8**2  # half the size, 8 pixels a token
    more, _ = encoder(PROMPT, "image-edit", torch.zeros(64, 96, 3, dtype=torch.uint8))
    assert more.shape[1] - text.shape[1] == 3 * tokens
    with pytest.raises(ValueError, match="needs an image"):
        encoder(PROMPT, "image-edit")


@pytest.mark.parametrize("variant", TEMPLATES)
def test_a_long_prompt_of_an_edit_leaves_the_image_whole(variant, caplog):
    """It is as if the prompt had ended where it is cut; upstream cuts no prompt of this length."""
    encoder, image = tiny.text_encoder(variant, images=True), torch.zeros(64, 96, 3).byte()
    template, seen = TEMPLATES[variant]["image-edit"], []
    encoder.qwen.register_forward_pre_hook(
        lambda module, args, options: seen.append((args[0], options)), with_kwargs=True
    )
    dropped = {"original": 3, "diffusers": 5}[variant]  # of the prompt, a token a letter
    fits = "a" * (template.max_tokens + dropped)
    for prompt in (fits, fits + "b" * 50, "a"):
        encoder(prompt, "image-edit", image)
    (whole, options), (cut, _), (short, _) = seen
    assert torch.equal(whole, cut) and "too long" in caplog.text and "b" * 50 in caplog.text
    image_tokens = (64 // 2) * (96 // 2) // 8**2
    assert (cut == encoder.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).sum() == image_tokens
    assert torch.equal(cut[0, -image_tokens - 3 :], short[0, -image_tokens - 3 :])
    assert options["mm_token_type_ids"].shape == whole.shape
    assert whole.shape[1] == template.crop + template.max_tokens + image_tokens + 3


# --- reading -----------------------------------------------------------------------------------


def test_reads_what_was_written(encoder, folder):
    read = load(folder, images=True)
    for content, image in (("video", None), ("image-edit", torch.ones(32, 32, 3).byte())):
        for a, b in zip(read(PROMPT, content, image), encoder(PROMPT, content, image), strict=True):
            assert torch.equal(a, b)


def test_layers_that_visit_the_device_give_the_same(encoder, folder):
    read, image = load(folder, images=True), torch.ones(32, 32, 3).byte()
    homes = {name: value.data_ptr() for name, value in read.state_dict().items()}
    for content, source in (("video", None), ("image-edit", image)):
        expected = encoder(PROMPT, content, source)
        with streamed(read, "cpu", read.blocks) as visitor:
            for a, b in zip(visitor(PROMPT, content, source), expected, strict=True):
                assert torch.equal(a, b)
    assert {name: value.data_ptr() for name, value in read.state_dict().items()} == homes


def test_takes_the_text_half_of_a_whole_clip(encoder, folder, tmp_path):
    config = CLIPConfig(
        text_config=encoder.clip.config.to_dict(),
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            image_size=32, patch_size=16,
        ).to_dict(),
        projection_dim=24,
    )  # fmt: skip
    whole = CLIPModel(config)
    whole.text_model.load_state_dict(encoder.clip.state_dict())
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    whole.save_pretrained(tmp_path / "text_encoder2")
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    spoil(tmp_path / "text_encoder2" / "model.safetensors", lambda t: t.update(positions))
    check(tmp_path, images=True)
    assert torch.equal(load(tmp_path)(PROMPT, "video")[1], encoder(PROMPT, "video")[1])


def spoil(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.language_model.norm.weight", None) or t.pop("model.norm.weight"),
         "missing keys.*norm.weight"),
        (lambda t: t.update(foreign=torch.ones(2)), "unexpected keys: foreign"),
        (lambda t: t.update({n: torch.ones(3) for n in t if n.endswith(".norm.weight")}),
         "cannot be read|other shapes: .* instead of"),
    ],
    ids=["missing", "unexpected", "reshaped"],
)  # fmt: skip
def test_other_tensors_are_refused(folder, tmp_path, change, words):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path / "text_encoder" / "model.safetensors", change)
    for read in (load, check):  # which reads no numbers
        with pytest.raises(ValueError, match=words):
            read(tmp_path)


def test_no_folder_and_no_library(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="cannot be read as Qwen2_5_VL"):
        load(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'nabla-attention\[generate\]'"):
        load(folder)
