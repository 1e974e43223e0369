"""The CUDA kernels as nvcc compiled them, without a GPU: resources, machine code, its bound."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.bounds import KERNELS, UNIONS, compiled, module_file
from benchmarks.issue_model import bound, overlapped, with_waits_first
from benchmarks.sass import read_kernels

NVCC = Path(__file__).parent.parent / "csrc/cuda/checked_nvcc.py"
REGISTERS = 65536  # of a multiprocessor
TENSOR_CORES = {"sm_90a": "HGMMA"}  # elsewhere HMMA
COPIES = {"sm_90a": ("UTMALDG", "UBLKCP")}  # elsewhere LDGSTS, which is cp.async
AT_LEAST = {  # TFLOP/s, of a union of 1.1
    "sm_90a forward D=128": 700,
    "sm_90a forward D=64": 520,
    "sm_90a backward of dk, dv D=128": 660,
    "sm_90a backward of dq D=128": 680,
    "sm_90a backward of dk, dv D=64": 580,
    "sm_90a backward of dq D=64": 680,
    "sm_80 forward D=128": 200,
    "sm_80 forward D=64": 150,
    "sm_80 backward D=128": 190,
    "sm_80 backward of dk, dv D=128": 185,
    "sm_80 backward of dq D=128": 190,
    "sm_80 backward D=64": 165,
    "sm_80 backward of dk, dv D=64": 175,
    "sm_80 backward of dq D=64": 185,
}


def label(kernel):
    """The name of a kernel and its template arguments, from its mangled name."""
    name = re.search(r"\d([a-z_]+_kernel)I?", kernel.name)
    arguments = re.findall(
        r"\d(BFloat16|Float16)|Li(\d+)E|Lb([01])E|(PassE\d)E", kernel.name[name.end() :]
    )
    text = ", ".join("".join(argument) for argument in arguments)
    return f"{kernel.architecture} {name[1]}<{text}>"


@pytest.fixture(scope="module")
def kernels():
    """All kernels of nabla._cuda, by label."""
    return {label(kernel): kernel for kernel in read_kernels(module_file())}


@pytest.fixture(scope="module", params=KERNELS, ids=lambda attention: attention.label)
def attention(request):
    return request.param


@pytest.fixture(scope="module")
def loop(attention):
    return compiled(attention).main_loop()


def of_architecture(name):
    """Only those of `KERNELS` for an architecture."""
    kernels = [attention for attention in KERNELS if attention.architecture == name]
    return pytest.mark.parametrize(
        "attention", kernels, indirect=True, ids=[attention.label for attention in kernels]
    )


@pytest.mark.parametrize(
    "printed, returned, expected",
    [
        ("ptxas info    : (C7515) Potential Performance Loss: serialized in 'f'", 0, 1),
        ("ptxas info    : Used 168 registers", 0, 0),
        ("error: no", 3, 3),
    ],
)
def test_the_build_fails_where_products_are_serialised(printed, returned, expected):
    compiler = [sys.executable, "-c", f"print({printed!r}); raise SystemExit({returned})"]
    result = subprocess.run([sys.executable, NVCC, *compiler], capture_output=True, text=True)
    assert result.returncode == expected
    assert printed in result.stdout
    assert ("ptxas error: (C7515)" in result.stderr) == (expected == 1)


def test_nothing_is_spilled(kernels, record_property):
    for name, kernel in kernels.items():
        record_property(
            "cuda_resources",
            f"{name:64} {kernel.registers:4} registers {kernel.stack:3} stack "
            f"{kernel.shared:6} B static shared {len(kernel.instructions):5} instructions",
        )
        assert kernel.stack == 0, f"{name} has a stack"
        assert not kernel.find("LDL", "STL"), f"{name} has local memory"
        # What is asked for at launch is checked where a launch is emulated.
        assert kernel.shared <= 48 * 1024, name


def test_registers_are_within_what_is_granted(kernels):
    """A warp group that asks for registers, or gives some back, uses no others afterwards."""
    for name, kernel in kernels.items():
        for grant in kernel.find("USETMAXREG"):
            count = int(grant.operands.split(",")[-1], 16)
            used = max(i.highest_register for i in kernel.reachable(grant)) + 1
            assert used <= count, f"{name} uses {used} registers after {grant}"


@of_architecture("sm_90a")
def test_the_grants_fit_the_chip(attention):
    """One warp group copies, the others multiply, and what they ask for was given at launch.

    A warp group that asks for more than is there would wait for ever.
    """
    kernel = compiled(attention)
    at_launch = 128 * (attention.warps + 1) * kernel.registers
    assert at_launch <= REGISTERS
    grants = {i.opcode: int(i.operands.split(",")[-1], 16) for i in kernel.find("USETMAXREG")}
    (multiply,) = (
        count for opcode, count in grants.items() if "ALLOC" in opcode and "DE" not in opcode
    )
    (copy,) = (count for opcode, count in grants.items() if "DEALLOC" in opcode)
    assert 128 * (attention.warps * multiply + copy) <= at_launch


@of_architecture("sm_80")
def test_a_multiprocessor_holds_the_ctas_that_the_model_has(attention):
    assert 128 * attention.warps * attention.ctas * compiled(attention).registers <= REGISTERS


@of_architecture("sm_80")
def test_operands_are_read_by_matrices(attention, loop):
    """Four matrices serve two products of 16 rows; the forward has 32 rows in a warp."""
    most = 0.6 if "backward" in attention.label else 1 / 3
    assert loop.count("LDSM") <= most * loop.count("HMMA")


def test_attention_multiplies_on_tensor_cores_and_copies_asynchronously(kernels):
    pattern = r"attention_(forward|backward)\w*_kernel<"
    attention = {n: k for n, k in kernels.items() if re.search(pattern, n)}
    assert attention
    for name, kernel in attention.items():
        assert kernel.find(TENSOR_CORES.get(kernel.architecture, "HMMA")), name
        assert kernel.find(*COPIES.get(kernel.architecture, ("LDGSTS",))), name


def test_one_pass_of_the_backward_adds_to_dq(kernels):
    """Other kernels add nothing in global memory: what they compute has the same bits each time."""
    backward = {n: k for n, k in kernels.items() if "attention_backward" in n}
    for name, kernel in backward.items():
        adds = {i.name for i in kernel.find("RED", "ATOMG", "UBLKRED")}
        is_one_pass = re.search(r"keys_kernel<\w+, \d+, 1>", name)
        assert adds == ({"RED"} if is_one_pass else set()), name


def test_selection_multiplies_exactly(kernels):
    """Scores are products of float32: tensor cores would round them."""
    selection = [name for name in kernels if "attention" not in name]
    assert selection
    for name in selection:
        assert not kernels[name].find("HMMA", "HGMMA"), name


@of_architecture("sm_90a")
def test_products_are_in_flight_during_softmax(loop):
    """ptxas has neither serialised them (C75xx) nor moved the waits above the exp2s."""
    products = loop.count("HGMMA")
    groups = sum(i.name == "HGMMA" and "gsb0" in i.operands for i in loop.path)
    assert products >= 4 * groups, f"{products} products are waited for in {groups} groups"
    assert overlapped(loop, "MUFU") == 1.0


def test_bounds(attention, loop, record_property):
    bounds = {union: bound(loop, attention, union) for union in UNIONS}
    for found in bounds.values():
        record_property("model", str(found))
    assert bounds[1.1].tflops >= AT_LEAST[attention.label], bounds[1.1]
    rates = [found.tflops for found in bounds.values()]
    assert rates == sorted(rates, reverse=True)


@of_architecture("sm_90a")
def test_waiting_earlier_is_slower(attention, loop):
    """For a warp group by itself: what it waits for, others hide, three of them nearly all."""
    alone = replace(attention, warps=1)
    slow, fast = (bound(x, alone, 1.1).simulated for x in (with_waits_first(loop), loop))
    assert slow > 1.1 * fast
