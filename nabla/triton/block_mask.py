"""Block selection without a sort: search the score at which a row's mass reaches top_p.

above(t) = mass of the scores greater than t
cut      = least t with above(t) < top_p * total: always one of the scores
keep     = scores > cut, and of those equal to it, lowest index first, as many as are needed

A program holds whole rows in registers. Masses are integers, so their sums are exact in any order.
The scores of q and k are made a few rows at a time, never as one map of all heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla.grid import TokenGrid, Window
from nabla.triton import launch
from nabla.triton.scores import block_mean, pooled_logits, row_tile, softmax

CHUNK_BYTES = 64 << 20  # of scores that exist at a time


def select_blocks(
    scores: Tensor, top_p: Tensor, grid: TokenGrid, window: Window | None, q_block_offset: int
) -> Tensor:
    """Bits [B, H, Nq, ceil(Nk / 32)]: fewest blocks of a row that hold top_p of its scores."""
    batch, heads, num_rows, num_columns = scores.shape
    bits = scores.new_empty(
        batch * heads, num_rows, triton.cdiv(num_columns, 32), dtype=torch.int32
    )
    scores = scores.reshape(batch * heads, num_rows, num_columns).contiguous()
    _select(scores, bits, top_p, grid, window, q_block_offset, 0, 0, IS_LOGITS=False)
    return bits.view(batch, heads, *bits.shape[1:])


def create_block_mask(
    q: Tensor,
    k: Tensor,
    top_p: Tensor,
    grid: TokenGrid,
    window: Window | None,
    q_block_offset: int,
    scale: float,
) -> Tensor:
    """Bits [B, H, Nq, ceil(Nk / 32)] of the NABLA mask of q and k."""
    q_mean, k_mean = block_mean(q, grid, q_block_offset), block_mean(k, grid, 0)
    (batch, heads, num_rows, _), num_columns = q_mean.shape, k_mean.shape[2]
    bits = q.new_empty(batch * heads, num_rows, triton.cdiv(num_columns, 32), dtype=torch.int32)
    rows_at_once = max(CHUNK_BYTES // (4 * num_columns), 1)
    maps_at_once = max(rows_at_once // num_rows, 1)
    for first_map in range(0, batch * heads, maps_at_once):
        maps = min(maps_at_once, batch * heads - first_map)
        for first_row in range(0, num_rows, rows_at_once):
            rows = min(rows_at_once, num_rows - first_row)
            at = (first_map, first_row)
            logits = pooled_logits(q_mean, k_mean, *at, maps, rows, scale)
            _select(logits, bits, top_p, grid, window, q_block_offset, *at, IS_LOGITS=True)
            del logits  # before the next ones are made
    return bits.view(batch, heads, *bits.shape[1:])


def _select(
    scores: Tensor,
    bits: Tensor,
    top_p: Tensor,
    grid: TokenGrid,
    window: Window | None,
    q_block_offset: int,
    first_map: int,
    first_row: int,
    IS_LOGITS: bool,
) -> None:
    """Write the bits of scores, or of logits [maps, rows, Nk]: the rows from `first_row` on."""
    num_lines, (rows, columns) = scores.shape[0] * scores.shape[1], row_tile(grid)
    launch(
        select_kernel,
        triton.cdiv(num_lines, rows),
        scores,
        bits,
        top_p,
        top_p.stride(0),
        top_p.shape[0],
        num_lines,
        first_map,
        first_row,
        scores.shape[1],
        bits.shape[1],
        q_block_offset,
        grid.num_blocks,
        grid.blocks,
        tuple(extent // 2 for extent in window or (-2, -2, -2)),
        IS_LOGITS=IS_LOGITS,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=min(max(rows * columns // 512, 4), 16),
    )


@triton.jit(
    do_not_specialize=[
        "top_p_stride",
        "heads",
        "num_lines",
        "first_map",
        "first_row",
        "num_rows",
        "q_blocks",
        "q_block_offset",
        "k_blocks",
        "blocks",
        "reach",
    ]
)
def select_kernel(
    scores_ptr,
    bits_ptr,
    top_p_ptr,
    top_p_stride,
    heads,
    num_lines,
    first_map,
    first_row,
    num_rows,
    q_blocks,
    q_block_offset,
    k_blocks,
    blocks,
    reach,
    IS_LOGITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The bits of ROWS rows. `blocks` and `reach`: extents in time, height and width, in blocks."""
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    is_inside = (line < num_lines)[:, None] & (column < k_blocks)
    line_map, row = first_map + line // num_rows, first_row + line % num_rows
    row_block = (q_block_offset + row)[:, None]
    num_selectable = blocks[0] * blocks[1] * blocks[2]
    scores_ptrs = scores_ptr + line.to(tl.int64)[:, None] * k_blocks + column
    scores = tl.load(scores_ptrs, mask=is_inside, other=float("inf"))  # [ROWS, COLUMNS]
    is_selectable = (column < num_selectable) & (row_block < num_selectable)
    if IS_LOGITS:
        scores = softmax(scores, is_selectable)
    is_selectable &= tl.abs(scores) < float("inf")  # false for NaN
    top_p_ptrs = top_p_ptr + line_map % heads * top_p_stride
    top_p = tl.load(top_p_ptrs, mask=line < num_lines, other=1.0)[:, None]

    keep = most_probable(scores, is_selectable, top_p)
    keep |= in_window(row_block, column, blocks, reach)
    keep = is_inside & (keep | ~is_selectable)

    words: tl.constexpr = COLUMNS // 32
    bits = tl.reshape(keep.to(tl.int32), [ROWS, words, 32]) << tl.arange(0, 32)
    num_words = tl.cdiv(k_blocks, 32)
    word = tl.arange(0, words)
    bits_ptrs = bits_ptr + (line_map.to(tl.int64) * q_blocks + row)[:, None] * num_words + word
    mask = (line < num_lines)[:, None] & (word < num_words)
    tl.store(bits_ptrs, tl.sum(bits, 2), mask=mask)


@triton.jit
def most_probable(scores, is_selectable, top_p):
    """Return which of the selectable scores of each row are the fewest that hold top_p of them."""
    scores = tl.maximum(scores, 0.0)
    # The bits of a float that is not negative, as an integer, have the order of the floats.
    keys = tl.where(is_selectable, scores.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
    largest = tl.max(keys, 1, keep_dims=True)  # [ROWS, 1], as all that follows
    # A power of 2 brings the largest score to between 2**38 and 2**39.
    power = tl.minimum(292 - (largest >> 23), 254) << 23
    mass = scores * power.to(tl.float32, bitcast=True)
    mass = tl.where(is_selectable, mass, 0.0).to(tl.int64)  # [ROWS, COLUMNS]
    total = tl.sum(mass, 1, keep_dims=True)
    share = tl.where(top_p > 0, top_p, 0.0).to(tl.float64) * total.to(tl.float64)  # 0 for NaN
    wanted = share.to(tl.int64)
    wanted += (wanted.to(tl.float64) < share).to(tl.int64)  # rounded up
    wanted = tl.maximum(wanted, 1)  # the first is always kept

    cut, below = largest, tl.full(largest.shape, -1, tl.int32)  # mass above: < and >= wanted
    for _ in range(31):
        middle = below + (cut - below) // 2
        is_low = tl.sum(tl.where(keys > middle, mass, 0), 1, keep_dims=True) >= wanted
        below = tl.where(is_low, middle, below)
        cut = tl.where(is_low, cut, middle)
    cut = tl.where(total == 0, largest, cut)

    is_equal = is_selectable & (keys == cut)
    missing = wanted - tl.sum(tl.where(keys > cut, mass, 0), 1, keep_dims=True)
    each = tl.max(tl.where(is_equal, mass, 0), 1, keep_dims=True)
    needed = (missing + each - 1) // tl.maximum(each, 1)
    needed = tl.where(each == 0, 1, needed).to(tl.int32)
    before = tl.cumsum(is_equal.to(tl.int32), 1) - is_equal.to(tl.int32)
    keep = (keys > cut) | (is_equal & (before < needed))
    return is_selectable & tl.where(top_p >= 1, keys >= 0, keep)


@triton.jit
def in_window(row, column, blocks, reach):
    """Return which columns are within reach of a row along each axis; none if reach is negative."""
    slab = blocks[1] * blocks[2]
    frames = tl.abs(row // slab - column // slab)
    height = tl.abs(row // blocks[2] % blocks[1] - column // blocks[2] % blocks[1])
    width = tl.abs(row % blocks[2] - column % blocks[2])
    return (frames <= reach[0]) & (height <= reach[1]) & (width <= reach[2])
