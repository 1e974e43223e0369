"""Where the parts of a pipeline lie in a folder of weights.

                upstream's download           a pipeline of diffusers
CrossDiT        model/<file>.safetensors      transformer/
Qwen2.5-VL      text_encoder/                 text_encoder/, its tokenizer in tokenizer/
CLIP            text_encoder2/                text_encoder_2/, its tokenizer in tokenizer_2/
VAE             vae/, of images flux/vae/     vae/
Everything is checked as far as headers of files tell, before anything is read.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from kandinsky_model.checkpoint import check_checkpoint, find_checkpoint, read_header
from kandinsky_model.presets import Preset

SOURCES = {
    "text encoder": "Qwen/Qwen2.5-VL-7B-Instruct",
    "second text encoder": "openai/clip-vit-large-patch14",
    "video VAE": "hunyuanvideo-community/HunyuanVideo, folder vae",
    "image VAE": "black-forest-labs/FLUX.1-dev, folder vae",
}


@dataclass(frozen=True)
class Parts:
    """The folders of the parts, and the file or folder of the CrossDiT."""

    model: Path
    text_encoder: Path
    tokenizer: Path
    text_encoder_2: Path
    tokenizer_2: Path
    vae: Path


def find_parts(folder: str | Path, preset: Preset) -> Parts:
    """Find the parts; an error names all that is missing, broken or of another preset.

    Args:
        folder: See above; the two layouts may be mixed.
        preset: What is to be generated with them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"weights {folder} is no folder")
    problems: list[str] = []

    def find(what: str, names: tuple[str, ...], wanted: tuple[str, ...]) -> Path:
        for name in names:
            if all((folder / name / file).is_file() for file in wanted):
                return folder / name
        places = " or ".join(f"{name}/" for name in names)
        problems.append(f"{what} ({SOURCES[what]}) in {places}")
        return folder / names[0]

    config = ("config.json",)
    text_encoder = find("text encoder", ("text_encoder",), config)
    text_encoder_2 = find("second text encoder", ("text_encoder2", "text_encoder_2"), config)
    if preset.is_video:
        vae = find("video VAE", ("vae",), config)
    else:
        vae = find("image VAE", ("flux/vae", "vae"), config)
    try:
        model = find_checkpoint(folder, preset)
        check_checkpoint(model, preset.model)
    except ValueError as error:
        problems.append(f"the model of the preset: {error}")
    if problems:
        raise ValueError(
            f"weights of preset {preset.name!r} are missing in {folder}: {'; '.join(problems)}"
        )
    _check_vae(vae, is_video=preset.is_video)
    for part in (text_encoder, text_encoder_2, vae):
        _check_tensors(part)
    tokenizer, tokenizer_2 = folder / "tokenizer", folder / "tokenizer_2"
    return Parts(
        model=model,
        text_encoder=text_encoder,
        tokenizer=tokenizer if tokenizer.is_dir() else text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2 if tokenizer_2.is_dir() else text_encoder_2,
        vae=vae,
    )


def fingerprint(checkpoint: str | Path) -> list[list[str | int]]:
    """Name and size of the files of a checkpoint."""
    return [[part.name, part.stat().st_size] for part in read_header(checkpoint).parts]


def _check_vae(folder: Path, *, is_video: bool) -> None:
    wanted = "AutoencoderKLHunyuanVideo" if is_video else "AutoencoderKL"
    try:
        found = json.loads((folder / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if found != wanted:
        raise ValueError(f"{folder} holds a VAE of class {found}, where {wanted} is wanted")


def _check_tensors(folder: Path) -> None:
    """Raise an error if the safetensors of a folder are not there, or not whole."""
    files = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors; fetch the weights beside config.json")
    for file in files:
        read_header(file)
