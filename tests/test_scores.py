"""Block means and pooled scores against float64 loops."""

import pytest
import torch
from conftest import BACKENDS
from hypothesis import given
from hypothesis import strategies as st
from oracle import block_means, block_runs, num_video_blocks, pooled_scores
from test_grid import grids

import nabla
from nabla import TokenGrid

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tokens(grid, heads=2, head_dim=32, dtype=torch.float32, batch=1):
    return torch.randn(batch, heads, grid.num_tokens, head_dim).to(dtype)


@given(grid=grids(max_extent=17), dtype=st.sampled_from(DTYPES))
@pytest.mark.parametrize("backend", BACKENDS)
def test_block_mean(backend, grid, dtype):
    x = tokens(grid, dtype=dtype)
    means = nabla.block_mean(x, grid, backend=backend)
    assert means.dtype == torch.float32
    torch.testing.assert_close(
        means.double(), block_means(x, block_runs(grid)), atol=5e-7, rtol=5e-7
    )


def test_block_mean_of_a_slice(backend, run):
    grid = TokenGrid(2, 17, 9)
    x = tokens(grid)
    start, stop = grid.block_start(3), grid.block_start(8)
    part = run(nabla.block_mean, x[:, :, start:stop], grid, block_offset=3, backend=backend)
    assert torch.equal(part, nabla.block_mean(x, grid, backend=backend)[:, :, 3:8])


@given(
    grid=grids(max_extent=17),
    dtype=st.sampled_from(DTYPES),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pooled_scores(backend, grid, dtype, heads):
    q, k = tokens(grid, heads[0], dtype=dtype), tokens(grid, heads[1], dtype=dtype)
    scores = nabla.pooled_scores(q, k, grid, scale=0.5, backend=backend)
    video = num_video_blocks(grid)
    assert scores.shape == (1, heads[0], grid.num_blocks, grid.num_blocks)
    assert torch.isinf(scores[..., video:]).all() and torch.isinf(scores[:, :, video:]).all()
    exact = pooled_scores(q, k, grid, 0.5)
    torch.testing.assert_close(
        scores[:, :, :video, :video].double(), exact[:, :, :video, :video], atol=0, rtol=2e-5
    )


@pytest.mark.parametrize("first", [1, 4, 7])
def test_pooled_scores_of_a_slice(backend, run, first):
    grid = TokenGrid(2, 17, 8, extra=100)  # 6 blocks of video, then 2 of extra tokens
    q, k = tokens(grid), tokens(grid)
    rows = q[:, :, grid.block_start(first) :]
    part = run(nabla.pooled_scores, rows, k, grid, q_block_offset=first, backend=backend)
    assert torch.equal(part, nabla.pooled_scores(q, k, grid, backend=backend)[:, :, first:])


def test_pooled_scores_of_strided_tokens(backend):
    grid = TokenGrid(2, 16, 16)
    qk = torch.randn(2, grid.num_tokens, 2, 3, 32)
    q, k = (x.transpose(1, 2) for x in qk.unbind(2))
    torch.testing.assert_close(
        nabla.pooled_scores(q, k, grid, backend=backend),
        nabla.pooled_scores(q.contiguous(), k.contiguous(), grid, backend=backend),
        rtol=1e-6,
        atol=0,
    )


def test_what_is_not_finite_is_marked(backend):
    grid = TokenGrid(4, 8, 8)
    q, k = tokens(grid), tokens(grid)
    expected = nabla.pooled_scores(q, k[:, :, :], grid, backend=backend)
    q[0, 0, 70] = torch.nan  # block 1 of the queries of head 0
    k[0, 1, 130, 3] = torch.inf  # block 2 of the keys of head 1
    scores = nabla.pooled_scores(q, k, grid, backend=backend)
    marked = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    marked[0, 0, 1] = True
    marked[0, 1, :, 2] = True
    assert torch.equal(torch.isinf(scores), marked)
    assert torch.equal(scores[0, 0, [0, 2, 3]], expected[0, 0, [0, 2, 3]])
    rest = expected[0, 1][:, [0, 1, 3]]
    torch.testing.assert_close(scores[0, 1][:, [0, 1, 3]], rest / rest.sum(-1, keepdim=True))


def test_scores_do_not_depend_on_low_precision_modes(backend):
    grid = TokenGrid(4, 16, 16)
    q, k = tokens(grid), tokens(grid)
    plain = nabla.pooled_scores(q.bfloat16(), k.bfloat16(), grid, backend=backend)
    with torch.autocast(q.device.type, torch.bfloat16):
        assert torch.equal(nabla.pooled_scores(q, k, grid, backend=backend), plain)


def test_scores_carry_no_gradient(backend):
    grid = TokenGrid(2, 8, 8)
    q = tokens(grid).requires_grad_()
    assert not nabla.pooled_scores(q, q, grid, backend=backend).requires_grad
    assert not nabla.block_mean(q, grid, backend=backend).requires_grad
