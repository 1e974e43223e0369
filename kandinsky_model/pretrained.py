"""Models of transformers and diffusers: imported when used, read strictly from local folders."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_SHOWN = 5
_INSTALL = "pip install 'nabla-attention[generate]'"


def require(name: str) -> Any:
    """Import a library of the `generate` extra, or say how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; generating needs {name}: {_INSTALL}", name=error.name
        ) from error


def read_model(kind: Any, folder: Path, *, ignore: Sequence[str] = (), **options: Any) -> Any:
    """Read a model, and refuse one whose tensors are not exactly those that the config asks for.

    Args:
        kind: Class of the model, of transformers or diffusers.
        folder: Where its config.json and its safetensors lie.
        ignore: How names begin of tensors that may lie beside those of the model.
        **options: For `from_pretrained`, such as the dtype.
    """
    model, info = _from_pretrained(
        kind, folder, use_safetensors=True, output_loading_info=True, **options
    )
    unexpected = [name for name in info["unexpected_keys"] if not name.startswith(tuple(ignore))]
    problems = [
        f"{len(names)} {what} keys: {', '.join(sorted(map(str, names))[:_SHOWN])}"
        for what, names in (
            ("missing", info["missing_keys"]),
            ("unexpected", unexpected),
            ("mismatched", info["mismatched_keys"]),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{folder} is no {kind.__name__}: {'; '.join(problems)}")
    return model


def read_other(kind: Any, folder: Path, **options: Any) -> Any:
    """Read a tokenizer or an image processor."""
    return _from_pretrained(kind, folder, **options)


def _from_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read as {kind.__name__}: {error}") from error
