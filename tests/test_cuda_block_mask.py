"""The CUDA kernels, emulated on the CPU: the very sources that nvcc compiles."""

import itertools

import pytest
import torch
from oracle import assert_selects, block_means, block_runs, pooled_scores, window_mask
from test_block_mask import (
    smooth_tokens,
    test_negative_scores_have_no_mass,
    test_ties_in_long_rows,
    test_top_p_one_keeps_blocks_of_no_mass,
    test_uniform_scores_keep_exactly_the_share,
)

import nabla
from nabla import BlockMask, TokenGrid, cuda
from nabla.bits import pack_bits
from nabla.cuda.block_mask import transposed_bits

BACKEND = "cuda-emulated"
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES = ("late", "eager", "random", "starving")

# name: grid, heads of q, heads of k, head_dim
PROBLEMS = {
    "one block": (TokenGrid(1, 8, 8), 1, 1, 64),
    "whole blocks": (TokenGrid(3, 16, 24), 2, 2, 128),
    "short blocks and extra tokens": (TokenGrid(2, 13, 21, extra=70), 4, 2, 64),
    "a plain sequence": (TokenGrid.sequence(40 * 64 + 5), 2, 1, 128),
    "deep blocks": (TokenGrid(9, 7, 9, block=(4, 4, 4)), 3, 1, 64),
}

# Tests of every backend whose input suits this one: their fixture `backend` is the one below.
SHARED_TESTS = (
    test_negative_scores_have_no_mass,
    test_ties_in_long_rows,
    test_top_p_one_keeps_blocks_of_no_mass,
    test_uniform_scores_keep_exactly_the_share,
)


@pytest.fixture
def backend():
    return BACKEND


@pytest.fixture(params=[80, 86, 90])
def architecture(request):
    """They differ in how much shared memory there is, and so in how many rows a CTA holds."""
    with cuda.emulation(request.param):
        yield request.param


def test_this_installation_emulates_them():
    assert cuda.emulation_unavailable_reason() is None


def problem(name, dtype, strength=1.0):
    grid, heads, kv_heads, head_dim = PROBLEMS[name]
    q = smooth_tokens(grid, heads, head_dim, dtype, batch=2, strength=strength)
    k = smooth_tokens(grid, kv_heads, head_dim, dtype, batch=2, strength=strength)
    return grid, q, k


# Masks


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("name", PROBLEMS)
def test_means_and_scores(name, dtype):
    grid, q, k = problem(name, dtype)
    mean = nabla.block_mean(q, grid, backend=BACKEND)
    exact = block_means(q, block_runs(grid))
    torch.testing.assert_close(mean.double(), exact, atol=1e-6, rtol=1e-6)
    scores = nabla.pooled_scores(q, k, grid, backend=BACKEND)
    expected = nabla.pooled_scores(q, k, grid, backend="reference")
    torch.testing.assert_close(scores, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("window", [None, (1, 3, 1), (3, 1, 5)], ids=str)
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("name", PROBLEMS)
def test_masks(name, dtype, window):
    for strength, top_p in ((0.0, 0.5), (0.5, 0.9), (2.0, 0.6)):
        grid, q, k = problem(name, dtype, strength)
        mask = nabla.create_block_mask(q, k, grid=grid, top_p=top_p, window=window, backend=BACKEND)
        exact = pooled_scores(q, k, grid, q.shape[3] ** -0.5)
        top_p = torch.full((q.shape[1],), top_p, dtype=torch.float32).double()
        assert_selects(mask.to_dense(), exact, top_p, window_mask(grid, window))
        assert torch.equal(mask.bits, BlockMask.from_dense(mask.to_dense(), grid=grid).bits)


@pytest.mark.parametrize("num_blocks", [31, 32, 33, 1700, 3400, 5000, 8192, 14000])
def test_rows_of_any_length(num_blocks, architecture):
    """Of many ties at the cut, of few, and of scores that differ much."""
    grid = TokenGrid(num_blocks, 8, 8)
    top_p = torch.tensor([0.3, 0.95])
    rows, columns = torch.arange(num_blocks - 2, num_blocks)[:, None], torch.arange(num_blocks)
    for power, reach in ((0, -1), (1, 1), (12, -1)):
        scores = (torch.randint(1, 40, (1, 2, 2, num_blocks)) / 40.0) ** power
        mask = nabla.select_blocks(
            scores,
            grid,
            top_p=top_p,
            window=None if reach < 0 else (2 * reach + 1, 1, 1),
            q_block_offset=num_blocks - 2,
            backend=BACKEND,
        )
        exact = scores.double() / scores.double().sum(-1, keepdim=True)
        assert_selects(mask.to_dense(), exact, top_p.double(), (rows - columns).abs() <= reach)


@pytest.mark.parametrize("num_blocks", [1800, 3500, 8192])
def test_long_rows_of_means(num_blocks, architecture):
    grid = TokenGrid(num_blocks, 8, 8)
    k = smooth_tokens(grid, 1, 64, torch.bfloat16, strength=1.0)
    q = k[:, :, 2 * 64 : 5 * 64]
    mask = nabla.create_block_mask(
        q, k, grid=grid, top_p=0.6, window=(5, 1, 1), q_block_offset=2, backend=BACKEND
    )
    exact = pooled_scores(q, k, grid, 64**-0.5, q_block_offset=2)
    keep = torch.zeros(3, num_blocks, dtype=torch.bool)
    for row in range(3):
        keep[row, row : row + 5] = True
    assert_selects(mask.to_dense(), exact, torch.tensor([0.6]).double(), keep)


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("value", [0.3, 1.1, 3e4, 1e-6])
def test_equal_tokens_tie_on_ragged_grids(value, dtype):
    """Blocks of 64 and of 40 equal tokens have equal means: the lowest indices are kept."""
    grid = TokenGrid(2, 13, 21)
    q = torch.ones(1, 1, grid.num_tokens, 64, dtype=dtype)
    k = torch.full_like(q, value)
    keep = nabla.create_block_mask(q, k, grid=grid, top_p=0.5, backend=BACKEND).to_dense()
    assert keep[0, 0].tolist() == [[True] * 6 + [False] * 6] * 12


def test_means_of_large_tokens_are_finite():
    x = torch.full((1, 1, 128, 64), 3e38, dtype=torch.bfloat16)
    mean = nabla.block_mean(x, TokenGrid(2, 8, 8), backend=BACKEND)
    assert torch.equal(mean, x[:, :, :2].float())


def test_top_p_per_head():
    grid, shares = TokenGrid(5, 16, 16), (0.3, 0.8, 1.0)
    q, k = (smooth_tokens(grid, 3, 64, torch.bfloat16) for _ in range(2))
    mask = nabla.create_block_mask(q, k, grid=grid, top_p=shares, backend=BACKEND)
    for head, share in enumerate(shares):
        alone = nabla.create_block_mask(
            q[:, head, None], k[:, head, None], grid=grid, top_p=share, backend=BACKEND
        )
        assert torch.equal(mask.bits[:, head], alone.bits[:, 0])
    out_of_range = torch.tensor([-1.0, torch.nan, 1.5])
    counts, _ = nabla.create_block_mask(
        q, k, grid=grid, top_p=out_of_range, backend=BACKEND
    ).indices()
    assert counts[0].tolist() == [[1] * 20, [1] * 20, [20] * 20]


@pytest.mark.parametrize("name", PROBLEMS)
def test_slices_of_the_queries_and_given_scores(name):
    grid, q, k = problem(name, torch.bfloat16)
    options = {"grid": grid, "top_p": 0.6, "window": (1, 3, 3), "backend": BACKEND}
    whole = nabla.create_block_mask(q, k, **options)
    first, last = grid.num_blocks // 3, grid.num_blocks
    rows = q[:, :, grid.block_start(first) : grid.block_start(last)]
    part = nabla.create_block_mask(rows, k, **options, q_block_offset=first)
    assert torch.equal(part.bits, whole.bits[:, :, first:last])
    scores = nabla.pooled_scores(rows, k, grid, q_block_offset=first, backend=BACKEND)
    selected = nabla.select_blocks(scores, **options, q_block_offset=first)
    assert torch.equal(selected.bits, part.bits)


def test_what_is_not_finite_is_kept_and_changes_nothing_else():
    grid = TokenGrid(6, 8, 8)
    q, k = (smooth_tokens(grid, 2, 64, torch.bfloat16) for _ in range(2))
    poisoned_q, poisoned_k = q.clone(), k.clone()
    poisoned_q[0, 0, 3 * 64 + 5, 7] = torch.nan
    poisoned_k[0, 1, 2 * 64 + 63, 0] = -torch.inf
    arguments = {"grid": grid, "top_p": 0.5, "backend": BACKEND}
    clean = nabla.create_block_mask(q, k, **arguments).to_dense()
    keep = nabla.create_block_mask(poisoned_q, poisoned_k, **arguments).to_dense()
    assert keep[0, 0, 3].all()
    others = [0, 1, 2, 4, 5]
    assert torch.equal(keep[0, 0, others], clean[0, 0, others])
    without = pooled_scores(q, k, grid, 64**-0.5)[:, 1:]
    without[..., 2] = 0
    forced = torch.zeros(6, 6, dtype=torch.bool)
    forced[:, 2] = True
    assert_selects(keep[:, 1:], without, torch.tensor([0.5]).double(), forced)


@pytest.mark.parametrize("offset", [0, 4], ids=["aligned", "not aligned"])
def test_strided_tokens_are_read_where_they_are(offset):
    """[B, S, H, D] transposed, with NaN beside it; rows off 16 bytes are copied."""
    grid, q, k = problem("short blocks and extra tokens", torch.float16)
    spread = []
    for x in (q, k):
        outer = torch.full((2, x.shape[2] + 2, x.shape[1] + 1, 80), torch.nan, dtype=torch.float16)
        inner = outer[:, 1:-1, :-1, offset : offset + 64].transpose(1, 2)
        spread.append(inner.copy_(x))
    masks = [
        nabla.create_block_mask(q, k, grid=grid, top_p=0.7, backend=BACKEND)
        for q, k in ((q, k), spread)
    ]
    assert torch.equal(masks[0].bits, masks[1].bits)


@pytest.mark.parametrize("rows", [1, 31, 70])
def test_transposed_bits(rows):
    """Of some rows, with garbage past the last column, and of heads that share a mask."""
    grid = TokenGrid(70, 8, 8)
    keep = torch.rand(2, 3, rows, 70) < 0.4
    bits = BlockMask.from_dense(keep, grid=grid).bits
    bits[..., -1] |= -1 << 70 % 32
    columns = transposed_bits(bits, grid)
    assert torch.equal(columns, pack_bits(keep.mT))
    shared = transposed_bits(bits[:, :1].expand(-1, 3, -1, -1), grid)
    assert shared.stride(1) == 0
    assert torch.equal(shared[:, 2], columns[:, 0])


def test_every_schedule_gives_the_same_mask():
    """Threads that depend on an order that nothing enforces would give another one, or an error."""
    grid, q, k = problem("short blocks and extra tokens", torch.bfloat16)
    options = {"grid": grid, "top_p": 0.7, "window": (1, 3, 1), "backend": BACKEND}
    expected = nabla.create_block_mask(q, k, **options)
    for schedule, seed in itertools.product(SCHEDULES, (1, 2)):
        with cuda.emulation(schedule=schedule, seed=seed):
            assert torch.equal(nabla.create_block_mask(q, k, **options).bits, expected.bits)


def test_rows_that_fit_no_kernel_are_refused(architecture):
    grid = TokenGrid(60000, 8, 8)
    with pytest.raises(ValueError, match="a row of 60000 blocks does not fit.*triton"):
        nabla.select_blocks(torch.ones(1, 1, 1, 60000), grid, top_p=0.5, backend=BACKEND)
