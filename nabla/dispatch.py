"""Which backend runs: a pure function of device, architecture, head_dim, dtype and block size.

A backend is a package with one module per stage (scores, block_mask, block_attention); every
backend has the same functions. "auto" takes the first one below that fits, Triton's interpreter
(which is slow) after all others; a backend that is named is used or refused, never replaced.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from nabla.grid import BLOCK_SIZES

HALF_DTYPES = (torch.bfloat16, torch.float16)


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine, and if not, why."""

    available: bool
    reason: str


@dataclass(frozen=True)
class Backend:
    """What a backend can compute; `unavailable` says why it is not there, or None.

    Args:
        dtypes: Of queries, keys and values; scores are float32 too.
        architectures: Compute capabilities of CUDA devices, such as 90.
        is_automatic: Whether "auto" may choose it.
        package: The package of its modules, if that has another name.
    """

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    head_dims: Sequence[int]
    block_sizes: tuple[int, ...]
    unavailable: Callable[[], str | None]
    architectures: Sequence[int] = range(1000)
    is_automatic: bool = True
    package: str | None = None

    def refusal(
        self,
        device: str,
        head_dim: int | None,
        dtype: torch.dtype,
        block_size: int,
        architecture: int | None,
    ) -> str | None:
        """Return why the backend does not take such input, with what it takes instead, or None."""
        if (reason := self.unavailable()) is not None:
            return reason
        if device not in self.devices:
            return f"the tensors are on {device}, it takes {', '.join(self.devices)}"
        if architecture is not None and architecture not in self.architectures:
            return f"the device is sm_{architecture}, it takes {_chips(self.architectures)}"
        dtypes = dict.fromkeys(self.dtypes)
        if head_dim is None:
            dtypes[torch.float32] = None
        if dtype not in dtypes:
            return f"the dtype is {dtype}, it takes {', '.join(map(str, dtypes))}"
        if head_dim is not None and head_dim not in self.head_dims:
            return f"head_dim is {head_dim}, it takes {_describe(self.head_dims)}"
        if block_size not in self.block_sizes:
            return (
                f"blocks have {block_size} tokens, it takes {', '.join(map(str, self.block_sizes))}"
            )
        return None


def num_multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has; a CPU counts as one."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _never() -> None:
    return None


def _cpu_unavailable() -> str | None:
    from nabla import cpu

    return cpu.unavailable_reason()


def is_interpreted() -> bool:
    """Return whether Triton's kernels run in its interpreter: on any machine, and on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def architecture(device: torch.device) -> int | None:
    """Return the compute capability of a device, such as 90; None for a CPU."""
    if device.type == "cpu":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _triton_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if is_interpreted():
        return None
    if not torch.cuda.is_available():
        why = "torch is built without CUDA" if torch.version.cuda is None else "no CUDA device"
        return f"{why} (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    if (architecture(torch.device("cuda")) or 0) < 80:
        return "the CUDA device is older than sm_80"
    return None


CUDA_ARCHITECTURES = (80, 86, 89, 90)  # that csrc/cuda has kernels for


def _cuda_unavailable() -> str | None:
    from nabla import cuda

    if (reason := cuda.unavailable_reason()) is not None:
        return reason
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"no CUDA device: {cuda.device_error() or 'torch finds none'}"
    if (reason := cuda.device_error()) is not None:
        return f"the CUDA runtime of the kernels finds no device: {reason}"
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if not any(architecture(device) in CUDA_ARCHITECTURES for device in devices):
        return f"no CUDA device is {_chips(CUDA_ARCHITECTURES)}"
    return None


def _emulation_unavailable() -> str | None:
    from nabla import cuda

    return cuda.emulation_unavailable_reason()


BACKENDS = (
    Backend(
        "cuda",
        ("cuda",),
        HALF_DTYPES,
        (64, 128),
        (64,),
        _cuda_unavailable,
        architectures=CUDA_ARCHITECTURES,
    ),
    Backend(
        "triton",
        ("cuda", "cpu") if is_interpreted() else ("cuda",),
        (*HALF_DTYPES, torch.float32),
        range(16, 257, 16),
        BLOCK_SIZES,
        _triton_unavailable,
    ),
    Backend(
        "cpu",
        ("cpu",),
        (*HALF_DTYPES, torch.float32),
        range(32, 257, 16),
        BLOCK_SIZES,
        _cpu_unavailable,
    ),
    Backend(
        "reference",
        ("cpu", "cuda"),
        (*HALF_DTYPES, torch.float32, torch.float64),
        range(1, 2**31),
        BLOCK_SIZES,
        _never,
    ),
    Backend(
        "cuda-emulated",
        ("cpu",),
        HALF_DTYPES,
        (64, 128),
        (64,),
        _emulation_unavailable,
        is_automatic=False,
        package="cuda",
    ),
)


def backends() -> dict[str, BackendStatus]:
    """Tell which backends this machine has and, of each missing one, why.

    Returns:
        The status (available, reason) of every backend by name, the preferred first.
    """
    reasons = {backend.name: backend.unavailable() for backend in BACKENDS}
    return {name: BackendStatus(why is None, why or "available") for name, why in reasons.items()}


def check_backend(backend: str) -> None:
    """Raise a ValueError if `backend` is neither "auto" nor the name of a backend."""
    if backend != "auto" and backend not in (known := [b.name for b in BACKENDS]):
        raise ValueError(
            f"backend={backend!r} is unknown: give 'auto' or one of {', '.join(known)}"
        )


def resolve(
    backend: str,
    *,
    device: str,
    head_dim: int | None,
    dtype: torch.dtype,
    block_size: int,
    architecture: int | None = None,
) -> str:
    """Return the name of the backend that runs.

    Args:
        backend: "auto" or the name of a backend.
        device: The type of the tensors' device.
        head_dim: Channels of a head; None where the stage has none.
        dtype: Of the tensors.
        block_size: Tokens in a whole block.
        architecture: Compute capability of the tensors' device; None for a CPU.

    Raises:
        ValueError: If the backend, or for "auto" every backend, cannot run this; says why, of each.
    """
    check_backend(backend)
    refusals = []
    for candidate in sorted(BACKENDS, key=_is_slow):
        if backend == candidate.name or (backend == "auto" and candidate.is_automatic):
            refusal = candidate.refusal(device, head_dim, dtype, block_size, architecture)
            if refusal is None:
                return candidate.name
            refusals.append(f"{candidate.name}: {refusal}")
    available = [name for name, status in backends().items() if status.available]
    raise ValueError(
        f"backend={backend!r} cannot run this ({'; '.join(refusals)}). "
        f"Available on this machine: {', '.join(available)}; backend='auto' chooses among them"
    )


def _is_slow(backend: Backend) -> bool:
    return backend.name == "triton" and is_interpreted()


def implementation(
    stage: str, backend: str, x: torch.Tensor, head_dim: int | None, block_size: int
) -> ModuleType:
    """Return the module that computes a stage for tensors like x."""
    name = resolve(
        backend,
        device=x.device.type,
        head_dim=head_dim,
        dtype=x.dtype,
        block_size=block_size,
        architecture=architecture(x.device),
    )
    chosen = next(candidate for candidate in BACKENDS if candidate.name == name)
    return importlib.import_module(f"nabla.{chosen.package or chosen.name}.{stage}")


def _chips(architectures: Sequence[int]) -> str:
    return ", ".join(f"sm_{architecture}" for architecture in architectures)


def _describe(head_dims: Sequence[int]) -> str:
    if isinstance(head_dims, range):
        step = f" in steps of {head_dims.step}" if head_dims.step > 1 else ""
        return f"{head_dims.start} to {head_dims[-1]}{step}"
    return ", ".join(map(str, head_dims))
