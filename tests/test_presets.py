"""The table of presets against what is published about the checkpoints."""

from dataclasses import replace

import pytest

from kandinsky_model import ARCHITECTURES, PRESETS, CrossDiTConfig
from kandinsky_model.presets import preset


# Frames, height and width of the tokens, heads, head dim, layers; top_p of the published attention.
@pytest.mark.parametrize(
    ("name", "tokens", "heads", "head_dim", "layers", "top_p"),
    [
        ("video-lite-5s", 31 * 32 * 48, 28, 64, 32, None),
        ("video-lite-10s", 61 * 32 * 48, 28, 64, 32, 0.9),
        ("video-lite-10s-flash", 61 * 32 * 48, 28, 64, 32, 0.9),
        ("video-pro-5s", 31 * 32 * 48, 32, 128, 60, None),
        ("video-pro-10s", 61 * 32 * 48, 32, 128, 60, 0.9),
        ("video-pro-5s-hd", 31 * 48 * 80, 32, 128, 60, 0.8),
        ("video-pro-10s-hd", 61 * 48 * 80, 32, 128, 60, 0.7),
        ("image-video-pro-5s-hd", 31 * 48 * 80, 32, 128, 60, 0.8),
        ("text-to-image-lite", 64 * 64, 20, 128, 50, None),
        ("image-to-image-lite", 64 * 64, 20, 128, 50, None),
    ],
)
def test_workloads(name, tokens, heads, head_dim, layers, top_p):
    row = PRESETS[name]
    frames, height, width = row.latent_shape()
    assert frames * height * width // row.model.patch_volume == tokens
    assert row.model.head_dim == head_dim and row.model.model_dim == heads * head_dim
    assert row.model.num_visual_blocks == layers
    assert (row.model.top_p, row.model.window) == (top_p, top_p and (11, 3, 3))


def test_every_name_says_what_the_row_holds():
    for name, row in PRESETS.items():
        assert row.name == name
        assert row.is_video == row.task.endswith("video") == (row.seconds is not None)
        assert row.is_video == (f"-{row.seconds}s" in name)
        assert name.endswith("-hd") == (row.model.rope_scale == (1.0, 3.16, 3.16))
        assert ("pro" in name) == (row.model.model_dim == 4096) == ("5pro_" in row.file)
        letters = row.task.split("-")
        assert f"_{letters[0][0]}2{letters[2][0]}" in row.file
        for variant, part in (("pretrain", "pretrain"), ("nocfg", "nocfg"), ("flash", "distilled")):
            assert (variant in name) == (part in row.file)
    assert len({(row.file, row.model) for row in PRESETS.values()}) == len(PRESETS)


def test_model_calls():
    """Steps, twice with guidance: what the latencies of the checkpoints are published for."""
    calls = {
        name: row.num_steps * (1 if row.guidance_scale == 1.0 else 2)
        for name, row in PRESETS.items()
    }
    for name, count in calls.items():
        assert count == (50 if "nocfg" in name else 16 if "flash" in name else 100), name


def test_shifts():
    for name, row in PRESETS.items():
        if not row.is_video:
            assert row.shift == 3.0
        elif row.task == "image-to-video":
            assert row.shift == (5.0 if name.endswith("-hd") else 10.0)
        else:
            assert row.shift == row.seconds


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes_fill_blocks_and_stay_in_range_of_the_positions(name):
    row = PRESETS[name]
    assert row.size == row.sizes[0] and len(set(row.sizes)) == len(row.sizes)
    for size in row.sizes:
        assert all(pixels % 128 == 0 for pixels in size)
        assert all(
            pixels % multiple == 0 for pixels, multiple in zip(size, row.size_multiple, strict=True)
        )
        assert max(row.latent_shape(size)[1:]) // 2 <= 128
        turned = size[::-1]
        assert turned in row.sizes
    assert row.latent_shape() == row.latent_shape(row.size)


def test_frames():
    assert [PRESETS[f"video-lite-{s}s"].frames for s in (5, 10)] == [121, 241]
    assert [PRESETS[f"video-lite-{s}s"].latent_frames for s in (5, 10)] == [31, 61]
    image = PRESETS["text-to-image-lite"]
    assert (image.frames, image.latent_frames) == (1, 1)


def test_input_channels():
    channels = {name: row.model.input_dim for name, row in PRESETS.items()}
    assert channels.pop("text-to-image-lite") == 16
    assert set(channels.values()) == {33}, "latents, a condition, a mask"


def test_a_preset_of_a_small_model():
    small = CrossDiTConfig(
        model_dim=32, ff_dim=32, time_dim=16, num_text_blocks=1, num_visual_blocks=1,
        axes_dims=(8, 12, 12),
    )  # fmt: skip
    row = replace(PRESETS["video-lite-5s"], model=small, sizes=((64, 96),), seconds=1, num_steps=2)
    assert (row.frames, row.latent_shape()) == (25, (7, 8, 12))


def test_an_unknown_name_lists_the_known_ones():
    assert preset("video-lite-10s") is PRESETS["video-lite-10s"]
    with pytest.raises(ValueError, match="preset 'video-lite' is none of video-lite-5s, .*image"):
        preset("video-lite")


def test_architectures_are_told_apart_by_their_sizes():
    assert len(set(ARCHITECTURES.values())) == len(ARCHITECTURES)
