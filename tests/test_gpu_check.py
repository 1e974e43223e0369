"""What `make gpu-check` runs, as far as a machine without a GPU can show: on the CPU, and tiny."""

import json
import sys

import pytest
import torch

import nabla
from benchmarks import gpu, gpu_check
from benchmarks.workloads import WORKLOADS, Workload

TINY = Workload("tiny", (3, 16, 16), 2, 64, 0.6, (1, 3, 3), (0.5, 0.3))


@pytest.fixture
def benchmark(tmp_path):
    torch.use_deterministic_algorithms(False)  # which times are not taken with
    return gpu.Benchmark(
        torch.device("cpu"), 100, tmp_path / "new" / "rows.json", compiler=lambda f, **_: f
    )


def test_the_benchmark_measures_every_stage(benchmark):
    benchmark.run([TINY])
    assert not benchmark.failures
    rows = json.loads(benchmark.out.read_text())
    assert not [row for row in rows if "error" in row or "skipped" in row]
    found = {(row["case"], row.get("implementation"), row.get("density") == 1) for row in rows}
    assert found >= {
        ("machine", None, False),
        ("mask", "ours", False),
        ("mask", "sorting", False),
        ("forward", "sdpa", True),
        ("forward", "ours", False),
        ("forward", "flex", False),
        ("backward", "sdpa", True),
        ("backward", "ours", False),
    }
    for row in rows:
        assert row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
        if row["case"] in ("forward", "backward") and row["implementation"] == "ours":
            dense = next(
                other["ms"]["median"]
                for other in rows
                if (other["case"], other.get("implementation")) == (row["case"], "sdpa")
            )
            assert row["E"] == pytest.approx(row["density"] * dense / row["ms"]["median"])
            assert row["speedup_of_ours"] == 1


@pytest.mark.parametrize("stage", ["mask", "forward", "backward"])
def test_wrong_output_gets_no_time(benchmark, stage, monkeypatch):
    if stage == "mask":
        bits = nabla.sliding_tile_mask(TINY.grid, (1, 1, 1)).bits
        wrong = nabla.BlockMask(bits.expand(1, TINY.heads, -1, -1), TINY.grid)
        right = nabla.create_block_mask

        def create_block_mask(*args, backend="auto", **options):
            return wrong if backend == "auto" else right(*args, backend=backend, **options)

        monkeypatch.setattr(nabla, "create_block_mask", create_block_mask)
    else:
        right = nabla.block_sparse_attention

        def block_sparse_attention(q, *args, **options):
            out, lse = right(q, *args, **options)
            return out * 1.1, lse

        monkeypatch.setattr(nabla, "block_sparse_attention", block_sparse_attention)
    benchmark.attempt(stage, lambda: getattr(benchmark, f"measure_{stage}")(TINY))
    assert benchmark.failures == 1
    assert "WrongOutput" in benchmark.rows[-1]["error"]
    assert not [row for row in benchmark.rows if row.get("implementation") == "ours"]


def test_a_peer_that_fails_is_named_and_left_out(benchmark):
    def fail():
        raise RuntimeError("no kernel for this")

    assert list(benchmark.working({"good": lambda: None, "bad": fail})) == ["good"]
    assert benchmark.rows == [
        {"case": "peer", "implementation": "bad", "error": "RuntimeError: no kernel for this"}
    ]
    assert not benchmark.failures


def test_nothing_begins_after_the_deadline(benchmark):
    benchmark.deadline = 0
    benchmark.run([TINY])
    assert [row["skipped"] for row in benchmark.rows] == ["out of time"] * 4


def test_the_masks_have_the_density_that_is_asked_for():
    workload = Workload("small", (9, 48, 64), 4, 64, 0.9, (3, 3, 3), (0.5,))
    for density in (0.3, 0.5):
        mask = gpu.nabla_like_mask(workload, density, torch.device("cpu"))
        assert mask.density().item() == pytest.approx(density, abs=0.02)
        window = nabla.sliding_tile_mask(workload.grid, workload.window).to_dense()
        assert (mask.to_dense() >= window).all()


def test_workloads_are_whole_grids():
    assert {workload.grid.num_blocks for workload in WORKLOADS} == {744, 1464, 1860, 1260, 3660}
    for workload in WORKLOADS:
        assert not workload.grid.is_ragged
    tera = {workload.name: workload.flops / 1e12 for workload in WORKLOADS}
    assert tera["wan14b-720p"] == pytest.approx(133.18, abs=0.01)
    assert tera["k5-pro-10s-hd"] == pytest.approx(898.96, abs=0.01)


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
    assert str(tmp_path / "benchmark.json") in gpu_check.benchmark_command(tmp_path, 100)
