"""What `make gpu-check` runs, as far as a machine without a GPU can show."""

import json
import sys

import torch

from benchmarks import gpu_check, presets
from benchmarks.case import Pace
from benchmarks.peers import PEERS
from benchmarks.workloads import WORKLOADS


def test_the_benchmark_of_a_gpu_covers_every_stage_of_every_workload():
    """The steps are made, and none is run: their shapes are too large for a CPU."""
    device = torch.device("cuda")
    pace = Pace({torch.float32: 1e14, torch.bfloat16: 5e14}, 1.0)
    steps = presets.find("gpu", device).steps(device, list(PEERS), pace, 300.0)
    stages = [step.stage for step in steps]
    for workload in WORKLOADS:
        of_workload = {step.stage for step in steps if step.workload == workload.name}
        assert of_workload == {
            *("reorder", "scores", "block_mask", "block_attention", "functional", "train"),
            *("block", "memory"),
        }
    assert len(stages) == 8 * len(WORKLOADS) + 1  # and the tiny model's own mask
    last_forward = max(i for i, stage in enumerate(stages[:-1]) if stage == "block_attention")
    assert last_forward < stages.index("train")


def test_the_check_runs_its_steps_and_records_them(monkeypatch, tmp_path, capsys):
    said = [sys.executable, "-c", "print('hello from a step')"]
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(gpu_check, "missing", lambda: None)
    monkeypatch.setattr(gpu_check, "build_command", lambda *_: "no cmake")
    monkeypatch.setattr(gpu_check, "sanitizer_command", lambda *_: "no compute-sanitizer")
    for tests, benchmark_, status in ((said, said, 0), (said, failing, 1), (failing, said, 1)):
        monkeypatch.setattr(gpu_check, "tests_command", lambda *_, command=tests: command)
        monkeypatch.setattr(gpu_check, "benchmark_command", lambda *_, c=benchmark_: c)
        assert gpu_check.main(tmp_path / "out") == status
        steps = json.loads((tmp_path / "out" / "record.json").read_text())["steps"]
        assert list(steps) == list(gpu_check.STEPS)
        assert steps["build"] == {"skipped": "no cmake"}
        assert steps["tests"]["exit_status"] == (3 if tests is failing else 0)
        assert "hello from a step" in (tmp_path / "out" / "log.txt").read_text()
        assert ("FAILED" in capsys.readouterr().out) == bool(status)


def test_a_late_step_is_stopped(tmp_path):
    with open(tmp_path / "log.txt", "w") as log:
        command = [sys.executable, "-c", "import time; print('begun'); time.sleep(60)"]
        result = gpu_check.run("tests", command, 2.0, log)
    assert result["exit_status"] == 124
    assert result["seconds"] < 20


def test_the_commands_of_the_check(tmp_path):
    command = gpu_check.tests_command(tmp_path, 100)
    for name in ("test_gpu.py", "test_triton.py", "test_devices.py"):
        assert any(part.endswith(name) for part in command), name
    assert not any(part.endswith("test_grid.py") for part in command)
    command = gpu_check.benchmark_command(tmp_path, 100)
    assert str(tmp_path / "benchmark.jsonl") in command
    assert command[command.index("--seconds") + 1] == "70"
