"""What L2 delivers to shared memory by bulk copies of 64 x 128 tiles of 2 bytes.

Keys and values come to a kernel that way. Here two programs a multiprocessor do nothing else but
add up what arrives. The table is small enough to stay in L2, and no two programs read the same tile
at the same time, for L2 delivers once what several ask for together.

    bytes = programs * steps * 16 KiB
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.accuracy import Accuracy, WrongOutput
from benchmarks.case import Case, Contest
from benchmarks.results import Row
from nabla import dispatch

STAGE = "l2"
OLDEST = 90  # compute capability of GPUs with bulk copies, times ten
TILE = (64, 128)
TILES = 1024  # 16 MiB
PER_SM, WARPS, STAGES = 2, 4, 7  # a ring of 96 KiB a program
STEPS = 4 * TILES
SHARES = 16  # of a tile; each is added up by itself


@triton.jit
def read_tiles_kernel(
    tiles, sums_ptr, steps, apart, TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """The sum of the tiles that a program walks through: `steps` of them, from pid * apart on."""
    pid = tl.program_id(0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        row = (pid * apart + step) % TILES * ROWS
        total += tiles.load([row, 0]).to(tl.float32)
    shares = tl.sum(tl.reshape(total, [SHARES, ROWS * COLUMNS // SHARES]), 1)
    tl.store(sums_ptr + pid * SHARES + tl.arange(0, SHARES), shares)


def absent(device: torch.device) -> str | None:
    """Say why this is not measured on a device, or None."""
    found = dispatch.architecture(device)
    return None if found >= OLDEST else f"sm_{found} has no bulk copies, sm_{OLDEST} has them"


def contest(device: torch.device) -> Contest:
    """One case, on a table of small whole numbers, of which float32 makes exact sums."""
    num_programs = PER_SM * dispatch.num_multiprocessors(device)
    table = torch.randint(-8, 8, (TILES * TILE[0], TILE[1]), device=device).to(torch.bfloat16)
    sums = torch.empty(num_programs, SHARES, device=device)

    def check() -> Accuracy:
        read(table, sums, STEPS)
        expected = STEPS // TILES * table.sum(dtype=torch.float64)  # each walks through all tiles
        if not (sums.sum(1, dtype=torch.float64) == expected).all():
            raise WrongOutput("other tiles arrived than those that were asked for")
        return Accuracy(0.0, 0.0)

    moved = float(num_programs * STEPS * TILE[0] * TILE[1] * table.itemsize)
    row = Row(
        STAGE, f"tiles of {TILE[0]} x {TILE[1]}", "bulk copies", dtype="bfloat16", bytes=moved
    )
    return Contest([Case(row, lambda: read(table, sums, STEPS), check)])


def read(table: Tensor, sums: Tensor, steps: int) -> None:
    """Launch a program for each row of sums [programs, SHARES]; the table is [tiles * 64, 128]."""
    tiles, num_programs = table.shape[0] // TILE[0], sums.shape[0]
    apart = max(1, tiles // num_programs)
    read_tiles_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(table, list(TILE)),
        sums,
        steps,
        apart,
        tiles,
        *TILE,
        STAGES,
        SHARES,
        num_warps=WARPS,
    )
