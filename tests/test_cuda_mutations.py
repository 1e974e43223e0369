"""Every wait, fence, arrival, commit and barrier of the CUDA kernels is needed.

Each is left out in turn, which the emulator does at run time. Then a fault is reported, or the
result differs under some schedule, or the call is on the list below with the reason why it may be
left out. `make mutations` tries every call; the suite tries a sample.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import nabla
from nabla import _cuda_emulated as emulated
from nabla import cuda
from nabla.cuda import block_attention
from nabla.cuda.block_mask import transposed_bits

SOURCES = Path(__file__).parent.parent / "csrc"
SCHEDULES = (("random", 1), ("starving", 2), ("late", 0), ("eager", 3))
SHARDS = 8  # the suite tries the calls of one

# By source file, lines of calls that may be left out, and why.
BENIGN: dict[str, dict[str, str]] = {}


class Case(NamedTuple):
    """A call of a kernel, small, and with all that makes the kernel wait."""

    name: str
    run: Callable[[], tuple[Tensor, ...]]
    architecture: int = 90


def mask_case() -> Case:
    """Rows of more blocks than lanes, equal scores, a window, ragged blocks, extra tokens."""
    grid = nabla.TokenGrid(frames=5, height=20, width=28, extra=70)
    q, k = torch.randn(2, 1, 2, grid.num_tokens, 64).bfloat16().unbind()
    k[:, :, :640] = k[:, :, :1]
    q[:, :, :, 0] = 8 * torch.randn(grid.num_tokens)

    def run() -> tuple[Tensor, ...]:
        mask = nabla.create_block_mask(
            q, k, grid=grid, top_p=0.6, window=(1, 3, 1), backend="cuda-emulated"
        )
        return (mask.bits,)

    return Case("mask", run)


def scores_case() -> Case:
    q, k = torch.randn(2, 1, 1, 1000, 64).half().unbind()
    grid = nabla.TokenGrid(frames=1, height=8, width=125)
    return Case("scores", lambda: (nabla.pooled_scores(q, k, grid=grid, backend="cuda-emulated"),))


def transposed_case() -> Case:
    """Rows of bits that end within a tile, as columns."""
    grid = nabla.TokenGrid.sequence(70 * 64)
    mask = nabla.BlockMask.from_dense(torch.rand(1, 1, 70, 70) < 0.5, grid=grid)
    return Case("transposed", lambda: (transposed_bits(mask.bits, grid),))


def attention_case(head_dim: int, dtype: torch.dtype, frames: int) -> Case:
    """Rows longer than the rings, short blocks among them, a row of none, and one with a gap.

    Behind the gap come as many blocks as the rings of D = 128 have stages, and then the end, which
    takes the place of the gap in the queue.
    """
    grid = nabla.TokenGrid(frames=frames, height=16, width=20)
    q, k, v = torch.randn(3, 1, 1, grid.num_tokens, head_dim).to(dtype).unbind()
    rows = grid.num_blocks // frames + 1  # a frame, and a row of the next
    keep = torch.rand(1, 1, rows, grid.num_blocks) < 0.6
    keep[:, :, 1:3] = False
    keep[:, :, 2, [0, *range(-6, 0)]] = True
    mask = nabla.BlockMask.from_dense(keep, grid=grid)
    q = q[:, :, : grid.block_start(rows)]

    def run() -> tuple[Tensor, ...]:
        return nabla.block_sparse_attention(q, k, v, mask, return_lse=True, backend="cuda-emulated")

    return Case(f"attention of D = {head_dim}", run)


def ampere_case() -> Case:
    """More blocks than a list holds, short ones among them, that both rows keep, or one."""
    grid = nabla.TokenGrid(frames=35, height=16, width=12)
    q, k, v = torch.randn(3, 1, 1, grid.num_tokens, 64).bfloat16().unbind()
    keep = torch.rand(1, 1, 2, grid.num_blocks) < 0.8
    mask = nabla.BlockMask.from_dense(keep, grid=grid)
    q = q[:, :, : grid.block_start(2)]

    def run() -> tuple[Tensor, ...]:
        return nabla.block_sparse_attention(q, k, v, mask, return_lse=True, backend="cuda-emulated")

    return Case("attention on sm_80", run, architecture=80)


def gradient_case(
    head_dim: int, dtype: torch.dtype, frames: int, *, architecture: int = 90, is_fast: bool = False
) -> Case:
    """Rows longer than the ring, of several heads; short blocks, gaps, and nothing.

    Behind the gap of a row come as many blocks as the ring of D = 128 has stages for dq, as in
    attention_case. is_fast: sm_80 sums dq in any order.
    """
    grid = nabla.TokenGrid(frames=frames, height=8, width=20)
    q, k, v, dout = torch.randn(4, 1, 2, grid.num_tokens, head_dim).to(dtype).unbind()
    k, v = k[:, :1], v[:, :1]
    rows = grid.num_blocks // frames + 1  # a frame, and a row of the next
    keep = torch.rand(1, 2, rows, grid.num_blocks) < 0.6
    keep[:, :, 2] = False
    keep[:, :, 2, [0, *range(-4, 0)]] = True
    keep[:, :, 1] = keep[..., 1] = keep[..., 1:-1, 2] = False
    mask = nabla.BlockMask.from_dense(keep, grid=grid)
    q, dout = (x[:, :, : grid.block_start(rows)] for x in (q, dout))
    attention = (mask.bits, grid, 0, head_dim**-0.5)
    out, lse = block_attention.attention_fwd(q, k, v, *attention)

    def run() -> tuple[Tensor, ...]:
        torch.use_deterministic_algorithms(not is_fast)
        return block_attention.attention_bwd(dout, None, q, k, v, out, lse, *attention)

    return Case(f"gradients of D = {head_dim} on sm_{architecture}", run, architecture)


def outcome(case: Case, schedule: str, seed: int, ignored: str = "") -> tuple[Tensor, ...] | None:
    """The result, or None where the emulator reports a fault."""
    with cuda.emulation(case.architecture, schedule=schedule, seed=seed, ignored=ignored):
        try:
            return case.run()
        except emulated.EmulationError:
            return None


def synchronising_calls(case: Case) -> set[str]:
    """The calls "file:line:instruction" that the case makes."""
    emulated.clear_report()
    with cuda.emulation(case.architecture):
        case.run()
    return {
        f"{file}:{line}:{instruction}"
        for file, line, instruction, synchronises, _ in emulated.sites()
        if synchronises
    }


def source_line(call: str) -> tuple[str, str]:
    """The file and the text of a call: what does not change with the lines above it."""
    file, line, _ = call.split(":")
    return file, (SOURCES / file).read_text().splitlines()[int(line) - 1].strip()


def is_benign(line: tuple[str, str]) -> bool:
    file, text = line
    return text in BENIGN.get(file, {})


def is_noticed(call: str, cases: list[Case], results: dict) -> bool:
    """Whether leaving the call out shows in any case under any schedule."""
    for schedule, seed in SCHEDULES:
        for case in cases:
            if (case.name, schedule) not in results:
                results[case.name, schedule] = outcome(case, schedule, seed)
            expected = results[case.name, schedule]
            assert expected is not None, f"{case.name} fails under {schedule}, {seed}"
            emulated.clear_report()
            actual = outcome(case, schedule, seed, ignored=call)
            assert emulated.ignored_calls(), f"{case.name} makes {call} no longer"
            if actual is None or not all(map(same_bits, actual, expected)):
                return True
    return False


def same_bits(a: Tensor, b: Tensor) -> bool:
    as_bytes = [x.contiguous().view(torch.uint8) for x in (a, b)]
    return torch.equal(*as_bytes)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    torch.manual_seed(0)
    attention_cases = [
        attention_case(64, torch.bfloat16, frames=5),
        attention_case(128, torch.float16, frames=3),
    ]
    gradient_cases = [
        gradient_case(64, torch.float16, frames=4),
        gradient_case(128, torch.bfloat16, frames=4),
        gradient_case(64, torch.float16, frames=2, architecture=80, is_fast=True),
        gradient_case(128, torch.bfloat16, frames=2, architecture=80),
    ]
    mask_cases = [mask_case(), scores_case(), transposed_case()]
    return [*mask_cases, *attention_cases, ampere_case(), *gradient_cases]


@pytest.mark.parametrize(
    "shard", [0, *(pytest.param(i, marks=pytest.mark.mutations) for i in range(1, SHARDS))]
)
def test_calls_are_needed(cases, shard):
    calls_of = {case.name: synchronising_calls(case) for case in cases}
    calls = sorted(set().union(*calls_of.values()))
    results: dict = {}
    unneeded, needed = [], []
    for call in calls[shard::SHARDS]:
        users = [case for case in cases if call in calls_of[case.name]]
        (needed if is_noticed(call, users, results) else unneeded).append(source_line(call))
    surprises = [line for line in unneeded if not is_benign(line)]
    assert not surprises, f"left out, and nothing shows: {surprises}"
    stale = [line for line in needed if is_benign(line)]
    assert not stale, f"not benign: {stale}"


def test_benign_calls_are_in_the_sources():
    for file, texts in BENIGN.items():
        lines = [line.strip() for line in (SOURCES / file).read_text().splitlines()]
        for text in texts:
            assert lines.count(text) == 1, f"{text} is in {file} {lines.count(text)} times"
