"""CUDA kernels: the module nabla._cuda for CUDA tensors, nabla._cuda_emulated for CPU tensors.

The emulator runs the very sources of the kernels thread by thread on the CPU, to test them; only
development installations have it.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from nabla.dispatch import architecture
from nabla.grid import TokenGrid
from nabla.native import with_tensors_as

PACKAGE = Path(__file__).parent.parent

_emulated_architecture = 90
_chosen_architecture: int | None = None  # in the place of a device's own
_emulator_lock = threading.Lock()  # the memory that kernels may touch is one for the process


def unavailable_reason() -> str | None:
    """Return why the kernels cannot be loaded in this installation, or None."""
    return _why_not_loaded("_cuda")


def emulation_unavailable_reason() -> str | None:
    """Return why the emulated kernels cannot be loaded in this installation, or None."""
    return _why_not_loaded("_cuda_emulated")


def device_error() -> str | None:
    """Return why the CUDA runtime of the kernels finds no device, or None."""
    return native("_cuda").device_error()


def architectures() -> dict[int, str]:
    """Return what the kernels are compiled for: names by compute capability, as {80: "sm_80"}."""
    return native("_cuda").architectures() if unavailable_reason() is None else {}


@functools.cache
def native(name: str) -> ModuleType:
    """Return a compiled module, "_cuda" or "_cuda_emulated"."""
    return importlib.import_module(f"nabla.{name}")


@contextmanager
def emulation(
    architecture: int = 90, *, schedule: str = "late", seed: int = 0, ignored: str = ""
) -> Iterator[None]:
    """Emulate otherwise, in all threads: kernels of an architecture, or in another order.

    Args:
        architecture: Compute capability: 80, 86, 89 or 90.
        schedule: Which thread runs next, and when asynchronous work is done: "late", "eager",
            "random" or "starving".
        seed: Of the schedule, and of the order of CTAs.
        ignored: "file:line:instruction", a call that is left out, to see that this shows.
    """
    global _emulated_architecture
    emulator = native("_cuda_emulated")
    _check_architecture(architecture, emulator)
    emulator.configure(schedule, seed, torch.get_num_threads(), ignored)
    before, _emulated_architecture = _emulated_architecture, architecture
    try:
        yield
    finally:
        _emulated_architecture = before
        emulator.configure()


@contextmanager
def kernels_of(architecture: int) -> Iterator[None]:
    """Launch, in all threads, the kernels of an older architecture, to test them on this device.

    The driver compiles them from PTX of sm_80, which 80, 86 and 89 share.

    Args:
        architecture: Compute capability: 80, 86, 89 or that of the device.
    """
    global _chosen_architecture
    _check_architecture(architecture, native("_cuda"))
    before, _chosen_architecture = _chosen_architecture, architecture
    try:
        yield
    finally:
        _chosen_architecture = before


def launch(
    stage: str, device: torch.device, writes: Sequence[str], *, grid: TokenGrid, **fields
) -> None:
    """Queue one stage with the fields of its Params on the current stream of a device.

    Tensors among the fields travel as pointers; their memory is not reused before the stage is
    done, because PyTorch orders what it frees by the same stream. The kernels write those named in
    `writes`, and the emulator lets them touch no other memory.
    """
    pointers = {name: with_tensors_as(Tensor.data_ptr, value) for name, value in fields.items()}
    pointers["grid"] = tuple(grid.as_ints())
    chosen = kernels_architecture(device)
    if device.type == "cpu":
        with _touchable(fields, writes):
            getattr(native("_cuda_emulated"), stage)(chosen, **pointers)
        return
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(native("_cuda"), stage)(chosen, stream=stream, **pointers)


def kernels_architecture(device: torch.device) -> int:
    """Return whose kernels are launched: the device's own, emulated ones on a CPU, or as asked."""
    own = architecture(device)
    return _emulated_architecture if own is None else _chosen_architecture or own


def with_aligned_rows(x: Tensor) -> Tensor:
    """Return x [B, H, S, D], copied unless every row of D begins at a multiple of 16 bytes.

    That is what vector loads and bulk tensor copies take. The copies take no tokens that share
    their memory, either.
    """
    steps = [stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    offsets = [x.data_ptr(), *(stride * x.element_size() for stride in steps)]
    if all(offset % 16 == 0 for offset in offsets) and (x.stride(2) or x.shape[2] == 1):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _check_architecture(architecture: int, module: ModuleType) -> None:
    if architecture not in (known := module.architectures()):
        raise ValueError(
            f"architecture={architecture} has no kernels: give one of {', '.join(map(str, known))}"
        )


def _why_not_loaded(name: str) -> str | None:
    try:
        native(name)
    except ImportError as error:
        reason = PACKAGE / f"{name}_build.txt"  # written by setup.py in place of the module
        if reason.exists():
            return reason.read_text().strip()
        return f"the module nabla.{name} does not load: {error}"
    return None


@contextmanager
def _touchable(fields: dict, writes: Sequence[str]) -> Iterator[None]:
    """Let emulated kernels touch the elements of the tensors among the fields, and no others."""
    emulator = native("_cuda_emulated")
    with _emulator_lock:
        for name, value in fields.items():
            x = value[0] if isinstance(value, tuple) else value
            if isinstance(x, Tensor):
                last = sum(
                    (size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)
                )
                num_bytes = (last + 1) * x.element_size()
                emulator.register_memory(x.data_ptr(), num_bytes, name in writes, name)
        try:
            yield
        finally:
            emulator.clear_memory()
