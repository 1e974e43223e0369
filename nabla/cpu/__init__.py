"""Native CPU kernels: the module nabla._cpu, for the best instruction set that this machine has."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from nabla.grid import TokenGrid
from nabla.native import with_tensors_as

REASON_FILE = Path(__file__).parent.parent / "_cpu_build.txt"  # written by setup.py without kernels

_forced: str | None = None


def unavailable_reason() -> str | None:
    """Return why the kernels cannot run in this installation, or None."""
    try:
        native()
    except ImportError as error:
        if REASON_FILE.exists():
            return REASON_FILE.read_text().strip()
        return f"the module nabla._cpu does not load: {error}"
    return None


def instruction_sets() -> list[str]:
    """Return the instruction sets that this machine can run the kernels with, the best first."""
    return native().instruction_sets(native().features())


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Run the kernels of all threads with one instruction set, to test or to compare.

    Raises:
        ValueError: If this machine does not have it.
    """
    global _forced
    if name not in instruction_sets():
        raise ValueError(
            f"instruction set {name!r} is not among those of this machine: "
            f"{', '.join(instruction_sets())}"
        )
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@functools.cache
def native() -> ModuleType:
    """Return the compiled module."""
    return importlib.import_module("nabla._cpu")


def launch(stage: str, *, grid: TokenGrid, **fields) -> None:
    """Run one stage with the fields of its Params and with as many threads as torch uses.

    Tensors among the fields travel as pointers; `fields` holds them until the stage is done.
    """
    instruction_set = _forced or _best_instruction_set()
    fields["starts"] = starts(grid)
    pointers = {name: with_tensors_as(Tensor.data_ptr, value) for name, value in fields.items()}
    getattr(native(), stage)(
        instruction_set, threads=torch.get_num_threads(), grid=tuple(grid.as_ints()), **pointers
    )


def empty_like(x: Tensor) -> Tensor:
    """Return a new tensor with the strides of x, in huge pages where it fills some."""
    empty = torch.empty_like(x)
    storage = empty.untyped_storage()
    native().prefer_huge_pages(storage.data_ptr(), storage.nbytes())
    return empty


@functools.lru_cache(maxsize=64)
def starts(grid: TokenGrid) -> Tensor:
    """Return the first token of every block of a grid, then its number of tokens."""
    return grid.starts("cpu")


@functools.cache
def _best_instruction_set() -> str:
    return instruction_sets()[0]
