"""The model of main loops, on kernels in public use whose rate is published."""

from dataclasses import replace

import pytest

from benchmarks.bounds import PUBLISHED
from benchmarks.issue_model import (
    Bound,
    Chip,
    bound,
    overlapped,
    simulate,
    steps_of,
    with_waits_first,
)
from benchmarks.sass import NO_BARRIER, Instruction


@pytest.fixture(scope="module", params=PUBLISHED, ids=lambda p: p.attention.label)
def published(request):
    return request.param


@pytest.fixture(scope="module")
def loop(published):
    return published.kernel().main_loop()


def test_a_published_rate_is_met_within_a_fifth(published, loop, record_property):
    found = bound(loop, published.attention)
    record_property("model", published.compare(found))
    assert 0.8 < published.ratio(found) < 1.2


@pytest.mark.parametrize(
    "published, overlap",
    [(PUBLISHED[0], 0.25), (PUBLISHED[1], 0.0)],
    indirect=["published"],
    ids=["D=128", "D=64"],
)
def test_waiting_earlier_is_slower(published, loop, overlap):
    """FlashAttention-3 has a quarter of its exp2 beside products, and at D=64 has lost that."""
    early = with_waits_first(loop)
    assert overlapped(loop, "MUFU") == pytest.approx(overlap, abs=0.02)
    assert overlapped(early, "MUFU") == 0
    slow, fast = (bound(x, published.attention).tflops for x in (early, loop))
    assert slow < 0.97 * fast


def test_one_warp_does_not_fill_the_tensor_cores(published, loop):
    few = replace(published.attention, warps=1, ctas=1)
    assert bound(loop, few).tflops < 0.85 * bound(loop, published.attention).tflops


def test_more_loads_than_l2_delivers(published, loop):
    alone = replace(published.attention, sharing=0.25, multicast=1)
    found = bound(loop, alone)
    assert found.bottleneck == "l2" and found.tflops < 0.5 * published.tflops


def instruction(opcode, operands="R0, R1, R2", stall=1, waits=0, sets=NO_BARRIER):
    return Instruction(0, "", opcode, operands, stall, sets, NO_BARRIER, waits)


def group(shape, a):
    """Four asynchronous products, and a wait until those of the last time are done."""
    products = [instruction(f"HGMMA.{shape}.F32.BF16", f"R0, {a}gdesc[UR4], R0")] * 4
    last = instruction(f"HGMMA.{shape}.F32.BF16", f"R0, {a}gdesc[UR4], R0, gsb0")
    return [*products[1:], last, instruction("WARPGROUP.DEPBAR.LE", "gsb0, 0x1")]


@pytest.mark.parametrize(
    "path, warps, cycles",
    [
        ([instruction("FFMA", stall=4)], 1, 4),
        ([instruction("FFMA", stall=4)], 4, 4),
        ([instruction("FFMA", stall=4)], 8, 8),
        ([instruction("IADD3")] * 10, 1, 20),
        ([instruction("MUFU.EX2")] * 10, 3, 240),
        ([instruction("NOP")] * 10, 3, 30),
        ([instruction("MUFU.EX2", sets=0), instruction("FADD", waits=1)], 1, 21),
        (group("64x64x16", ""), 1, 128),
        (group("64x128x16", "R4, "), 1, 256),
        (group("64x128x16", "R4, "), 2, 512),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value),
)
def test_rates(path, warps, cycles):
    chip = Chip("sm_90a")
    found = simulate([[steps_of(path, chip)]] * warps, chip, stages=100, rounds=50)
    assert found == pytest.approx(cycles, rel=0.02)


def test_shared_memory_holds_up_products():
    """Both operands of 64x64x16 from shared memory take all of its bandwidth, without copies."""
    chip = Chip("sm_90a")
    steps = steps_of(group("64x64x16", ""), chip, copied_bytes=4 * 2048)
    assert simulate([[steps]], chip, stages=100) == pytest.approx(4 * 48, rel=0.02)


def test_the_line_of_a_bound():
    line = str(Bound("label", 1.1, 512, 256, 100, 90, 400, 300, 350, 700, 500.4, "waits"))
    assert "union 1.1" in line and "500 TFLOP/s by waits" in line
