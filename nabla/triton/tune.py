"""Search of tile configurations on the GPU at hand, for `nabla tune`; no product path comes here.

For each kernel, dtype and head_dim: the fastest candidate whose output is that of the entry in use.
The result is a table for `nabla.triton.config.use_table`.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nabla import dispatch
from nabla.bits import pack_bits
from nabla.grid import TokenGrid
from nabla.triton import block_attention
from nabla.triton.config import CHIPS, TABLE, Key, TileConfig, nearest_chip, save_table, table_key

DIRECTIONS = ("forward", "dq", "dkdv")
GRID, HEADS, DENSITY = TokenGrid(30, 32, 48), 8, 0.2
GAIN = 0.98  # an entry is replaced by what takes less than this share of its time

Run = Callable[[], Sequence[Tensor]]
Timer = Callable[[Run], float]


def tune(
    path: Path,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    head_dims: Sequence[int] = (64, 128),
    *,
    device: torch.device | None = None,
    grid: TokenGrid = GRID,
    heads: int = HEADS,
    timer: Timer | None = None,
    report: Callable[[str], None] = print,
) -> dict[Key, TileConfig]:
    """Measure candidates and write a table of the fastest.

    Args:
        path: The JSON file to write.
        dtypes: Of the tensors to measure with; float16 and bfloat16 share their entries.
        head_dims: Channels of a head to measure with.
        device: The GPU; the current one if None.
        grid: Of the tokens to measure with.
        heads: To measure with.
        timer: Returns the seconds of a run; CUDA events if None.
        report: Takes a line about each entry.

    Returns:
        The entries written, by their key in the table. The table in use stays as it is.

    Raises:
        ValueError: If Triton cannot run here.
    """
    status = dispatch.backends()["triton"]
    if not status.available or (timer is None and dispatch.is_interpreted()):
        reason = "its interpreter is on" if status.available else status.reason
        raise ValueError(f"nabla tune measures Triton's kernels on a GPU: {reason}")
    device = torch.device("cuda") if device is None else device
    architecture = dispatch.architecture(device) or min(CHIPS)
    entries = {}
    for dtype, head_dim in itertools.product(dtypes, head_dims):
        runs = _problem(grid, heads, head_dim, dtype, device)
        for direction in DIRECTIONS:
            key = table_key(direction, architecture, head_dim, dtype)
            entries[key] = fastest(key, architecture, runs[direction], timer or cuda_seconds)
            report(f"{direction:8} {str(dtype).removeprefix('torch.')} {head_dim}: {entries[key]}")
    name = str(device) if device.type == "cpu" else torch.cuda.get_device_name(device)
    save_table(path, entries, name)
    return entries


def fastest(key: Key, architecture: int, run: Run, timer: Timer) -> TileConfig:
    """Return the entry in use, or the candidate that is clearly faster and as right."""
    in_use = best = TABLE[key]
    expected = run()
    least = timer(run) * GAIN
    try:
        for candidate in candidates(key, CHIPS[nearest_chip(architecture)][0]):
            TABLE[key] = candidate
            if (seconds := _seconds(run, expected, timer)) < least:
                best, least = candidate, seconds
    finally:
        TABLE[key] = in_use
    return best


def candidates(key: Key, shared: int) -> Iterator[TileConfig]:
    """Yield configurations whose tiles fit into shared memory as often as they say."""
    _, _, itemsize, head_dim = key
    rows = (64, 32) if itemsize == 2 else (32, 16)
    for row, step, warps, stages, per_sm in itertools.product(
        rows, (64, 32, 16), (4, 8), (2, 3), (1, 2, 3)
    ):
        if (row + 2 * stages * step) * head_dim * itemsize * per_sm <= shared:
            yield TileConfig(row, step, warps, stages, per_sm)


def cuda_seconds(run: Run) -> float:
    """Return the median time of a run on the GPU."""
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _seconds(run: Run, expected: Sequence[Tensor], timer: Timer) -> float:
    """The time of a run; infinite if it does not fit the chip, or its output is another one."""
    try:
        outputs = run()
    except Exception:  # Triton has an error for each resource, and versions name them differently
        return math.inf
    for actual, right in zip(outputs, expected, strict=True):
        error = (actual.float() - right.float()).abs().max()
        if not error <= 4 * torch.finfo(right.dtype).eps * right.float().abs().max():
            return math.inf
    return timer(run)


def _problem(
    grid: TokenGrid, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Run]:
    """What to run for each direction."""
    torch.manual_seed(0)
    shape = (1, heads, grid.num_tokens, head_dim)
    q, k, v, dout = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    num_blocks = grid.num_blocks
    keep = torch.rand(1, heads, num_blocks, num_blocks, device=device) < DENSITY
    mask = (pack_bits(keep), grid, 0, head_dim**-0.5)
    out, lse = block_attention.attention_fwd(q, k, v, *mask)

    def backward() -> Sequence[Tensor]:
        return block_attention.attention_bwd(dout, None, q, k, v, out, lse, *mask)

    def forward() -> Sequence[Tensor]:
        return block_attention.attention_fwd(q, k, v, *mask)[:1]

    return {"forward": forward, "dq": backward, "dkdv": backward}
