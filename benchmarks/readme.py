"""Renders the tables of README.md, the page of arithmetic and the pages of GPUs from committed
results.

    python -m benchmarks.readme [--check]

results/*.jsonl are of CPUs, results/GPU/*.jsonl of GPUs of one model, whose page is
results/GPU/README.md. A table stands between <!-- results: NAME --> and <!-- end -->, with text by
hand around it; what is not measured is said so. `--check` writes nothing and exits 1 if something
would change.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks import arithmetic, gpu_tables
from benchmarks.machine import ROOT, describe
from benchmarks.presets import TABLE_DENSITIES
from benchmarks.results import OURS, Row, Run, read
from benchmarks.tables import Table

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
ARITHMETIC = RESULTS / "arithmetic.md"
UNMEASURED = "Not measured yet."
# A page of a GPU, as it begins; what stands between its tables is written by hand.
PAGE = """# Measured: {gpu}

What `nabla bench` has measured on this GPU, beside what was predicted. The tables are made by
`make readme` from the results in this folder.

{tables}

## Why they differ

Not examined yet.
"""
HEADINGS = {
    "machine": "The machine",
    "predicted": "Predicted and measured",
    "attention": "Attention, forward",
    "training": "Attention, forward and backward",
    "mask": "Building the mask",
    "block": "One CrossDiT block",
    "unmeasured": "Not measured",
}


def main(arguments: list[str]) -> int:
    """Write what is not as the results are; return the exit status."""
    runs = committed()
    changed = False
    for path, text in pages(runs).items():
        if not path.exists() or path.read_text() != text:
            changed = True
            print(f"{path.relative_to(ROOT)} differs from the results")
            if "--check" not in arguments:
                path.write_text(text)
    return int(changed and "--check" in arguments)


def committed() -> dict[str, Run]:
    """The runs under results/, by the name of their file; those of GPUs as "h100/gpu"."""
    paths = sorted((*RESULTS.glob("*.jsonl"), *RESULTS.glob("*/*.jsonl")))
    return {path.relative_to(RESULTS).with_suffix("").as_posix(): read(path) for path in paths}


def of_gpus(runs: dict[str, Run]) -> dict[str, list[Run]]:
    """The runs of GPUs, by the folder of their model."""
    found: dict[str, list[Run]] = {}
    for name, run in runs.items():
        if "/" in name:
            found.setdefault(name.partition("/")[0], []).append(run)
    return found


def pages(runs: dict[str, Run]) -> dict[Path, str]:
    """Every file that is made from results, as it has to be."""
    found = {README: rendered(README.read_text(), runs), ARITHMETIC: page(runs)}
    for folder, of_gpu in of_gpus(runs).items():
        path = RESULTS / folder / "README.md"
        text = path.read_text() if path.exists() else new_page(of_gpu)
        found[path] = gpu_page(text, of_gpu)
    return found


def new_page(runs: list[Run]) -> str:
    """A page of a GPU, without its tables."""
    tables = [
        f"## {heading}\n\n<!-- results: {name} -->\n<!-- end -->"
        for name, heading in HEADINGS.items()
    ]
    return PAGE.format(gpu=_name_of_gpu(runs), tables="\n\n".join(tables))


def _name_of_gpu(runs: Sequence[Run]) -> str:
    about = runs[-1].about
    return (about["gpu"] or about["devices"][0]["name"]).partition(",")[0]


def gpu_page(text: str, runs: list[Run]) -> str:
    """A page of a GPU with its tables as the results are; raises what `rendered` does."""
    return _filled(text, {name: partial(make, runs) for name, make in gpu_tables.TABLES.items()})


def rendered(text: str, runs: dict[str, Run]) -> str:
    """The README with its tables as the results are.

    Raises:
        ValueError: If it asks for a table that there is not, or one has no end.
    """
    tables = {name: partial(make, runs) for name, make in TABLES.items()}
    for name, make in gpu_tables.TABLES.items():
        tables[f"gpu_{name}"] = partial(_of_every_gpu, make, runs)
    return _filled(text, tables)


def _of_every_gpu(make: Callable[[Sequence[Run]], str], runs: dict[str, Run]) -> str:
    return "\n\n".join(make(of_gpu) for of_gpu in of_gpus(runs).values()) or UNMEASURED


def _filled(text: str, tables: dict[str, Callable[[], str]]) -> str:
    def render(match: re.Match[str]) -> str:
        name = match[1]
        if name not in tables:
            raise ValueError(f"a page asks for results {name!r}: there are {', '.join(tables)}")
        if "<!-- results:" in match[2]:
            raise ValueError(f"the table of results {name!r} has no end: <!-- end --> ends it")
        return f"<!-- results: {name} -->\n{tables[name]()}\n<!-- end -->"

    return re.sub(r"<!-- results: (\w+) -->\n(.*?)<!-- end -->", render, text, flags=re.DOTALL)


def page(runs: dict[str, Run]) -> str:
    """The page of arithmetic: by machine, what its runs have measured together."""
    parts = [
        "# Arithmetic at scale",
        "Made by `make readme` from the results in this folder. What a layer can gain is bounded "
        "by its FLOPs outside attention; what a thousand clips cost follows from measured rates.",
    ]
    machines: dict[str, list[Run]] = {}
    for run in runs.values():
        machines.setdefault(describe(run.about), []).append(run)
    for machine, of_machine in machines.items():
        parts += [f"## {machine}"]
        for table in (arithmetic.bounds(of_machine), arithmetic.device_hours(of_machine)):
            parts += [f"### {table.title}", table.markdown(), *map(str.strip, table.notes)]
    if not any(run.about["device"] == "cuda" for run in runs.values()):
        parts += ["## GPU", f"{UNMEASURED} `make gpu-check` measures it."]
    return "\n\n".join(parts) + "\n"


def attention_table(runs: dict[str, Run]) -> str:
    """Speed-up and E on plain sequences."""
    if (run := runs.get("cpu")) is None:
        return UNMEASURED
    groups: dict[tuple, dict[float | None, Row]] = {}
    for stage in ("block_attention", "train"):
        for row in run.measured(stage, OURS):
            if row.mask == "random" and row.workload == "sequence":
                key = (row.dtype, row.heads, row.head_dim, row.tokens, stage)
                groups.setdefault(key, {})[row.asked] = row
    cells = [
        [
            f"{dtype}, H={heads}, D={head_dim}, S={tokens:,}",
            "forward" if stage == "block_attention" else "forward + backward",
            *(_speedup(rows.get(density)) for density in TABLE_DENSITIES),
        ]
        for (dtype, heads, head_dim, tokens, stage), rows in sorted(groups.items())
    ]
    columns = ("", "density", *(f"{density:g}" for density in TABLE_DENSITIES))
    return _quoted(Table("", columns, cells), run)


def mask_table(runs: dict[str, Run]) -> str:
    """Building the mask of Kandinsky 5 Lite at 10 s."""
    if (run := runs.get("cpu")) is None:
        return UNMEASURED
    shares = {
        row.implementation: row.values["share_of_qkv"]
        for row in run.rows
        if row.stage == "memory" and row.part == "mask"
    }
    cells = []
    for row in run.measured("block_mask"):
        if row.workload == "k5-lite-10s" and row.seconds is not None and row.relative is not None:
            share = shares.get(row.implementation)
            cells.append(
                [
                    row.implementation,
                    f"{row.heads} heads, {row.tokens // 64:,} blocks, {row.dtype}",
                    f"{row.seconds.median * 1e3:,.0f} ms",
                    f"{row.speedup:.1f}x",
                    "" if share is None else f"{share:.1%}",
                ]
            )
    columns = ("", "of", "time", "speed-up", "memory, of q + k + v")
    return _quoted(Table("", columns, cells), run)


def end_to_end_table(runs: dict[str, Run]) -> str:
    """The bound by FLOPs of every model workload, beside what was measured."""
    measured = [run for run in runs.values() if run.measured("block")]
    # Of GPUs, if there are any: a CPU has measured a small part of a model.
    measured = [run for run in measured if run.about["device"] == "cuda"] or measured
    table = arithmetic.bounds(measured)
    quoted = "; ".join(dict.fromkeys(describe(run.about) for run in measured))
    note = f"End to end: {quoted}." if quoted else UNMEASURED
    return f"{table.markdown()}\n\n{note}"


def gpu_pages(runs: dict[str, Run]) -> str:
    """Where more is said of each GPU."""
    links = [
        f"[{_name_of_gpu(of_gpu)}](benchmarks/results/{folder}/README.md)"
        for folder, of_gpu in of_gpus(runs).items()
    ]
    return f"What was predicted, and all else: {', '.join(links)}." if links else ""


TABLES: dict[str, Callable[[dict[str, Run]], str]] = {
    "attention": attention_table,
    "mask": mask_table,
    "end_to_end": end_to_end_table,
    "gpu_pages": gpu_pages,
}


def _speedup(row: Row | None) -> str:
    if row is None or row.speedup is None or row.efficiency is None:
        return "unmeasured"
    return f"{row.speedup:.1f}x ({row.efficiency:.2f})"


def _quoted(table: Table, run: Run) -> str:
    return f"{table.markdown()}\n\n{describe(run.about)}."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
