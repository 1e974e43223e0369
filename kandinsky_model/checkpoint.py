"""Checkpoints: safetensors, never pickle. Keys are those of the public Kandinsky 5 checkpoints.

original     model/<name>.safetensors; our config, if any, in <name>.json beside it
diffusers    transformer/diffusion_pytorch_model.safetensors, config in config.json
sharded      either, in parts that <name>.safetensors.index.json lists
Tensors keep the dtype they are stored in (usually bfloat16), all but the modulations and time
embeddings, which are float32. On a CPU they are the file itself, memory-mapped; to another device
they go one by one. All is checked against the headers of the files before a tensor is read.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kandinsky_model.config import ARCHITECTURES, CrossDiTConfig
from kandinsky_model.files import replacing
from kandinsky_model.model import CrossDiT, is_float32
from kandinsky_model.presets import PRESETS, Preset

Layout = Literal["original", "diffusers"]

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"
DIFFUSERS_STEM = "diffusion_pytorch_model"

DTYPES = ("F64", "F32", "F16", "BF16")  # all others are quantized
_SHOWN = 5


def load_checkpoint(
    path: str | Path,
    *,
    config: CrossDiTConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> CrossDiT:
    """Read a model.

    Args:
        path: A file, .safetensors or .safetensors.index.json, or a folder with one of them.
        config: Usually `PRESETS[...].model`. None takes the config beside the tensors. A public
            file has none: its shapes tell the architecture, its name attention and rope scale.
        dtype: Dtype of all but the tensors that stay float32; None keeps what is stored.
        device: Where the tensors go.

    Returns:
        The model in eval mode.

    Raises:
        ValueError: The file is absent, broken, of another kind or of another architecture.
    """
    header = read_header(path)
    model = _fitting_model(header, config or _config(header))
    tensors: dict[str, Tensor] = {}
    for part in header.parts:
        with _opened(part, device) as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                kept = torch.float32 if is_float32(name) else dtype or tensor.dtype
                tensors[name] = tensor.to(kept)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def check_checkpoint(path: str | Path, config: CrossDiTConfig) -> None:
    """Raise the ValueError that `load_checkpoint` would raise; reads nothing but headers."""
    _fitting_model(read_header(path), config)


def stored_config(path: str | Path) -> CrossDiTConfig | None:
    """The config that lies beside the tensors of a checkpoint, or None."""
    found = _beside(read_header(path))
    return None if found is None else found[0]


def find_checkpoint(weights: str | Path, preset: Preset) -> Path:
    """Where the model of a preset is.

    Args:
        weights: What `load_checkpoint` takes, or a folder that holds model/<file>.safetensors,
            <file>.safetensors or transformer/, where <file> is the preset's.
        preset: What is looked for.

    Returns:
        A path for `load_checkpoint`.
    """
    weights = Path(weights)
    if not weights.is_dir():
        return weights
    files = [folder / f"{preset.file}{end}" for folder in (weights / "model", weights)
             for end in (SUFFIX, INDEX)]  # fmt: skip
    for path in [*files, weights / "transformer"]:
        if path.exists():
            return path
    public = {row.file for row in PRESETS.values()}
    found = [_stem(entry) for folder in (weights, weights / "model") for entry in _entries(folder)]
    if _entries(weights) and not public.intersection(found):
        return weights
    raise ValueError(
        f"{weights} has no weights for preset {preset.name!r}: put {preset.file}{SUFFIX} into it "
        f"or into {weights / 'model'}, or a model of diffusers into {weights / 'transformer'}"
        + (f". It has {_some(found)}" if found else "")
    )


def save_checkpoint(
    model: CrossDiT,
    path: str | Path,
    *,
    layout: Layout = "original",
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
) -> None:
    """Write a model and its config. Old files stay until all new ones are whole.

    Args:
        model: The model to store.
        path: A name ending in .safetensors; in the layout of diffusers a folder.
        layout: How the files are called.
        dtype: Stored dtype of all but the tensors that stay float32; None keeps the model's.
        max_shard_size: Bytes of tensors in one file; None writes one file.
    """
    path = Path(path)
    if layout not in get_args(Layout):
        raise ValueError(f"layout {layout!r} is none of {', '.join(get_args(Layout))}")
    if layout == "original" and path.suffix != SUFFIX:
        raise ValueError(f"checkpoint {path} must end in {SUFFIX}")
    if layout == "diffusers":
        folder, stem, config_path = path, DIFFUSERS_STEM, path / "config.json"
        config = model.config.to_diffusers()
    else:
        folder, stem, config_path = path.parent, path.stem, path.with_suffix(".json")
        config = model.config.to_dict()
    tensors = {
        name: (value.detach(), value.dtype if dtype is None or is_float32(name) else dtype)
        for name, value in model.state_dict().items()
    }
    sizes = {name: value.numel() * kept.itemsize for name, (value, kept) in tensors.items()}
    shards = _shards(sizes, max_shard_size)
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}{SUFFIX}" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{stem}{SUFFIX}"]
    with ExitStack() as drafts:  # which renames in reverse: what points to the shards comes last
        config_draft = drafts.enter_context(replacing(config_path))
        config_draft.write_text(json.dumps(config, indent=2) + "\n")
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(sizes.values())},
                "weight_map": {
                    name: file for file, shard in zip(names, shards, strict=True) for name in shard
                },
            }
            index_draft = drafts.enter_context(replacing(folder / f"{stem}{INDEX}"))
            index_draft.write_text(json.dumps(index, indent=2) + "\n")
        for file, shard in zip(names, shards, strict=True):
            part = {name: tensors[name][0].to("cpu", tensors[name][1]) for name in shard}
            part = {name: value.contiguous() for name, value in part.items()}
            save_file(part, drafts.enter_context(replacing(folder / file)), {"format": "pt"})
    pattern = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors")
    for old in folder.iterdir():
        if pattern.fullmatch(old.name) and old.name not in names:
            old.unlink()
    if len(shards) == 1:
        (folder / f"{stem}{INDEX}").unlink(missing_ok=True)


# Headers.


@dataclass(frozen=True)
class Header:
    """What the files of a checkpoint say about themselves.

    Attributes:
        path: The file that names the checkpoint: the one part, or the index.
        parts: The files with the tensors.
        shapes: Of every tensor.
        dtypes: Of every tensor, as safetensors calls them.
    """

    path: Path
    parts: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @property
    def stem(self) -> str:
        """The name of the checkpoint."""
        return _stem(self.path)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(part.stat().st_size for part in self.parts)


def read_header(path: str | Path) -> Header:
    """What a checkpoint holds, without reading its tensors.

    Args:
        path: As for `load_checkpoint`.

    Raises:
        ValueError: A file is absent, cut off, or no safetensors.
    """
    path = _entry(Path(path))
    weight_map = _weight_map(path) if path.name.endswith(INDEX) else None
    parts = [path]
    if weight_map is not None:
        parts = [path.parent / name for name in sorted(set(weight_map.values()))]
        if absent := [part.name for part in parts if not part.is_file()]:
            raise ValueError(
                f"{path} lists {len(parts)} files, of which {len(absent)} are missing: "
                f"{_some(absent)}; fetch them too"
            )
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    found: dict[str, str] = {}
    for part in parts:
        with _opened(part) as file:
            for name in file.keys():
                view = file.get_slice(name)
                shapes[name], dtypes[name] = tuple(view.get_shape()), view.get_dtype()
                found[name] = part.name
    if weight_map is not None and found != weight_map:
        wrong = sorted({name for name, _ in found.items() ^ weight_map.items()})
        raise ValueError(f"{path} and its files disagree on where {_some(wrong)} is")
    return Header(path, tuple(parts), shapes, dtypes)


def looks_like(header: Header) -> str:
    """In words, what the tensors of a checkpoint are of."""
    if any(".lora_" in name for name in header.shapes):
        return "a LoRA adapter, which goes onto its base model"
    config = _shaped(header)
    if config is None:
        return "no CrossDiT of Kandinsky 5"
    for name, architecture in ARCHITECTURES.items():
        if config.has_shapes_of(architecture):
            presets = [preset.name for preset in _presets(config)]
            return f"{name}, the architecture of {_some(presets)}" if presets else name
    return (
        f"a CrossDiT of another size (model_dim {config.model_dim}, ff_dim {config.ff_dim}, "
        f"{config.num_text_blocks} text and {config.num_visual_blocks} visual blocks)"
    )


@contextmanager
def _opened(path: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; fetch or write it first") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}); fetch or write it again"
        ) from error


def _stem(path: Path) -> str:
    return path.name.removesuffix(INDEX).removesuffix(SUFFIX)


def _checked(path: Path) -> Path:
    if not path.name.endswith((SUFFIX, INDEX)):
        raise ValueError(f"checkpoint {path} must end in {SUFFIX}; other formats may run code")
    return path


def _entry(path: Path) -> Path:
    """The file that stands for a checkpoint, which `path` is or holds."""
    if not path.is_dir():
        return _checked(path)
    entries = _entries(path)
    if len(entries) != 1:
        names = [entry.name for entry in entries]
        raise ValueError(
            f"{path} holds {f'several checkpoints ({_some(names)})' if names else f'no {SUFFIX}'}; "
            "name the file"
        )
    return entries[0]


def _entries(folder: Path) -> list[Path]:
    """The files of a folder that stand for a checkpoint each: indices, and files in no index."""
    indices = sorted(folder.glob(f"*{INDEX}"))
    listed = {name for index in indices for name in _weight_map(index).values()}
    single = sorted(path for path in folder.glob(f"*{SUFFIX}") if path.name not in listed)
    return [*indices, *single]


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name to file name."""
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        plain = all(Path(name).name == name for name in weight_map.values())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; fetch or write it first") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no index of safetensors: {error!r}") from error
    if not plain:
        raise ValueError(f"{path} lists files outside its folder")
    return weight_map


# Configs.


def _config(header: Header) -> CrossDiTConfig:
    """The config beside the tensors, or the one of the preset that they look like."""
    if (found := _beside(header)) is not None:
        config, has_rope_scale = found
        same = [p for p in _presets(config) if p.model.top_p == config.top_p]
        if has_rope_scale or not same:
            return config
        return replace(config, rope_scale=same[0].model.rope_scale)
    ours = _ours(header)
    same = _presets(_shaped(header))
    if not same:
        raise ValueError(
            f"{header.path} looks like {looks_like(header)}, and {ours} is missing; pass config"
        )
    for preset in same:
        if preset.file == header.stem:
            return preset.model
    config = replace(same[0].model, top_p=None, window=None)
    warnings.warn(
        f"{header.path} looks like {looks_like(header)}, but its name does not tell which: dense "
        f"attention and rope_scale {config.rope_scale} are assumed; pass config",
        stacklevel=3,
    )
    return config


def _ours(header: Header) -> Path:
    return header.path.with_name(f"{header.stem}.json")


def _beside(header: Header) -> tuple[CrossDiTConfig, bool] | None:
    """The config beside the tensors, and whether it says how positions are scaled."""
    ours, diffusers = _ours(header), header.path.with_name("config.json")
    if ours.is_file():
        return _read_config(ours, CrossDiTConfig.from_dict), True
    if diffusers.is_file():
        config = _read_config(diffusers, CrossDiTConfig.from_diffusers)
        return config, "_rope_scale" in json.loads(diffusers.read_text())
    return None


def _read_config(path: Path, parse: Callable[[dict[str, Any]], CrossDiTConfig]) -> CrossDiTConfig:
    try:
        return parse(json.loads(path.read_text()))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no config of a CrossDiT: {error}") from error


def _shaped(header: Header) -> CrossDiTConfig | None:
    """The architecture that the shapes are of, if of any."""
    try:
        return CrossDiTConfig.from_shapes(header.shapes)
    except ValueError:
        return None


def _presets(config: CrossDiTConfig | None) -> list[Preset]:
    """The presets whose tensors have the same shapes."""
    if config is None:
        return []
    return [preset for preset in PRESETS.values() if config.has_shapes_of(preset.model)]


def _fitting_model(header: Header, config: CrossDiTConfig) -> CrossDiT:
    """A model without storage, once its tensors are found to be those of the header."""
    with torch.device("meta"):
        model = CrossDiT(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found, problems = header.shapes, []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"{len(missing)} missing keys: {_some(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        problems.append(f"{len(unexpected)} unexpected keys: {_some(unexpected)}")
    reshaped = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if reshaped:
        problems.append(f"{len(reshaped)} other shapes: {_some(reshaped)}")
    if quantized := sorted(name for name, dtype in header.dtypes.items() if dtype not in DTYPES):
        kinds = ", ".join(sorted({header.dtypes[name] for name in quantized}))
        problems.append(f"{len(quantized)} quantized tensors ({kinds}): {_some(quantized)}")
    if problems:
        raise ValueError(
            f"{header.path} does not fit the config: {'; '.join(problems)}. "
            f"It looks like {looks_like(header)}."
        )
    return model


# Shards.


def _shards(sizes: dict[str, int], max_size: int | None) -> list[list[str]]:
    """Names in their order, in runs of at most `max_size` bytes; a larger tensor has its own."""
    if max_size is not None and max_size < 1:
        raise ValueError(f"max_shard_size {max_size} must be positive")
    shards: list[list[str]] = [[]]
    room = max_size
    for name, size in sizes.items():
        if room is not None and max_size is not None:
            if size > room and shards[-1]:
                shards.append([])
                room = max_size
            room -= size
        shards[-1].append(name)
    return shards


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
