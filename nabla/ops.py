"""Every operator of nabla: its schema, its shapes for the tracer, its gradient, its registration.

The tracer sees one node per stage. A grid travels as seven integers (TokenGrid.as_ints), a window
as three or none, "auto" is resolved inside, where the device is known.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nabla import dispatch
from nabla.grid import TokenGrid

SCHEMAS = {
    "block_mean": "(Tensor x, SymInt[] grid, SymInt block_offset, str backend) -> Tensor",
    "pooled_scores": """(
        Tensor q, Tensor k, SymInt[] grid, SymInt q_block_offset, float scale, str backend
    ) -> Tensor""",
    "select_blocks": """(
        Tensor scores, Tensor top_p, SymInt[] grid, SymInt[] window, SymInt q_block_offset,
        str backend
    ) -> Tensor""",
    "create_block_mask": """(
        Tensor q, Tensor k, Tensor top_p, SymInt[] grid, SymInt[] window, SymInt q_block_offset,
        float scale, str backend
    ) -> Tensor""",
    "attention_fwd": """(
        Tensor q, Tensor k, Tensor v, Tensor bits, SymInt[] grid, SymInt q_block_offset,
        float scale, str backend
    ) -> (Tensor out, Tensor lse)""",
    "attention_bwd": """(
        Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
        Tensor bits, SymInt[] grid, SymInt q_block_offset, float scale, str backend
    ) -> (Tensor dq, Tensor dk, Tensor dv)""",
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"nabla::{_name}", " ".join(_schema.split()))

block_mean = torch.ops.nabla.block_mean.default
pooled_scores = torch.ops.nabla.pooled_scores.default
select_blocks = torch.ops.nabla.select_blocks.default
create_block_mask = torch.ops.nabla.create_block_mask.default
attention_fwd = torch.ops.nabla.attention_fwd.default
attention_bwd = torch.ops.nabla.attention_bwd.default


def _register(name: str) -> Callable:
    """Register a kernel for CPU and CUDA tensors; it computes in the precision of its arguments."""

    def register(kernel: Callable) -> Callable:
        def without_autocast(x: Tensor, *args):
            with torch.autocast(x.device.type, enabled=False):
                return kernel(x, *args)

        torch.library.impl(f"nabla::{name}", ("cpu", "cuda"), without_autocast)
        return kernel

    return register


# What looks on: called as observe(q, k, v, bits, grid, q_block_offset, scale, lse) after each
# attention, in eager and in compiled models alike. nabla.inspect puts observers here.
observers: list[Callable[..., None]] = []


# What runs.


@_register("block_mean")
def _(x, grid, block_offset, backend):
    grid = TokenGrid.from_ints(grid)
    scores = dispatch.implementation("scores", backend, x, x.shape[-1], grid.block_size)
    return scores.block_mean(x, grid, block_offset)


@_register("pooled_scores")
def _(q, k, grid, q_block_offset, scale, backend):
    grid = TokenGrid.from_ints(grid)
    scores = dispatch.implementation("scores", backend, q, q.shape[-1], grid.block_size)
    return scores.pooled_scores(q, k, grid, q_block_offset, scale)


@_register("select_blocks")
def _(scores, top_p, grid, window, q_block_offset, backend):
    grid = TokenGrid.from_ints(grid)
    block_mask = dispatch.implementation("block_mask", backend, scores, None, grid.block_size)
    return block_mask.select_blocks(scores, top_p, grid, tuple(window) or None, q_block_offset)


@_register("create_block_mask")
def _(q, k, top_p, grid, window, q_block_offset, scale, backend):
    grid = TokenGrid.from_ints(grid)
    block_mask = dispatch.implementation("block_mask", backend, q, q.shape[-1], grid.block_size)
    return block_mask.create_block_mask(
        q, k, top_p, grid, tuple(window) or None, q_block_offset, scale
    )


@_register("attention_fwd")
def _(q, k, v, bits, grid, q_block_offset, scale, backend):
    grid = TokenGrid.from_ints(grid)
    attention = dispatch.implementation("block_attention", backend, q, q.shape[-1], grid.block_size)
    out, lse = attention.attention_fwd(q, k, v, bits, grid, q_block_offset, scale)
    for observe in tuple(observers):
        observe(q, k, v, bits, grid, q_block_offset, scale, lse)
    return out, lse


@_register("attention_bwd")
def _(dout, dlse, q, k, v, out, lse, bits, grid, q_block_offset, scale, backend):
    grid = TokenGrid.from_ints(grid)
    attention = dispatch.implementation("block_attention", backend, q, q.shape[-1], grid.block_size)
    return attention.attention_bwd(dout, dlse, q, k, v, out, lse, bits, grid, q_block_offset, scale)


# What the tracer sees: shape, dtype, device and strides.


@torch.library.register_fake("nabla::block_mean")
def _(x, grid, block_offset, backend):
    num_blocks = TokenGrid.from_ints(grid).count_blocks(x.shape[2], block_offset)
    return x.new_empty(*x.shape[:2], num_blocks, x.shape[3], dtype=_accumulated(x))


@torch.library.register_fake("nabla::pooled_scores")
def _(q, k, grid, q_block_offset, scale, backend):
    grid = TokenGrid.from_ints(grid)
    num_q_blocks = grid.count_blocks(q.shape[2], q_block_offset)
    return q.new_empty(*q.shape[:2], num_q_blocks, grid.num_blocks, dtype=_accumulated(q))


@torch.library.register_fake("nabla::select_blocks")
def _(scores, top_p, grid, window, q_block_offset, backend):
    return scores.new_empty(*scores.shape[:3], -(-scores.shape[3] // 32), dtype=torch.int32)


@torch.library.register_fake("nabla::create_block_mask")
def _(q, k, top_p, grid, window, q_block_offset, scale, backend):
    grid = TokenGrid.from_ints(grid)
    num_q_blocks = grid.count_blocks(q.shape[2], q_block_offset)
    return q.new_empty(*q.shape[:2], num_q_blocks, -(-grid.num_blocks // 32), dtype=torch.int32)


@torch.library.register_fake("nabla::attention_fwd")
def _(q, k, v, bits, grid, q_block_offset, scale, backend):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=_accumulated(q))


@torch.library.register_fake("nabla::attention_bwd")
def _(dout, dlse, q, k, v, out, lse, bits, grid, q_block_offset, scale, backend):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _accumulated(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# Gradients.


def _save_for_backward(ctx, inputs, output):
    q, k, v, bits, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, bits)
    ctx.set_materialize_grads(False)


def _attention_backward(ctx, dout, dlse):
    q, k, v, out, lse, bits = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    gradients = attention_bwd(dout, dlse, q, k, v, out, lse, bits, *ctx.options)
    return *gradients, None, None, None, None, None


def _no_double_backward(ctx, *gradients):
    raise RuntimeError(
        "nabla attention has no second derivative: call backward() without create_graph=True"
    )


torch.library.register_autograd(
    "nabla::attention_fwd", _attention_backward, setup_context=_save_for_backward
)
torch.library.register_autograd("nabla::attention_bwd", _no_double_backward)


def _carries_no_gradient(ctx, inputs, output):
    ctx.mark_non_differentiable(output)


for _name in ("block_mean", "pooled_scores", "select_blocks", "create_block_mask"):
    torch.library.register_autograd(
        f"nabla::{_name}", lambda ctx, _: None, setup_context=_carries_no_gradient
    )


# vmap.


def _refuse_vmap(name: str) -> Callable:
    def refuse(info, in_dims, *args):
        raise RuntimeError(
            f"nabla::{name} has no vmap: put the mapped dimension into the batch, [B, H, S, D]"
        )

    return refuse


for _name in SCHEMAS:
    torch.library.register_vmap(f"nabla::{_name}", _refuse_vmap(_name))
