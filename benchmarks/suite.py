"""Runs a preset: estimates, measures within the estimate, refuses wrong output, keeps the rows.

nabla bench PRESET [--device cpu] [--peers ...] [--only ...] [--json F] [--compare F]
python -m benchmarks.suite PRESET ...     the same, where typer is not installed
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import generate, presets, report, results
from benchmarks.accuracy import Accuracy, WrongOutput
from benchmarks.case import Case, Contest, Pace, Step
from benchmarks.machine import describe, facts, measure_limits, seconds_of
from benchmarks.peers import NAMES, chosen
from benchmarks.peers.peer import Peer
from benchmarks.results import BUSY, MASK_PART, OURS, Change, Row, Run
from benchmarks.timing import LEAST_ROUNDS, MOST_ROUNDS, contest, graphed

OUT = Path("out/bench")
YARDSTICKS = ("sdpa", "sdpa-cudnn", "sdpa-flash", "sorting")  # speed-ups are over these
SPARSE = {"cpu": 1.0, "cuda": 2.0}  # how much longer FLOPs of kept blocks take than dense ones
FURTHER_SAMPLES = 4  # of an output that is a little too far off by the first
OVERHEAD = 12.0  # seconds for everything that is no step: measuring the machine, the report
MOST_OVERHEAD = 8.0  # times that, on a busy machine
SAFETY, BUSY_SAFETY = 1.3, 3.0  # a machine may slow down after the estimate, a busy one by more


class Suite:
    """Measures steps on one device and keeps their rows.

    Args:
        device: Where to measure.
        peers: Whom to measure beside ours.
        say: Takes the rows of each finished step.
        pace: How fast the machine is.
    """

    def __init__(
        self,
        device: torch.device,
        peers: list[Peer],
        say: Callable[[list[Row]], None],
        pace: Pace,
    ) -> None:
        self.device, self.peers, self.say, self.pace = device, peers, say, pace
        self.rows: list[Row] = []
        self.failures = 0
        self.stop = math.inf
        self.only: set[tuple] | None = None
        self.step_of: dict[tuple, Step] = {}

    def run(
        self, steps: Sequence[Step], least: Sequence[float], *, aim: float, stop: float
    ) -> None:
        """Measure; a step gets its share of the time that is left until `aim`.

        Args:
            steps: What to measure.
            least: The seconds that each takes at least.
            aim: When by time.monotonic() there are no more rounds than there have to be.
            stop: When everything has ended: what would take longer does not begin.
        """
        self.stop, alone = stop, self.pace._replace(busy=1.0)
        for index, step in enumerate(steps):
            left = aim - time.monotonic()
            if time.monotonic() + step.least_seconds(alone) > stop:
                self._skip(Row(step.stage, step.workload))
                self.say(self.rows[-1:])
            else:
                self.measure(step, left * least[index] / sum(least[index:]))

    def again(self, keys: set[tuple]) -> list[Row]:
        """Measure cases once more, beside their references and with many rounds."""
        before, self.stop, self.only = len(self.rows), math.inf, keys
        for step in dict.fromkeys(self.step_of[key] for key in keys):
            self.measure(step, 0.0)
        return self.rows[before:]

    def measure(self, step: Step, seconds: float) -> None:
        """Measure one step; what goes wrong becomes a row and a failure, and stops nothing else."""
        before = len(self.rows)
        try:
            step.measure(self, seconds)
        except ModuleNotFoundError as error:
            reason = f"{error}: pip install 'nabla-attention[demo]'"
            self.rows.append(Row(step.stage, step.workload, status="absent", reason=reason))
        except Exception as error:
            self._fail(Row(step.stage, step.workload), "failed", error)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.step_of |= {row.key: step for row in self.rows[before:]}
        self.say(self.rows[before:])

    def race(self, race: Contest, seconds: float) -> None:
        """Check the cases, time those that are right in turn, and keep a row of each."""
        began, planned = time.monotonic(), 0.0
        with torch.set_grad_enabled(race.with_grad):
            checked: dict[int, tuple[Case, Accuracy]] = {}
            for case in race.cases:
                is_reference = not checked and case in race.references
                if not (self.only is None or is_reference or case.row.key in self.only):
                    continue
                if case.is_fallback and checked:
                    continue
                needed = self.pace.least_seconds(case.row)
                if time.monotonic() + planned + needed > self.stop:
                    self._skip(case.row)
                elif (accuracy := self._checked(case)) is not None:
                    checked[len(checked)] = (case, accuracy)
                    planned += needed
            if not checked:
                return
            timings = contest(
                {index: case.run for index, (case, _) in checked.items()},
                0,
                device=self.device,
                seconds=seconds - (time.monotonic() - began),
                stop=self.stop,
                least=LEAST_ROUNDS if self.only is None else MOST_ROUNDS,
                graphs=[index for index, (case, _) in checked.items() if case.is_graph],
            )
        if not timings:
            for case, _ in checked.values():
                self._skip(case.row)
            return
        reference = checked[0][0]
        has_reference = reference in race.references
        fastest = min(
            (timings[i].relative.median for i, (c, _) in checked.items() if c.row.mask == "dense"),
            default=1.0,
        )
        masks = [i for i, (case, _) in checked.items() if case.row.part == MASK_PART]
        of_mask = {"mask_relative": timings[masks[0]].relative.median} if masks else {}
        for index, (case, accuracy) in checked.items():
            timing, row = timings[index], case.row
            if has_reference:
                ratios = {"relative": timing.relative, "relative_cpu": timing.relative_cpu}
                row = replace(row, **ratios, reference=reference.row.implementation, dense=fastest)
            else:
                row = replace(row, reason="nothing that is right to compare with")
            needs_mask = row.implementation == OURS and row.mask not in ("dense", "built")
            self.rows.append(
                replace(
                    row,
                    values=row.values | (of_mask if needs_mask else {}),
                    seconds=timing.seconds,
                    rounds=timing.rounds,
                    error=accuracy.error,
                    allowed=accuracy.allowed,
                )
            )

    def _checked(self, case: Case) -> Accuracy | None:
        """The accuracy of a case; None, and a row that says why, if it gets no time."""
        try:
            if case.is_graph:
                graphed(case.run)
            return _check(case)
        except WrongOutput as error:
            self._fail(case.row, "wrong", error)
        except Exception as error:
            self._fail(case.row, "failed", error)
        return None

    def _skip(self, row: Row) -> None:
        self.rows.append(replace(row, status="skipped", reason="out of time"))

    def _fail(self, row: Row, status: str, error: Exception) -> None:
        reason = str(error)[:300]
        if status == "failed":
            reason = f"{type(error).__name__}: {reason}"
        self.failures += row.implementation == OURS
        self.rows.append(replace(row, status=status, reason=reason))


def bench(
    preset: str,
    *,
    device: str | None = None,
    peers: list[str] | None = None,
    only: list[str] | None = None,
    json: Path | None = None,
    compare: Path | None = None,
    seconds: float | None = None,
    out: Path | None = None,
    say: Callable[[object], None] = print,
) -> int:
    """Run a preset, print and write what it shows; return the exit status.

    Args:
        preset: One of `presets.PRESETS`.
        device: "cpu" or "cuda"; None is CUDA where there is a device.
        peers: Names of the peers to measure beside ours; None is all that are installed. What
            speed-ups are over is always among them.
        only: Names of stages and of workloads to leave it at; None is all of the preset.
        json: Where the rows are written, as JSON lines.
        compare: Results of another run; the status is 1 if ours has become slower.
        seconds: To take at most, and what does not fit is left out; None is what the preset says,
            or more where the machine is slow.
        out: Folder for the pictures and the report.
        say: Prints text and tables.

    Returns:
        0; 1 if something of ours failed or was wrong, or has become slower.

    Raises:
        ValueError: If an argument names what does not exist.
    """
    began = time.monotonic()
    where = _device(device)
    before = None if compare is None else results.read(compare)
    others = chosen(None if peers is None else [*peers, *YARDSTICKS])
    definition = presets.find(preset, where)
    if only is not None:  # unknown names are told before anything is measured
        any_pace = Pace(dict.fromkeys(definition.dtypes, 1.0), 1.0)
        presets.only(definition.steps(where, others, any_pace, 1.0), only)
    about = facts(where)
    say(describe(about))
    limits = measure_limits(where, definition.dtypes)
    rates = {dtype: attention_rate(where, dtype) for dtype in definition.dtypes}
    say(report.limits_line(limits, rates))
    for peer in others:
        say(f"peer {peer.name}: {peer.absent(where) or 'used'}")
    budget = definition.seconds[where.type] if seconds is None else seconds
    earlier = [] if before is None else before.rows
    tokens = {(row.workload, row.stage): row.tokens for row in earlier}
    pace = Pace(rates, busyness(), tokens, SPARSE[where.type])
    overhead = OVERHEAD * min(pace.busy, MOST_OVERHEAD)
    safety = SAFETY if pace.busy <= BUSY else BUSY_SAFETY
    steps = definition.steps(where, others, pace, (budget - overhead) / safety)
    if only is not None:
        steps = presets.only(steps, only)
    least = [step.least_seconds(pace) for step in steps]
    aim = estimate = budget
    if seconds is None:
        aim = max(budget, sum(least) + overhead)
        estimate = max(budget, safety * sum(least) + overhead)
    if pace.busy > BUSY:
        say(
            f"this machine is busy ({pace.busy:.0f} processes for each core): expect noise, and "
            "ratios that favour short cases"
        )
    say(f"estimate: {aim:.0f} s, at most {estimate:.0f} s, for {len(steps)} steps")

    def finished(rows: list[Row]) -> None:
        say(report.table(rows, limits))
        if json is not None:  # who stops it keeps what there is
            Run(preset, about, limits, suite.rows).write(json)

    suite = Suite(where, others, finished, pace)
    suite.rows += [
        Row("peer", "", peer.name, "absent", why) for peer in others if (why := peer.absent(where))
    ]
    end = began - overhead / 2  # the report takes the other half
    suite.run(steps, least, aim=end + aim, stop=end + estimate)
    suite.rows += generate.extrapolate(suite.rows)
    run = Run(preset, about, limits, list(suite.rows))
    say(report.summary(run))
    folder = out or OUT / f"{preset}-{where.type}"
    for path in report.write(run, folder):
        say(f"wrote {path}")
    if json is not None:
        run.write(json)
        say(f"wrote {json}")
    say(f"took {time.monotonic() - began:.0f} s of at most {estimate:.0f} s")
    slower = [] if before is None else compared(before, run, suite, say)
    return 1 if suite.failures or slower else 0


def compared(before: Run, now: Run, suite: Suite, say: Callable[[object], None]) -> list[Change]:
    """Return the cases that are slower than before, measured once more with more rounds."""
    for difference in results.differences(before, now):
        say(f"another machine or version, so more than our code is compared: {difference}")
    is_busy = before.is_busy or now.is_busy
    if is_busy:
        say("one of the runs had a busy machine: CPU times are compared")
    changes = results.compare(before.rows, now.rows, is_busy=is_busy)
    if not changes:
        raise ValueError(
            f"no case of {now.preset} has a time in both runs; the other is of {before.preset} on "
            f"{before.about['device']}: compare runs of the same preset, and give them the time "
            "they need (--seconds)"
        )
    suspects = {change.row.key for change in changes if change.is_suspect}
    if suspects:
        say(f"{len(suspects)} of {len(changes)} cases look slower; measuring them once more")
        again = suite.again(suspects)
        second = {c.row.key: c for c in results.compare(before.rows, again, is_busy=is_busy)}
        changes = [second.get(change.row.key, change) for change in changes]
    say(report.changes(changes, before))
    return [change for change in changes if change.is_slower]


def attention_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of dense attention, from which the estimate follows."""
    is_gpu = device.type == "cuda"
    heads, tokens, head_dim = (16, 8192, 128) if is_gpu else (2, 2048, 64)
    q, k, v = torch.randn(3, 1, heads, tokens, head_dim, device=device).to(dtype)
    seconds = seconds_of(lambda: F.scaled_dot_product_attention(q, k, v), device)
    return 4 * heads * tokens**2 * head_dim / seconds


def busyness() -> float:
    """How many times slower than alone this machine is: by how many others wait for its cores."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def _check(case: Case) -> Accuracy:
    """Check; what is a little too far off by one sample is judged by the majority of five."""
    if case.check is None:
        case.run()
        return Accuracy(0.0, 0.0)
    try:
        return case.check()
    except WrongOutput as error:
        if not error.is_near_miss:
            raise
    right, last = [], WrongOutput("")
    for _ in range(FURTHER_SAMPLES):
        try:
            right.append(case.check())
        except WrongOutput as error:
            last = error
    if len(right) <= FURTHER_SAMPLES // 2:
        raise last
    return right[0]


def _device(name: str | None) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if has_gpu else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r} is unknown: give cpu or cuda")
    if name == "cuda" and not has_gpu:
        raise ValueError("--device 'cuda', but torch finds no CUDA device: give --device cpu")
    return torch.device(name)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line, without typer."""
    parser = argparse.ArgumentParser(prog="benchmarks.suite", description="Run the benchmarks.")
    parser.add_argument("preset", choices=list(presets.PRESETS))
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--peers", help=f"some of {','.join(NAMES)}")
    parser.add_argument("--only", help="some of its stages and workloads")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--out", type=Path)
    options = vars(parser.parse_args(arguments))
    for name in ("peers", "only"):
        options[name] = None if options[name] is None else options[name].split(",")
    return bench(**options, say=report.plain)


if __name__ == "__main__":
    sys.exit(main())
