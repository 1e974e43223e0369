"""Timing of cases that run in turn, and what it shows: medians, and ratios with their uncertainty.

    relative = time of a case / time of the reference in the same round

What else the machine does meets a round as a whole, so ratios within a round are steadier than
times. A ratio is reported as the median over the rounds with an interval that holds the true one
with 95 % confidence: order statistics, whatever the distribution; with fewer than six rounds
Student's, of the logarithms. On a CPU the ratio of CPU times is kept beside that of times, as the
one that other processes hardly change.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import operator
import resource
import statistics
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

L2_BYTES = 256 << 20  # more than any GPU has
LEAST_ROUNDS, MOST_ROUNDS = 3, 31
REPLAYS = 3
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # its 97.5 % quantiles, by rounds
SHORTEST = 0.03  # seconds for which a short case is repeated in a round on a CPU
PRECISE = 0.03  # half width of the interval of a ratio at which a case needs no further rounds

Cases = dict[Hashable, Callable[[], object]]


class Seconds(NamedTuple):
    """How long a case took: the median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


class Ratio(NamedTuple):
    """The median of a ratio, and an interval that holds the true one with 95 % confidence."""

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Of the interval, in units of the logarithm: 0.1 is about 10 %."""
        return math.log(self.high / self.low) / 2


class Timing(NamedTuple):
    """What the rounds of a case showed."""

    seconds: Seconds
    relative: Ratio
    relative_cpu: Ratio
    rounds: int


def contest(
    cases: Cases,
    reference: Hashable,
    *,
    device: torch.device,
    seconds: float,
    stop: float = math.inf,
    least: int = LEAST_ROUNDS,
    graphs: Collection[Hashable] = (),
) -> dict[Hashable, Timing]:
    """Time cases in turn, each of which has run before.

    `least` rounds; then, until `seconds` have passed, further ones of the reference and of the
    cases whose ratio is not yet known precisely.

    Args:
        cases: What to time, by name.
        reference: The case that ratios are of.
        device: Where they run.
        seconds: After which no round begins, except the first ones.
        stop: When by time.monotonic() all has ended: rounds that would take longer do not begin.
        least: Rounds that are run before `seconds` count.
        graphs: Cases to time as CUDA graphs.

    Returns:
        What the rounds showed; of no case if they were stopped before there were three.
    """
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    replays = {name: graphed(cases[name]) for name in graphs}
    spans: dict[Hashable, list[float]] = {name: [] for name in cases}
    ratios: dict[Hashable, list[float]] = {name: [] for name in cases}
    of_cpu: dict[Hashable, list[float]] = {name: [] for name in cases}
    unsettled = [name for name in cases if name != reference]
    began, done = time.monotonic(), 0
    while (
        done < least or (done < MOST_ROUNDS and unsettled and _fits(began, done, seconds))
    ) and _fits(began, done, stop - began):
        order = unsettled if done % 2 else unsettled[::-1]  # a drift is no advantage
        half = len(order) // 2
        taken = {}
        for name in (*order[:half], reference, *order[half:]):
            replay = replays.get(name)
            taken[name] = clock(cases[name]) if replay is None else _graph_seconds(replay)
            spans[name].append(taken[name][0])
        for name in unsettled:
            ratio, ratio_of_cpu = (
                a / b for a, b in zip(taken[name], taken[reference], strict=True)
            )
            ratios[name].append(ratio)
            of_cpu[name].append(ratio_of_cpu)
        done += 1
        if done >= least:
            unsettled = [name for name in unsettled if interval(ratios[name]).half_width > PRECISE]
    if done < LEAST_ROUNDS:
        return {}
    ratios[reference] = of_cpu[reference] = [1.0] * len(spans[reference])
    return {
        name: Timing(
            summary(spans[name]),
            interval(ratios[name]),
            interval(of_cpu[name]),
            len(spans[name]),
        )
        for name in cases
    }


def summary(values: Sequence[float]) -> Seconds:
    """Return the median and the percentiles of times in seconds."""
    if len(values) == 1:
        return Seconds(values[0], values[0], values[0])
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Seconds(statistics.median(values), deciles[1], deciles[7])


def interval(values: Sequence[float]) -> Ratio:
    """Return the median of a sample and the 95 % interval of the true one."""
    ordered, count = sorted(values), len(values)
    if count in STUDENT:
        width = STUDENT[count] * statistics.stdev(map(math.log, values)) / math.sqrt(count)
        median = statistics.median(values)
        return Ratio(median, median * math.exp(-width), median * math.exp(width))
    outside, tail = 0, 0.5**count  # the probability that the median is below the smallest value
    while outside < (count - 1) // 2:
        wider = tail + math.comb(count, outside + 1) * 0.5**count
        if wider > 0.025:
            break
        outside, tail = outside + 1, wider
    return Ratio(statistics.median(ordered), ordered[outside], ordered[count - 1 - outside])


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


def fit_power(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Fit y = factor * x^exponent; also return the largest relative error."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    exponent, start = statistics.linear_regression(*zip(*logs, strict=True))
    factor = math.exp(start)
    return factor, exponent, max(abs(factor * x**exponent - y) / y for x, y in points)


def graphed(case: Callable[[], object]) -> Callable[[], object]:
    """Return the case as a CUDA graph: its kernels without the launches.

    Raises:
        RuntimeError: If it cannot be captured, for example because it waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warms up where the capture runs
        case()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = case()

    def replay(result=result) -> object:
        graph.replay()
        return result

    return replay


def device_seconds(run: Callable[[], object]) -> float:
    """Return the seconds that a GPU takes for what is launched."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_memory(function: Callable[..., object], calls: Sequence[tuple]) -> list[int]:
    """Return the bytes that the peak of a fresh process is above what function() prepares.

    `function(*arguments)` makes its inputs and returns what is to be measured, without arguments.

    Args:
        function: Prepares a run.
        calls: Its arguments, for each run.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_peaks, function, calls, torch.get_num_threads()).result()


def _fits(began: float, done: int, seconds: float) -> bool:
    """Whether one more round, as long as those before, ends within so many seconds."""
    spent = time.monotonic() - began
    return (spent * (done + 1) / done if done else spent) < seconds


def _cpu_seconds(case: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a case, and of CPU time; of a short one medians, which a pause does not change."""
    began, spans = time.perf_counter(), []
    while not spans or time.perf_counter() - began < SHORTEST:
        start, start_of_cpu = time.perf_counter(), time.process_time()
        case()
        spans.append((time.perf_counter() - start, time.process_time() - start_of_cpu))
    seconds, of_cpu = (statistics.median(values) for values in zip(*spans, strict=True))
    return seconds, of_cpu or seconds


def _cuda_seconds(case: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a case on the device, with a cold L2 cache; twice, as none are of a CPU."""
    flushed = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    flushed.zero_()  # empties the cache, and gives the launches a head start
    seconds = device_seconds(case)
    return seconds, seconds


def _graph_seconds(replay: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a CUDA graph, replayed back to back; twice."""
    replay()
    seconds = device_seconds(lambda: [replay() for _ in range(REPLAYS)]) / REPLAYS
    return seconds, seconds


def _peaks(
    function: Callable[..., Callable[[], object]], calls: Sequence[tuple], threads: int
) -> list[int]:
    torch.set_num_threads(threads)
    peaks = []
    for arguments in calls:
        measured = function(*arguments)
        measured()  # loads what it needs
        ctypes.CDLL(None).malloc_trim(0)
        before = _resident_bytes()
        _reset_peak()
        result = measured()
        del result
        peaks.append(_peak_bytes() - before)
    return peaks


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
