"""One file of results from several runs on GPUs of one model.

    python -m benchmarks.merge OUT RUN... [--commit COMMIT]

A run may measure a part of a preset (`nabla bench PRESET --only ...`). Of a case that several runs
have measured, the last one counts; what one run has left out and another measured is measured. The
head is that of the last run, and names date, commit and machine of each; a row says which it is of.
What failed or was wrong replaces a time that was measured before. Rows of our attention get what is
predicted of the kernels that are compiled here, unless they hold a prediction.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.machine import Limits, full
from benchmarks.predictions import with_predictions
from benchmarks.results import Row, Run, differences, read

OF_A_RUN = ("date", "commit", "gpu", "platform", "load")  # that the head keeps of each
MAY_DIFFER = ("CPU", "threads")  # of the machines around the GPUs


def merged(runs: Sequence[Run]) -> Run:
    """All rows, as if one run had measured them.

    Args:
        runs: The earliest first; each may be merged itself.

    Raises:
        ValueError: If they are of different GPUs or versions.
    """
    *_, last = runs
    for run in runs:
        found = [line for line in differences(run, last) if not line.startswith(MAY_DIFFER)]
        if found:
            raise ValueError(f"results of different machines: {'; '.join(found)}")
    parts: list[dict] = []
    rows: list[Row] = []
    gemm: dict[str, float] = {}
    for run in runs:
        rows += [replace(row, run=row.run + len(parts)) for row in run.rows]
        parts += run.about.get("runs", [{name: run.about.get(name) for name in OF_A_RUN}])
        gemm |= run.limits.gemm
    about = last.about | {"runs": parts}
    return Run(last.preset, about, Limits(last.limits.copy, gemm), _latest(rows))


def _latest(rows: Sequence[Row]) -> list[Row]:
    """Of each case the row that was measured last, or that says why it was not."""
    found: dict[tuple, Row] = {}
    for row in rows:
        before = found.get(row.key)
        if before is None or not _is_left_out(row) or _is_left_out(before):
            found[row.key] = row
    measured = [row for row in found.values() if _has_result(row)]
    peers = {row.implementation for row in measured}
    steps = {(row.stage, row.workload) for row in measured}
    return [
        row
        for row in found.values()
        if not _is_left_out(row)
        # What stands for a whole step, or for all of a peer, and was measured after all.
        or not (row.stage == "peer" and row.implementation in peers)
        and not (row.tokens == 0 and (row.stage, row.workload) in steps)
    ]


def _has_result(row: Row) -> bool:
    return row.status in ("measured", "extrapolated")


def _is_left_out(row: Row) -> bool:
    """Whether nothing was tried; what failed or was wrong is a result, and replaces a time."""
    return row.status in ("skipped", "absent")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the merged runs."""
    parser = argparse.ArgumentParser(prog="benchmarks.merge", description="Merge results.")
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--commit", help="of runs that name none, as where there was no git")
    options = parser.parse_args(arguments)
    try:
        runs = [_with_commit(read(path), path, options.commit) for path in options.runs]
        run = merged(runs)
    except (OSError, ValueError) as error:
        print(f"benchmarks.merge: {error}", file=sys.stderr)
        return 1
    if (architecture := run.about.get("architecture")) is not None:
        try:
            run = with_predictions(run, architecture)
        except (FileNotFoundError, ValueError) as error:
            print(f"benchmarks.merge: no predictions: {error}", file=sys.stderr)
    run.write(options.out)
    counts = {status: 0 for status in dict.fromkeys(row.status for row in run.rows)}
    for row in run.rows:
        counts[row.status] += 1
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"{options.out}: {len(run.rows)} rows of {len(run.about['runs'])} runs: {said}")
    return 0


def _with_commit(run: Run, path: Path, commit: str | None) -> Run:
    named = run.about.get("commit")
    if named and not named.endswith("-dirty"):
        return run
    if commit is None:
        raise ValueError(f"{path} names no commit but {named}: name it by --commit")
    return replace(run, about=run.about | {"commit": full(commit)})


if __name__ == "__main__":
    sys.exit(main())
