"""What the benchmarks of the stages share: interleaved timing, memory, the heading of a table."""

from __future__ import annotations

import ctypes
import multiprocessing
import operator
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from typing import NamedTuple

import torch

from benchmarks.gpu_check import commit
from nabla.inspect import environment


class Seconds(NamedTuple):
    """How long a case took: the median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    def __str__(self) -> str:
        return f"{self.median * 1e3:9.1f} ({self.p20 * 1e3:.1f}-{self.p80 * 1e3:.1f})"


def interleaved(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, Seconds]:
    """Time cases in turn, so that what else the machine does meets them alike.

    Each runs once unmeasured, then `rounds` times, and in every round for at least 50 ms.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case()
    for _ in range(rounds):
        for name, case in cases.items():
            began = time.perf_counter()
            while True:
                start = time.perf_counter()
                case()
                times[name].append(time.perf_counter() - start)
                if time.perf_counter() - began > 0.05:
                    break
    return {name: summary(values) for name, values in times.items()}


def fit_line(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Fit y = start + slope * x with relative weights; also return the largest relative error."""
    xs, ys = zip(*points, strict=True)
    weights = [1 / y**2 for y in ys]
    total = sum(weights)
    x_mean, y_mean = (sum(map(operator.mul, weights, values)) / total for values in (xs, ys))
    spread = sum(w * (x - x_mean) ** 2 for w, x in zip(weights, xs, strict=True))
    product = sum(w * (x - x_mean) * (y - y_mean) for w, x, y in zip(weights, xs, ys, strict=True))
    slope = product / spread if spread else 0.0
    start = y_mean - slope * x_mean
    return start, slope, max(abs(start + slope * x - y) / y for x, y in points)


def peak_memory(function: Callable[..., object], *arguments) -> int:
    """Return the bytes that the peak of a fresh process is above what function() prepares.

    `function(*arguments)` makes its inputs and returns what is to be measured, without arguments.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak_memory, function, arguments, torch.get_num_threads()).result()


def heading(title: str) -> str:
    """Return what every table has to state: the machine, its software, the commit and the date."""
    about = environment()
    versions, cpu = about["versions"], about["cpu"]
    from nabla import cpu as kernels

    return (
        f"{title}\n"
        f"{cpu['name']}, {cpu['threads']} threads, kernels for {kernels.instruction_sets()[0]}; "
        f"torch {versions['torch']}, nabla {versions['nabla']} at "
        f"{(commit() or 'no commit')[:12]}, {datetime.now(UTC):%Y-%m-%d}"
    )


def summary(values: list[float]) -> Seconds:
    """Return the median and the percentiles of times in seconds."""
    if len(values) == 1:
        return Seconds(values[0], values[0], values[0])
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Seconds(statistics.median(values), deciles[1], deciles[7])


def _peak_memory(function: Callable[..., Callable[[], object]], arguments, threads: int) -> int:
    torch.set_num_threads(threads)
    measured = function(*arguments)
    measured()  # loads what it needs
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident_bytes()
    _reset_peak()
    result = measured()
    del result
    return _peak_bytes() - before


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")


def _peak_bytes() -> int:
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
