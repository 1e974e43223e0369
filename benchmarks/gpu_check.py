"""What only a GPU can show: build, tests, sanitizers and benchmark, and a record of them.

    python -m benchmarks.gpu_check [OUT [STEP ...]]     a folder, out/gpu-check if none is given;
                                                        and steps to leave it at, such as memcheck

Runs with the Python that runs it, from the checkout, without network, in less than 10 minutes: a
step that takes longer than it may is stopped, the next ones have their time, and what it has shown
is kept. That Python needs torch built for CUDA; what else is missing is named, and its step
skipped. OUT gets record.json, page.md, log.txt, the rows benchmark.jsonl, and the report of the
benchmarks. Exit status: 0 all passed, 1 something failed, 2 this machine cannot run it.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TextIO

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 570  # of all steps together
PAGE_SECONDS = 20  # for what comes after the last step
LATE = 124  # the exit status of a step that was stopped
NOT_SUPPORTED = "Device not supported"  # what compute-sanitizer says of some virtual machines


class Budget(NamedTuple):
    """Seconds of a step: it may take so many, and so many are left to it by those before it."""

    most: int
    least: int


STEPS = {
    "build": Budget(240, 0),
    "tests": Budget(180, 90),
    "memcheck": Budget(45, 20),
    "racecheck": Budget(45, 20),
    "initcheck": Budget(45, 20),
    "synccheck": Budget(45, 20),
    "benchmark": Budget(400, 150),
}
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


def main(out: Path, names: Sequence[str] = tuple(STEPS)) -> int:
    """Run steps and write their record; return the exit status."""
    if unknown := [name for name in names if name not in STEPS]:
        print(f"gpu-check: no step {', '.join(unknown)}: {', '.join(STEPS)}", file=sys.stderr)
        return 2
    if (reason := missing()) is not None:
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 2
    from benchmarks.machine import commit, gpu
    from nabla.inspect import environment

    out.mkdir(parents=True, exist_ok=True)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "gpu": gpu(),
    }
    record["steps"] = results = {}
    commands = {
        "build": build_command,
        "tests": tests_command,
        **{tool: partial(sanitizer_command, tool) for tool in SANITIZERS},
        "benchmark": benchmark_command,
    }
    end = time.monotonic() + SECONDS - PAGE_SECONDS
    if "benchmark" in names:
        (out / "benchmark.jsonl").unlink(missing_ok=True)  # of an earlier check
    with open(out / "log.txt", "w", buffering=1) as log:
        if "build" not in names:
            record["environment"] = environment()
        for name, command in commands.items():
            if name not in names:
                continue
            seconds = seconds_of(name, end - time.monotonic())
            results[name] = run(name, command(out, seconds), seconds, log)
            if name == "build":
                record["environment"] = environment()  # with the modules that are there now
            write(out, record)
    if "benchmark" in names:
        record["predictions"] = predicted(out)
    write(out, record)
    for name, result in results.items():
        print(f"gpu-check: {name} {verdict(result)}")
    failed = any(result.get("exit_status") for result in results.values())
    print(f"gpu-check: {'FAILED' if failed else 'passed'}, record in {out}")
    return 1 if failed else 0


def seconds_of(name: str, left: float) -> float:
    """What a step may take of the seconds that are left to it and those after it."""
    names = list(STEPS)
    later = sum(STEPS[step].least for step in names[names.index(name) + 1 :])
    return min(STEPS[name].most, left - later)


def verdict(result: dict[str, Any]) -> str:
    """A word on a step."""
    if "skipped" in result:
        return result["skipped"]
    status = result["exit_status"]
    return {0: "passed", LATE: "out of time"}.get(status, f"FAILED with status {status}")


# The steps: each is a command, or the reason to skip it.


def build_command(out: Path, seconds: float) -> Sequence[str] | str:
    """The native modules, in place."""
    missing = [name for name in ("setuptools", "pybind11") if find_spec(name) is None]
    missing += [name for name in ("cmake", "ninja") if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}"
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]  # goes on without a module
    verify = [sys.executable, "-c", "from nabla import cuda; exit(cuda.unavailable_reason())"]
    return ["sh", "-c", f"{shlex.join(build)} && {shlex.join(verify)}"]


def tests_command(out: Path, seconds: float) -> Sequence[str] | str:
    """The tests marked gpu; only test files with such tests are collected."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        return f"no {', '.join(missing)}"
    marked = [str(path) for path in sorted(ROOT.glob("tests/test_*.py")) if is_marked(path)]
    processes = ["--numprocesses", "4"] if find_spec("xdist") else []  # most of it is compilation
    # Each test has its line when it ends; files that ask for packages that are not there, an error.
    options = ["-v", "--durations=10", "--continue-on-collection-errors"]
    return [sys.executable, "-m", "pytest", "-m", "gpu", *options, *processes, *marked]


def sanitizer_command(tool: str, out: Path, seconds: float) -> Sequence[str] | str:
    """On small shapes: accesses out of bounds, races, what was never written, barriers missed."""
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = os.pathsep.join((os.environ.get("PATH", ""), f"{cuda_home}/bin"))
    if (sanitizer := shutil.which("compute-sanitizer", path=places)) is None:
        return "no compute-sanitizer"
    if isinstance(tests := tests_command(out, seconds), str):
        return tests
    options = ["--tool", tool, "--error-exitcode", "99"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [
        *(sanitizer, *options),
        *(sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py", "-k", "sanitizer"),
    ]


def benchmark_command(out: Path, seconds: float) -> Sequence[str] | str:
    """The real workloads against what there is; it begins nothing late, to end in time."""
    options = {
        "--seconds": str(int(seconds - 30)),
        "--json": str(out.resolve() / "benchmark.jsonl"),
        "--out": str(out.resolve() / "benchmark"),
    }
    return [sys.executable, "-m", "benchmarks.suite", "gpu", *itertools.chain(*options.items())]


def run(name: str, command: Sequence[str] | str, seconds: float, log: TextIO) -> dict:
    """Run a step, its output to the terminal and the log."""
    if isinstance(command, str):
        log.write(f"== {name}: skipped, {command}\n")
        return {"skipped": command}
    log.write(f"== {name}: {' '.join(command)}\n")
    # Freed memory goes back to the device, so that the sanitizer sees every allocation end.
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if name in SANITIZERS:
        environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    began, is_late, is_supported = time.monotonic(), threading.Event(), True
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )

    def stop() -> None:
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, signal.SIGKILL)
            is_late.set()

    timer = threading.Timer(seconds, stop)
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.write(line)
        log.write(line)
        is_supported &= NOT_SUPPORTED not in line
    status = process.wait()
    timer.cancel()
    if name in SANITIZERS and not is_supported:
        return {"skipped": "compute-sanitizer does not support this device"}
    return {
        "command": list(command),
        "exit_status": LATE if is_late.is_set() else status,
        "seconds": round(time.monotonic() - began, 1),
    }


# The record, and what people read of it.


def predicted(out: Path) -> dict[str, Any]:
    """What our forward was predicted to reach beside what it reached, or why that is not known."""
    import torch

    from benchmarks.predictions import l2_bandwidth, predictions
    from benchmarks.results import read
    from nabla import cuda, dispatch

    try:
        run = read(out / "benchmark.jsonl")
        compute_capability = dispatch.architecture(torch.device("cuda"))
        found = predictions(run, cuda.architectures()[compute_capability])
    except (FileNotFoundError, ValueError) as error:
        return {"skipped": str(error)}
    except KeyError:
        return {"skipped": f"the CUDA kernels are not compiled for sm_{compute_capability}"}
    return {"l2": l2_bandwidth(run), "forward": [one._asdict() for one in found]}


def write(out: Path, record: dict[str, Any]) -> None:
    """Write the record and its page."""
    (out / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / "page.md").write_text(page(record))


def page(record: dict[str, Any]) -> str:
    """What people read of a record."""
    from benchmarks.predictions import Prediction, table
    from benchmarks.tables import Table

    versions = record["environment"]["versions"]
    steps = Table(
        "",
        ("step", "", "seconds"),
        [[name, verdict(x), str(x.get("seconds", ""))] for name, x in record["steps"].items()],
    )
    parts = [
        "# Check on a GPU",
        f"{record['gpu']}; torch {versions['torch']}, triton {versions['triton']}, nabla "
        f"{versions['nabla']} at {record['commit']}, {record['date']}",
        steps.markdown(),
    ]
    found = record.get("predictions", {"skipped": "the benchmark has not ended"})
    parts.append("## Predicted and measured")
    if "skipped" in found:
        parts.append(f"Not known: {found['skipped']}.")
    else:
        l2 = "was not measured" if found["l2"] is None else f"{found['l2'] / 1e12:.2f} TB/s"
        lines = table([Prediction(**one) for one in found["forward"]])
        parts += [f"L2 to shared memory, by bulk copies: {l2}.", lines.markdown(), *lines.notes]
    return "\n\n".join(parts) + "\n"


def missing() -> str | None:
    """Return why this Python cannot run the check here, with the remedy, or None."""
    if find_spec("torch") is None:
        return (
            f"{sys.executable} has no torch. Name a Python that has torch with CUDA: "
            "make gpu-check PYTHON=/path/to/python"
        )
    import torch

    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} of {sys.executable} is built without CUDA. Name a Python "
            "whose torch is built for CUDA: make gpu-check PYTHON=/path/to/python"
        )
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} finds no CUDA device. Run this on a machine with an NVIDIA "
            "GPU and its driver (nvidia-smi lists them)"
        )
    return None


def is_marked(path: Path) -> bool:
    """Whether a test file has tests for a GPU."""
    return "mark.gpu" in path.read_text()


if __name__ == "__main__":
    folder, *steps = sys.argv[1:] or [str(ROOT / "out" / "gpu-check")]
    sys.exit(main(Path(folder), steps or tuple(STEPS)))
