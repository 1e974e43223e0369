"""Where the parts of a pipeline lie in a folder of weights.

                upstream's download           a pipeline of diffusers
CrossDiT        model/<file>.safetensors      transformer/
Qwen2.5-VL      text_encoder/                 text_encoder/, its tokenizer in tokenizer/
CLIP            text_encoder2/                text_encoder_2/, its tokenizer in tokenizer_2/
VAE             vae/, of images flux/vae/     vae/
Everything is checked as far as headers of files tell, before anything is read.
"""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kandinsky_model.checkpoint import (
    check_checkpoint,
    find_checkpoint,
    read_header,
    stored_config,
)
from kandinsky_model.config import CrossDiTConfig
from kandinsky_model.presets import PRESETS, Preset, Task

SOURCES = {
    "text encoder": "Qwen/Qwen2.5-VL-7B-Instruct",
    "second text encoder": "openai/clip-vit-large-patch14",
    "video VAE": "hunyuanvideo-community/HunyuanVideo, folder vae",
    "image VAE": "black-forest-labs/FLUX.1-dev, folder vae",
}


PIPELINES: dict[Task, str] = {
    "text-to-video": "Kandinsky5T2VPipeline",
    "image-to-video": "Kandinsky5I2VPipeline",
    "text-to-image": "Kandinsky5T2IPipeline",
    "image-to-image": "Kandinsky5I2IPipeline",
}

_REPOSITORY = re.compile(r"kandinsky-5\.0-(?P<task>[ti]2[vi])-(?P<size>lite|pro)(?P<rest>(-\w+)*)")
_CHUNK = 2**24  # bytes hashed at a time
_SAMPLE = 2**12  # bytes of a chunk that stand for it
_DIGITS = 16  # of a digest


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
        _check_preset(model, preset)
    except ValueError as error:
        problems.append(f"the model of the preset: {error}")
    if problems:
        raise ValueError(f"{folder} lacks weights of preset {preset.name!r}: {'; '.join(problems)}")
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


def fingerprint(parts: Parts) -> dict[str, str]:
    """What tells these weights from others: a digest of every file that is read, by its name.

    What an interrupted run still computes with, and all that is small, counts byte for byte. The
    text encoders are large and have done their work by then: of their tensors count names, shapes
    and dtypes, and of each the first 4 KiB of every 16 MiB.
    """
    texts = [parts.text_encoder, parts.tokenizer, parts.text_encoder_2, parts.tokenizer_2]
    small = [
        file for folder in texts for end in ("json", "txt") for file in folder.glob(f"*.{end}")
    ]
    whole = [parts.vae / "config.json", *parts.vae.glob("*.safetensors"), *small]
    found = {f"model/{file.name}": digest(file) for file in read_header(parts.model).parts}
    found |= {f"{file.parent.name}/{file.name}": digest(file) for file in sorted(set(whole))}
    for folder in (parts.text_encoder, parts.text_encoder_2):
        for file in sorted(folder.glob("*.safetensors")):
            found[f"{folder.name}/{file.name}"] = _digest_of_samples(file)
    return found


def digest(path: Path) -> str:
    """Of every byte: SHA-256, cut to 16 digits, of that of its chunks, read side by side."""
    with path.open("rb") as file, ThreadPoolExecutor() as pool:

        def chunk(start: int) -> bytes:
            return hashlib.sha256(os.pread(file.fileno(), _CHUNK, start)).digest()

        digests = pool.map(chunk, range(0, path.stat().st_size, _CHUNK))
        return hashlib.sha256(b"".join(digests)).hexdigest()[:_DIGITS]


def _digest_of_samples(path: Path) -> str:
    """Of the header of a safetensors file, and of the beginning of each chunk of each tensor."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size)
        found = hashlib.sha256(header)
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        for tensor in tensors.values():
            start, end = tensor["data_offsets"]
            for at in range(start, end, _CHUNK):
                found.update(os.pread(file.fileno(), min(_SAMPLE, end - at), 8 + size + at))
        return found.hexdigest()[:_DIGITS]


def _check_preset(model: Path, preset: Preset) -> None:
    """Raise an error if something beside the tensors says that they are of another preset.

    Shapes do not tell presets of one architecture apart. The name of upstream's file does, and has
    been looked for already. Of a pipeline of diffusers, model_index.json tells the task, the config
    the attention, and the folder the rest, as long as it is called as upstream calls it.
    """
    if not model.is_dir():
        return
    if (config := stored_config(model)) is not None:
        same = [preset, *(row for row in PRESETS.values() if row.file == preset.file)]
        if all(_attention(config) != _attention(row.model) for row in same):
            fitting = [
                row.name
                for row in PRESETS.values()
                if config.has_shapes_of(row.model) and _attention(config) == _attention(row.model)
            ]
            raise ValueError(
                f"the config in {model} is of top_p {config.top_p} and window {config.window}, and "
                f"the preset of {preset.model.top_p} and {preset.model.window}"
                + (f"; it looks like {', '.join(fitting)}" if fitting else "")
            )
    if model.name != "transformer":
        return
    index = model.parent / "model_index.json"
    found = _read_json(index).get("_class_name") if index.is_file() else PIPELINES[preset.task]
    if found != PIPELINES[preset.task]:
        tasks = [task for task, name in PIPELINES.items() if name == found]
        raise ValueError(
            f"{index} is of {found}{f' ({tasks[0]})' if tasks else ''}, and the preset is "
            f"{preset.task}"
        )
    for name in model.resolve().parent.parts:
        file = file_of(name)
        rows = [row.name for row in PRESETS.values() if row.file == file]
        if rows and file != preset.file:
            raise ValueError(f"{name} is by its name of preset {' or '.join(rows)}")


def file_of(repository: str) -> str | None:
    """What `Preset.file` is called in a repository of this name; None if it is none of upstream's.

    They are called Kandinsky-5.0-T2V-Lite-sft-5s, with -Diffusers behind it in that layout.
    """
    if (match := _REPOSITORY.search(repository.lower())) is None:
        return None
    rest = match["rest"].removesuffix("-diffusers").replace("-", "_")
    return f"kandinsky5{match['size']}_{match['task']}{rest}"


def _attention(config: CrossDiTConfig) -> tuple[float | None, tuple[int, int, int] | None]:
    return config.top_p, config.window


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__} is no object")
        return found
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _check_vae(folder: Path, *, is_video: bool) -> None:
    wanted = "AutoencoderKLHunyuanVideo" if is_video else "AutoencoderKL"
    found = _read_json(folder / "config.json").get("_class_name")
    if found != wanted:
        raise ValueError(f"{folder} holds a VAE of class {found}, where {wanted} is wanted")


def _check_tensors(folder: Path) -> None:
    """Raise an error if the safetensors of a folder are not there, or not whole."""
    files = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors; fetch the weights beside config.json")
    for file in files:
        read_header(file)
