"""Block-sparse attention: a program lists the blocks that its row keeps, then walks the list.

s = scale * q k^T;  p = exp(s - lse);  out = p v;  delta = rowsum(dout * out) - dlse
ds = p * (dout v^T - delta);  dq = scale * ds k;  dk = scale * ds^T q;  dv = p^T dout

Gradients are sums in one fixed order: dq walks the rows of the mask, dk and dv its columns.
Exponentials are to base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla.grid import TokenGrid
from nabla.triton import launch, strides
from nabla.triton.blocks import (
    block_run,
    dot,
    head_ptr,
    list_blocks,
    listed_run,
    load_rows,
    load_tile,
    own_block,
    own_run,
    ragged_starts,
    round_to,
    store_rows,
    store_tile,
    transposed_bits,
)
from nabla.triton.config import tile_config

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SMALLEST_SCALE = 1e-30  # in the place of 0, which would turn an infinite distance into NaN


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    grid: TokenGrid,
    q_block_offset: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Out [B, H, Sq, D] with the strides of q, and lse [B, H, Sq]; an empty row is 0 and -inf."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    # The kernel takes scale * (product - largest product): the scale has to be positive.
    q, scale = (q, max(scale, SMALLEST_SCALE)) if scale >= 0 else (-q, -scale)
    _launch(
        "forward", attention_fwd_kernel, (q, k, v, out), (lse,), bits, grid, q_block_offset, scale
    )
    return out, lse


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bits: Tensor,
    grid: TokenGrid,
    q_block_offset: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (dq, dk, dv), with the strides of q, k and v."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.zeros_like(lse) if dlse is None else -dlse
    rows = (lse.contiguous(), delta.contiguous())  # the kernel of dq adds rowsum(dout * out)
    options = (grid, q_block_offset, scale)
    _launch("dq", attention_bwd_dq_kernel, (q, k, v, out, dout, dq), rows, bits, *options)
    columns = transposed_bits(bits, grid.num_blocks)
    _launch("dkdv", attention_bwd_dkdv_kernel, (q, k, v, dout, dk, dv), rows, columns, *options)
    return dq, dk, dv


def _launch(
    direction: str,
    kernel,
    tensors: tuple[Tensor, ...],
    rows: tuple[Tensor, ...],
    bits: Tensor,
    grid: TokenGrid,
    q_block_offset: int,
    scale: float,
) -> None:
    """Run a kernel with no more programs than the device holds at a time, each with its list.

    Args:
        direction: Which entry of the table of configurations.
        kernel: The kernel.
        tensors: q, k and then all that is [B, H, S, D].
        rows: What is [B, Hq, Sq].
        bits: Bits [B, Hq, blocks, words] of which a program walks one row.
        grid: The grid of the keys.
        q_block_offset: The block with which q begins.
        scale: Factor of the scores.
    """
    q, k = tensors[:2]
    (batch, heads, q_tokens, head_dim), kv_heads = q.shape, k.shape[1]
    is_by_key = direction == "dkdv"
    q_blocks = grid.count_blocks(q_tokens, q_block_offset)
    num_blocks, num_columns = q_blocks, grid.num_blocks
    if is_by_key:
        num_blocks, num_columns = num_columns, num_blocks
    if bits.stride(3) != 1:
        bits = bits.contiguous()
    config = tile_config(direction, q.device, head_dim, q.dtype, grid.block_size)
    tiles_per_block = grid.block_size // config.rows
    num_tiles = batch * (kv_heads if is_by_key else heads) * num_blocks * tiles_per_block
    num_programs = min(config.programs(q.device), num_tiles)
    launch(
        kernel,
        num_programs,
        *tensors,
        *rows,
        bits,
        torch.empty(num_programs, num_columns, dtype=torch.int64, device=q.device),
        *(strides(x) for x in tensors),
        strides(bits),
        kv_heads,
        heads // kv_heads,
        q_tokens,
        num_tiles,
        num_blocks,
        num_columns,
        q_block_offset,
        ragged_starts(grid, q.device),
        scale,
        D=head_dim,
        BLOCK=grid.block_size,
        ROWS=config.rows,
        STEP=config.step,
        RAGGED=grid.is_ragged,
        num_warps=config.warps,
        num_stages=config.stages,
        # Float32 products are unrolled: given registers, the compiler loads ahead until it spills.
        maxnreg=None if q.dtype == torch.float32 else config.registers,
    )


VARYING = [
    "bits_strides",
    "kv_heads",
    "group",
    "q_tokens",
    "num_tiles",
    "num_blocks",
    "num_columns",
    "q_block_offset",
]


@triton.jit(do_not_specialize=VARYING)
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    bits_ptr,
    list_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    bits_strides,
    kv_heads,
    group,
    q_tokens,
    num_tiles,
    num_blocks,
    num_columns,
    q_block_offset,
    starts_ptr,
    scale,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Out and lse of ROWS queries at a time; a step of the inner loop visits STEP keys."""
    scale_log2 = tl.cast(scale, tl.float32) * LOG2_E
    list_ptr += tl.program_id(0).to(tl.int64) * num_columns
    q_start, _ = block_run(q_block_offset, starts_ptr, BLOCK)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        batch, head, block = own_block(tile, num_blocks, kv_heads * group, BLOCK, ROWS)
        first, size = own_run(tile, block + q_block_offset, starts_ptr, BLOCK, ROWS)
        first -= q_start
        bits_row = head_ptr(bits_ptr, bits_strides, batch, head) + block * bits_strides[2]
        count = list_blocks(list_ptr, bits_row, num_columns, 0, 0, starts_ptr, BLOCK)

        q_head = head_ptr(q_ptr, q_strides, batch, head)
        k_head = head_ptr(k_ptr, k_strides, batch, head // group)
        v_head = head_ptr(v_ptr, v_strides, batch, head // group)
        q = load_tile(q_head, q_strides[2], first, size, ROWS, D, RAGGED)  # [ROWS, D]
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        out = tl.zeros(q.shape, tl.float32)
        for step in range(count * (BLOCK // STEP)):
            key, keys = listed_run(list_ptr, step, BLOCK, STEP)
            k = load_tile(k_head, k_strides[2], key, keys, STEP, D, RAGGED)  # [STEP, D]
            s = dot(q, tl.trans(k))  # [ROWS, STEP]
            if RAGGED:
                s = tl.where(tl.arange(0, STEP) < keys, s, float("-inf"))
            larger = tl.maximum(largest, tl.max(s, 1))
            shift = tl.where(larger == float("-inf"), 0.0, larger)
            p = tl.exp2((s - shift[:, None]) * scale_log2)
            decay = tl.exp2((largest - shift) * scale_log2)
            total = total * decay + tl.sum(p, 1)
            v = load_tile(v_head, v_strides[2], key, keys, STEP, D, RAGGED)  # [STEP, D]
            out = dot(round_to(p, v.dtype), v, out * decay[:, None])
            largest = larger

        out *= (1 / tl.where(total == 0, 1.0, total))[:, None]
        out_head = head_ptr(out_ptr, out_strides, batch, head)
        store_tile(out_head, out_strides[2], first, size, out, ROWS, D)
        lse = (largest * scale_log2 + tl.log2(total)) * LN_2
        store_rows(lse_ptr, batch * kv_heads * group + head, q_tokens, first, size, lse, ROWS)


@triton.jit(do_not_specialize=VARYING)
def attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,
    bits_ptr,
    list_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    dout_strides,
    dq_strides,
    bits_strides,
    kv_heads,
    group,
    q_tokens,
    num_tiles,
    num_blocks,
    num_columns,
    q_block_offset,
    starts_ptr,
    scale,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Dq of ROWS queries at a time, and delta, which holds -dlse before."""
    scale_log2 = tl.cast(scale, tl.float32) * LOG2_E
    list_ptr += tl.program_id(0).to(tl.int64) * num_columns
    q_start, _ = block_run(q_block_offset, starts_ptr, BLOCK)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        batch, head, block = own_block(tile, num_blocks, kv_heads * group, BLOCK, ROWS)
        first, size = own_run(tile, block + q_block_offset, starts_ptr, BLOCK, ROWS)
        first -= q_start
        bits_row = head_ptr(bits_ptr, bits_strides, batch, head) + block * bits_strides[2]
        count = list_blocks(list_ptr, bits_row, num_columns, 0, 0, starts_ptr, BLOCK)

        row = batch * kv_heads * group + head
        out_head = head_ptr(out_ptr, out_strides, batch, head)
        out = load_tile(out_head, out_strides[2], first, size, ROWS, D, RAGGED)  # [ROWS, D]
        dout_head = head_ptr(dout_ptr, dout_strides, batch, head)
        dout = load_tile(dout_head, dout_strides[2], first, size, ROWS, D, RAGGED)  # [ROWS, D]
        delta = load_rows(delta_ptr, row, q_tokens, first, size, 0.0, ROWS)
        delta += tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
        store_rows(delta_ptr, row, q_tokens, first, size, delta, ROWS)
        lse = load_rows(lse_ptr, row, q_tokens, first, size, float("inf"), ROWS) * LOG2_E

        k_head = head_ptr(k_ptr, k_strides, batch, head // group)
        v_head = head_ptr(v_ptr, v_strides, batch, head // group)
        q_head = head_ptr(q_ptr, q_strides, batch, head)
        q = load_tile(q_head, q_strides[2], first, size, ROWS, D, RAGGED)  # [ROWS, D]
        dq = tl.zeros(q.shape, tl.float32)
        for step in range(count * (BLOCK // STEP)):
            key, keys = listed_run(list_ptr, step, BLOCK, STEP)
            k = load_tile(k_head, k_strides[2], key, keys, STEP, D, RAGGED)  # [STEP, D]
            v = load_tile(v_head, v_strides[2], key, keys, STEP, D, RAGGED)
            s = dot(q, tl.trans(k)) * scale_log2  # [ROWS, STEP]
            p = probability(s, lse[:, None])
            if RAGGED:
                p = tl.where(tl.arange(0, STEP) < keys, p, 0.0)
            dp = dot(dout, tl.trans(v))
            ds = p * (dp - delta[:, None])
            dq = dot(round_to(ds, k.dtype), k, dq)
        dq *= tl.cast(scale, tl.float32)
        dq_head = head_ptr(dq_ptr, dq_strides, batch, head)
        store_tile(dq_head, dq_strides[2], first, size, dq, ROWS, D)


@triton.jit(do_not_specialize=VARYING)
def attention_bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
    bits_ptr,
    list_ptr,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dk_strides,
    dv_strides,
    bits_strides,
    kv_heads,
    group,
    q_tokens,
    num_tiles,
    num_blocks,
    num_columns,
    q_block_offset,
    starts_ptr,
    scale,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Dk and dv of ROWS keys at a time, over the query heads that share them, in order."""
    scale_log2 = tl.cast(scale, tl.float32) * LOG2_E
    list_ptr += tl.program_id(0).to(tl.int64) * num_columns
    q_start, _ = block_run(q_block_offset, starts_ptr, BLOCK)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        batch, kv_head, block = own_block(tile, num_blocks, kv_heads, BLOCK, ROWS)
        first, size = own_run(tile, block, starts_ptr, BLOCK, ROWS)
        k_head = head_ptr(k_ptr, k_strides, batch, kv_head)
        v_head = head_ptr(v_ptr, v_strides, batch, kv_head)
        k = load_tile(k_head, k_strides[2], first, size, ROWS, D, RAGGED)  # [ROWS, D]
        v = load_tile(v_head, v_strides[2], first, size, ROWS, D, RAGGED)
        dk = tl.zeros(k.shape, tl.float32)
        dv = tl.zeros(k.shape, tl.float32)
        for member in range(group):
            head = kv_head * group + member
            bits_row = head_ptr(bits_ptr, bits_strides, batch, head) + block * bits_strides[2]
            count = list_blocks(
                list_ptr, bits_row, num_columns, q_block_offset, q_start, starts_ptr, BLOCK
            )
            row = batch * kv_heads * group + head
            q_head = head_ptr(q_ptr, q_strides, batch, head)
            dout_head = head_ptr(dout_ptr, dout_strides, batch, head)
            for step in range(count * (BLOCK // STEP)):
                query, queries = listed_run(list_ptr, step, BLOCK, STEP)
                q = load_tile(q_head, q_strides[2], query, queries, STEP, D, RAGGED)  # [STEP, D]
                lse = load_rows(lse_ptr, row, q_tokens, query, queries, float("inf"), STEP)
                s = dot(k, tl.trans(q)) * scale_log2  # [ROWS, STEP]
                p = probability(s, lse * LOG2_E)
                dout = load_tile(dout_head, dout_strides[2], query, queries, STEP, D, RAGGED)
                dv = dot(round_to(p, dout.dtype), dout, dv)
                dp = dot(v, tl.trans(dout))
                delta = load_rows(delta_ptr, row, q_tokens, query, queries, 0.0, STEP)
                ds = p * (dp - delta)
                dk = dot(round_to(ds, q.dtype), q, dk)
        dk *= tl.cast(scale, tl.float32)
        dk_head = head_ptr(dk_ptr, dk_strides, batch, kv_head)
        store_tile(dk_head, dk_strides[2], first, size, dk, ROWS, D)
        dv_head = head_ptr(dv_ptr, dv_strides, batch, kv_head)
        store_tile(dv_head, dv_strides[2], first, size, dv, ROWS, D)


@triton.jit
def probability(s, lse):
    """Return exp2(s - lse), which is 1 at most, however large and thus coarse s and lse are."""
    return tl.exp2(tl.minimum(s - lse, 0.0, propagate_nan=tl.PropagateNan.ALL))
