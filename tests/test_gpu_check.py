"""What `make gpu-check` runs, as far as a machine without a GPU can show."""

import json
import sys

import pytest
import torch

import nabla
from benchmarks import gpu_check, predictions, presets
from benchmarks.case import Pace
from benchmarks.machine import Limits
from benchmarks.peers import PEERS, chosen
from benchmarks.results import OURS, Row, Run
from benchmarks.timing import Seconds
from benchmarks.workloads import WORKLOADS


def test_the_benchmark_of_a_gpu_covers_every_stage_of_every_workload():
    """The steps are made, and none is run: their shapes are too large for a CPU."""
    device = torch.device("cuda")
    pace = Pace({torch.float32: 1e14, torch.bfloat16: 5e14}, 1.0)
    steps = presets.find("gpu", device).steps(device, list(PEERS), pace, 300.0)
    first, *stages = [step.stage for step in steps]
    assert first == "l2"
    for workload in WORKLOADS:
        of_workload = [step.stage for step in steps if step.workload == workload.name]
        assert of_workload == [
            *("block_mask", "block_attention", "train", "block"),
            *("functional", "block_attention", "reorder", "scores", "memory"),
        ]
    assert len(stages) == 9 * len(WORKLOADS) + 1  # and the tiny model's own mask
    leading = 4 * len(presets.LEADING)
    assert {step.workload for step in steps[1 : 1 + leading]} == set(presets.LEADING)
    essential = steps[: 1 + 4 * len(WORKLOADS)]
    assert {step.workload for step in essential} == {"", *(w.name for w in WORKLOADS)}
    assert "functional" not in {step.stage for step in essential}


def test_what_counts_most_fits_into_a_short_run():
    """By the rates of an H100, beside the peers that are worth their time."""
    device = torch.device("cuda")
    pace = Pace({torch.float32: 1.5e13, torch.bfloat16: 6e14}, 1.0, sparse=2.0)
    others = chosen(["sdpa-cudnn", "sorting", "flex"])
    steps = presets.find("gpu", device).steps(device, others, pace, 150.0)
    leading = steps[: 1 + 4 * len(presets.LEADING)]
    assert sum(step.least_seconds(pace) for step in leading) < 130


def test_stages_and_workloads_are_chosen_by_name():
    device = torch.device("cuda")
    pace = Pace({torch.float32: 1e14, torch.bfloat16: 5e14}, 1.0)
    steps = presets.find("gpu", device).steps(device, list(PEERS), pace, 300.0)

    def chosen_by(*names):
        return [(step.stage, step.workload) for step in presets.only(steps, names)]

    assert chosen_by("l2", "block_mask") == [
        ("l2", ""),
        *(("block_mask", name) for name in presets.LEADING),
        *(("block_mask", w.name) for w in WORKLOADS if w.name not in presets.LEADING),
    ]
    assert chosen_by("train", "wan14b-720p") == [("train", "wan14b-720p")]
    of_workload = chosen_by("wan14b-720p")
    assert len(of_workload) == 1 + 9 and of_workload[0] == ("l2", "")
    with pytest.raises(ValueError, match="--only nonsense are unknown: give some of block, "):
        presets.only(steps, ["train", "nonsense"])


ENVIRONMENT = {"versions": {"torch": "2", "triton": "3", "nabla": "0"}}


def test_the_check_runs_its_steps_and_records_them(monkeypatch, tmp_path, capsys):
    said = [sys.executable, "-c", "print('hello from a step')"]
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(gpu_check, "missing", lambda: None)
    monkeypatch.setattr(gpu_check, "build_command", lambda *_: "no cmake")
    monkeypatch.setattr(gpu_check, "sanitizer_command", lambda *_: "no compute-sanitizer")
    monkeypatch.setattr(nabla.inspect, "environment", lambda: ENVIRONMENT)
    monkeypatch.setattr(nabla.dispatch, "architecture", lambda device: 90)
    for tests, benchmark_, status in ((said, said, 0), (said, failing, 1), (failing, said, 1)):
        monkeypatch.setattr(gpu_check, "tests_command", lambda *_, command=tests: command)
        monkeypatch.setattr(gpu_check, "benchmark_command", lambda *_, c=benchmark_: c)
        assert gpu_check.main(tmp_path / "out") == status
        steps = json.loads((tmp_path / "out" / "record.json").read_text())["steps"]
        assert list(steps) == list(gpu_check.STEPS)
        assert steps["build"] == {"skipped": "no cmake"}
        assert steps["tests"]["exit_status"] == (3 if tests is failing else 0)
        assert "hello from a step" in (tmp_path / "out" / "log.txt").read_text()
        page = (tmp_path / "out" / "page.md").read_text()
        assert "| build | no cmake |" in page and "Not known: " in page
        assert ("FAILED with status 3" in page) == bool(status)
        assert ("FAILED" in capsys.readouterr().out) == bool(status)


def test_some_steps(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "missing", lambda: None)
    monkeypatch.setattr(gpu_check, "build_command", lambda *_: pytest.fail("not asked for"))
    monkeypatch.setattr(gpu_check, "sanitizer_command", lambda *_: "no compute-sanitizer")
    monkeypatch.setattr(nabla.inspect, "environment", lambda: ENVIRONMENT)
    monkeypatch.setattr(nabla.dispatch, "architecture", lambda device: 90)
    assert gpu_check.main(tmp_path, ["memcheck", "synccheck"]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert list(record["steps"]) == ["memcheck", "synccheck"]
    assert gpu_check.main(tmp_path, ["memcheck", "nonsense"]) == 2
    assert "gpu-check: no step nonsense: build, tests, memcheck" in capsys.readouterr().err


def test_a_late_step_is_stopped(tmp_path):
    with open(tmp_path / "log.txt", "w") as log:
        command = [sys.executable, "-c", "import time; print('begun'); time.sleep(60)"]
        result = gpu_check.run("tests", command, 2.0, log)
    assert result["exit_status"] == 124
    assert result["seconds"] < 20


def test_every_step_has_time_left():
    """However long those before it take, and nothing takes ten minutes."""
    left = gpu_check.SECONDS - gpu_check.PAGE_SECONDS
    for name, budget in gpu_check.STEPS.items():
        seconds = gpu_check.seconds_of(name, left)
        assert budget.least <= seconds <= budget.most
        left -= seconds
    assert 0 <= left and gpu_check.SECONDS < 600
    spared = gpu_check.SECONDS - gpu_check.PAGE_SECONDS
    assert gpu_check.seconds_of("benchmark", spared) == gpu_check.STEPS["benchmark"].most


@pytest.mark.parametrize("tool", gpu_check.SANITIZERS)
def test_sanitizers_look_at_our_kernels(tool, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, **_: f"/bin/{name}")
    command = gpu_check.sanitizer_command(tool, tmp_path, 30)
    assert command[:3] == ["/bin/compute-sanitizer", "--tool", tool]
    assert command[-2:] == ["-k", "sanitizer"]
    assert ("--report-api-errors" in command) == (tool == "memcheck")


def test_predictions_stand_beside_what_was_measured():
    def row(seconds, union, **values):
        return Row(
            *("block_attention", "k5-pro-10s-hd", OURS),
            **{"mask": "random", "asked": 0.1, "density": 0.1, "head_dim": 128},
            **{"flops": 9e13, "values": {"union": union}, "seconds": Seconds(*[seconds] * 3)},
            **values,
        )

    of_l2 = Row("l2", "tiles", "bulk copies", bytes=5e12, seconds=Seconds(1.0, 1.0, 1.0))
    run = Run("gpu", {}, Limits(1e12, {}), [of_l2, row(0.3, 2.71), row(0.2, 1.0, part="graph")])
    cold, warm = predictions.predictions(run, "sm_90a")
    assert (cold.measured, warm.measured) == (pytest.approx(300), pytest.approx(450))
    # Three query blocks load a K and a V of 16 KiB each for every block of their union.
    assert cold.l2 == pytest.approx(4 * 64 * 64 * 128 / (2 * 16384 * 2.71 / 3) * 5)
    assert cold.l2 < warm.l2 and cold.model < warm.model < 989
    (line, _) = predictions.table([cold, warm]).cells
    assert line[:4] == ["k5-pro-10s-hd", "random", "0.100", "2.71"]
    assert line[-1] == f"{300 / min(cold.model, cold.l2):.2f}"


def test_the_commands_of_the_check(tmp_path):
    command = gpu_check.tests_command(tmp_path, 100)
    for name in ("test_gpu.py", "test_triton.py", "test_devices.py"):
        assert any(part.endswith(name) for part in command), name
    assert not any(part.endswith("test_grid.py") for part in command)
    command = gpu_check.benchmark_command(tmp_path, 100)
    assert str(tmp_path / "benchmark.jsonl") in command
    assert command[command.index("--seconds") + 1] == "70"
