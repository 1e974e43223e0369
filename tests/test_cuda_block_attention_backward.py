"""Gradients of the CUDA attention kernels, emulated on the CPU, in both modes of torch.

Fast: sm_80 sums dq as blocks of keys come. Deterministic: in one order, as sm_90 always does.
torch.empty is filled with NaN in both (tests/conftest.py).
"""

import pytest
import torch
from oracle import assert_as_accurate_as, attention, block_runs, token_mask
from test_block_attention import LAYOUTS, check, gradients, problem
from test_cuda_block_attention import ARCHITECTURES, BACKEND, HALF, HEAD_DIMS, SCHEDULES

import nabla
from nabla import BlockMask, TokenGrid, cuda
from nabla import _cuda_emulated as emulated

# name: grid, heads of q and k, batch
PROBLEMS = {
    "one token": (TokenGrid(1, 1, 1), (1, 1), 1),
    "whole blocks in pairs of frames and one": (TokenGrid(3, 8, 16), (2, 2), 1),
    "short blocks and extra tokens": (TokenGrid(2, 9, 8, extra=70), (2, 1), 2),
    "a plain sequence": (TokenGrid.sequence(4 * 64 + 5), (3, 1), 1),
    "deep blocks": (TokenGrid(5, 7, 5, block=(4, 4, 4)), (2, 1), 1),
}


@pytest.fixture(autouse=True, params=ARCHITECTURES.values(), ids=ARCHITECTURES)
def architecture(request):
    with cuda.emulation(request.param):
        yield request.param


@pytest.fixture(params=["fast", "deterministic"])
def mode(request, monkeypatch):
    """Whether torch asks for the same bits each time."""
    if request.param == "fast":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    return request.param


def ours(mask, scale=0.2):
    def function(q, k, v):
        return nabla.block_sparse_attention(
            q, k, v, mask, scale=scale, return_lse=True, backend=BACKEND
        )

    return function


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients(name, head_dim, dtype, mode):
    """Some rows keep nothing, and some columns."""
    grid, heads, batch = PROBLEMS[name]
    q, k, v, dout, keep = problem(grid, heads, head_dim, dtype, batch, share=0.5, empty=True)
    keep[..., 1::4] = False
    check(q, k, v, dout, keep, grid, BACKEND)


def test_gradients_through_lse(mode):
    grid = TokenGrid(2, 9, 12, extra=3)
    q, k, v, dout, keep = problem(grid, (4, 2), 64, torch.bfloat16)
    check(q, k, v, dout, keep, grid, BACKEND, dlse=torch.randn(q.shape[:3]))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(schedule, head_dim, mode, architecture):
    """Columns of different lengths, and none: the same bits, but for dq in sm_80's fast mode."""
    grid = TokenGrid(2, 9, 12, extra=3)
    q, k, v, dout, keep = problem(grid, (2, 1), head_dim, torch.bfloat16, share=0.6, empty=True)
    keep[..., 2] = False
    check(q, k, v, dout, keep, grid, BACKEND)
    mask = BlockMask.from_dense(keep, grid=grid)
    expected = gradients(ours(mask), q, k, v, dout)
    emulated.configure(schedule, 1)
    actual = gradients(ours(mask), q, k, v, dout)
    for index, (x, y) in enumerate(zip(actual, expected, strict=True)):
        if index == 2 and mode == "fast" and architecture == 80:
            torch.testing.assert_close(x, y, atol=1e-2, rtol=1e-2)
        else:
            assert torch.equal(x, y)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_blocks_that_share_little(schedule, head_dim):
    """Where a slot of the ring is used for other blocks in between, some rounds long."""
    grid = TokenGrid(24, 8, 8)
    q, k, v, dout, keep = problem(grid, (1, 1), head_dim, torch.bfloat16, share=0.12)
    emulated.configure(schedule, 1)
    check(q, k, v, dout, keep, grid, BACKEND)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_columns_that_drift_apart(schedule, mode):
    """A line of all blocks beside lines with gaps, about as long as the rings of 3 and 4 stages."""
    grid = TokenGrid(7, 8, 8)
    gaps = (2, 3, 4, 5)
    q, k, v, dout, _ = problem(grid, (len(gaps), 1), 128, torch.bfloat16)
    keep = torch.zeros(1, len(gaps), 7, 7, dtype=torch.bool)
    keep[..., 0] = True
    for head, gap in enumerate(gaps):
        keep[:, head, ::gap, 1] = True
        keep[:, head, [0, 1, gap - 1, gap], 2] = True
    emulated.configure(schedule, 3)
    check(q, k, v, dout, keep | keep.mT, grid, BACKEND)


def test_long_rows_and_columns(mode):
    """Of more blocks than sm_80 lists at a time, in each of two heads that read the keys."""
    grid = TokenGrid(100, 1, 1)  # a token a block
    q, k, v, dout, keep = problem(grid, (2, 1), 64, torch.bfloat16, share=0.02)
    keep[..., 3] = keep[..., 98, :] = True
    check(q, k, v, dout, keep, grid, BACKEND)


@pytest.mark.parametrize("architecture", [86, 89], indirect=True)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_less_shared_memory(head_dim, mode):
    grid = TokenGrid(2, 8, 9)
    check(*problem(grid, (1, 1), head_dim, torch.bfloat16), grid, BACKEND)


@pytest.mark.parametrize("first, last", [(0, 1), (1, 8), (3, 9), (8, 9)], ids=str)
def test_slices_of_the_queries(first, last, mode):
    grid = TokenGrid(2, 9, 12, extra=1)
    q, k, v, dout, keep = problem(grid, (2, 1), 64, torch.float16, batch=2)
    rows = slice(grid.block_start(first), grid.block_start(last))
    check(q[:, :, rows], k, v, dout[:, :, rows], keep[:, :, first:last], grid, BACKEND, first)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_large_scores(head_dim, mode):
    grid = TokenGrid(2, 9, 12)
    q, k, v, dout, keep = problem(grid, (2, 2), head_dim, torch.bfloat16, share=0.6)
    check(100 * q, 100 * k, v, dout, keep, grid, BACKEND)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-3])
def test_scales(scale, mode):
    grid = TokenGrid(1, 9, 12)
    q, k, v, dout, keep = problem(grid, (1, 1), 64, torch.bfloat16, share=1.0)
    dense, mask = token_mask(keep, grid), BlockMask.from_dense(keep, grid=grid)

    def oracle(q, k, v):
        return attention(q, k, v, dense, scale)

    actual = gradients(ours(mask, scale), q, k, v, dout)
    low = gradients(oracle, q, k, v, dout)
    exact = gradients(oracle, *(x.double() for x in (q, k, v, dout)))
    largest = max(exact[2:], key=lambda gradient: gradient.abs().max())
    for x, y, z in zip(actual[2:], low[2:], exact[2:], strict=True):
        assert_as_accurate_as(x, y, z, factor=3.0, values=largest)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(layout, mode):
    grid = TokenGrid(2, 9, 8, extra=5)
    q, k, v, dout, keep = problem(grid, (2, 1), 64, torch.bfloat16, batch=2)
    check(*(layout(x) for x in (q, k, v, dout)), keep, grid, BACKEND)


def test_expanded_tensors(mode):
    grid = TokenGrid(2, 8, 9)
    q, k, v, _, keep = problem(grid, (2, 2), 64, torch.bfloat16, batch=2)
    q, k, v = (x[:1, :1].expand(2, 2, -1, -1) for x in (q, k, v))
    check(q, k, v, torch.ones((), dtype=q.dtype).expand(q.shape), keep, grid, BACKEND)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (1, 1)], ids=str)
def test_masks_for_any_batch_and_heads(shape, mode):
    grid = TokenGrid(3, 8, 12)
    q, k, v, dout, keep = problem(grid, (2, 2), 64, torch.bfloat16, batch=2)
    shared = BlockMask.from_dense(keep[: shape[0], : shape[1]], grid=grid)
    whole = keep[: shape[0], : shape[1]].expand(2, 2, -1, -1).contiguous()
    mask = BlockMask.from_dense(whole, grid=grid)
    results = [gradients(ours(m), q, k, v, dout) for m in (shared, mask)]
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("which", ["k", "v", "dout"])
def test_poison_reaches_who_meets_it_and_no_one_else(which, mode):
    grid = TokenGrid(3, 12, 9)  # ragged: the poisoned block has short neighbours
    q, k, v, dout, keep = problem(grid, (2, 2), 64, torch.bfloat16)
    block = 4
    start, stop = block_runs(grid)[block]
    tensors = {"k": k.clone(), "v": v.clone(), "dout": dout.clone()}
    tensors[which][:, :, start:stop] = torch.nan
    mask = BlockMask.from_dense(keep, grid=grid)
    clean = gradients(ours(mask), q, k, v, dout)
    dirty = gradients(ours(mask), q, tensors["k"], tensors["v"], tensors["dout"])
    queries = token_mask(keep, grid)[..., start].clone()  # that meet it, or are it
    if which == "dout":
        queries[:] = False
        queries[:, :, start:stop] = True
    met = keep[:, :, block] if which == "dout" else (keep & keep[..., block, None]).any(2)
    keys = met.repeat_interleave(
        torch.tensor([stop - start for start, stop in block_runs(grid)]), 2
    )
    assert not dirty[2][queries].isfinite().any()
    assert torch.equal(dirty[2][~queries], clean[2][~queries])
    for x, y in zip(dirty[3:], clean[3:], strict=True):
        assert torch.equal(x[~keys], y[~keys])
    assert not dirty[3][keys].isfinite().any()


def test_compiled():
    grid = TokenGrid(2, 8, 12)
    q, k, v, dout, keep = problem(grid, (2, 1), 64, torch.bfloat16)
    function = ours(BlockMask.from_dense(keep, grid=grid))
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [gradients(f, q, k, v, dout) for f in (function, compiled)]
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_attention_differentiates():
    """Mask and attention, by the public function."""
    grid = TokenGrid(2, 12, 16)
    q, k, v, dout, _ = problem(grid, (2, 1), 64, torch.bfloat16)
    options = {"grid": grid, "top_p": 0.5, "window": (1, 3, 1), "enable_gqa": True}

    def results(backend):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = nabla.attention(*inputs, **options, backend=backend)
        return out, *torch.autograd.grad(out, inputs, dout)

    for x, y in zip(results(BACKEND), results("reference"), strict=True):
        torch.testing.assert_close(x, y, atol=2e-2, rtol=2e-2)
