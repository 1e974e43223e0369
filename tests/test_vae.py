"""The autoencoders against diffusers' own calls: scaling, layout, tiles."""

import shutil

import pytest
import tiny
import torch

from kandinsky_model import vae as module
from kandinsky_model.vae import VAE


def frames(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)


def generator():
    return torch.Generator().manual_seed(9)


@pytest.mark.parametrize("length", [1, 5])
def test_video_encoding(length):
    model, pixels = tiny.video_vae(), frames(length, 32, 48)
    actual = VAE(model).encode(pixels, generator=generator())
    x = (pixels / 127.5 - 1).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        z = tiny.video_vae().encode(x).latent_dist.sample(generator=generator())
    assert actual.shape == (1, (length - 1) // 4 + 1, 4, 6, 4)
    expected = 0.476986 * z.permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert model.config.scaling_factor == 0.476986


def test_image_encoding_and_decoding_leave_the_shift_out():
    model, pixels = tiny.image_vae(), frames(1, 32, 48)
    autoencoder, scale = VAE(model), model.config.scaling_factor
    latents = autoencoder.encode(pixels, generator=generator())
    x = (pixels / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        z = model.encode(x).latent_dist.sample(generator=generator())
        y = model.decode(z).sample
    torch.testing.assert_close(latents[:, 0].permute(0, 3, 1, 2), scale * z, rtol=0, atol=1e-6)
    decoded = autoencoder.decode(latents)
    assert decoded.shape == (1, 32, 48, 3) and decoded.dtype == torch.uint8
    expected = ((y[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0)
    assert (decoded[0].float() - expected).abs().max() < 1.0, "cut to whole numbers, not rounded"
    assert (decoded[0].float() <= expected + 1e-3).all()


@pytest.mark.parametrize(
    ("shape", "tiles"),
    [((1, 4, 6), 1), ((4, 4, 32), 1), ((5, 8, 8), 3), ((2, 33, 4), 2), ((5, 4, 33), 6)],
)
def test_tiles(shape, tiles, monkeypatch):
    """What tqdm counts is what the decoder is called for, and tiles are those of diffusers."""
    model = tiny.video_vae()
    autoencoder, calls = VAE(model), []
    model.decoder.register_forward_hook(lambda *_: calls.append(1))
    bars = []
    monkeypatch.setattr(module, "tqdm", lambda **options: bars.append(Bar(**options)) or bars[-1])
    latents = torch.randn(1, *shape, 4)
    decoded = autoencoder.decode(latents, progress="decoding")
    assert decoded.shape == (4 * shape[0] - 3, 8 * shape[1], 8 * shape[2], 3)
    assert len(calls) == bars[0].n == bars[0].total == tiles
    other = tiny.video_vae()
    other.enable_tiling(tile_sample_min_num_frames=16, tile_sample_stride_num_frames=8)
    with torch.no_grad():
        y = other.decode((latents / 0.476986).permute(0, 4, 1, 2, 3)).sample
    expected = ((y[0].clamp(-1, 1) + 1) * 127.5).to(torch.uint8).permute(1, 2, 3, 0)
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize(
    ("size", "tiles"), [((1408, 16), 1), ((16, 1424), 2), ((1600, 32), 3), ((1424, 784), 4)]
)
def test_large_images_go_tile_by_tile(size, tiles, monkeypatch):
    """Both ways, as diffusers cuts them; up to the longest published side they are whole."""
    model, pixels = tiny.image_vae(), frames(1, *size)
    autoencoder, calls, bars = VAE(model), [], []
    model.encoder.register_forward_hook(lambda *_: calls.append("encode"))
    model.decoder.register_forward_hook(lambda *_: calls.append("decode"))
    monkeypatch.setattr(module, "tqdm", lambda **options: bars.append(Bar(**options)) or bars[-1])
    latents = autoencoder.encode(pixels, generator=generator())
    decoded = autoencoder.decode(latents, progress="decoding")
    assert calls == ["encode"] * tiles + ["decode"] * tiles
    assert bars[0].n == bars[0].total == tiles
    other = tiny.image_vae()
    other.use_tiling = tiles > 1
    other.tile_sample_min_size, other.tile_latent_min_size = 1024, 128  # what FLUX's config says
    with torch.no_grad():
        x = (pixels / 127.5 - 1).permute(3, 0, 1, 2)[None, :, 0]  # strides decide on roundings
        z = other.encode(x).latent_dist.sample(generator=generator())
        scale = other.config.scaling_factor
        y = other.decode(latents.permute(0, 4, 1, 2, 3)[:, :, 0] / scale).sample
    actual = latents[:, 0].permute(0, 3, 1, 2)
    torch.testing.assert_close(actual, scale * z, rtol=0, atol=1e-6)
    assert torch.equal(decoded, ((y.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1))


class Bar:
    """A progress bar that nobody sees."""

    def __init__(self, total, desc, disable):
        self.total, self.n = total, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self):
        self.n += 1
        return True


@pytest.mark.parametrize("factor", [None, 0, float("nan"), "0.4"])
def test_a_scale_that_is_none(factor):
    model = tiny.video_vae()
    model.register_to_config(scaling_factor=factor)
    with pytest.raises(ValueError, match=f"scaling_factor {factor!r} of this VAE must be a posit"):
        VAE(model).check(tiny.CONFIG)


def test_reading(tmp_path):
    tiny.video_vae().save_pretrained(tmp_path / "video")
    tiny.image_vae().save_pretrained(tmp_path / "image")
    for kind, is_video in (("video", True), ("image", False)):
        read = VAE.load(tmp_path / kind, is_video=is_video, dtype=torch.bfloat16)
        assert read.model.dtype == torch.bfloat16 and read.is_video == is_video
        latents = read.encode(frames(1, 32, 32), generator=generator())
        assert read.decode(latents).shape == (1, 32, 32, 3)
        with pytest.raises(ValueError, match=f"{kind} (is no|cannot be read as) AutoencoderKL"):
            VAE.load(tmp_path / kind, is_video=not is_video, dtype=torch.float32)
    shutil.rmtree(tmp_path / "video")
    with pytest.raises(ValueError, match="video cannot be read as AutoencoderKLHunyuanVideo"):
        VAE.load(tmp_path / "video", is_video=True, dtype=torch.float32)
