"""The machine that figures are of: what it is, and what it reaches as measured there.

copy    bytes read and written per second by a copy of more than its caches hold
gemm    FLOPs per second of a matrix product, per dtype
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

import nabla
from nabla import cuda
from nabla.dispatch import architecture
from nabla.inspect import environment

ROOT = Path(__file__).resolve().parent.parent


class Limits(NamedTuple):
    """Bytes per second of a copy, and FLOPs per second of a matrix product by dtype."""

    copy: float
    gemm: dict[str, float]

    def seconds(self, flops: float, num_bytes: float, dtype: str) -> float:
        """The least time that so much work takes here."""
        return max(num_bytes / self.copy, flops / self.gemm.get(dtype, float("inf")))


def measure_limits(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Limits:
    """Measure on random data; the median of five."""
    is_gpu = device.type == "cuda"
    source = torch.randn(1 << (30 if is_gpu else 26), device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)
    size, gemm = 8192 if is_gpu else 1536, {}
    for dtype in dtypes:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        gemm[name_of(dtype)] = 2 * size**3 / seconds_of(lambda a=a, b=b: a @ b, device)
    return Limits(copy, gemm)


def facts(device: torch.device) -> dict:
    """What a report has to state of the machine, its software and the code."""
    about = environment()
    about["device"] = device.type
    about["commit"] = commit()
    about["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    about["cores"] = os.cpu_count()
    about["load"] = os.getloadavg()[0]
    about["clock_mhz"] = _cpu_clock()
    if (status := nabla.backends()["cpu"]).available:
        from nabla import cpu

        about["cpu_kernels"] = cpu.instruction_sets()[0]
    else:
        about["cpu_kernels"] = status.reason
    if device.type == "cuda":
        about["gpu"] = gpu()
        about["architecture"] = cuda.architectures().get(architecture(device) or 0)
    return about


def describe(about: dict) -> str:
    """One line: the machine, its software, the commit and the date."""
    if about["device"] == "cuda":
        machine = about["gpu"] or about["devices"][0]["name"]
    else:
        cpu = about["cpu"]
        machine = f"{cpu['name']}, {cpu['threads']} threads, kernels for {about['cpu_kernels']}"
    versions, runs = about["versions"], about.get("runs", [about])
    commits = dict.fromkeys(short(run["commit"]) for run in runs)
    days = dict.fromkeys(run["date"][:10] for run in runs)
    return (
        f"{machine}; torch {versions['torch']}, nabla {versions['nabla']} at "
        f"{' and '.join(commits)}, {' and '.join(days)}"
    )


def short(commit: str | None) -> str:
    """A commit as people write it; `-dirty` marks changes that are not in it."""
    if commit is None:
        return "no commit"
    name, dash, dirty = commit.partition("-")
    return name[:12] + dash + dirty


def name_of(dtype: torch.dtype) -> str:
    """`float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")


def gpu() -> str | None:
    """Return what nvidia-smi says of the GPU: name, driver, highest clocks, power limit; None where
    it is not there."""
    query = "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    found = _output("nvidia-smi", query, "--format=csv,noheader")
    if found is None or found.count(",") != 4:  # several GPUs, or an error
        return found
    name, driver, clock, memory_clock, power = found.split(", ")
    return f"{name}, driver {driver}, up to {clock}, memory {memory_clock}, {power}"


def full(commit: str) -> str:
    """The whole hash of a commit of this checkout.

    Raises:
        ValueError: If it has none of that name.
    """
    if (
        found := _output("git", "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    ) is None:
        raise ValueError(f"commit {commit!r} is not in this checkout")
    return found


def commit() -> str | None:
    """Return the commit of the checkout, or None where there is no git."""
    return _output("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def seconds_of(case: Callable[[], object], device: torch.device) -> float:
    """Seconds of a case, the median of five."""
    times = []
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        case()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _cpu_clock() -> float | None:
    """MHz of the first core, where Linux says so."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((float(x.split(":")[1]) for x in lines if x.startswith("cpu MHz")), None)


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None
