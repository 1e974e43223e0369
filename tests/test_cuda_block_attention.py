"""The CUDA attention kernels, emulated on the CPU: the very sources that nvcc compiles."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate_as, attention, block_runs, token_mask
from test_block_attention import LAYOUTS, check, gradients, problem

import nabla
from nabla import BlockMask, TokenGrid, cuda
from nabla import _cuda_emulated as emulated

BACKEND = "cuda-emulated"
ARCHITECTURES = {"sm_80": 80, "sm_90a": 90}  # those of sm_86 and sm_89 are those of sm_80
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
HEAD_DIMS = (64, 128)
SCHEDULES = ("late", "eager", "random", "starving")  # see csrc/emulation/emulation.h

# name: grid, heads of q and k, batch
PROBLEMS = {
    "one block": (TokenGrid(1, 8, 8), (1, 1), 1),
    "one token": (TokenGrid(1, 1, 1), (1, 1), 1),
    "whole blocks in pairs of frames and one": (TokenGrid(5, 8, 16), (2, 2), 1),
    "short blocks and extra tokens": (TokenGrid(4, 9, 12, extra=70), (4, 2), 2),
    "a plain sequence": (TokenGrid.sequence(7 * 64 + 5), (3, 1), 1),
    "deep blocks": (TokenGrid(9, 7, 5, block=(4, 4, 4)), (2, 1), 1),
}


@pytest.fixture(autouse=True, params=ARCHITECTURES.values(), ids=ARCHITECTURES)
def architecture(request):
    with cuda.emulation(request.param):
        yield request.param


def assert_exact(q, k, v, keep, grid, first=0, scale=0.2):
    """Out and lse by the tolerance policy; 0 and -inf in rows that keep nothing."""
    mask = BlockMask.from_dense(keep, grid=grid, q_block_offset=first)
    out, lse = nabla.block_sparse_attention(
        q, k, v, mask, scale=scale, return_lse=True, backend=BACKEND
    )
    dense = token_mask(keep, grid, first)
    low = F.scaled_dot_product_attention(q, k, v, dense, scale=scale, enable_gqa=True)
    exact, exact_lse = attention(q.double(), k.double(), v.double(), dense, scale)
    nothing = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, nothing)
    assert (out[nothing] == 0).all()
    assert_as_accurate_as(out, low.masked_fill(nothing[..., None], 0), exact)
    # lse is float32 throughout: as exact as the products that it is computed from
    keys = k.abs().float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    size = abs(scale) * (q.abs().float() @ keys.mT).amax(-1) + exact_lse.abs() + 1
    error = (lse - exact_lse).abs().masked_fill(nothing, 0)
    assert (error <= 4 * torch.finfo(torch.float32).eps * size).all()
    return out, lse


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_attention(name, head_dim, dtype):
    grid, heads, batch = PROBLEMS[name]
    q, k, v, _, keep = problem(grid, heads, head_dim, dtype, batch, share=0.5, empty=True)
    assert_exact(q, k, v, keep, grid)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_it_differentiates(head_dim):
    grid = TokenGrid(3, 8, 12)
    check(*problem(grid, (4, 2), head_dim, torch.bfloat16), grid, BACKEND)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_gives_the_same(schedule, head_dim):
    """Short blocks, rows of different lengths and empty ones, bit for bit."""
    grid = TokenGrid(3, 9, 12, extra=3)
    q, k, v, _, keep = problem(grid, (1, 1), head_dim, torch.bfloat16, share=0.6, empty=True)
    expected = assert_exact(q, k, v, keep, grid)
    mask = BlockMask.from_dense(keep, grid=grid)
    for seed in (1, 2):
        emulated.configure(schedule, seed)
        actual = nabla.block_sparse_attention(
            q, k, v, mask, scale=0.2, return_lse=True, backend=BACKEND
        )
        for x, y in zip(actual, expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rows_that_drift_apart(schedule, head_dim):
    """A row of all blocks beside rows with gaps, about as long as the rings of 6 and 11 stages."""
    grid = TokenGrid(28, 8, 8)
    gaps = (5, 6, 7, 10, 11, 12, 27)
    q, k, v, _, _ = problem(grid, (len(gaps), 1), head_dim, torch.bfloat16)
    keep = torch.zeros(1, len(gaps), 4, 28, dtype=torch.bool)
    keep[:, :, 0] = True
    for head, gap in enumerate(gaps):
        keep[:, head, 1, ::gap] = True
        keep[:, head, 2, [0, 1, gap - 1, gap]] = True
        keep[:, head, 3, gap::gap] = True
    emulated.configure(schedule, 3)
    assert_exact(q[:, :, : 4 * 64], k, v, keep, grid)


@pytest.mark.parametrize("share", [0.03, 0.1, 0.3])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rows_that_share_little(schedule, head_dim, share):
    """Where a slot of a ring is used for other rows in between, some rounds long."""
    grid = TokenGrid(120, 8, 8)
    q, k, v, _, keep = problem(grid, (1, 1), head_dim, torch.bfloat16, share=share)
    emulated.configure(schedule, 1)
    assert_exact(q[:, :, : 5 * 64], k, v, keep[:, :, :5], grid)


def test_long_rows():
    """Of more words than a warp has lanes, and of more blocks than are listed at a time."""
    grid = TokenGrid(1100, 8, 8)
    k, v = torch.randn(2, 1, 1, grid.num_tokens, 64, dtype=torch.bfloat16)
    keep = torch.zeros(1, 1, 2, 1100, dtype=torch.bool)
    keep[..., 0, 400:550] = keep[..., 1, 520:530] = keep[..., [3, 1023, 1024, 1099]] = True
    assert_exact(k[:, :, : 2 * 64], k, v, keep, grid)


@pytest.mark.parametrize("first, last", [(0, 1), (1, 8), (3, 9), (8, 9)], ids=str)
def test_slices_of_the_queries(first, last):
    grid = TokenGrid(2, 9, 12, extra=1)
    q, k, v, _, keep = problem(grid, (2, 1), 64, torch.float16, batch=2)
    rows = slice(grid.block_start(first), grid.block_start(last))
    assert_exact(q[:, :, rows], k, v, keep[:, :, first:last], grid, first)


@pytest.mark.parametrize("amplitude", [30, 100, 250])
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_large_scores(head_dim, dtype, amplitude):
    """What dominates a row weighs 1, however coarse its score is: lse of 1e4 to 1e6."""
    grid = TokenGrid(3, 9, 12)
    q, k, v, _, keep = problem(grid, (2, 1), head_dim, dtype, share=0.6)
    assert_exact(amplitude * q, amplitude * k, v, keep, grid)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-3, 4.0])
def test_scales(scale, head_dim):
    grid = TokenGrid(1, 9, 12)
    q, k, v, _, keep = problem(grid, (1, 1), head_dim, torch.bfloat16, share=1.0)
    assert_exact(q, k, v, keep, grid, scale=scale)


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("step", [-12.0, 1.0, 4.0, 40.0])
def test_scores_that_rise_from_block_to_block(step, dtype):
    """So the references move at each block, at some, or at none."""
    grid = TokenGrid(6, 8, 8)
    q, k, v, _, keep = problem(grid, (1, 1), 64, dtype, share=1.0)
    q[..., 0], k[..., 0] = 1.0, torch.arange(6).repeat_interleave(64) * step / 0.2
    assert_exact(q, k, v, keep, grid)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(layout):
    grid = TokenGrid(2, 9, 8, extra=5)
    q, k, v, _, keep = problem(grid, (2, 1), 64, torch.bfloat16, batch=2)
    q, k, v = (layout(x) for x in (q, k, v))
    out, _ = assert_exact(q, k, v, keep, grid)
    if q.stride(-1) == 1:
        assert out.stride() == torch.empty_like(q).stride()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_expanded_tensors(axis):
    """Batch and heads that share their memory are read where they are; tokens are copied."""
    grid = TokenGrid(2, 8, 9)
    q, k, v, _, keep = problem(grid, (2, 2), 64, torch.bfloat16, batch=2)
    q, k, v = (x.narrow(axis, 0, 1).expand_as(x) for x in (q, k, v))
    assert_exact(q, k, v, keep, grid)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (1, 1)], ids=str)
def test_masks_for_any_batch_and_heads(shape):
    grid = TokenGrid(3, 8, 12)
    q, k, v, _, keep = problem(grid, (2, 2), 64, torch.bfloat16, batch=2)
    keep = keep[: shape[0], : shape[1]]
    whole = keep.expand(2, 2, -1, -1)
    shared = BlockMask.from_dense(keep, grid=grid)
    out = nabla.block_sparse_attention(q, k, v, shared, scale=0.2, backend=BACKEND)
    assert torch.equal(out, assert_exact(q, k, v, whole, grid)[0])


def test_garbage_bits_are_ignored():
    grid = TokenGrid(5, 8, 8)
    q, k, v, _, keep = problem(grid, (1, 1), 64, torch.bfloat16)
    mask = BlockMask.from_dense(keep, grid=grid)
    garbage = BlockMask(mask.bits | ~0b11111, grid)
    clean, dirty = (
        nabla.block_sparse_attention(q, k, v, m, backend=BACKEND) for m in (mask, garbage)
    )
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_poison_reaches_who_attends_to_it_and_no_one_else(which, poison):
    grid = TokenGrid(3, 12, 9)  # ragged: the poisoned block has short neighbours
    q, k, v, _, keep = problem(grid, (2, 2), 64, torch.bfloat16)
    clean, clean_lse = assert_exact(q, k, v, keep, grid)
    block = 4
    start, stop = block_runs(grid)[block]
    tensors = {"q": q, "k": k, "v": v}
    tensors[which][:, :, start:stop] = poison
    mask = BlockMask.from_dense(keep, grid=grid)
    out, lse = nabla.block_sparse_attention(
        *tensors.values(), mask, scale=0.2, return_lse=True, backend=BACKEND
    )
    if which == "q":
        reached = torch.zeros(q.shape[:3], dtype=torch.bool)
        reached[:, :, start:stop] = True
    else:
        reached = token_mask(keep, grid)[..., start]
    assert not out[reached].isfinite().any()
    assert torch.equal(out[~reached], clean[~reached])
    assert torch.equal(lse[~reached], clean_lse[~reached])


@pytest.mark.parametrize("size, frame_blocks", [*itertools.product((2, 3), (1, 2, 5))])
def test_groups_take_every_block_once(size, frame_blocks):
    """Those of one place in frames in a row, as long as there are whole chunks of frames."""
    for count in range(1, 41):
        groups = emulated.probes.block_groups(size, count, frame_blocks)
        assert all(len(group) == size for group in groups)
        blocks = [block for group in groups for block in group if block >= 0]
        assert sorted(blocks) == list(range(count))
        assert len(groups) == -(-count // size)
        chunked = count // (size * frame_blocks) * frame_blocks
        for group in groups[:chunked]:
            assert [b - a for a, b in itertools.pairwise(group)] == [frame_blocks] * (size - 1)


def test_compiled():
    grid = TokenGrid(2, 8, 12)
    q, k, v, dout, keep = problem(grid, (2, 1), 64, torch.bfloat16)
    mask = BlockMask.from_dense(keep, grid=grid)

    def function(q, k, v):
        return nabla.block_sparse_attention(q, k, v, mask, return_lse=True, backend=BACKEND)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for x, y in zip(
        gradients(function, q, k, v, dout), gradients(compiled, q, k, v, dout), strict=True
    ):
        assert torch.equal(x, y)
