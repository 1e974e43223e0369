"""Block means, summed in float64, and pooled scores, in float32.

mean_b = sum of the tokens of block b / their number      one pass over the tokens
logits = scale * q_mean k_mean^T                          exact products, never TF32
scores = softmax(logits) over the finite ones             a row a program
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla.grid import TokenGrid
from nabla.triton import launch, strides
from nabla.triton.blocks import dot, grid_run, head_ptr

LOG2_E = tl.constexpr(1.4426950408889634)
ONE = tl.constexpr(2.0**38)  # 1 in fixed point
MEAN_ROWS = 8
LOGITS_TILE = 64


def block_mean(x: Tensor, grid: TokenGrid, block_offset: int) -> Tensor:
    """Means [B, H, N, D] of the blocks of x [B, H, S, D], the first of which is `block_offset`."""
    batch, heads, num_tokens, head_dim = x.shape
    num_blocks = grid.count_blocks(num_tokens, block_offset)
    mean = x.new_empty(batch, heads, num_blocks, head_dim, dtype=torch.float32)
    launch(
        block_mean_kernel,
        batch * heads * num_blocks,
        x,
        mean,
        strides(x),
        heads,
        num_blocks,
        block_offset,
        tuple(grid.as_ints()),
        BLOCK=grid.block_size,
        ROWS=MEAN_ROWS,
        D=head_dim,
        num_warps=4,
    )
    return mean


def pooled_scores(
    q: Tensor, k: Tensor, grid: TokenGrid, q_block_offset: int, scale: float
) -> Tensor:
    """Row-stochastic scores [B, H, Nq, Nk]; +inf where a block is always kept."""
    q_mean, k_mean = block_mean(q, grid, q_block_offset), block_mean(k, grid, 0)
    num_maps, num_rows = q.shape[0] * q.shape[1], q_mean.shape[2]
    scores = pooled_logits(q_mean, k_mean, 0, 0, num_maps, num_rows, scale)
    rows, columns = row_tile(grid)
    launch(
        softmax_kernel,
        triton.cdiv(num_maps * num_rows, rows),
        scores,
        num_maps * num_rows,
        num_rows,
        q_block_offset,
        grid.num_blocks,
        grid.num_grid_blocks,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=min(max(rows * columns // 512, 4), 16),
    )
    return scores.view(*q.shape[:2], num_rows, grid.num_blocks)


def pooled_logits(
    q_mean: Tensor,
    k_mean: Tensor,
    first_map: int,
    first_row: int,
    num_maps: int,
    num_rows: int,
    scale: float,
) -> Tensor:
    """Logits [maps, rows, Nk] of some rows of some maps, of which there are B * Hq."""
    num_columns, head_dim = k_mean.shape[2:]
    logits = q_mean.new_empty(num_maps, num_rows, num_columns)
    launch(
        logits_kernel,
        num_maps * triton.cdiv(num_rows, LOGITS_TILE) * triton.cdiv(num_columns, LOGITS_TILE),
        q_mean,
        k_mean,
        logits,
        q_mean.shape[1] // k_mean.shape[1],
        q_mean.shape[2],
        num_columns,
        first_map,
        first_row,
        num_rows,
        scale,
        TILE=LOGITS_TILE,
        D=head_dim,
        CHANNELS=16,
        num_warps=4,
        num_stages=2,
    )
    return logits


def row_tile(grid: TokenGrid) -> tuple[int, int]:
    """Return how many rows of scores a program holds, and their columns: whole words of bits."""
    columns = max(triton.next_power_of_2(grid.num_blocks), 32)
    return max(2048 // columns, 1), columns


@triton.jit(do_not_specialize=["heads", "num_blocks", "block_offset", "grid"])
def block_mean_kernel(
    x_ptr,
    mean_ptr,
    x_strides,
    heads,
    num_blocks,
    block_offset,
    grid,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """The mean of one block, ROWS tokens at a time; exact, so equal tokens have equal means."""
    pid = tl.program_id(0)
    block, head, batch = pid % num_blocks, pid // num_blocks % heads, pid // num_blocks // heads
    first, size = grid_run(block_offset + block, grid)
    first -= grid_run(block_offset, grid)[0]
    row, channel = tl.arange(0, ROWS), tl.arange(0, triton.next_power_of_2(D))
    x_ptr = head_ptr(x_ptr, x_strides, batch, head)
    total = tl.zeros([ROWS, triton.next_power_of_2(D)], tl.float64)
    for skipped in tl.static_range(0, BLOCK, ROWS):
        token = (first + skipped + row).to(tl.int64)
        mask = (skipped + row < size)[:, None] & (channel < D)
        x = tl.load(x_ptr + token[:, None] * x_strides[2] + channel, mask=mask, other=0.0)
        total += x.to(tl.float64)  # [ROWS, D]
    mean = (tl.sum(total, 0) / size.to(tl.float64)).to(tl.float32)
    tl.store(mean_ptr + pid.to(tl.int64) * D + channel, mean, mask=channel < D)


@triton.jit(
    do_not_specialize=["group", "q_blocks", "k_blocks", "first_map", "first_row", "num_rows"]
)
def logits_kernel(
    q_mean_ptr,
    k_mean_ptr,
    logits_ptr,
    group,
    q_blocks,
    k_blocks,
    first_map,
    first_row,
    num_rows,
    scale,
    TILE: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One tile of the product of a head's means; consecutive programs share their rows."""
    tiles_n = tl.cdiv(k_blocks, TILE)
    tiles_m = tl.cdiv(num_rows, TILE)
    pid = tl.program_id(0)
    row = pid // tiles_n % tiles_m * TILE + tl.arange(0, TILE)
    column = pid % tiles_n * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, CHANNELS)
    local_map = (pid // tiles_n // tiles_m).to(tl.int64)
    q_head = (first_map + local_map) * q_blocks + first_row
    k_head = (first_map + local_map) // group * k_blocks
    q_ptrs = q_mean_ptr + (q_head + row)[:, None] * D + channel
    k_ptrs = k_mean_ptr + (k_head + column)[:, None] * D + channel
    total = tl.zeros([TILE, TILE], tl.float32)
    for _ in range(D // CHANNELS):
        q = tl.load(q_ptrs, mask=(row < num_rows)[:, None], other=0.0)  # [TILE, CHANNELS]
        k = tl.load(k_ptrs, mask=(column < k_blocks)[:, None], other=0.0)
        total = dot(q, tl.trans(k), total)
        q_ptrs += CHANNELS
        k_ptrs += CHANNELS
    at = (local_map * num_rows + row)[:, None] * k_blocks + column
    mask = (row < num_rows)[:, None] & (column < k_blocks)
    tl.store(logits_ptr + at, total * tl.cast(scale, tl.float32), mask=mask)


@triton.jit(do_not_specialize=["num_lines", "num_rows", "first_row", "k_blocks", "grid_blocks"])
def softmax_kernel(
    scores_ptr,
    num_lines,
    num_rows,
    first_row,
    k_blocks,
    grid_blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Scores of ROWS rows, in place of the logits; row 0 of a map is block `first_row`."""
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (line < num_lines)[:, None] & (column < k_blocks)
    scores_ptrs = scores_ptr + line.to(tl.int64)[:, None] * k_blocks + column
    logits = tl.load(scores_ptrs, mask=mask, other=0.0)  # [ROWS, COLUMNS]
    is_selectable = (column < grid_blocks) & (first_row + line % num_rows < grid_blocks)[:, None]
    tl.store(scores_ptrs, softmax(logits, is_selectable), mask=mask)


@triton.jit
def softmax(logits, is_selectable):
    """Return the softmax over the finite selectable logits of each row, and +inf elsewhere."""
    is_selectable &= tl.abs(logits) < float("inf")  # false for NaN
    logits = tl.where(is_selectable, logits, float("-inf"))
    largest = tl.max(logits, 1, keep_dims=True)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    mass = tl.exp2((logits - largest) * LOG2_E)
    # Sums of integers are exact in any order, so every kernel finds the same scores.
    total = tl.sum((mass * ONE).to(tl.int64), 1, keep_dims=True).to(tl.float32) / ONE
    return tl.where(is_selectable, mass / total, float("inf"))
