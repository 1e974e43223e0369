"""What runs here: versions, the machine, its devices, and which backends it has."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import nabla
from nabla import cuda
from nabla.dispatch import backends

# The instruction sets that decide which CPU kernel runs, by torch's names for them.
INSTRUCTION_SETS = {
    "x86_64": ("avx2", "fma3", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16"),
    "aarch64": ("neon", "fp16_arith", "bf16", "i8mm", "sve", "sve2"),
}


def environment() -> dict[str, Any]:
    """Return what a bug report or a benchmark has to say about the machine.

    Asks the CUDA driver for its devices, so it starts CUDA where there is a device.

    Returns:
        Plain values that `json.dumps` takes: versions by name (None where not installed), python,
        platform, cpu, what the CUDA kernels are compiled for, devices, and the backends, each with
        whether it is available and why not.
    """
    return {
        "versions": {
            "nabla": nabla.__version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cuda_kernels": list(cuda.architectures().values()),
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
        "backends": {name: status._asdict() for name, status in backends().items()},
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    has = torch.cpu.get_capabilities()
    return {
        "name": has.get("cpu_name") or platform.processor(),
        "architecture": platform.machine(),
        "instruction_sets": [
            name for name in INSTRUCTION_SETS.get(platform.machine(), ()) if has.get(name)
        ],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
    }
