"""Attention over the kept blocks against dense float64 attention with the same mask."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_as_accurate_as, attention, block_runs, token_mask
from test_grid import grids
from test_scores import DTYPES
from torch.nn.attention import SDPBackend, sdpa_kernel

import nabla
from nabla import BlockMask, TokenGrid


def problem(grid, heads=(2, 2), head_dim=32, dtype=torch.float32, batch=1, share=0.4, empty=False):
    """(q, k, v, dout, keep): every row keeps something, unless `empty`."""
    q = torch.randn(batch, heads[0], grid.num_tokens, head_dim)
    k, v = (torch.randn(batch, heads[1], grid.num_tokens, head_dim) for _ in range(2))
    keep = torch.rand(batch, heads[0], grid.num_blocks, grid.num_blocks) < share
    if empty:
        keep[..., ::3, :] = False
    else:
        keep[..., 0] |= ~keep.any(-1)
    return *(x.to(dtype) for x in (q, k, v, torch.randn_like(q))), keep


def gradients(function, q, k, v, dout, dlse=None):
    """(out, lse, dq, dk, dv) of a function that returns (out, lse)."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = function(q, k, v)
    loss = (out * dout).sum()
    if dlse is not None:
        loss = loss + (lse * dlse).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v))


def check(q, k, v, dout, keep, grid, backend, q_block_offset=0, dlse=None, run=None, fused=False):
    """out, lse and all gradients by the tolerance policy; scale is 0.2."""
    mask = BlockMask.from_dense(keep, grid=grid, q_block_offset=q_block_offset)
    dense = token_mask(keep, grid, q_block_offset)
    run = run or (lambda function, *args, **kwargs: function(*args, **kwargs))
    options = {"scale": 0.2, "return_lse": True, "backend": backend}

    def ours(q, k, v):
        return run(nabla.block_sparse_attention, q, k, v, mask, **options)

    def oracle(q, k, v):
        return attention(q, k, v, dense, 0.2)

    def sdpa(q, k, v):
        # On CUDA, fused kernels differ in what they give for rows of nothing, some give NaN.
        kind = SDPBackend.EFFICIENT_ATTENTION if fused else SDPBackend.MATH
        with sdpa_kernel(kind) if q.is_cuda else nullcontext():
            out = F.scaled_dot_product_attention(q, k, v, dense, scale=0.2, enable_gqa=True)
        return out, oracle(q, k, v)[1]

    actual = gradients(ours, q, k, v, dout, dlse)
    low = gradients(sdpa if dlse is None else oracle, q, k, v, dout, dlse)
    doubles = (None if x is None else x.double() for x in (q, k, v, dout, dlse))
    exact = gradients(oracle, *doubles)
    for name, x, y in zip(
        ("out", "dq", "dk", "dv"), (actual[0], *actual[2:]), (q, q, k, v), strict=True
    ):
        assert x.dtype == q.dtype and x.shape == y.shape, name
    assert actual[1].dtype == torch.float32
    nothing = exact[1] == -torch.inf
    assert torch.equal(actual[1] == -torch.inf, nothing)
    for x, y, z in zip(actual[:2], low[:2], exact[:2], strict=True):
        assert_as_accurate_as(*(t.where(t != -torch.inf, 0) for t in (x, y, z)))
    # dq and dk may cancel to 0, as with one key: the floor is that of the largest gradient. Means
    # are over the rows that attend or are attended to: in the others every gradient is 0, and the
    # keys that no query keeps would make the floor of dq too small.
    queries = dense.any(-1)
    keys = dense.unflatten(1, (k.shape[1], -1)).any(2).any(2)
    attended = (queries, keys, keys)
    for x, rows in zip(actual[2:], attended, strict=True):
        assert (x[~rows] == 0).all()
    if keys.any():
        kept = [
            [x[rows] for x, rows in zip(g[2:], attended, strict=True)] for g in (actual, low, exact)
        ]
        largest = max(kept[2], key=lambda gradient: gradient.abs().max())
        for x, y, z in zip(*kept, strict=True):
            assert_as_accurate_as(x, y, z, factor=3.0, values=largest)
    assert (actual[0][nothing] == 0).all()


@given(
    grid=grids(max_extent=17),
    dtype=st.sampled_from(DTYPES),
    heads=st.sampled_from([(1, 1), (3, 3), (4, 2), (3, 1)]),
    head_dim=st.sampled_from([32, 64, 80]),
    batch=st.integers(1, 2),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    empty=st.booleans(),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention(backend, grid, dtype, heads, head_dim, batch, share, empty):
    check(*problem(grid, heads, head_dim, dtype, batch, share, empty), grid, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_of_the_usual_shapes(backend, dtype, head_dim):
    grid = TokenGrid(3, 16, 24)
    check(*problem(grid, (2, 2), head_dim, dtype, 2), grid, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_through_lse(backend, run, dtype):
    grid = TokenGrid(1, 17, 20)
    q, k, v, dout, keep = problem(grid, (4, 2), dtype=dtype)
    check(q, k, v, dout, keep, grid, backend, dlse=torch.randn(q.shape[:3]), run=run)


@given(grid=grids(max_extent=17), data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_the_queries(backend, grid, data):
    first = data.draw(st.integers(0, grid.num_blocks - 1))
    last = data.draw(st.integers(first + 1, grid.num_blocks))
    q, k, v, dout, keep = problem(grid)
    rows = slice(grid.block_start(first), grid.block_start(last))
    check(q[:, :, rows], k, v, dout[:, :, rows], keep[:, :, first:last], grid, backend, first)


LAYOUTS = {
    "BSHD": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "fused": lambda x: torch.stack([x, x + 1, x - 1], 2)[:, :, 1] - 1,
    "view of fused": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "channels not contiguous": lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1),
    "overlapping": lambda x: torch.randn(x.numel()).to(x).as_strided(x.shape, (500, 100, 1, 1)),
    "offset": lambda x: torch.cat([x[:, :, :1], x], 2)[:, :, 1:],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(backend, layout):
    grid = TokenGrid(2, 17, 8, extra=5)
    q, k, v, dout, keep = problem(grid, (4, 2), batch=2)
    strided = [layout(x) for x in (q, k, v)]
    check(*strided, dout, keep, grid, backend)
    mask = BlockMask.from_dense(keep, grid=grid)
    out = nabla.block_sparse_attention(*strided, mask, backend=backend)
    if strided[0].stride(-1) == 1:
        assert out.stride() == torch.empty_like(strided[0]).stride()


def test_expanded_inputs_and_gradients(backend):
    grid = TokenGrid(2, 9, 9)
    q, k, v, _, keep = problem(grid, batch=2)
    q, k, v = (x[:1, :1].expand(2, 2, -1, -1) for x in (q, k, v))
    check(q, k, v, torch.ones(()).expand(q.shape), keep, grid, backend)


def test_a_gradient_without_strides(backend):
    """sum() hands back one number, expanded to the shape of out."""
    grid = TokenGrid(2, 9, 9)
    q, k, v, _, keep = problem(grid)
    mask = BlockMask.from_dense(keep, grid=grid)
    q.requires_grad_()
    out = nabla.block_sparse_attention(q, k, v, mask, backend=backend)
    (expected,) = torch.autograd.grad(out, q, torch.ones_like(out), retain_graph=True)
    (actual,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (1, 1)], ids=str)
def test_masks_for_any_batch_and_heads(backend, run, shape):
    grid = TokenGrid(3, 10, 12)
    q, k, v, _, keep = problem(grid, batch=2)
    keep = keep[: shape[0], : shape[1]]
    mask = BlockMask.from_dense(keep, grid=grid)
    whole = BlockMask.from_dense(keep.expand(2, 2, -1, -1).contiguous(), grid=grid)
    out = run(nabla.block_sparse_attention, q, k, v, mask, backend=backend)
    assert torch.equal(out, nabla.block_sparse_attention(q, k, v, whole, backend=backend))


def test_garbage_bits_are_ignored(backend):
    grid = TokenGrid(5, 8, 8)
    q, k, v, dout, keep = problem(grid)
    mask = BlockMask.from_dense(keep, grid=grid)
    garbage = BlockMask(mask.bits | ~0b11111, grid)
    results = [
        gradients(
            lambda q, k, v, m=m: nabla.block_sparse_attention(
                q, k, v, m, return_lse=True, backend=backend
            ),
            q,
            k,
            v,
            dout,
        )
        for m in (mask, garbage)
    ]
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["k", "v"])
def test_poison_reaches_who_attends_to_it_and_no_one_else(backend, poison, which):
    grid = TokenGrid(3, 12, 9)  # ragged: the poisoned block has short neighbours
    q, k, v, dout, keep = problem(grid)
    block = 4
    start, stop = block_runs(grid)[block]
    keep[..., block] = False
    keep[:, 0, 2, block] = True  # one row of head 0 attends to the poison
    arguments = (BlockMask.from_dense(keep, grid=grid),)
    poisoned = {"k": k.clone(), "v": v.clone()}
    poisoned[which][:, :, start:stop] = poison

    def ours(q, k, v):
        return nabla.block_sparse_attention(q, k, v, *arguments, return_lse=True, backend=backend)

    clean = gradients(ours, q, k, v, dout)
    dirty = gradients(ours, q, poisoned["k"], poisoned["v"], dout)
    row = torch.zeros(q.shape[2], dtype=torch.bool)
    row[slice(*block_runs(grid)[2])] = True
    assert not dirty[0][:, 0, row].isfinite().any()  # out of the row that attends to it
    # out, lse and dq of the other rows are untouched, and dk and dv of the blocks it drops
    for x, y in zip(dirty[:3], clean[:3], strict=True):
        assert torch.equal(x[:, 1], y[:, 1])
        assert torch.equal(x[:, 0, ~row], y[:, 0, ~row])
    unkept = torch.ones(grid.num_blocks, dtype=torch.bool)
    unkept[keep[0, 0, 2].nonzero()] = False
    for index, run in enumerate(block_runs(grid)):
        tokens = slice(*run)
        for x, y in zip(dirty[3:], clean[3:], strict=True):
            assert torch.equal(x[:, 1, tokens], y[:, 1, tokens])
            if unkept[index]:
                assert torch.equal(x[:, 0, tokens], y[:, 0, tokens])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
def test_poison_at_the_end_of_a_short_block(backend, poison, which):
    """One channel of its last token reaches what it reaches in the reference, and no more."""
    grid = TokenGrid(1, 5, 9, block=(1, 4, 4), extra=3)
    q, k, v, dout, keep = problem(grid, (2, 1))
    _, stop = block_runs(grid)[2]
    tensors = {"q": q, "k": k, "v": v, "dout": dout}
    tensors[which][:, :, stop - 1, 3] = poison
    mask = BlockMask.from_dense(keep, grid=grid)
    results = [
        gradients(
            lambda q, k, v, name=name: nabla.block_sparse_attention(
                q, k, v, mask, return_lse=True, backend=name
            ),
            q,
            k,
            v,
            dout,
        )
        for name in (backend, "reference")
    ]
    for ours, right in zip(*results, strict=True):
        assert torch.equal(ours.isfinite(), right.isfinite())
        torch.testing.assert_close(
            *(x.where(right.isfinite(), 0) for x in (ours, right)), atol=2e-5, rtol=2e-5
        )
    assert not all(right.isfinite().all() for right in results[1])


def test_a_nan_query_stays_in_its_row(backend):
    grid = TokenGrid(2, 8, 16)
    q, k, v, _, keep = problem(grid)
    mask = BlockMask.from_dense(keep, grid=grid)
    poisoned = q.clone()
    poisoned[0, 0, 70] = torch.nan
    clean = nabla.block_sparse_attention(q, k, v, mask, backend=backend)
    dirty = nabla.block_sparse_attention(poisoned, k, v, mask, backend=backend)
    assert dirty[0, 0, 70].isnan().all()
    dirty[0, 0, 70] = clean[0, 0, 70]
    assert torch.equal(dirty, clean)


def test_a_mask_that_keeps_nothing(backend, run):
    grid = TokenGrid(2, 8, 9)
    q, k, v, dout, keep = problem(grid)
    check(q, k, v, dout, torch.zeros_like(keep), grid, backend, run=run)


def test_large_scores_do_not_overflow(backend):
    """Many rows: the error of one is that of its two closest scores, whoever computes it."""
    grid = TokenGrid(2, 16, 16)
    q, k, v, dout, keep = problem(grid, (4, 4), batch=2)
    check(q * 30, k * 30, v, dout, keep, grid, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("magnitude", [3, 10])
def test_gradients_of_peaked_rows(backend, dtype, magnitude):
    """Where a row is almost all on one key, dq and dk are differences of nearly equal numbers.

    Delta = rowsum(dout * out) has the rounding of out, here as in the fused kernels of SDPA: these
    are the reference, not the one in plain PyTorch, which computes all of it in float32.
    """
    grid = TokenGrid(1, 16, 16)
    q, k, v, dout, keep = problem(grid, (2, 2), 64, dtype)
    check(q * magnitude, k * magnitude, v, dout, keep, grid, backend, fused=True)


@pytest.mark.parametrize("magnitude", [1e3, 1e5])
def test_huge_scores_stay_finite(backend, magnitude):
    grid = TokenGrid(2, 8, 16)
    q, k, v, dout, keep = problem(grid)
    mask = BlockMask.from_dense(keep, grid=grid)
    results = gradients(
        lambda q, k, v: nabla.block_sparse_attention(
            q, k, v, mask, return_lse=True, backend=backend
        ),
        q * magnitude,
        k * magnitude,
        v,
        dout,
    )
    for x in results:
        assert x.isfinite().all()
    exact, _ = attention(
        *(x.double() for x in (q * magnitude, k * magnitude, v)), token_mask(keep, grid), 32**-0.5
    )
    assert (results[0] - exact).abs().mean() < 1e-3  # all of a row is on its largest score


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(backend, scale):
    grid = TokenGrid(2, 9, 16)
    q, k, v, _, keep = problem(grid)
    keep[:, :, 1] = False
    mask = BlockMask.from_dense(keep, grid=grid)
    out, lse = nabla.block_sparse_attention(
        q, k, v, mask, scale=scale, return_lse=True, backend=backend
    )
    exact_out, exact_lse = attention(
        *(x.double() for x in (q, k, v)), token_mask(keep, grid), scale
    )
    torch.testing.assert_close(out.double(), exact_out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)


def test_deterministic(backend):
    grid = TokenGrid(3, 20, 20)
    q, k, v, dout, keep = problem(grid, (4, 2))
    mask, dlse = BlockMask.from_dense(keep, grid=grid), torch.randn(q.shape[:3])

    def ours(q, k, v):
        return nabla.block_sparse_attention(q, k, v, mask, return_lse=True, backend=backend)

    first = gradients(ours, q, k, v, dout, dlse)
    for _ in range(3):
        for x, y in zip(first, gradients(ours, q, k, v, dout, dlse), strict=True):
            assert torch.equal(x, y)


def test_float64_gradients():
    """The formula of the oracle's backward."""
    grid = TokenGrid(1, 4, 9, block=(1, 4, 4), extra=3)
    q, k, v, _, keep = problem(grid, (2, 1), head_dim=3, dtype=torch.float64)
    mask = BlockMask.from_dense(keep, grid=grid)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda *qkv: tuple(nabla.block_sparse_attention(*qkv, mask, return_lse=True)),
        inputs,
        fast_mode=True,
    )


def test_autocast(backend):
    grid = TokenGrid(2, 8, 16)
    q, k, v, _, keep = problem(grid)
    mask = BlockMask.from_dense(keep, grid=grid)
    low = nabla.block_sparse_attention(*(x.bfloat16() for x in (q, k, v)), mask, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        out = nabla.block_sparse_attention(q, k, v, mask, backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, low)


def test_bad_tensors():
    grid = TokenGrid(2, 8, 8)
    mask = nabla.sliding_tile_mask(grid, (1, 1, 1))
    q = torch.zeros(1, 2, 128, 32)
    cases = [
        ((q[0], q, q), r"q has shape \[2, 128, 32\]: give a tensor \[B, H, S, D\]"),
        ((q, q.half(), q), "k has dtype torch.float16 and q has torch.float32"),
        ((q, q, q.to("meta")), "v has device meta and q has cpu"),
        ((q, q, q[..., :16]), "v has head_dim 16 and q has 32"),
        ((q.expand(2, -1, -1, -1), q, q), "k has batch size 1 and q has 2"),
        ((q, q.repeat(1, 2, 1, 1), q.repeat(1, 2, 1, 1)), "q has 2 heads and k has 4"),
        ((q, q[:, :1], q), "v has shape .* and k has"),
        ((q[:, :, :0], q, q), "q has shape .* which is empty"),
        ((q.int(), q.int(), q.int()), "q has dtype torch.int32: supported are torch.bfloat16"),
        ((q[:, :, :100], q, q), "100 tokens from block 0 on are no whole number of blocks"),
        ((q, q[:, :, :64], q[:, :, :64]), "k has 64 tokens, but .* has 128"),
        ((q[:, :, :64], q, q), "mask has 2 rows .* but the 64 tokens of q are 1"),
    ]
    for (q_, k_, v_), message in cases:
        with pytest.raises(ValueError, match=message):
            nabla.block_sparse_attention(q_, k_, v_, mask)


def test_bad_masks():
    grid = TokenGrid(2, 8, 8)
    q = torch.zeros(2, 4, 128, 32)
    keep = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with pytest.raises(TypeError, match="mask is a Tensor: give a BlockMask"):
        nabla.block_sparse_attention(q, q, q, keep)
    with pytest.raises(ValueError, match="mask has batch size 1 and 3 heads, q has 2 and 4"):
        mask = BlockMask.from_dense(keep.expand(1, 3, 2, 2), grid=grid)
        nabla.block_sparse_attention(q, q, q, mask)
    with pytest.raises(ValueError, match="k has 128 tokens, but .*frames=3.* has 192"):
        mask = nabla.sliding_tile_mask((3, 8, 8), (1, 1, 1))
        nabla.block_sparse_attention(q, q, q, mask)
    with pytest.raises(ValueError, match="mask is on meta and q on cpu"):
        mask = BlockMask.from_dense(keep, grid=grid).to("meta")
        nabla.block_sparse_attention(q, q, q, mask)
    with pytest.raises(
        ValueError, match=r"mask.bits has shape \[1, 1, 2, 2\] and dtype torch.bool"
    ):
        nabla.block_sparse_attention(q, q, q, BlockMask(keep, grid))
