"""What the kernels share: where blocks lie, which blocks a row keeps, tiles of tokens.

A list entry is a block: first token << 8 | tokens. Where all blocks are whole, block b begins at
b * BLOCK; where some are ragged, kernels read where blocks begin, which takes fewer registers than
to compute it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla.dispatch import is_interpreted
from nabla.grid import TokenGrid
from nabla.triton import launch

INTERPRETED = tl.constexpr(is_interpreted())
LIST_CHUNK = tl.constexpr(256)
WORDS = 4  # that a program transposes
STARTS = 256  # that a program writes


def ragged_starts(grid: TokenGrid, device: torch.device) -> Tensor | None:
    """Where every block begins and the last one ends, int32; None if all are whole."""
    if not grid.is_ragged:
        return None
    starts = torch.empty(grid.num_blocks + 1, dtype=torch.int32, device=device)
    num_programs = triton.cdiv(grid.num_blocks, STARTS)
    arguments = (starts, grid.num_blocks, tuple(grid.as_ints()))
    launch(starts_kernel, num_programs, *arguments, BLOCKS=STARTS, num_warps=4)
    return starts


@triton.jit(do_not_specialize=["num_blocks", "grid"])
def starts_kernel(starts_ptr, num_blocks, grid, BLOCKS: tl.constexpr):
    """The starts of BLOCKS blocks, and the end of the last of all."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    first, size = grid_run(block, grid)
    tl.store(starts_ptr + block, first, mask=block < num_blocks)
    tl.store(starts_ptr + block + 1, first + size, mask=block == num_blocks - 1)


def transposed_bits(bits: Tensor, num_columns: int) -> Tensor:
    """Bits [B, H, Nk, ceil(Nq / 32)] of bits [B, H, Nq, ceil(Nk / 32)]; those past Nq are 0."""
    shared = tuple(slice(1) if stride == 0 else slice(None) for stride in bits.stride()[:2])
    batch, heads, num_rows, _ = bits[shared].shape
    num_words = triton.cdiv(num_rows, 32)
    columns = bits.new_empty(batch, heads, num_columns, num_words)
    launch(
        transpose_kernel,
        batch * heads * num_words * triton.cdiv(num_columns, 32 * WORDS),
        bits,
        columns,
        bits.stride(),
        heads,
        num_rows,
        num_columns,
        COLUMNS=32 * WORDS,
        num_warps=4,
    )
    return columns.expand(*bits.shape[:2], -1, -1)


@triton.jit(do_not_specialize=["bits_strides", "heads", "num_rows", "num_columns"])
def transpose_kernel(
    bits_ptr, columns_ptr, bits_strides, heads, num_rows, num_columns, COLUMNS: tl.constexpr
):
    """One word of COLUMNS columns: that of 32 rows."""
    tiles, words = tl.cdiv(num_columns, COLUMNS), tl.cdiv(num_rows, 32)
    pid = tl.program_id(0)
    column = pid % tiles * COLUMNS + tl.arange(0, COLUMNS)
    word, line = pid // tiles % words, pid // tiles // words
    row = word * 32 + tl.arange(0, 32)
    bits_ptrs = head_ptr(bits_ptr, bits_strides, line // heads, line % heads)
    bits_ptrs += row[:, None] * bits_strides[2] + column // 32 * bits_strides[3]
    mask = (row < num_rows)[:, None] & (column < num_columns)
    bit = tl.load(bits_ptrs, mask=mask, other=0) >> (column % 32) & 1  # [32, COLUMNS]
    transposed = tl.sum(bit << tl.arange(0, 32)[:, None], 0)
    columns_ptrs = columns_ptr + (line.to(tl.int64) * num_columns + column) * words + word
    tl.store(columns_ptrs, transposed, mask=column < num_columns)


@triton.jit
def own_block(tile, num_blocks, heads, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Return the batch element, head and block of a program's tile, one of BLOCK // ROWS."""
    row = tile // (BLOCK // ROWS)
    return row // num_blocks // heads, row // num_blocks % heads, row % num_blocks


@triton.jit
def own_run(tile, block, starts_ptr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Return the first position of a program's tile, and how many it holds (may be negative)."""
    first, size = block_run(block, starts_ptr, BLOCK)
    skipped = tile % (BLOCK // ROWS) * ROWS
    return first + skipped, size - skipped


@triton.jit
def block_run(block, starts_ptr, BLOCK: tl.constexpr, mask=None):
    """Return the first position of each block and its number of tokens."""
    if starts_ptr is None:
        first, size = block * BLOCK, BLOCK
    else:
        first = tl.load(starts_ptr + block, mask=mask)
        size = tl.load(starts_ptr + block + 1, mask=mask) - first
    return first, size


@triton.jit
def grid_run(block, grid):
    """Return the first position of each block and its number of tokens, of TokenGrid.as_ints()."""
    frames, height, width, block_frames, block_height, block_width, extra = grid
    rows, columns = tl.cdiv(height, block_height), tl.cdiv(width, block_width)
    slab, row, column = block // (rows * columns), block // columns % rows, block % columns
    slab_frames = tl.minimum(block_frames, frames - slab * block_frames)
    row_height = tl.minimum(block_height, height - row * block_height)
    column_width = tl.minimum(block_width, width - column * block_width)
    in_slab = row * block_height * width + row_height * column * block_width
    first = slab * block_frames * height * width + slab_frames * in_slab

    block_size = block_frames * block_height * block_width
    past = (block - tl.cdiv(frames, block_frames) * rows * columns) * block_size
    first = tl.where(past < 0, first, frames * height * width + past)
    size = tl.where(
        past < 0, slab_frames * row_height * column_width, tl.minimum(block_size, extra - past)
    )
    return first, size


@triton.jit
def list_blocks(
    list_ptr, bits_ptr, num_blocks, first_block, first_token, starts_ptr, BLOCK: tl.constexpr
):
    """Write the blocks that a row of bits keeps to a list; return how many they are.

    Column 0 is `first_block`, and tokens count from `first_token`. A loop over the list has a
    known number of steps, which is what lets the compiler overlap its loads with its products.
    """
    tl.debug_barrier()  # the list may be overwritten: all threads have read the one before
    count = 0
    for base in range(0, num_blocks, LIST_CHUNK):
        column = base + tl.arange(0, LIST_CHUNK)
        word = tl.load(bits_ptr + column // 32, mask=column < num_blocks, other=0)
        kept = word >> (column % 32) & 1  # [LIST_CHUNK]
        first, size = block_run(first_block + column, starts_ptr, BLOCK, column < num_blocks)
        entry = (first - first_token).to(tl.int64) << 8 | size
        tl.store(list_ptr + count + tl.cumsum(kept, 0) - kept, entry, mask=kept != 0)
        count += tl.sum(kept)
    tl.debug_barrier()  # the list may be read: all threads have written their entries
    return count


@triton.jit
def listed_run(list_ptr, step, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Return the first token of a step, and how many it holds (may be negative)."""
    parts: tl.constexpr = BLOCK // STEP
    entry = tl.load(list_ptr + step // parts)
    skipped = step % parts * STEP
    return (entry >> 8) + skipped, (entry & 255).to(tl.int32) - skipped


@triton.jit
def head_ptr(x_ptr, strides, batch, head):
    """Return where the tokens [S, D] of a head of x [B, H, S, D] begin."""
    return x_ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def load_tile(
    x_ptr, stride, first, size, TILE: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr
):
    """Return tokens from `first` on: [TILE, D padded to a power of 2].

    Past `size`, where other blocks may hold NaN, it repeats the last token that there is: masks
    would take registers that tiles of 128 channels do not have. If that token is infinite, rows
    that attend to it get NaN, since its repetitions have probability 0.
    """
    row = tl.arange(0, TILE)
    if RAGGED:
        row = tl.minimum(row, size - 1)
    channel = tl.arange(0, triton.next_power_of_2(D))
    x_ptrs = x_ptr + (first + row).to(tl.int64)[:, None] * stride + channel
    if triton.next_power_of_2(D) != D:
        return tl.load(x_ptrs, mask=(channel < D)[None, :], other=0.0)
    return tl.load(x_ptrs)


@triton.jit
def store_tile(x_ptr, stride, first, size, tile, TILE: tl.constexpr, D: tl.constexpr):
    """Store the tokens that `load_tile` loads."""
    row = tl.arange(0, TILE)
    channel = tl.arange(0, triton.next_power_of_2(D))
    x_ptrs = x_ptr + (first + row).to(tl.int64)[:, None] * stride + channel
    mask = (row < size)[:, None] & (channel < D)
    tl.store(x_ptrs, round_to(tile, x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Return float32 values in another type, rounded to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # Triton's interpreter truncates, and to no zero
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + (bits >> 16 & 1) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, total=None):
    """Return total + a b in float32; products of float32 are exact, never TF32."""
    if INTERPRETED:  # the interpreter of Triton 3.9 multiplies the bits of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def load_rows(x_ptr, row, num_tokens, first, size, other, TILE: tl.constexpr):
    """Return tokens of a row of x [rows, tokens] from `first` on; `other` from `size` on."""
    at = tl.arange(0, TILE)
    return tl.load(x_ptr + row.to(tl.int64) * num_tokens + first + at, mask=at < size, other=other)


@triton.jit
def store_rows(x_ptr, row, num_tokens, first, size, x, TILE: tl.constexpr):
    """Store the tokens that `load_rows` loads."""
    at = tl.arange(0, TILE)
    tl.store(x_ptr + row.to(tl.int64) * num_tokens + first + at, x, mask=at < size)
