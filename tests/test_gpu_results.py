"""Results of GPUs: several runs in one file, and the tables that are made of them."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu_tables, merge, predictions, readme, results
from benchmarks.case import Shape
from benchmarks.machine import Limits, commit, describe
from benchmarks.results import OURS, Row, Run
from benchmarks.timing import Ratio, Seconds
from benchmarks.workloads import BY_NAME

PRO = BY_NAME["k5-pro-10s-sd"]
SHAPE = Shape(PRO, PRO, torch.bfloat16, torch.device("cuda"))
UNIONS = {"union": 1.5, "union_of_keys": 1.3, "union_of_queries": 1.3}
LIKE = "nabla-like 0.5"


def run(rows, *, date="2026-01-02", **about):
    about = {
        "device": "cuda",
        "cpu": {"name": "A CPU", "threads": 16},
        "devices": [{"name": "NVIDIA G100"}],
        "gpu": "NVIDIA G100, driver 1.2, up to 2000 MHz, memory 2000 MHz, 700 W",
        "architecture": "sm_90a",
        "versions": {"torch": "2.11", "nabla": "0.1"},
        "commit": "a" * 40,
        "date": f"{date}T03:04:05",
        "platform": "Linux",
        "load": 0.1,
        **about,
    }
    return Run("gpu", about, Limits(3e12, {"bfloat16": 8e14}), rows)


def timed(stage, name, seconds, over=1.0, work=1.0, **values):
    relative = Ratio(*[seconds / over] * 3)
    flops = values.get("density", 1.0) * work * PRO.flops
    return SHAPE.row(
        stage, name, seconds=Seconds(*[seconds] * 3), relative=relative, flops=flops, **values
    )


def attention_rows(stage, work, dense, seconds):
    about = {"mask": LIKE, "asked": 0.1, "density": 0.1, "values": UNIONS}
    return [
        timed(stage, "sdpa-cudnn", dense, dense, work, mask="dense", density=1.0),
        timed(stage, OURS, seconds, dense, work, **about),
        timed(stage, "flex", 3 * seconds, dense, work, **about),
        timed(stage, "vsa-tk", 1.5 * seconds, dense, work, **about),
    ]


def of_training():
    ours = attention_rows("train", 3.5, 0.8, 0.16)[1]
    return [*attention_rows("train", 3.5, 0.8, 0.16), replace(ours, part="deterministic")]


ROWS = [
    Row("l2", "tiles", "bulk copies", bytes=5e12, seconds=Seconds(1.0, 1.0, 1.0)),
    *attention_rows("block_attention", 1.0, 0.2, 0.032),
    *of_training(),
    timed("block_mask", "sorting", 0.05, 0.05),
    timed("block_mask", OURS, 0.002, 0.05, values={}),
    timed("block", "dense", 0.3, 0.3, mask="dense", part="block", density=1.0),
    timed(
        *("block", OURS, 0.1, 0.3),
        **{"mask": LIKE, "asked": 0.1, "part": "block", "density": 0.1, "values": {"bound": 3.2}},
    ),
]


def test_of_each_case_the_run_that_measured_it_last_counts():
    skipped = Row("train", PRO.name, status="skipped", reason="out of time")
    absent = Row("peer", "", "flex", "absent", "not installed")
    failed = replace(ROWS[4], status="failed", seconds=None, relative=None, reason="no kernel")
    first = run([absent, *ROWS[:4], failed, skipped])
    slower = timed(
        "block_attention", OURS, 0.04, 0.2, mask=LIKE, asked=0.1, density=0.1, values=UNIONS
    )
    second = run([slower, *of_training()], date="2026-01-03", commit="b" * 40)
    both = merge.merged([first, second])
    assert [row.run for row in both.rows] == [0, 0, 1, 0, 0, *[1] * 5]
    assert both.rows[2].seconds.median == 0.04
    assert both.rows[4].status == "failed"  # nothing has measured it
    assert skipped not in both.rows and absent not in both.rows
    assert [one["commit"][0] for one in both.about["runs"]] == ["a", "b"]
    assert both.about["date"] == second.about["date"]
    assert "at aaaaaaaaaaaa and bbbbbbbbbbbb, 2026-01-02 and 2026-01-03" in describe(both.about)
    unmeasured = merge.merged([second, first])
    assert {row.status for row in unmeasured.rows} == {"measured", "failed"}
    wrong = replace(slower, status="wrong", seconds=None, relative=None, reason="0.5 off")
    assert merge.merged([both, run([wrong])]).rows[2].status == "wrong"  # its time counts no more
    third = merge.merged([both, run([replace(slower, asked=0.2)])])
    assert third.rows[-1].run == 2 and len(third.about["runs"]) == 3
    assert third.rows[2].run == 1


def test_results_of_different_machines_are_not_merged():
    first = run(ROWS)
    for about, word in (
        ({"devices": [{"name": "NVIDIA G200"}]}, "GPU"),
        ({"versions": {"torch": "2.12", "nabla": "0.1"}}, "torch: 2.11 before, 2.12 now"),
    ):
        with pytest.raises(ValueError, match=f"different machines: {word}"):
            merge.merged([first, run(ROWS, **about)])
    merge.merged([first, run(ROWS, cpu={"name": "Another CPU", "threads": 8})])


def test_the_command_names_a_commit_and_predicts(tmp_path, capsys):
    run(ROWS, commit=None).write(tmp_path / "a.jsonl")
    out = tmp_path / "gpu" / "gpu.jsonl"
    assert merge.main([str(out), str(tmp_path / "a.jsonl")]) == 1
    assert "a.jsonl names no commit but None: name it by --commit" in capsys.readouterr().err
    assert merge.main([str(out), str(tmp_path / "a.jsonl"), "--commit", "nonsense"]) == 1
    assert "commit 'nonsense' is not in this checkout" in capsys.readouterr().err
    assert merge.main([str(out), str(tmp_path / "a.jsonl"), "--commit", "HEAD"]) == 0
    found = results.read(out)
    assert found.about["commit"] == commit().removesuffix("-dirty")
    assert json.loads(out.read_text().splitlines()[0])["about"]["runs"][0]["commit"]
    predicted = predictions.stored(found)
    assert [(one.stage, one.mask) for one in predicted] == [
        *(("block_attention", LIKE), ("train", LIKE), ("train", f"{LIKE} deterministic")),
    ]
    assert predictions.stored(predictions.with_predictions(found, "sm_90a")) == predicted


def test_predicted_times_of_kernels_add_up():
    """At one rate the whole has it; what is computed twice takes its time."""
    forward, training, deterministic = predictions.predictions(run(ROWS), "sm_90a")
    assert forward.measured == pytest.approx(0.1 * PRO.flops / 0.032 / 1e12)
    assert deterministic.model == training.model < 989
    _, fast, deterministic = predictions.predictions(run(ROWS), "sm_80")
    assert fast.model != deterministic.model
    kernels = {
        attention.products: predictions._bound(attention, 1.3)
        for attention in predictions.bounds.KERNELS
        if (attention.architecture, attention.head_dim) == ("sm_90a", 128)
    }
    kernels[2] = predictions._bound(
        next(a for a in predictions.bounds.KERNELS if a.label == "sm_90a forward D=128"), 1.5
    )
    times = {number: number / found.tflops for number, found in kernels.items()}
    assert forward.model == pytest.approx(2 / times[2])
    assert training.model == pytest.approx(7 / (times[2] + times[4] + times[3]))


def test_tables_of_a_gpu():
    runs = [predictions.with_predictions(run(ROWS), "sm_90a")]
    forward = gpu_tables.attention(runs)
    rate = 0.1 * PRO.flops / 0.032 / 1e12
    line = f"| {PRO.name} | 0.1 | 200 sdpa-cudnn | 32.0 | {rate:.0f} | 6.2x (0.62) | 3.0x | 1.5x |"
    assert line in forward and "over flex | over vsa-tk |" in forward
    slower = replace(ROWS[4], relative=Ratio(0.4, 0.4, 0.4))  # within its rounds; ours has 0.16
    assert "| 3.0x | 2.5x |" in gpu_tables.attention([run([*ROWS[:4], slower])])
    assert "NVIDIA G100, driver 1.2" in forward and "aaaaaaaaaaaa, 2026-01-02." in forward
    assert "| 160 |" in (training := gpu_tables.training(runs))
    assert "deterministic (E)" in training and "| 5.0x (0.50) | 5.0x (0.50) | 3.0x |" in training
    assert "| 32 heads, 1,464 blocks | 50.0 | 2.00 | 25x |" in gpu_tables.mask(runs)
    assert f"| {PRO.name} | 0.1 | 300 | 100 | 3.00x | 3.20x |" in gpu_tables.block(runs)
    assert "| copy, bytes read and written | 3.00 TB/s |" in gpu_tables.machine(runs)
    assert "| 5.00 TB/s |" in gpu_tables.machine(runs)
    assert f"| {PRO.name} with gradients | {LIKE} | 0.100 | 1.50 |" in gpu_tables.predicted(runs)
    assert gpu_tables.unmeasured(runs) == "Everything was measured."
    failed = replace(ROWS[4], status="failed", seconds=None, reason="a | b\nc")
    assert "failed: a / b c |" in gpu_tables.unmeasured([run([failed])])
    empty = [run([])]
    for name, make in gpu_tables.TABLES.items():
        assert name in ("machine", "unmeasured") or make(empty) == gpu_tables.UNMEASURED


def test_the_page_of_a_gpu_keeps_what_is_written_by_hand():
    runs = [run(ROWS)]
    text = readme.new_page(runs)
    assert text.startswith("# Measured: NVIDIA G100\n")
    page = readme.gpu_page(text, runs)
    by_hand = page.replace("Not examined yet.", "Clocks differ.")
    assert "Clocks differ." in by_hand and f"| {PRO.name} |" in by_hand
    assert readme.gpu_page(by_hand, runs) == by_hand
    fewer = readme.gpu_page(by_hand, [run(ROWS[:1])])
    assert "Clocks differ." in fewer and f"| {PRO.name} |" not in fewer
    assert set(gpu_tables.TABLES) == set(readme.HEADINGS)
    endless = text.replace("<!-- end -->", "", 1)
    with pytest.raises(ValueError, match="table of results 'machine' has no end"):
        readme.gpu_page(endless, runs)


def test_the_readme_shows_every_gpu():
    asked = "<!-- results: gpu_block -->\n<!-- end -->"
    assert readme.UNMEASURED in readme.rendered(asked, {"cpu": run([])})
    runs = {"cpu": run([]), "g100/gpu": run(ROWS), "g200/gpu": run(ROWS, gpu="NVIDIA G200, 1")}
    shown = readme.rendered(asked, runs)
    assert shown.count(f"| {PRO.name} | 0.1 | 300 |") == 2
    assert shown.index("G100") < shown.index("G200")
