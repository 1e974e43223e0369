"""Results: one row per case, one JSON object per line, and the comparison of two runs.

The first line of a file is the run: machine, versions, commit, date. Every other line is a row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from benchmarks.machine import Limits
from benchmarks.timing import Ratio, Seconds

OURS = "nabla"
MASK_PART = "mask"  # of a stage that is not mask building: our mask, timed in the same rounds
MARGIN = 0.08  # a change below this is none: two runs of the same code differ by as much
WIDER = 1.5  # than 95 %: of many cases, none may be called slower by chance
BUSY = 1.5  # processes a core, above which times are those of a shared machine


@dataclass(frozen=True)
class Row:
    """A case: what was run, on what, and what came of it.

    Args:
        stage: The file of benchmarks/ that measures it.
        workload: Its name.
        implementation: Whose: "nabla", or a peer.
        status: "measured", "extrapolated", "absent", "wrong", "failed" or "skipped".
        reason: Why it is not measured.
        mask: The kind of mask.
        part: Of the stage, where it has several.
        asked: The density that was asked for; `density` is that of the mask.
        tokens, heads, head_dim, dtype: The shape.
        flops: Of the kept blocks; `extra_flops` are those of blocks that a coarser mask adds.
        bytes: Inputs and outputs, each moved once.
        seconds: Median, p20 and p80.
        relative: Time over that of `reference` in the same round, with its interval.
        relative_cpu: The same of CPU time, which other processes hardly change.
        dense: `relative` of the fastest dense attention beside it: the reference, or faster.
        error, allowed: The largest error relative to the largest value, and its limit.
        reduced: What of the workload is left out.
        values: What else a stage has to say, by name.
        run: Which of the runs it is of, where a file has several (benchmarks/merge.py).
    """

    stage: str
    workload: str
    implementation: str = OURS
    status: str = "measured"
    reason: str = ""
    mask: str = ""
    part: str = ""
    asked: float | None = None
    density: float | None = None
    tokens: int = 0
    heads: int = 0
    head_dim: int = 0
    dtype: str = ""
    flops: float = 0.0
    extra_flops: float = 0.0
    bytes: float = 0.0
    seconds: Seconds | None = None
    rounds: int = 0
    reference: str = ""
    relative: Ratio | None = None
    relative_cpu: Ratio | None = None
    dense: float = 1.0
    error: float | None = None
    allowed: float | None = None
    reduced: str = ""
    values: dict = field(default_factory=dict)
    run: int = 0

    @property
    def key(self) -> tuple:
        """What is the same in two runs of the same case."""
        return (
            *(self.stage, self.workload, self.implementation, self.mask, self.part, self.asked),
            *(self.tokens, self.heads, self.head_dim, self.dtype),
        )

    @property
    def speedup(self) -> float | None:
        """How many times faster than the fastest dense attention, or what else is replaced."""
        return None if self.relative is None else self.dense / self.relative.median

    @property
    def efficiency(self) -> float | None:
        """E: density * (time of dense attention) / time; 1 where a kept block costs what it costs
        in dense attention."""
        if self.speedup is None or self.density is None:
            return None
        return self.density * self.speedup

    @property
    def efficiency_with_mask(self) -> float | None:
        """E if the mask is built as well, as often as it is used."""
        if self.efficiency is None or self.relative is None or "mask_relative" not in self.values:
            return None
        share = self.relative.median / (self.relative.median + self.values["mask_relative"])
        return self.efficiency * share

    @property
    def flops_per_second(self) -> float | None:
        """Of the kept blocks."""
        return self.flops / self.seconds.median if self.seconds and self.flops else None

    @property
    def bytes_per_second(self) -> float | None:
        """Of inputs and outputs."""
        return self.bytes / self.seconds.median if self.seconds and self.bytes else None

    def share_of_limit(self, limits: Limits) -> float | None:
        """The least time that the work takes on this machine, as measured there, over the time."""
        if self.seconds is None or not (self.flops or self.bytes):
            return None
        return limits.seconds(self.flops, self.bytes, self.dtype) / self.seconds.median

    def to_dict(self) -> dict:
        """Plain values; fields at their defaults are left out."""
        return {
            name: value._asdict() if isinstance(value, Seconds | Ratio) else value
            for name, value, default in (
                (f.name, getattr(self, f.name), f.default) for f in fields(self)
            )
            if value != default and value != {}
        }

    @classmethod
    def from_dict(cls, values: dict) -> Row:
        """The inverse of `to_dict`."""
        row = cls(**values)
        return replace(
            row,
            seconds=Seconds(**values["seconds"]) if "seconds" in values else None,
            relative=Ratio(**values["relative"]) if "relative" in values else None,
            relative_cpu=Ratio(**values["relative_cpu"]) if "relative_cpu" in values else None,
        )


@dataclass(frozen=True)
class Run:
    """A run of the suite: what it ran on, and its rows."""

    preset: str
    about: dict
    limits: Limits
    rows: list[Row]

    def head(self) -> dict:
        """The first line of a file."""
        return {"preset": self.preset, "about": self.about, "limits": self.limits._asdict()}

    @property
    def is_busy(self) -> bool:
        """Whether other processes had the machine as well."""
        return self.about["load"] > BUSY * self.about["cores"]

    def write(self, path: Path) -> None:
        """Write a line for the run and one for each row."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [self.head(), *(row.to_dict() for row in self.rows)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def measured(self, stage: str, implementation: str | None = None) -> list[Row]:
        """The rows of a stage that have a time."""
        return [
            row
            for row in self.rows
            if row.stage == stage
            and row.seconds is not None
            and implementation in (None, row.implementation)
        ]


def read(path: Path) -> Run:
    """Read what `Run.write` wrote.

    Raises:
        ValueError: If the file holds no results.
    """
    try:
        head, *rows = [json.loads(line) for line in path.read_text().splitlines()]
        limits = Limits(**head["limits"])
        return Run(head["preset"], head["about"], limits, [Row.from_dict(row) for row in rows])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no results of nabla bench ({error}): give a file that --json wrote"
        ) from None


@dataclass(frozen=True)
class Change:
    """How the ratio of a case to its reference differs between two runs.

    Args:
        row: The case, as it is now.
        factor: Its ratio now over that before: 1.3 is 30 % slower.
        low, high: The interval of the factor, that of both runs together.
    """

    row: Row
    factor: float
    low: float
    high: float

    @property
    def is_slower(self) -> bool:
        """Whether it is slower by more than two runs of the same code differ."""
        return self.low > 1 + MARGIN

    @property
    def is_suspect(self) -> bool:
        """Whether it looks slower, be it certain or not."""
        return self.factor > 1 + MARGIN


def compare(before: Sequence[Row], now: Sequence[Row], *, is_busy: bool = False) -> list[Change]:
    """Compare our cases that both runs measured, relative to the reference timed beside them.

    Args:
        before: The rows of a run.
        now: Those of another.
        is_busy: Whether other processes had the machine as well. Then CPU times are compared, where
            both runs have them: they say of short cases, too, what those processes hardly change.
    """
    old = {row.key: row for row in before if row.relative is not None}
    changes = []
    for row in now:
        found = old.get(row.key)
        if row.implementation != OURS or row.relative is None or found is None:
            continue
        if row.reference != found.reference:
            continue
        if is_busy and found.relative_cpu is not None and row.relative_cpu is not None:
            changes.append(_change(row, found.relative_cpu, row.relative_cpu))
        else:
            changes.append(_change(row, found.relative, row.relative))
    return changes


def _change(row: Row, before: Ratio, now: Ratio) -> Change:
    factor = now.median / before.median
    width = WIDER * math.hypot(now.half_width, before.half_width)
    return Change(row, factor, factor * math.exp(-width), factor * math.exp(width))


def differences(before: Run, now: Run) -> list[str]:
    """What of the machines differs, so that a comparison of the code is not all that it shows."""
    found = []
    for what, value in (
        ("device", lambda about: about["device"]),
        ("CPU", lambda about: about["cpu"]["name"]),
        ("threads", lambda about: about["cpu"]["threads"]),
        ("GPU", lambda about: [device["name"] for device in about["devices"]]),
        ("torch", lambda about: about["versions"]["torch"]),
    ):
        old, new = value(before.about), value(now.about)
        if old != new:
            found.append(f"{what}: {old} before, {new} now")
    return found
