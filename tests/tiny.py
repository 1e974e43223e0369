"""Kandinsky 5 at the smallest size: random weights, tokenizers of single bytes, nothing fetched."""

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from torch import nn
from transformers import (
    AddedToken,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from kandinsky_model import CrossDiT, CrossDiTConfig, Preset
from kandinsky_model.checkpoint import save_checkpoint
from kandinsky_model.folder import PIPELINES
from kandinsky_model.text import IMAGE_TOKEN, TEMPLATES, TextEncoder
from kandinsky_model.vae import VAE

CONFIG = CrossDiTConfig(
    model_dim=64, ff_dim=64, time_dim=32, num_text_blocks=1, num_visual_blocks=2,
    axes_dims=(8, 12, 12), in_visual_dim=4, out_visual_dim=4, in_text_dim=32, in_text_dim2=24,
    rope_scale=(1.0, 3.16, 3.16),
)  # fmt: skip
# As Qwen2.5's vocabulary does, written as byte-level BPE writes them: \u0120 is a space.
SPLIT_IN_TWO = [
    ("\u0120prom", "t"), ("\u0120dynam", "ism"), ("\u0120scre", "n"), ("\u0120post", "processing"),
]  # fmt: skip
RATIOS = tuple(1.0 + 0.01 * (-1) ** (i // 2) for i in range(2 * 9))  # of MagCache


def preset(task="text-to-video", *, sizes=((64, 96),), **changes) -> Preset:
    """A preset of tiny size, in the manner of the published ones."""
    is_video = task.endswith("video")
    model = replace(CONFIG, visual_cond=task != "text-to-image")
    if not is_video:
        model = replace(model, rope_scale=(1.0, 1.0, 1.0))
    values = {
        "name": f"tiny-{task}", "task": task, "model": model, "sizes": sizes,
        "seconds": 1 if is_video else None, "num_steps": 4, "guidance_scale": 5.0, "shift": 5.0,
        "file": f"kandinsky5tiny_{task}",
    }  # fmt: skip
    return Preset(**values | changes)


def randomized(module: nn.Module, seed: int) -> nn.Module:
    """The module with every parameter random, those that start as zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(scale * noise + (parameter.ndim == 1))
    return module.eval()


def cross_dit(config: CrossDiTConfig, seed: int = 0) -> CrossDiT:
    """A model whose every parameter is random."""
    torch.manual_seed(seed)
    model = CrossDiT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3))
    return model


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the templates but for those that Qwen2.5's own vocabulary splits in two;
    of other words, one token a byte."""
    words = {
        word
        for templates in TEMPLATES.values()
        for template in templates.values()
        for word, _ in _split().pre_tokenize_str(re.sub(r"<\|\w+\|>", "", template.text))
    }
    merges = []
    for halves in SPLIT_IN_TWO:
        words.discard("".join(halves))
        for half in halves:
            merges += [(half[:i], half[i]) for i in range(1, len(half))]
    merges = list(dict.fromkeys(merges))
    alphabet = sorted(ByteLevel.alphabet())
    tokens = dict.fromkeys([*alphabet, *("".join(pair) for pair in merges), *sorted(words)])
    model = BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = _split(), ByteLevelDecoder()
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", IMAGE_TOKEN]
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>")
    wrapped.add_tokens([AddedToken(token, special=True) for token in special])
    return wrapped


def _split() -> Sequence:
    return Sequence([
        Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
        ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


def clip_tokenizer() -> CLIPTokenizer:
    """One token a byte."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(f"{c}</w>" for c in alphabet)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def image_processor() -> Qwen2VLImageProcessorPil:
    """Patches of 4 pixels, 2 x 2 of which make a token."""
    return Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=4096
    )


def qwen() -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL of two layers."""
    tokenizer = qwen_tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": CONFIG.in_text_dim, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096,
            "bos_token_id": None, "eos_token_id": None,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3],
            },
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
            "out_hidden_size": CONFIG.in_text_dim, "patch_size": 4, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [0],
        },
        image_token_id=ids(IMAGE_TOKEN), vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    torch.manual_seed(1)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def clip() -> CLIPTextModel:
    """CLIP's text model of one layer."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=CONFIG.in_text_dim2, intermediate_size=24,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=77,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(2)
    return CLIPTextModel(config).eval()


def video_vae() -> AutoencoderKLHunyuanVideo:
    """HunyuanVideo's VAE with 8 channels."""
    torch.manual_seed(3)
    return AutoencoderKLHunyuanVideo(
        latent_channels=CONFIG.in_visual_dim, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        norm_num_groups=4, mid_block_add_attention=False,
    ).eval()  # fmt: skip


def image_vae() -> AutoencoderKL:
    """FLUX's VAE with 8 channels, its shift included."""
    torch.manual_seed(4)
    return AutoencoderKL(
        latent_channels=CONFIG.in_visual_dim, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()  # fmt: skip


def text_encoder(variant="original", *, images=False) -> TextEncoder:
    """Both text encoders."""
    return TextEncoder(
        qwen(), qwen_tokenizer(), clip(), clip_tokenizer(), variant=variant,
        image_processor=image_processor() if images else None,
    )  # fmt: skip


def vae(row: Preset) -> VAE:
    """The VAE that a preset takes."""
    return VAE(video_vae() if row.is_video else image_vae())


def write_weights(folder: Path, row: Preset, *, layout="original") -> Path:
    """All that `nabla generate` reads for a preset, in one of the two layouts."""
    is_ours = layout == "original"
    qwen().save_pretrained(folder / "text_encoder")
    clip().save_pretrained(folder / ("text_encoder2" if is_ours else "text_encoder_2"))
    tokenizer = folder / ("text_encoder" if is_ours else "tokenizer")
    qwen_tokenizer().save_pretrained(tokenizer)
    image_processor().save_pretrained(tokenizer)
    clip_tokenizer().save_pretrained(folder / ("text_encoder2" if is_ours else "tokenizer_2"))
    place = "vae" if row.is_video or not is_ours else "flux/vae"
    (video_vae() if row.is_video else image_vae()).save_pretrained(folder / place)
    model = cross_dit(row.model)
    if is_ours:
        save_checkpoint(model, folder / "model" / f"{row.file}.safetensors")
        (folder / "model" / f"{row.file}.json").unlink()  # as published
    else:
        save_checkpoint(model, folder / "transformer", layout="diffusers")
        (folder / "model_index.json").write_text(json.dumps({"_class_name": PIPELINES[row.task]}))
    return folder
