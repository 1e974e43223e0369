"""The benchmark suite: right kernels get times, wrong ones none, and noise is no change."""

import base64
import json
import math
import random
import re
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nabla
from benchmarks import (
    accuracy,
    arithmetic,
    block_attention,
    block_mask,
    masks,
    peers,
    presets,
    readme,
    results,
    suite,
    timing,
    train,
)
from benchmarks.case import Case, Contest, MaskSpec, Pace, Shape, Step
from benchmarks.machine import Limits
from benchmarks.results import OURS, Row, Run
from benchmarks.timing import Ratio, Seconds
from benchmarks.workloads import BY_NAME, Workload, sequence
from nabla.cli import main

CPU = torch.device("cpu")
SMALL = Workload("small", (3, 16, 24), 2, 64, 0.6, (1, 3, 3), (0.5,))
SHAPE = Shape(SMALL, SMALL, torch.float32, CPU)
SPECS = [MaskSpec("random", 0.3), MaskSpec("nabla-like", 0.6, 0.5)]
YARDSTICKS = peers.chosen(["sdpa", "sorting"])
PACE = Pace({}, 1.0)


@pytest.fixture(autouse=True)
def _not_deterministic():
    torch.use_deterministic_algorithms(False)  # which times are not taken with


def raced(contest):
    found = suite.Suite(CPU, YARDSTICKS, lambda rows: None, PACE)
    found.race(contest, 0.0)
    return found


# Workloads and masks


def test_workloads_are_those_of_the_models():
    """The figures are those of the models' papers and configurations, computed elsewhere."""
    wanted = {
        "k6-sr-tile": (744, 16.25, 4.28),
        "k5-lite-10s": (1464, 62.93, 8.60),
        "k5-pro-10s-sd": (1464, 143.83, 44.42),
        "k5-pro-5s-hd": (1860, 232.17, 56.44),
        "wan14b-720p": (1260, 133.18, 49.10),
        "k5-pro-10s-hd": (3660, 898.96, 111.04),
    }
    assert set(BY_NAME) == set(wanted)
    for name, (blocks, attention, linear) in wanted.items():
        workload = BY_NAME[name]
        assert not workload.grid.is_ragged
        assert workload.grid.num_blocks == blocks
        assert workload.flops / 1e12 == pytest.approx(attention, abs=0.01)
        assert workload.linear_flops / 1e12 == pytest.approx(linear, rel=2e-3)
    assert BY_NAME["wan14b-720p"].bound(0.075) == pytest.approx(3.09, abs=0.005)


def test_a_reduction_is_said():
    whole = BY_NAME["k5-lite-10s"]
    assert whole.reduction(whole) == ""
    used = whole.reduced(heads=2, frames=16)
    assert whole.reduction(used) == "2 of 28 heads, 16 of 61 frames (24,576 of 93,696 tokens)"


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_random_masks_have_the_density(density):
    mask = masks.random_mask(nabla.TokenGrid.sequence(64 * 128), 2, density, CPU)
    assert float(mask.density()) == pytest.approx(density, abs=0.01)
    assert mask.to_dense().any(-1).all()


@pytest.mark.parametrize("correlation", masks.CORRELATIONS)
def test_nabla_like_masks_have_the_density_and_the_correlation(correlation):
    grid, window = nabla.TokenGrid(24, 32, 48), (3, 1, 1)
    options = {"window": window, "correlation": correlation, "device": CPU}
    mask = masks.nabla_like_mask(grid, 3, 0.3, **options)
    assert float(mask.density()) == pytest.approx(0.3, abs=0.01)
    keep, near = mask.to_dense()[0], nabla.sliding_tile_mask(grid, window).to_dense()[0, 0]
    assert (keep | ~near).all()
    far = ~near.unflatten(0, (24, -1))[1:] & ~near.unflatten(0, (24, -1))[:-1]
    found = []
    for head in keep.float():
        frames = head.unflatten(0, (24, -1))
        pair = torch.stack([frames[1:][far], frames[:-1][far]])
        found.append(torch.corrcoef(pair)[0, 1].item())
    assert statistics.mean(found) == pytest.approx(correlation, abs=0.03)
    densities = keep.float().mean((1, 2))
    assert densities[0] < densities[1] < densities[2]


@pytest.mark.parametrize("extents", [(7, 16, 16), (1, 1, 512)], ids=["frames", "line"])
def test_the_union_is_of_groups(extents):
    grid = nabla.TokenGrid(*extents, block=(1, 8, 8) if extents[0] > 1 else (1, 1, 64))
    mask = masks.random_mask(grid, 2, 0.2, CPU)
    keep, places = mask.to_dense()[0], 4 if extents[0] > 1 else 1
    loaded = kept = 0
    for head in keep:
        for first in range(0, grid.num_blocks // (3 * places) * 3 * places, 3 * places):
            for place in range(places):
                rows = [head[first + place + i * places] for i in range(3)]
                loaded += int((rows[0] | rows[1] | rows[2]).sum())
                kept += sum(int(row.sum()) for row in rows)
    assert masks.union(mask, 3) == pytest.approx(3 * loaded / kept)
    assert masks.union(block_attention.full_mask(grid, CPU), 3) == 1


def test_the_captured_mask_is_the_models_own():
    q, k, v, mask = masks.captured(4)
    assert q.shape == k.shape == v.shape == (1, 4, 4 * 256, 32)
    again = nabla.create_block_mask(q, k, grid=mask.grid, top_p=0.5, window=(3, 1, 1))
    assert mask.bits.equal(again.bits)
    assert 0.05 < float(mask.density()) < 0.95


@pytest.mark.parametrize("tokens", [64 * 6, 64 * 7])
def test_a_dilated_mask_is_the_least_that_covers(tokens):
    mask = masks.random_mask(nabla.TokenGrid.sequence(tokens), 1, 0.1, CPU)
    large, small = masks.dilated(mask)
    keep, covering = mask.to_dense()[0, 0], small.to_dense()[0, 0]
    num = keep.shape[-1]
    for i in range(math.ceil(num / 2)):
        for j in range(math.ceil(num / 2)):
            part = (slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2))
            assert large[0, 0, i, j] == keep[part].any()
            assert covering[part].eq(keep[part].any()).all()


# Statistics


def test_an_interval_holds_the_median_as_often_as_it_says():
    source = random.Random(0)
    for count in (9, 15, 31):
        hits = 0
        for _ in range(2000):
            ratio = timing.interval([source.lognormvariate(0, 0.5) for _ in range(count)])
            assert ratio.low <= ratio.median <= ratio.high
            hits += ratio.low <= 1 <= ratio.high
        assert 0.945 < hits / 2000 < 0.99
    few = [timing.interval([source.lognormvariate(0, 0.5) for _ in range(3)]) for _ in range(2000)]
    assert 0.9 < sum(ratio.low <= 1 <= ratio.high for ratio in few) / 2000 < 0.99


def test_fits():
    start, slope, worst = timing.fit_line([(x, 5 + 2 * x) for x in (1, 10, 100)])
    assert (start, slope) == (pytest.approx(5), pytest.approx(2))
    assert worst < 1e-9
    factor, exponent, _ = timing.fit_power([(x, 3 * x**1.5) for x in (1, 10, 100)])
    assert (factor, exponent) == (pytest.approx(3), pytest.approx(1.5))


def test_cases_run_in_turn_until_they_are_known(monkeypatch):
    order = []
    monkeypatch.setattr(timing, "_cpu_seconds", lambda case: (case(), 1.0))

    def case(name, seconds):
        def run():
            order.append(name)
            return seconds()

        return run

    source = random.Random(0)
    found = timing.contest(
        {
            "dense": case("dense", lambda: 1.0),
            "steady": case("steady", lambda: 0.5),
            "noisy": case("noisy", lambda: 0.25 * source.lognormvariate(0, 0.3)),
        },
        "dense",
        device=CPU,
        seconds=100,
    )
    assert order[:9] == [*("noisy", "dense", "steady"), *("steady", "dense", "noisy")] + [
        *("noisy", "dense", "steady")
    ]
    assert found["steady"].relative == (0.5, 0.5, 0.5)
    assert found["steady"].rounds == timing.LEAST_ROUNDS
    assert found["noisy"].rounds > 9
    assert found["dense"].rounds == found["noisy"].rounds
    assert found["noisy"].relative.median == pytest.approx(0.25, rel=0.2)


def test_what_is_stopped_early_has_no_time(monkeypatch):
    monkeypatch.setattr(timing, "_cpu_seconds", lambda case: (case(), 1.0))
    found = timing.contest({"a": lambda: 1.0}, "a", device=CPU, seconds=9, stop=time.monotonic())
    assert found == {}


# Correctness first


def test_right_kernels_get_times():
    found = raced(block_attention.contest(SHAPE, SPECS, YARDSTICKS))
    found.race(train.contest(SHAPE, SPECS, YARDSTICKS), 0.0)
    found.race(block_mask.contest(SHAPE, YARDSTICKS), 0.0)
    assert not found.failures
    assert {row.status for row in found.rows} == {"measured"}
    for row in found.rows:
        assert row.seconds.p20 <= row.seconds.median <= row.seconds.p80
        assert row.error <= row.allowed
        assert row.bytes > 0 and row.tokens and row.heads and row.dtype
        if row.density is not None and row.mask != "built":
            work = {"block_attention": 1, "train": 3.5}[row.stage]
            assert row.flops == pytest.approx(row.density * work * SMALL.flops)
            assert row.efficiency == pytest.approx(row.density / row.relative.median)
    dense, sparse, _, mask, *_ = found.rows
    ratio = sparse.relative.median / (sparse.relative.median + mask.relative.median)
    assert sparse.efficiency_with_mask == pytest.approx(sparse.efficiency * ratio)
    assert (dense.implementation, dense.mask, dense.relative) == ("sdpa", "dense", (1, 1, 1))
    assert (sparse.implementation, sparse.mask, sparse.asked) == (OURS, "random", 0.3)


def wrong_attention(kind):
    right = nabla.block_sparse_attention

    def attention(q, k, v, mask, **options):
        if kind == "scaled":
            return right(q, k, v, mask, **options) * 1.01
        if kind == "nan":
            return right(q, k, v, mask, **options) * math.nan
        if kind == "a block too few":
            keep = mask.to_dense()
            first = keep.int().argmax(-1, keepdim=True)
            fewer = keep.scatter(-1, first, keep.sum(-1, keepdim=True) < 2)
            return right(q, k, v, nabla.BlockMask.from_dense(fewer, grid=mask.grid), **options)
        out = right(q, k, v, mask, **options)
        return out.detach() + (out - out.detach()) * 1.05  # right, but for its gradients

    return attention


def test_a_deterministic_case_asks_torch_for_that():
    def state():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    torch.use_deterministic_algorithms(False)
    case = block_attention.deterministic(Case(Row("train", "w"), state, state))
    assert case.row.part == "deterministic"
    assert case.run() == case.check() == (True, False)
    assert state() == (False, True)


@pytest.mark.parametrize("kind", ["scaled", "nan", "a block too few", "gradients"])
def test_a_wrong_kernel_gets_no_time(kind, monkeypatch):
    monkeypatch.setattr(nabla, "block_sparse_attention", wrong_attention(kind))
    stage = train if kind == "gradients" else block_attention
    found = raced(stage.contest(SHAPE, SPECS, YARDSTICKS))
    ours = [row for row in found.rows if row.implementation == OURS and row.part != "mask"]
    assert [row.status for row in ours] == ["wrong"] * len(SPECS)
    assert all(row.seconds is None and row.reason for row in ours)
    assert found.failures == len(SPECS)
    assert [row.status for row in found.rows if row.implementation == "sdpa"] == ["measured"]


@pytest.mark.parametrize("kind", ["one more", "one less"])
def test_a_wrong_mask_gets_no_time(kind, monkeypatch):
    right = nabla.create_block_mask

    def create_block_mask(q, k, **options):
        keep = right(q, k, **options).to_dense()
        changed = (~keep if kind == "one more" else keep).int().argmax(-1, keepdim=True)
        keep = keep.scatter(-1, changed, kind == "one more")
        return nabla.BlockMask.from_dense(keep, grid=options["grid"])

    monkeypatch.setattr(nabla, "create_block_mask", create_block_mask)
    found = raced(block_mask.contest(SHAPE, []))
    assert [row.status for row in found.rows] == ["wrong"]
    assert found.failures == 1


def test_a_peer_that_fails_is_named_and_is_no_failure_of_ours():
    def fail(*_):
        raise RuntimeError("no kernel for this")

    broken = peers.Peer("broken", "sparse", lambda device: None, fail)
    found = raced(block_attention.contest(SHAPE, SPECS[:1], [*YARDSTICKS, broken]))
    (row,) = [row for row in found.rows if row.implementation == "broken"]
    assert (row.status, row.reason) == ("failed", "RuntimeError: no kernel for this")
    assert not found.failures


def case_of(name, attention, mask=""):
    """A case that computes what it is told to."""

    def prepare(q, k, v, mask):
        return lambda: attention(q, k, v)

    shape = SHAPE.inputs(distinct_blocks=False)
    made = block_attention._Attention("block_attention", SHAPE, shape, False)
    everything = block_attention.full_mask(SMALL.grid, CPU)
    return made.case(name, prepare, everything, everything, mask=mask, density=1.0)


def test_the_reference_is_the_first_that_is_right():
    """As cuDNN's attention, which gives NaN on some GPUs, would be the first."""
    right = torch.nn.functional.scaled_dot_product_attention

    def nan(q, k, v):
        return right(q, k, v) * math.nan

    def cases(*dense):
        named = [case_of(f"dense-{i}", f, "dense") for i, f in enumerate(dense)]
        return Contest([*named, case_of(OURS, right)])

    found = raced(cases(nan, right, right))
    assert [row.status for row in found.rows] == ["wrong"] + ["measured"] * 3
    assert {row.reference for row in found.rows[1:]} == {"dense-1"}
    again = suite.Suite(CPU, YARDSTICKS, lambda rows: None, PACE)
    again.only = {found.rows[-1].key}
    again.race(cases(nan, right, right), 0.0)
    assert [row.implementation for row in again.rows] == ["dense-0", "dense-1", OURS]
    assert again.rows[-1].reference == "dense-1"

    alone = raced(cases(nan, nan)).rows[-1]
    assert alone.seconds is not None and alone.relative is None and alone.speedup is None
    assert alone.reason == "nothing that is right to compare with"


def test_a_fallback_is_measured_if_none_before_it_is_right():
    right = torch.nn.functional.scaled_dot_product_attention
    fallback = replace(case_of("flash", right, "dense"), is_fallback=True)
    for first, names in (
        (right, ["cudnn", OURS]),
        (lambda q, k, v: right(q, k, v) * math.nan, ["cudnn", "flash", OURS]),
    ):
        dense = case_of("cudnn", first, "dense")
        found = raced(Contest([dense, fallback, case_of(OURS, right)]))
        assert [row.implementation for row in found.rows] == names
        assert found.rows[-1].reference == names[-2]


def test_nothing_begins_that_cannot_end_in_time():
    slow = Pace({torch.float32: SMALL.flops / 100.0}, 1.0)  # 100 seconds for dense attention
    found = suite.Suite(CPU, YARDSTICKS, lambda rows: None, slow)
    found.stop = time.monotonic() + 300
    found.race(block_attention.contest(SHAPE, SPECS, YARDSTICKS), 0.0)
    skipped = {(row.implementation, row.asked) for row in found.rows if row.status == "skipped"}
    assert skipped == {("sdpa", None), (OURS, 0.6)}  # 450 seconds, and what is left of 300
    assert all(row.reason == "out of time" for row in found.rows if row.status == "skipped")
    step = Step("train", "small", torch.float32, SMALL.flops, lambda *_: pytest.fail("began"))
    began = time.monotonic()
    found.run([step], [step.least_seconds(slow)], aim=began + 300, stop=began + 300)
    assert (found.rows[-1].stage, found.rows[-1].status) == ("train", "skipped")


def test_what_needs_more_than_is_installed_is_absent_and_stops_nothing():
    def measure(suite_, seconds):
        raise ModuleNotFoundError("No module named 'av'", name="av")

    found = suite.Suite(CPU, YARDSTICKS, lambda rows: None, PACE)
    found.measure(Step("generate", "tiny", torch.float32, 1.0, measure), 1.0)
    (row,) = found.rows
    assert (row.status, found.failures) == ("absent", 0)
    assert row.reason == "No module named 'av': pip install 'nabla-attention[demo]'"


def test_a_coarser_peer_gets_the_covering_mask_and_its_extra_work_is_shown():
    def prepare(q, k, v, mask):
        covering = masks.dilated(mask)[1]
        return lambda: nabla.block_sparse_attention(q, k, v, covering)

    coarse = peers.Peer("coarse", "sparse", lambda device: None, prepare, block=128)
    found = raced(block_attention.contest(SHAPE, SPECS[:1], [*YARDSTICKS, coarse]))
    (row,) = [row for row in found.rows if row.implementation == "coarse"]
    assert row.status == "measured"
    assert row.extra_flops > 0.2 * row.flops


# Peers


def test_absent_peers_say_why():
    assert set(peers.NAMES) >= {
        *("sdpa", "sdpa-cudnn", "sdpa-flash", "fa2", "fa3", "fa4-128", "fa4-64", "flex"),
        *("sorting", "vsa-triton", "vsa-tk", "cudnn-bsa", "flashinfer", "sage", "natten"),
    }
    for peer in peers.PEERS:
        reason = peer.absent(CPU)
        if peer.name in ("sdpa", "flex", "sorting"):
            assert reason is None
        else:
            assert "not on cpu" in reason
    (fa3,) = [peer for peer in peers.PEERS if peer.name == "fa3"]
    assert fa3.absent(torch.device("cuda")) == "not installed: pip install fa3-fwd"


VSA = """
import nabla
from nabla import BlockMask, TokenGrid

GRID = TokenGrid(3, 16, 24)


def block_sparse_attn(q, k, v, block_map, sizes):
    raise AssertionError("not what is measured")


def block_sparse_attn_triton(q, k, v, indices, counts, sizes):
    assert sizes.tolist() == [64] * GRID.num_blocks
    mask = BlockMask.from_indices(counts, indices, grid=GRID)
    return nabla.block_sparse_attention(q.float(), k.float(), v.float(), mask).to(q.dtype), None
"""


def test_a_package_that_names_a_function_as_its_module(monkeypatch, tmp_path):
    """As FastVideo's does; what its kernels would take for something else is refused."""
    (tmp_path / "fastvideo_kernel").mkdir()
    (tmp_path / "fastvideo_kernel" / "block_sparse_attn.py").write_text(VSA)
    init = "from fastvideo_kernel.block_sparse_attn import block_sparse_attn\n"
    (tmp_path / "fastvideo_kernel" / "__init__.py").write_text(init)
    monkeypatch.syspath_prepend(tmp_path)
    (vsa,) = peers.chosen(["vsa-triton"])
    (q, k, v), mask = SHAPE.inputs(), masks.random_mask(SMALL.grid, 2, 0.3, CPU)
    qkv = [x.bfloat16() for x in (q, k, v)]
    wanted = nabla.block_sparse_attention(*(x.float() for x in qkv), mask).bfloat16()
    assert vsa.prepare(*qkv, mask)().equal(wanted)
    with pytest.raises(ValueError, match="takes bfloat16"):
        vsa.prepare(q, k, v, mask)
    with pytest.raises(ValueError, match="takes bfloat16 of D=.64, 128., not .* of D=32"):
        vsa.prepare(*(x[..., :32] for x in qkv), mask)
    ragged = nabla.TokenGrid(3, 16, 20)
    qkv = [x[:, :, : ragged.num_tokens] for x in qkv]
    with pytest.raises(ValueError, match="takes whole blocks"):
        vsa.prepare(*qkv, masks.random_mask(ragged, 2, 0.3, CPU))


# Comparison


def measured(ratio, half_width, **values):
    relative = Ratio(ratio, ratio * math.exp(-half_width), ratio * math.exp(half_width))
    seconds = Seconds(1.0, 1.0, 1.0)
    return Row("train", "w", seconds=seconds, relative=relative, reference="sdpa", **values)


def simulated(slowdown, source, rounds, spread=0.1):
    """A row of a machine whose speed wanders, which ratios within a round do not show."""
    ratios = []
    for _ in range(rounds):
        pace = source.lognormvariate(0, 0.5)
        ours = pace * slowdown * 0.3 * source.lognormvariate(0, spread)
        ratios.append(ours / (pace * source.lognormvariate(0, spread)))
    return Row("train", "w", relative=timing.interval(ratios), reference="sdpa")


def test_a_slowdown_is_a_change_and_noise_is_none():
    source = random.Random(0)
    alarms, found = 0, 0
    for _ in range(200):
        before = simulated(1.0, source, 31)
        (noise,) = results.compare([before], [simulated(1.0, source, 9)])
        (slower,) = results.compare([before], [simulated(1.3, source, 31)])
        alarms += noise.is_slower
        found += slower.is_slower
    assert alarms == 0
    assert found > 140


def test_on_a_busy_machine_cpu_times_are_compared():
    steady = Ratio(0.5, 0.49, 0.51)
    before = [replace(measured(0.5, 0.01), relative_cpu=steady)]
    slower = [replace(measured(0.8, 0.01), relative_cpu=Ratio(0.8, 0.79, 0.81))]
    disturbed = [replace(measured(0.8, 0.01), relative_cpu=steady)]
    assert [c.is_slower for c in results.compare(before, slower, is_busy=True)] == [True]
    assert [c.is_slower for c in results.compare(before, disturbed)] == [True]
    assert [c.is_slower for c in results.compare(before, disturbed, is_busy=True)] == [False]
    noisy = [replace(measured(0.5, 0.5), relative_cpu=Ratio(0.65, 0.64, 0.66))]
    assert [c.is_slower for c in results.compare(before, noisy, is_busy=True)] == [True]


def test_only_cases_of_ours_that_are_the_same_are_compared():
    before = [measured(0.5, 0.01, asked=0.1), measured(0.5, 0.01, asked=0.2)]
    now = [measured(0.7, 0.01, asked=0.1), measured(0.7, 0.01, asked=0.3)]
    now.append(measured(0.9, 0.01, asked=0.2, implementation="flex"))
    (change,) = results.compare(before, now)
    assert change.factor == pytest.approx(1.4)
    assert change.is_slower


def test_a_reduced_workload_is_compared_at_the_shape_of_before():
    paces = [Pace({torch.float32: x, torch.bfloat16: x}, 1.0) for x in (1e11, 4e11)]

    def flops(pace):
        steps = presets.find("k5-lite-10s", CPU).steps(CPU, YARDSTICKS, pace, 160.0)
        return [step.flops for step in steps]

    slow, fast = map(flops, paces)
    assert sum(slow) < sum(fast)
    tokens = {("k5-lite-10s", "train"): 3 * 32 * 48, ("k5-lite-10s", "block"): 32 * 48}
    slow, fast = (flops(pace._replace(tokens=tokens)) for pace in paces)
    assert slow == fast


def test_results_are_read_as_they_were_written(tmp_path):
    rows = [
        measured(0.5, 0.01, asked=0.0, density=0.1, error=0.0, values={"bound": 2.0}),
        Row("peer", "", "fa3", "absent", "not installed"),
    ]
    run = Run("cpu", {"device": "cpu"}, Limits(1e9, {"float32": 1e11}), rows)
    run.write(tmp_path / "new" / "run.jsonl")
    assert results.read(tmp_path / "new" / "run.jsonl") == run
    lines = (tmp_path / "new" / "run.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 3


# The command


def bench(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["nabla", "bench", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    captured = capsys.readouterr()
    return exit_.value.code, captured.out + captured.err


def mini_steps(device, peers, pace, left):
    shape = Shape(SMALL, BY_NAME["k5-lite-10s"], torch.float32, device)
    return [presets._attention_steps(shape, SPECS, peers)[0], presets._mask_step(shape, peers)]


@pytest.fixture
def mini(monkeypatch, tmp_path):
    """A preset of two steps, and an empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    preset = presets.Preset("tiny", (torch.float32,), mini_steps, {"cpu": 60.0})
    monkeypatch.setitem(presets.PRESETS, "mini", preset)
    monkeypatch.setattr(suite, "measure_limits", lambda *_: Limits(1e9, {"float32": 1e11}))


def test_smoke_measures_every_stage_and_writes_a_report(monkeypatch, capsys, tmp_path):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    status, said = bench(
        monkeypatch, capsys, "smoke", "--device", "cpu", "--json", "rows.jsonl", "--seconds", "250"
    )
    assert status == 0, said
    (estimate,) = re.findall(r"estimate: \d+ s, at most (\d+) s", said)
    (took,) = re.findall(r"took (\d+) s", said)
    assert int(took) <= int(estimate)
    run = results.read(tmp_path / "rows.jsonl")
    stages = {row.stage for row in run.rows if row.status == "measured"}
    assert stages == {
        *("reorder", "scores", "block_mask", "block_attention", "functional", "train"),
        *("block", "generate", "memory", "scaling"),
    }
    assert {row.status for row in run.rows} == {"measured", "absent", "extrapolated"}
    for row in run.rows:
        if row.status == "extrapolated":
            assert "extrapolated" in row.reason
    for word in ("speed-up", "density", " E", "error", "reduced: 2 of 28 heads", "bound"):
        assert word in said
    folder = tmp_path / "out" / "bench" / "smoke-cpu"
    pictures = sorted(folder.glob("*.png"))
    assert {path.stem for path in pictures} == {
        *("speedup", "share", "tokens", "kept", "memory", "roofline")
    } - {"kept"}
    for path in pictures:
        Image.open(path).verify()
    page = (folder / "report.html").read_text()
    embedded = [base64.b64decode(x) for x in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert sorted(embedded) == sorted(path.read_bytes() for path in pictures)
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "not installed: pip install fa3-fwd" in page


def test_a_planted_slowdown_is_found(mini, monkeypatch, capsys):
    """Times are made up, with noise; what is under test is what the command concludes."""
    source, right = random.Random(0), nabla.block_sparse_attention
    calls = []

    def counted(*args, **options):
        calls.append(1)
        return right(*args, **options)

    def seconds(case, slowdown=1.0):
        before = len(calls)
        case()
        found = (1.0 if len(calls) == before else 0.3 * slowdown) * source.lognormvariate(0, 0.05)
        return found, found

    monkeypatch.setattr(nabla, "block_sparse_attention", counted)
    monkeypatch.setattr(timing, "_cpu_seconds", seconds)
    options = ("mini", "--device", "cpu")
    assert bench(monkeypatch, capsys, *options, "--json", "before.jsonl")[0] == 0
    for _ in range(5):
        status, said = bench(monkeypatch, capsys, *options, "--compare", "before.jsonl")
        assert status == 0, said
    monkeypatch.setattr(timing, "_cpu_seconds", lambda case: seconds(case, 1.3))
    status, said = bench(monkeypatch, capsys, *options, "--compare", "before.jsonl")
    assert status == 1
    assert said.count("SLOWER") == len(SPECS)


def test_wrong_output_is_told_and_is_the_exit_status(mini, monkeypatch, capsys):
    monkeypatch.setattr(nabla, "block_sparse_attention", wrong_attention("scaled"))
    status, said = bench(monkeypatch, capsys, "mini", "--device", "cpu", "--json", "rows.jsonl")
    assert status == 1
    assert "wrong: out: mean error" in said
    wrong = [row for row in results.read(Path("rows.jsonl")).rows if row.status == "wrong"]
    assert {row.mask for row in wrong} == {str(spec) for spec in SPECS}
    assert not [row for row in wrong if row.seconds]


BAD = {
    "preset": (["nonsense"], "preset 'nonsense' is unknown: give one of cpu"),
    "device": (["smoke", "--device", "tpu"], "--device 'tpu' is unknown: give cpu or cuda"),
    "peers": (["smoke", "--device", "cpu", "--peers", "fa9"], "--peers fa9 are unknown"),
    "compare": (["smoke", "--device", "cpu", "--compare", "none.jsonl"], "none.jsonl"),
    "not_results": (["smoke", "--device", "cpu", "--compare", "bad.jsonl"], "holds no results"),
    "only": (["smoke", "--device", "cpu", "--only", "trian"], "--only trian are unknown: give"),
    "gpu_preset": (["gpu", "--device", "cpu"], "preset 'gpu' is for cuda, not cpu"),
}


@pytest.mark.parametrize("arguments, words", BAD.values(), ids=BAD)
def test_bad_input_is_one_line(arguments, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"what": 1}\n')
    status, said = bench(monkeypatch, capsys, *arguments)
    assert status == 1
    assert said.startswith("nabla: ") and words in said
    assert len(said.splitlines()) == 1


def test_an_installed_package_says_where_the_suite_is(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(nabla, "__file__", str(tmp_path / "nabla" / "__init__.py"))
    status, said = bench(monkeypatch, capsys, "smoke")
    assert status == 1
    assert "nabla bench is part of the source" in said and "make setup" in said


# What is derived from results


def test_clips_are_extrapolated_from_rates():
    workload = BY_NAME["k5-lite-10s"]
    shape = Shape(workload.reduced(heads=2, frames=8), workload, torch.bfloat16, CPU)
    used = shape.workload

    def row(stage, implementation, seconds, **values):
        return shape.row(stage, implementation, seconds=Seconds(*[seconds] * 3), **values)

    dense = row("block_attention", "sdpa", used.flops / 1e12, mask="dense", flops=used.flops)
    ours = row(
        "block_attention",
        OURS,
        0.1 * used.flops / 5e11,
        mask="nabla-like 0.5",
        asked=0.1,
        flops=0.1 * used.flops,
    )
    mask = row("block_mask", OURS, 0.5)
    run = Run("x", {"device": "cpu"}, Limits(1e9, {"bfloat16": 2e12}), [dense, ours, mask])
    layers = 100 * 32
    linear = workload.linear_flops / 2e12
    wanted = (
        1000 * layers * (linear + workload.flops / 1e12) / 3600,
        1000 * layers * (linear + 0.1 * workload.flops / 5e11 + 0.5 * 14) / 3600,
    )
    table = arithmetic.device_hours([run])
    (line,) = [cells for cells in table.cells if cells[:2] == ["k5-lite-10s", "0.1"]]
    assert line[2:4] == [f"{hours:,.0f}" for hours in wanted]
    assert sum("unmeasured" in cells for cells in table.cells) == len(table.cells) - 1


def test_the_readme_shows_the_committed_results():
    pages = readme.pages(readme.committed())
    assert {readme.README, readme.ARITHMETIC} <= set(pages)
    for path, text in pages.items():
        assert path.read_text() == text, f"{path}: make readme"


def test_committed_results_name_machine_date_and_commit():
    for name, run in readme.committed().items():
        assert run.about["cpu"]["name"] or run.about["gpu"], name
        assert re.fullmatch(r"[0-9a-f]{40}", run.about["commit"]), name
        assert re.match(r"20\d\d-\d\d-\d\dT", run.about["date"]), name
        ours = [row for row in run.rows if row.implementation == OURS]
        assert not [row for row in ours if row.status in ("wrong", "failed")], name


def test_tables_quote_what_is_in_the_results():
    rows = [
        sequence_row("block_attention", 0.25, asked=0.1, density=0.1),
        sequence_row("train", 0.5, asked=0.1, density=0.1),
    ]
    about = {
        "device": "cpu",
        "cpu": {"name": "A CPU", "threads": 2},
        "cpu_kernels": "avx2",
        "versions": {"torch": "2.13", "nabla": "0.1"},
        "commit": "a" * 40,
        "date": "2026-01-02T03:04:05",
    }
    runs = {"cpu": Run("cpu", about, Limits(1e9, {}), rows)}
    table = readme.attention_table(runs)
    assert "| float32, H=2, D=64, S=8,192 | forward | unmeasured | 4.0x (0.40) |" in table
    assert "A CPU, 2 threads" in table and "aaaaaaaaaaaa, 2026-01-02" in table
    assert readme.attention_table({}) == "Not measured yet."
    with pytest.raises(ValueError, match="nonsense"):
        readme.rendered("<!-- results: nonsense -->\n<!-- end -->", runs)


def sequence_row(stage, ratio, **values):
    shape = Shape(sequence(8192, 64), sequence(8192, 64), torch.float32, CPU)
    relative = Ratio(ratio, ratio, ratio)
    seconds = Seconds(1.0, 1.0, 1.0)
    return shape.row(stage, OURS, mask="random", seconds=seconds, relative=relative, **values)


def test_accuracy_is_that_of_the_policy():
    exact = torch.randn(1, 1, 64, 8, dtype=torch.float64)
    low = exact + 1e-3 * torch.randn_like(exact)
    accuracy._compare("out", [exact + 1.9 * (low - exact)], [low], [exact], 2.0)
    with pytest.raises(accuracy.WrongOutput, match="error"):
        accuracy._compare("out", [exact + 2.1 * (low - exact)], [low], [exact], 2.0)
