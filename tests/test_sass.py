"""The reader of compiled kernels, on kernels in public use and on a small one written here."""

import re

import pytest

from benchmarks.bounds import PUBLISHED
from benchmarks.issue_model import product_of
from benchmarks.sass import NO_BARRIER, Instruction, Kernel


@pytest.fixture(scope="module", params=PUBLISHED, ids=lambda p: p.attention.label)
def published(request):
    return request.param


@pytest.fixture(scope="module")
def kernel(published):
    return published.kernel()


def test_a_main_loop(published, kernel):
    """Its products are those of a tile, and each score has its exp2."""
    loop = kernel.main_loop()
    scores, head_dim = published.tile[0] * published.tile[1], published.attention.head_dim
    # A product of HGMMA is of 64 rows of the tile, one of HMMA counts for all four warps.
    groups = published.tile[0] // 64 if kernel.architecture == "sm_90a" else 1
    products = [product for i in loop.path if (product := product_of(i))]
    assert sum(p.flop for p in products) * groups == 2 * 2 * scores * head_dim
    of_a_thread = scores // (128 * groups)
    assert of_a_thread <= loop.count("MUFU") <= of_a_thread + 4


def test_registers(kernel):
    """A warp group uses most of the registers that it asks for, and none beyond."""
    grants = [(int(i.operands.split(",")[-1], 16), i) for i in kernel.find("USETMAXREG")]
    assert len(grants) == (2 if kernel.architecture == "sm_90a" else 0)
    for count, grant in grants:
        used = max(i.highest_register for i in kernel.reachable(grant)) + 1
        assert 0.8 * count <= used <= count
    assert max(i.highest_register for i in kernel.instructions) < 256


def test_spills(kernel):
    """All of these spill a little: on sm_90a where it copies, on sm_80 within its main loop."""
    assert kernel.stack > 0 and kernel.find("LDL") and kernel.find("STL")
    assert bool(kernel.main_loop().count("LDL", "STL")) == (kernel.architecture == "sm_80")


@pytest.mark.parametrize("outer", ["00", "10"], ids=["two headers", "one header"])
def test_the_way_through_a_loop(outer):
    """Around a wait that spins elsewhere, past a rare part; and past a stage that is not used."""
    code = f"""
        00 MOV R0, R1
        10 SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0
        20 @!P0 BRA 0xc0
        30 @P1 BRA 0x60
        40 SYNCS.ARRIVE.TRANS64 RZ, [UR4], RZ
        50 @P2 BRA 0x10
        60 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0
        70 @P3 BRA 0x90
        80 FMUL R2, R2, R2
        90 MUFU.EX2 R2, R2
        a0 @P4 BRA 0x{outer}
        b0 EXIT
        c0 SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0
        d0 @!P0 BRA 0xc0
        e0 BRA 0x30
    """
    lines = re.findall(r"(\w\w) (@!?P\d)? ?([\w.]+) ?(.*)", code)
    instructions = tuple(
        Instruction(int(at, 16), predicate, opcode, operands, 1, NO_BARRIER, NO_BARRIER, 0)
        for at, predicate, opcode, operands in lines
    )
    kernel = Kernel("small", "sm_90a", 32, 0, 0, instructions)
    assert set(kernel.loops) == {0x00, 0x10, 0xC0} if outer == "00" else {0x10, 0xC0}
    loop = kernel.main_loop()
    start = [0x00] if outer == "00" else []
    assert [i.address for i in loop.path] == [*start, 0x10, 0x20, 0x30, 0x60, 0x70, 0x90, 0xA0]


def test_without_a_loop():
    end = Instruction(0, "", "EXIT", "", 1, NO_BARRIER, NO_BARRIER, 0)
    with pytest.raises(ValueError, match="no loop of small multiplies matrices"):
        Kernel("small", "sm_90a", 32, 0, 0, (end,)).main_loop()
