"""What only a GPU can show: build, tests, sanitizer and benchmark, and a record of them.

    python -m benchmarks.gpu_check [OUT]      a folder; out/gpu-check if none is given

Runs with the Python that runs it, from the checkout, without network, in under 8 minutes on an
H200. That Python needs torch built for CUDA; what else is missing is named, and its step skipped.
OUT gets record.json, log.txt, the rows benchmark.jsonl, and the report of the benchmarks.
Exit status: 0 all passed, 1 something failed, 2 this machine cannot run it.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 460  # of all steps together
STEPS = {"build": 100, "tests": 200, "sanitizer": 100, "benchmark": 400}  # seconds at most, each
NOT_SUPPORTED = "Device not supported"  # what compute-sanitizer says of some virtual machines


def main(out: Path) -> int:
    """Run all steps and write their record; return the exit status."""
    if (reason := missing()) is not None:
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 2
    from benchmarks.machine import commit, gpu
    from nabla.inspect import environment

    out.mkdir(parents=True, exist_ok=True)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "environment": environment(),
        "gpu": gpu(),
    }
    record["steps"] = results = {}
    commands = {
        "build": build_command,
        "tests": tests_command,
        "sanitizer": sanitizer_command,
        "benchmark": benchmark_command,
    }
    began = time.monotonic()
    with open(out / "log.txt", "w") as log:
        for name, command in commands.items():
            seconds = min(SECONDS - (time.monotonic() - began), STEPS[name])
            results[name] = run(name, command(out, seconds), seconds, log)
            (out / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    for name, result in results.items():
        print(f"gpu-check: {name} {result.get('skipped') or result['exit_status'] or 'passed'}")
    failed = any(result.get("exit_status") for result in results.values())
    print(f"gpu-check: {'FAILED' if failed else 'passed'}, record in {out}")
    return 1 if failed else 0


# The steps: each is a command, or the reason to skip it.


def build_command(out: Path, seconds: float) -> Sequence[str] | str:
    """The native modules, in place."""
    missing = [name for name in ("setuptools", "pybind11") if find_spec(name) is None]
    missing += [name for name in ("cmake", "ninja") if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}"
    return [sys.executable, "setup.py", "build_ext", "--inplace"]


def tests_command(out: Path, seconds: float) -> Sequence[str] | str:
    """The tests marked gpu; only test files with such tests are collected."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        return f"no {', '.join(missing)}"
    marked = [str(path) for path in sorted(ROOT.glob("tests/test_*.py")) if is_marked(path)]
    processes = ["--numprocesses", "4"] if find_spec("xdist") else []  # most of it is compilation
    return [sys.executable, "-m", "pytest", "-m", "gpu", "--durations=10", *processes, *marked]


def sanitizer_command(out: Path, seconds: float) -> Sequence[str] | str:
    """Reads and writes out of bounds, on small shapes."""
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = os.pathsep.join((os.environ.get("PATH", ""), f"{cuda_home}/bin"))
    if (sanitizer := shutil.which("compute-sanitizer", path=places)) is None:
        return "no compute-sanitizer"
    if isinstance(tests := tests_command(out, seconds), str):
        return tests
    return [
        *(sanitizer, "--tool", "memcheck", "--error-exitcode", "99", "--report-api-errors", "no"),
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
    """Run a step, its output to the terminal and the log; 124 is the exit status of a late one."""
    if isinstance(command, str):
        log.write(f"== {name}: skipped, {command}\n")
        return {"skipped": command}
    log.write(f"== {name}: {' '.join(command)}\n")
    # Freed memory goes back to the device, so that the sanitizer sees every allocation end.
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if name == "sanitizer":
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
        is_late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, stop)
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.write(line)
        log.write(line)
        is_supported &= NOT_SUPPORTED not in line
    status = process.wait()
    timer.cancel()
    if name == "sanitizer" and not is_supported:
        return {"skipped": "compute-sanitizer does not support this device"}
    return {
        "command": list(command),
        "exit_status": 124 if is_late.is_set() else status,
        "seconds": round(time.monotonic() - began, 1),
    }


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
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "out" / "gpu-check"))
