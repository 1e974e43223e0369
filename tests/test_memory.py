"""The memory plan against what is measured, and streaming against a model that is all there."""

import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import nabla
from kandinsky_model import PRESETS, CrossDiT, CrossDiTConfig, memory
from kandinsky_model.checkpoint import load_checkpoint, save_checkpoint
from kandinsky_model.memory import (
    GB,
    crossdit,
    first_frame_activations,
    image_vae,
    memory_plan,
    model_activations,
    streamed,
    video_vae,
)
from kandinsky_model.vae import VAE

CONFIG = CrossDiTConfig(
    model_dim=64, ff_dim=128, time_dim=16, num_text_blocks=2, num_visual_blocks=4,
    axes_dims=(8, 12, 12), in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8,
)  # fmt: skip


class Meter(TorchDispatchMode):
    """Counts the bytes of all tensors that live, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {id_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        outputs = func(*args, **kwargs or {})
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and id_of(tensor) not in inputs | self.known:
                storage, identity, size = (
                    tensor.untyped_storage(), id_of(tensor), tensor.untyped_storage().nbytes()
                )  # fmt: skip
                self.known.add(identity)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, identity, size)
        return outputs

    def free(self, identity: int, size: int) -> None:
        self.known.discard(identity)
        self.live -= size


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def random_inputs(config: CrossDiTConfig, shape, dtype=torch.float32) -> list[Tensor]:
    return [
        torch.randn(1, *shape, config.input_dim).to(dtype),
        torch.randn(1, 5, config.in_text_dim).to(dtype),
        torch.randn(1, config.in_text_dim2).to(dtype),
        torch.tensor([0.5]),
    ]


def measured(config: CrossDiTConfig, shape: tuple[int, int, int], attention=None) -> int:
    """Peak of a model call in bfloat16, beside the weights and the inputs."""
    model = CrossDiT(config).cast(torch.bfloat16).eval()
    inputs = random_inputs(config, shape, torch.bfloat16)
    with torch.no_grad(), Meter() as meter:
        model(*inputs, attention=attention)
    return meter.peak


# --- the plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [None, 0.9], ids=["dense", "nabla"])
def test_activations_of_a_small_model(top_p):
    config = replace(CONFIG, model_dim=256, ff_dim=512, top_p=top_p)
    shape = (4, 64, 64)
    with torch.no_grad(), FakeTensorMode():
        peak = measured(config, shape)
    assert 0.95 < peak / model_activations(config, 4 * 32 * 32) < 1.05


def test_activations_of_a_small_model_that_runs():
    """As above, with numbers in the tensors: what the fake run counts is what a real one takes."""
    config = replace(CONFIG, model_dim=256, ff_dim=512)
    with torch.no_grad(), FakeTensorMode():
        fake = measured(config, (2, 32, 32))
    assert measured(config, (2, 32, 32)) == pytest.approx(fake, rel=0.01)
    assert 0.9 < fake / model_activations(config, 2 * 16 * 16) < 1.05


@pytest.mark.parametrize("name", ["video-lite-10s", "video-pro-10s-hd", "text-to-image-lite"])
def test_activations_of_a_preset(name):
    """At the published size and width; the blocks are alike, so one of each will do."""
    preset = PRESETS[name]
    config = replace(preset.model, num_visual_blocks=1, num_text_blocks=1)
    with torch.no_grad(), FakeTensorMode():
        peak = measured(config, preset.latent_shape())
    planned = memory_plan(preset).phases[1].activations
    assert 0.95 < peak / planned <= 1.02


def test_selection_counts_where_blocks_are_many():
    """The pooled map grows with the square of the tokens: past a million it is what counts."""
    config = replace(CONFIG, model_dim=32, ff_dim=32, top_p=0.9, num_visual_blocks=1)
    tokens = 400 * 64 * 64

    def stage_by_stage(q, k, v, grid):
        """A backend may hold the whole map; from the fused op only the bits come out."""
        scores = nabla.pooled_scores(q, k, grid=grid)
        mask = nabla.select_blocks(scores, grid, top_p=config.top_p)
        return nabla.block_sparse_attention(q, k, v, mask)

    with torch.no_grad(), FakeTensorMode():
        fused = measured(config, (400, 128, 128))
        peak = measured(config, (400, 128, 128), stage_by_stage)
    assert fused < 0.5 * peak
    assert 0.85 < peak / model_activations(config, tokens) < 1.02


@pytest.mark.parametrize("name", ["video-lite-10s", "video-pro-5s", "text-to-image-lite"])
def test_weights_of_the_model(name):
    config = PRESETS[name].model
    with torch.device("meta"):
        model = CrossDiT(config).cast(torch.bfloat16)
    part = crossdit(config)
    assert part.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    largest = model.visual_transformer_blocks[0]
    blocks = [*model.text_transformer_blocks, *model.visual_transformer_blocks]
    rest = part.weights - sum(size_of(block) for block in blocks)
    assert part.streamed == rest + 2 * size_of(largest)


def size_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def test_the_weights_of_video_lite_are_those_of_the_public_file():
    assert crossdit(PRESETS["video-lite-10s"].model).weights == pytest.approx(4.57e9, abs=5e6)


def test_weights_of_the_text_encoders():
    """The public configs, without storage."""
    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": 3584,
    }  # fmt: skip
    with torch.device("meta"):
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
        qwen = Qwen2_5_VLForConditionalGeneration(config).bfloat16()
        clip = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
        )
    language = qwen.model.language_model
    assert memory.QWEN.weights == size_of(qwen)
    parts = sorted(map(size_of, (qwen.model.visual, language.embed_tokens, *language.layers)))
    assert memory.QWEN.streamed == sum(parts[-2:])
    assert memory.CLIP.weights == size_of(clip)


def test_activations_of_the_video_vae():
    """One tile and the frames around it; a whole video takes minutes even without numbers."""
    torch.set_default_dtype(torch.float16)
    try:
        with FakeTensorMode(), torch.no_grad():
            vae = AutoencoderKLHunyuanVideo()
            latents = torch.empty(1, 16, 5, 32, 32)
            with Meter() as meter:
                vae.decode(latents)
    finally:
        torch.set_default_dtype(torch.float32)
    phase = video_vae(17 * 256 * 256)
    assert phase.parts[0].weights == size_of(vae)
    assert 0.95 < meter.peak / phase.activations < 1.05


@pytest.mark.parametrize("size", [(512, 768), (768, 1280), (1536, 1536)])
def test_activations_of_a_first_frame(size):
    """It is encoded whole; a large one takes more than the tiles of the video."""
    torch.set_default_dtype(torch.float16)
    try:
        with FakeTensorMode(), torch.no_grad():
            vae = AutoencoderKLHunyuanVideo()
            frame = torch.empty(1, 3, 1, *size)
            torch.set_default_dtype(torch.float32)
            with Meter() as meter:
                vae.encode(frame)
    finally:
        torch.set_default_dtype(torch.float32)
    assert 0.95 < meter.peak / first_frame_activations(size[0] * size[1]) < 1.05


def test_a_first_frame_and_residuals_count():
    preset = PRESETS["image-video-lite-5s"]
    size = 1536, 1536
    of_text = memory_plan(PRESETS["video-lite-5s"], size, seconds=1).phases[2].activations
    of_image = memory_plan(preset, size, seconds=1).phases[2].activations
    assert of_image == first_frame_activations(size[0] * size[1]) > of_text
    plain, cached = memory_plan(preset), memory_plan(preset, residuals=2)
    more = cached.phases[1].activations - plain.phases[1].activations
    assert more == 3 * 2 * plain.tokens * preset.model.model_dim


@pytest.mark.parametrize("size", [(1024, 1024), (1536, 1536), (1024, 4096)])
def test_activations_of_the_image_vae(size):
    """Whole, and in tiles; the image is as our pipeline has it in the end."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(), torch.no_grad():
            model = AutoencoderKL(
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
                block_out_channels=[128, 256, 512, 512],
                layers_per_block=2, latent_channels=16,
                use_quant_conv=False, use_post_quant_conv=False,
            )  # fmt: skip
            latents = torch.empty(1, 1, size[0] // 8, size[1] // 8, 16)
            autoencoder = VAE(model)
            with Meter() as meter:
                autoencoder.decode(latents)
    finally:
        torch.set_default_dtype(torch.float32)
    phase = image_vae(*size)
    assert phase.parts[0].weights == size_of(model)
    assert 0.95 < meter.peak / phase.activations < 1.05


def test_a_large_image_takes_little_more_than_a_tile():
    preset = PRESETS["text-to-image-lite"]
    vae = memory_plan(preset, (4096, 4096)).phases[2]
    assert vae.activations < 1.2 * memory_plan(preset, (1024, 1024)).phases[2].activations


@pytest.mark.parametrize("name", PRESETS)
def test_lite_runs_in_12_gb_and_pro_in_80(name):
    preset = PRESETS[name]
    device_memory = (80 if "pro" in name else 12) * GB
    for size in preset.sizes:
        plan = memory_plan(preset, size, device_memory=device_memory)
        assert plan.fits, plan.describe()
        plan.check()
        assert plan.peaks["stream"] <= plan.peaks["offload"] <= plan.peaks["resident"]
        assert plan.mode == ("stream" if not preset.is_video else plan.mode)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("video-pro-5s", 47), ("video-pro-10s", 51),
        ("video-pro-5s-hd", 53), ("video-pro-10s-hd", 68),
    ],
)  # fmt: skip
def test_offloading_takes_what_is_published_for_upstream(name, published):
    """Table 5 of the technical report: GB of GPU memory with offloading."""
    assert memory_plan(PRESETS[name]).peaks["offload"] / GB == pytest.approx(published, rel=0.1)


def test_a_plan_grows_with_size_and_seconds():
    preset = PRESETS["video-lite-5s"]
    plan = memory_plan(preset)
    assert (plan.size, plan.frames, plan.tokens) == ((512, 768), 121, 47_616)
    longer = memory_plan(preset, seconds=10)
    assert (longer.frames, longer.tokens) == (241, 93_696)
    assert longer.phases == memory_plan(replace(preset, seconds=10)).phases
    assert memory_plan(preset, seconds=0.5).frames == 13
    larger = memory_plan(preset, (720, 1280))
    assert larger.tokens == 31 * 45 * 80
    for mode, peak in plan.peaks.items():
        assert peak < longer.peaks[mode] and peak < larger.peaks[mode]


def test_the_fastest_mode_that_fits_is_taken():
    preset = PRESETS["video-lite-10s"]
    peaks = memory_plan(preset).peaks
    assert memory_plan(preset).mode == "resident", "nobody said how much there is"
    for mode, peak in peaks.items():
        assert memory_plan(preset, device_memory=peak).mode == mode
    short = memory_plan(preset, device_memory=peaks["stream"] - 1)
    assert not short.fits and short.mode is None
    with pytest.raises(
        ValueError,
        match=r"video-lite-10s at 512x768 with 241 frames needs 5\.\d\d GB .* there are 5\.\d\d GB",
    ):
        short.check()


def test_a_plan_in_words():
    preset = PRESETS["video-lite-10s"]
    text = memory_plan(preset, device_memory=12 * GB).describe()
    assert text.startswith("video-lite-10s: 241 frames of 512x768, 93,696 tokens")
    lines = text.splitlines()
    assert [line.split()[0] for line in lines if "<- fits" in line] == ["offload"]
    assert "there are" in text and "12.00 GB" in text
    for part in ("Qwen2.5-VL-7B", "CLIP", "CrossDiT", "VAE"):
        assert any(line.startswith(part) or part in line for line in lines), part
    assert "too little" in memory_plan(preset, device_memory=GB).describe()
    assert "fits" not in memory_plan(preset).describe()
    assert "1 image of 1024x1024" in memory_plan(PRESETS["text-to-image-lite"]).describe()


@pytest.mark.parametrize(
    ("size", "seconds", "device_memory"), [((8, 8), None, None), (None, None, 0)]
)
def test_a_plan_of_nothing(size, seconds, device_memory):
    with pytest.raises(ValueError, match="must be positive"):
        memory_plan(PRESETS["text-to-image-lite"], size, seconds, device_memory)


# --- streaming ---------------------------------------------------------------------------------


@pytest.fixture
def model() -> CrossDiT:
    torch.manual_seed(0)
    model = CrossDiT(CONFIG).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("top_p", [None, 0.5], ids=["dense", "nabla"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_model_gives_the_same_bits(model, dtype, top_p):
    model.config = replace(CONFIG, top_p=top_p)
    model.cast(dtype)
    inputs = random_inputs(CONFIG, (2, 20, 36), dtype)
    with torch.no_grad():
        expected = model(*inputs)
        with streamed(model, "cpu"):
            actual = [model(*inputs) for _ in range(3)]
        after = model(*inputs)
    assert all(torch.equal(x, expected) for x in [*actual, after])


def test_a_streamed_file_gives_the_same_bits(tmp_path, model):
    save_checkpoint(model, tmp_path / "model.safetensors", dtype=torch.bfloat16)
    first, second = (load_checkpoint(tmp_path / "model.safetensors") for _ in range(2))
    for parameter in first.parameters():  # where a file puts a tensor can change the last bit
        parameter.data = parameter.data.clone()
    inputs = random_inputs(CONFIG, (2, 20, 36), torch.bfloat16)
    with torch.no_grad(), streamed(second, "cpu"):
        assert torch.equal(second(*inputs), first(*inputs))


def test_at_most_two_blocks_are_there(model):
    largest = size_of(model.visual_transformer_blocks[0])
    blocks = sum(map(size_of, [*model.text_transformer_blocks, *model.visual_transformer_blocks]))
    rest = size_of(model) - blocks
    inputs = random_inputs(CONFIG, (1, 2, 2))
    with torch.no_grad():
        with Meter() as alone:
            model(*inputs)
        with Meter() as meter, streamed(model, "cpu"):
            entered = meter.live
            for _ in range(2):
                model(*inputs)
    assert entered == rest, "blocks come when they are needed"
    assert rest + 2 * largest <= meter.peak <= rest + 2 * largest + alone.peak
    assert meter.peak < size_of(model), "with six blocks, streaming saves memory"


def test_each_block_comes_once_and_before_it_is_called(model, monkeypatch):
    events = []
    blocks = [*model.text_transformer_blocks, *model.visual_transformer_blocks]
    fetch = memory._Stream.fetch
    monkeypatch.setattr(
        memory._Stream,
        "fetch",
        lambda self, index: events.append(f"fetch {index}") or fetch(self, index),
    )
    for index, block in enumerate(blocks):
        block.feed_forward.register_forward_hook(
            lambda *_, index=index: events.append(f"run {index}")
        )
    inputs = random_inputs(CONFIG, (1, 2, 2))
    with torch.no_grad(), streamed(model, "cpu"):
        for _ in range(2):
            model(*inputs)
    order = [0, 1, 2, 3, 4, 5] * 2
    wanted = ["fetch 0"]
    for index in order:
        wanted += [f"run {index}", f"fetch {(index + 1) % 6}"]
    assert events == wanted, "on CUDA, to run a block is to ask for it: the next comes meanwhile"


def test_weights_go_back_where_they_were(model):
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    inputs = random_inputs(CONFIG, (1, 4, 4))

    def everything_is_back() -> bool:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        return not any(hooks) and before == {n: p.data_ptr() for n, p in model.named_parameters()}

    with torch.no_grad(), streamed(model, "cpu"):
        assert not everything_is_back()
        model(*inputs)
    assert everything_is_back()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.visual_transformer_blocks[2].feed_forward.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), streamed(model, "cpu"):
        model(*inputs)
    handle.remove()
    assert everything_is_back()


def test_blocks_out_of_their_order():
    """A block may be left out, or called twice."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = layers[3](layers[0](layers[2](layers[2](x))))
        with streamed(layers, "cpu", list(layers)):
            assert torch.equal(layers[3](layers[0](layers[2](layers[2](x)))), expected)


def test_without_blocks_all_of_a_module_visits(model):
    before = model.out_layer.out_layer.weight.data_ptr()
    inputs = random_inputs(CONFIG, (1, 4, 4))
    with torch.no_grad():
        expected = model(*inputs)
        with Meter() as meter, streamed(model, "cpu", []):
            assert meter.live == size_of(model)
            assert model.out_layer.out_layer.weight.data_ptr() != before
            assert torch.equal(model(*inputs), expected)
    assert model.out_layer.out_layer.weight.data_ptr() == before


def test_buffers_visit_too():
    norm = nn.BatchNorm1d(4).eval()
    home = norm.running_mean.data_ptr()
    with streamed(norm, "cpu", []):
        assert norm.running_mean.data_ptr() != home
    assert norm.running_mean.data_ptr() == home


def test_blocks_of_another_module_have_to_be_named():
    with (
        pytest.raises(ValueError, match="blocks of a Linear are not known; pass them"),
        streamed(nn.Linear(2, 2), "cpu"),
    ):
        pass
