"""An interrupted run on disk: tensors, the steps done, and the arguments that led to them.

A state is only taken up by a run with the same arguments; it is written whole or not at all. One of
no step yet, which saves nothing but the features of the text, gives way to other arguments.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kandinsky_model.files import replacing

Arguments = dict[str, Any]


def save_state(path: Path, tensors: dict[str, Tensor], step: int, arguments: Arguments) -> None:
    """Write a state in place of an earlier one.

    Args:
        path: Its file.
        tensors: All that the rest of the run needs.
        step: Steps done.
        arguments: All that the result depends on, as JSON values.
    """
    metadata = {"step": str(step), "arguments": json.dumps(arguments)}
    with replacing(path) as draft:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, draft, metadata=metadata)


def load_state(path: Path, arguments: Arguments) -> tuple[dict[str, Tensor], int] | None:
    """Tensors and steps done of a run with these arguments; None if there is nothing to go on."""
    if not path.exists():
        return None
    with _opened(path) as (file, step, saved):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    wanted = json.loads(json.dumps(arguments))
    if saved != wanted:
        if step == 0:
            return None
        names = sorted(name for name in saved | wanted if saved.get(name) != wanted.get(name))
        changes = "; ".join(
            f"{name} {saved.get(name)!r}, now {wanted.get(name)!r}" for name in names
        )
        raise ValueError(
            f"{path} is of an interrupted run with other arguments ({changes}): repeat those to go "
            "on with it, or delete it to start anew"
        )
    return tensors, step


def is_state_of(path: Path, arguments: Arguments) -> bool:
    """Whether a file is the state of a run with these arguments."""
    try:
        with _opened(path) as (_, _, saved):
            return bool(saved == json.loads(json.dumps(arguments)))
    except ValueError:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, int, Arguments]]:
    """The file, the steps done, and the arguments."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            yield file, int(metadata["step"]), json.loads(metadata["arguments"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"state {path} cannot be read ({error!r}); delete it to start anew"
        ) from error
