"""Checkpoints: `<name>.safetensors` holds the tensors, `<name>.json` the config. No pickle.

Keys are those of the public Kandinsky 5 checkpoints. Tensors keep the dtype they were stored in: a
model is usually bfloat16, its modulations and time embeddings always float32.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kandinsky_model.config import CrossDiTConfig
from kandinsky_model.model import CrossDiT, is_float32

_SHOWN = 5


def save_checkpoint(model: CrossDiT, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write `path` (.safetensors) and its config (.json) beside it.

    Args:
        model: The model to store.
        path: Name ending in .safetensors.
        dtype: Stored dtype of all but the tensors that stay float32; None keeps the model's.
    """
    path = _checked(path)
    tensors = {
        name: value.detach()
        .to("cpu", value.dtype if dtype is None or is_float32(name) else dtype)
        .contiguous()
        for name, value in model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    path.with_suffix(".json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")


def load_checkpoint(
    path: str | Path,
    *,
    config: CrossDiTConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> CrossDiT:
    """Read a model.

    Args:
        path: Name ending in .safetensors.
        config: The architecture, where no .json lies beside the tensors, as with public files.
        dtype: Dtype of all but the tensors that stay float32; None keeps what is stored.
        device: Where the tensors go.

    Returns:
        The model in eval mode.
    """
    path = _checked(path)
    try:
        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}); fetch or write it again"
        ) from error
    with torch.device("meta"):
        model = CrossDiT(config or _read_config(path))
    _check_tensors(path, model.state_dict(), tensors)
    model.load_state_dict(tensors, assign=True)
    return (model if dtype is None else model.cast(dtype)).eval()


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"checkpoint {path} must end in .safetensors; other formats may run code")
    return path


def _read_config(path: Path) -> CrossDiTConfig:
    source = path.with_suffix(".json")
    try:
        return CrossDiTConfig.from_dict(json.loads(source.read_text()))
    except FileNotFoundError:
        raise ValueError(
            f"{source} is missing; write it or pass config=ARCHITECTURES[...]"
        ) from None
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source} is no CrossDiTConfig: {error}") from error


def _check_tensors(path: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"{len(missing)} missing keys: {_some(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        problems.append(f"{len(unexpected)} unexpected keys: {_some(unexpected)}")
    reshaped = [
        f"{name} {list(found[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if reshaped:
        problems.append(f"{len(reshaped)} other shapes: {_some(reshaped)}")
    if problems:
        raise ValueError(
            f"{path} does not fit the config: {'; '.join(problems)}. Is it another preset "
            "(video-lite, video-pro, image-lite), or an adapter without its base model?"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
