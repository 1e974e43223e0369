"""What only a GPU can show: the tests marked gpu, and a record of what they ran on.

    python -m benchmarks.gpu_check [OUT.json]

Runs with the Python that runs it, from the checkout, without network; that Python needs torch built
for CUDA, and pytest. Only test files with such tests are collected, so nothing else is needed.
Exit status: 0 all passed, 1 a test failed, 2 this machine cannot run them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(out: Path) -> int:
    """Run the tests and write their record; return the exit status."""
    if (reason := missing()) is not None:
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 2
    from nabla.inspect import environment

    marked = [path for path in sorted(ROOT.glob("tests/test_*.py")) if is_marked(path)]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *map(str, marked)]
    status = subprocess.run(command, cwd=ROOT).returncode
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "pytest_exit_status": status,
        "environment": environment(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"gpu-check: {'passed' if status == 0 else 'FAILED'}, record in {out}")
    return 0 if status == 0 else 1


def missing() -> str | None:
    """Return why this Python cannot run the tests here, with the remedy, or None."""
    for module in ("torch", "pytest"):
        if find_spec(module) is None:
            return (
                f"{sys.executable} has no {module}. Name a Python that has torch with CUDA and "
                "pytest: make gpu-check PYTHON=/path/to/python"
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


def commit() -> str | None:
    """Return the commit of the checkout, or None where there is no git."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return (
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
        )
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "out" / "gpu-check.json"))
