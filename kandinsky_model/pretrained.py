"""Models of transformers and diffusers: imported when used, read strictly from local folders."""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from kandinsky_model.checkpoint import read_header

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


def check_model(kind: Any, folder: Path, *, ignore: Sequence[str] = ()) -> Any:
    """Raise the error that `read_model` would raise; reads nothing but the config and headers.

    Args:
        kind: Class of the model, of transformers.
        folder: See `read_model`.
        ignore: See `read_model`.

    Returns:
        The model without numbers.
    """
    names = "model.safetensors", "model.safetensors.index.json"
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files:
        raise ValueError(f"{folder} holds neither {' nor '.join(names)}; fetch the weights")
    shapes = read_header(files[0]).shapes
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with _quiet():
        config = _from_pretrained(kind.config_class, folder)
        model, info = kind.from_pretrained(
            None, config=config, state_dict=tensors, device_map={"": "meta"},
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    _check_keys(kind, folder, info, ignore)
    return model


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
    _check_keys(kind, folder, info, ignore)
    return model


def read_other(kind: Any, folder: Path, **options: Any) -> Any:
    """Read a tokenizer or an image processor."""
    return _from_pretrained(kind, folder, **options)


def _check_keys(kind: Any, folder: Path, info: dict[str, Any], ignore: Sequence[str]) -> None:
    unexpected = [name for name in info["unexpected_keys"] if not name.startswith(tuple(ignore))]
    mismatched = [
        f"{name} {list(found)} instead of {list(wanted)}"
        for name, found, wanted in info["mismatched_keys"]
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:_SHOWN])}"
        for what, names in (
            ("missing keys", info["missing_keys"]),
            ("unexpected keys", unexpected),
            ("other shapes", mismatched),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{folder} is no {kind.__name__}: {'; '.join(problems)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting what an error is about to say."""
    logging = require("transformers").utils.logging
    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def _from_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read as {kind.__name__}: {error}") from error
