"""NABLA in diffusers: enable(pipe) puts it into the self-attention of a video transformer.

    tokens, RoPE  ->  block order        once per forward, by hooks     models.py
    q, k, v       ->  as the host computes them                         processors.py
    mask, softmax ->  nabla.attention    in the host's place            attention.py
    output        ->  raster order

Importing this package also makes "nabla" known to `set_attention_backend`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

try:
    from nabla.integrations.diffusers.attention import nabla_attention
except ImportError as error:
    raise ImportError(
        f"nabla.integrations.diffusers needs diffusers 0.42 or newer ({error}): "
        "pip install 'diffusers>=0.42'"
    ) from error

from nabla.inspect import Calibration
from nabla.integrations.diffusers.models import ATTRIBUTE, FAMILIES, Installed

__all__ = ["enable", "disable", "nabla_attention"]


def enable(
    pipe_or_transformer: Any,
    top_p: float | Sequence[float] | Tensor | Calibration | None = None,
    window: Sequence[int] | None = None,
    *,
    backend: str = "auto",
) -> contextlib.AbstractContextManager[None]:
    """Run the self-attention of a video transformer as NABLA, until `disable`.

    Replaces the processors of the self-attention over the video, and nothing else of the model.
    Enabling again replaces the settings. A compiled transformer is compiled again by its next call.
    A transformer runs one forward at a time.

    Args:
        pipe_or_transformer: A transformer of Kandinsky 5, Kandinsky 6 SR, Wan or HunyuanVideo, also
            compiled or wrapped, or a pipeline with one as `transformer` or `transformer_2`.
        top_p: The attention mass of the pooled map to keep, in (0, 1]; one value, one per head, or
            the Calibration of a transformer (see `nabla.inspect.calibrate`). None is what the
            transformer was made for, or else 0.9.
        window: Odd extents (frames, height, width), in blocks, around each block that are kept too.
            None is that of the calibration, what the transformer was made for, or else no window.
        backend: "auto", or the name of a backend (see `nabla.backends`).

    Returns:
        A context manager, if wanted: `with enable(pipe): ...` restores what was there before.

    Raises:
        ValueError: If the transformer is of another class, or an argument is out of its range.
    """
    models = _transformers(pipe_or_transformer)
    installed = [family(model, top_p, window, backend) for model, family in models]
    previous = [old for model, _ in models if (old := _installed(model)) is not None]
    disable(pipe_or_transformer)
    for new in installed:
        new.install()
    return _restoring(pipe_or_transformer, previous)


def disable(pipe_or_transformer: Any) -> None:
    """Undo `enable`: the processors that it replaced are there again.

    Does nothing where NABLA is not enabled, and leaves processors alone that were set since.

    Args:
        pipe_or_transformer: What was given to `enable`.

    Raises:
        ValueError: If the transformer is of a class that `enable` does not take.
    """
    for model, _ in _transformers(pipe_or_transformer):
        if (installed := _installed(model)) is not None:
            installed.remove()


@contextlib.contextmanager
def _restoring(pipe_or_transformer: Any, previous: list[Installed]) -> Iterator[None]:
    try:
        yield
    finally:
        disable(pipe_or_transformer)
        for installed in previous:
            installed.install()


def _transformers(pipe_or_transformer: Any) -> list[tuple[Any, type[Installed]]]:
    """The transformers of a pipeline, or inside what may wrap one, with what NABLA does to each."""
    candidates = [pipe_or_transformer]
    if not isinstance(pipe_or_transformer, nn.Module):
        names = ("transformer", "transformer_2")
        candidates = [getattr(pipe_or_transformer, name, None) for name in names]
        candidates = [model for model in candidates if model is not None]
    models = []
    for candidate in candidates:
        inside = candidate.modules() if isinstance(candidate, nn.Module) else ()
        families = ((module, _family(module)) for module in inside)
        models += [(module, family) for module, family in families if family is not None]
    if len(models) < max(len(candidates), 1):
        given = " and ".join(type(model).__name__ for model in candidates) or "no transformer"
        raise ValueError(
            f"{type(pipe_or_transformer).__name__} has {given}: supported are "
            f"{', '.join(FAMILIES)}; for other models see nabla.integrations.sdpa.override"
        )
    return models


def _family(model: nn.Module) -> type[Installed] | None:
    """What NABLA does to a transformer of this class or of one that it is derived from."""
    names = (base.__name__ for base in type(model).__mro__)
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)


def _installed(model: Any) -> Installed | None:
    return model.__dict__.get(ATTRIBUTE)
