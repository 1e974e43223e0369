"""Selection against sorting in float64, and BlockMask against booleans."""

import pytest
import torch
from conftest import BACKENDS
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_selects, fewest, pooled_scores, window_mask
from test_grid import grids
from test_scores import DTYPES, tokens

import nabla
from nabla import BlockMask, TokenGrid

WINDOWS = st.none() | st.tuples(*[st.sampled_from([1, 3, 5])] * 3)


def smooth_tokens(grid, heads=2, head_dim=32, dtype=torch.float32, batch=1, strength=3.0):
    """Tokens whose block means differ, as those of a real model do: the mask is then sparse."""
    blocks = torch.randn(batch, heads, grid.num_blocks, head_dim) * strength
    sizes = grid.starts().diff().long()
    x = blocks.repeat_interleave(sizes, 2) + torch.randn(batch, heads, grid.num_tokens, head_dim)
    return x.to(dtype)


@given(
    grid=grids(max_extent=30),
    dtype=st.sampled_from(DTYPES),
    heads=st.sampled_from([(2, 2), (4, 2)]),
    top_p=st.floats(0.01, 1.0) | st.sampled_from([0.5, 0.9, 1.0]),
    window=WINDOWS,
    strength=st.sampled_from([0.0, 0.3, 1.0]),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nabla_masks(backend, grid, dtype, heads, top_p, window, strength):
    q = smooth_tokens(grid, heads[0], dtype=dtype, strength=strength)
    k = smooth_tokens(grid, heads[1], dtype=dtype, strength=strength)
    mask = nabla.create_block_mask(q, k, grid=grid, top_p=top_p, window=window, backend=backend)
    scores = pooled_scores(q, k, grid, 32**-0.5)
    top_p = torch.full((heads[0],), top_p, dtype=torch.float32).double()
    assert_selects(mask.to_dense(), scores, top_p, window_mask(grid, window))


@given(
    rows=st.lists(
        st.lists(st.sampled_from([0.0, 0.125, 0.25, 1.0, 3.0]), min_size=6, max_size=6),
        min_size=1,
        max_size=6,
    ),
    top_p=st.sampled_from([0.001, 0.25, 0.5, 0.7, 0.999, 1.0]),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_are_kept_lowest_index_first(backend, rows, top_p):
    rows = [[*row[:-1], row[-1] + 0.125] for row in rows] + [[0.25] * 6] * (6 - len(rows))
    scores = torch.tensor(rows)[None, None]
    mask = nabla.select_blocks(scores, TokenGrid(6, 8, 8), top_p=top_p, backend=backend)
    exact_p = torch.tensor(top_p).item()  # as float32
    for kept, row in zip(mask.to_dense()[0, 0].tolist(), rows, strict=True):
        assert {j for j, is_kept in enumerate(kept) if is_kept} == fewest(row, exact_p)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
def test_ties_in_long_rows(backend, top_p):
    grid = TokenGrid(700, 8, 8)
    scores = torch.randint(0, 5, (1, 1, 3, 700)) / 4.0  # sums are exact in float32
    mask = nabla.select_blocks(scores, grid, top_p=top_p, backend=backend)
    exact_p = torch.tensor(top_p).item()  # as float32
    for kept, row in zip(mask.to_dense()[0, 0], scores[0, 0].tolist(), strict=True):
        assert set(kept.nonzero().flatten().tolist()) == fewest(row, exact_p)


@pytest.mark.parametrize("value", [0.3, 1.1, 1e-30])
def test_equal_tokens_tie_on_ragged_grids(backend, value):
    """Blocks of 64 and of 40 equal tokens have equal means: the lowest indices are kept."""
    grid = TokenGrid(2, 13, 21)
    x = torch.full((1, 1, grid.num_tokens, 64), value)
    keep = nabla.create_block_mask(x, x, grid=grid, top_p=0.5, backend=backend).to_dense()
    assert keep[0, 0].tolist() == [[True] * 6 + [False] * 6] * 12


def test_uniform_scores_keep_exactly_the_share(backend, run):
    scores = torch.full((1, 1, 4, 4), 0.25)
    mask = run(nabla.select_blocks, scores, TokenGrid(4, 8, 8), top_p=0.5, backend=backend)
    assert mask.to_dense()[0, 0].tolist() == [[True, True, False, False]] * 4


def test_top_p_one_keeps_blocks_of_no_mass(backend):
    scores = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 1, 4, 4).contiguous()
    grid = TokenGrid(4, 8, 8)
    assert nabla.select_blocks(scores, grid, top_p=1.0, backend=backend).to_dense().all()
    kept = nabla.select_blocks(scores, grid, top_p=0.999, backend=backend).to_dense()
    assert kept[..., 0].all() and not kept[..., 1:].any()


def test_top_p_per_head(backend, run):
    grid = TokenGrid(5, 16, 16)
    q, k = smooth_tokens(grid, 3), smooth_tokens(grid, 3)
    shares = (0.3, 0.8, 1.0)
    mask = run(nabla.create_block_mask, q, k, grid=grid, top_p=shares, backend=backend)
    for head, share in enumerate(shares):
        alone = nabla.create_block_mask(
            q[:, head, None], k[:, head, None], grid=grid, top_p=share, backend=backend
        )
        assert torch.equal(mask.to_dense()[:, head], alone.to_dense()[:, 0])
    as_tensor = nabla.create_block_mask(
        q, k, grid=grid, top_p=torch.tensor(shares), backend=backend
    )
    assert torch.equal(as_tensor.bits, mask.bits)


def test_tensor_top_p_out_of_range_keeps_one_or_all(backend):
    grid = TokenGrid(5, 8, 8)
    q = smooth_tokens(grid, 4)
    top_p = torch.tensor([-1.0, 0.0, 1.5, torch.nan])
    counts, _ = nabla.create_block_mask(q, q, grid=grid, top_p=top_p, backend=backend).indices()
    assert counts[0].tolist() == [[1] * 5, [1] * 5, [5] * 5, [1] * 5]


@given(grid=grids(max_extent=20), data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_the_queries(backend, grid, data):
    first = data.draw(st.integers(0, grid.num_blocks - 1))
    last = data.draw(st.integers(first + 1, grid.num_blocks))
    q, k = smooth_tokens(grid), smooth_tokens(grid)
    whole = nabla.create_block_mask(q, k, grid=grid, top_p=0.6, window=(1, 3, 3), backend=backend)
    rows = slice(grid.block_start(first), grid.block_start(last))
    part = nabla.create_block_mask(
        q[:, :, rows],
        k,
        grid=grid,
        top_p=0.6,
        window=(1, 3, 3),
        q_block_offset=first,
        backend=backend,
    )
    assert part.q_block_offset == first
    assert torch.equal(part.to_dense(), whole.to_dense()[:, :, first:last])
    scores = nabla.pooled_scores(q[:, :, rows], k, grid, q_block_offset=first, backend=backend)
    selected = nabla.select_blocks(
        scores, grid, top_p=0.6, window=(1, 3, 3), q_block_offset=first, backend=backend
    )
    assert torch.equal(selected.bits, part.bits)


def test_what_is_not_finite_is_kept_and_changes_nothing_else(backend):
    grid = TokenGrid(6, 8, 8)
    q, k = smooth_tokens(grid), smooth_tokens(grid)
    poisoned_q, poisoned_k = q.clone(), k.clone()
    poisoned_q[0, 0, 3 * 64 + 5, 7] = torch.nan
    poisoned_k[0, 1, 2 * 64 + 63, 0] = -torch.inf
    arguments = {"grid": grid, "top_p": 0.5, "backend": backend}
    clean = nabla.create_block_mask(q, k, **arguments).to_dense()
    keep = nabla.create_block_mask(poisoned_q, poisoned_k, **arguments).to_dense()
    assert keep[0, 0, 3].all()
    others = [0, 1, 2, 4, 5]
    assert torch.equal(keep[0, 0, others], clean[0, 0, others])
    assert keep[0, 1, :, 2].all()
    without = pooled_scores(q, k, grid, 32**-0.5)[:, 1:]
    without[..., 2] = 0
    forced = torch.zeros(6, 6, dtype=torch.bool)
    forced[:, 2] = True
    assert_selects(keep[:, 1:], without, torch.tensor([0.5]).double(), forced)


def test_masks_are_the_same_for_the_same_input(backend):
    grid = TokenGrid(5, 20, 20)
    q, k = smooth_tokens(grid), smooth_tokens(grid)
    first = nabla.create_block_mask(q, k, grid=grid, top_p=0.7, backend=backend)
    for _ in range(3):
        again = nabla.create_block_mask(q, k, grid=grid, top_p=0.7, backend=backend)
        assert torch.equal(first.bits, again.bits)


@given(grid=grids(max_extent=14), window=st.tuples(*[st.sampled_from([1, 3, 5])] * 3))
def test_sliding_tile_mask(grid, window):
    mask = nabla.sliding_tile_mask(grid, window)
    assert mask.shape == (1, 1, grid.num_blocks, grid.num_blocks)
    assert torch.equal(mask.to_dense()[0, 0], window_mask(grid, window))


def random_mask(num_blocks, batch=2, heads=3, share=0.4):
    return torch.rand(batch, heads, num_blocks, num_blocks) < share


@pytest.mark.parametrize("num_blocks", [1, 2, 31, 32, 33, 64, 65, 100])
def test_dense_round_trip(num_blocks):
    keep = random_mask(num_blocks)
    mask = BlockMask.from_dense(keep, grid=(num_blocks, 8, 8))
    assert mask.bits.dtype == torch.int32
    assert mask.bits.shape == (2, 3, num_blocks, -(-num_blocks // 32))
    for i, j in ((0, 0), (num_blocks - 1, num_blocks // 2), (num_blocks // 2, num_blocks - 1)):
        assert (mask.bits[1, 2, i, j // 32].item() >> j % 32 & 1) == keep[1, 2, i, j]
    assert torch.equal(mask.to_dense(), keep)
    assert torch.equal(mask.transpose().to_dense(), keep.transpose(-2, -1))
    assert mask.density().shape == ()
    torch.testing.assert_close(mask.density(), keep.float().mean())
    counts, indices = mask.indices()
    for row, count, listed in zip(
        keep.flatten(0, 2), counts.flatten(), indices.flatten(0, 2), strict=True
    ):
        assert listed[:count].tolist() == row.nonzero().flatten().tolist()
        assert sorted(listed.tolist()) == list(range(num_blocks))


@pytest.mark.parametrize("num_blocks", [1, 33, 64])
def test_garbage_past_the_last_block_is_ignored(num_blocks):
    keep = random_mask(num_blocks)
    clean = BlockMask.from_dense(keep, grid=(num_blocks, 8, 8))
    bits = clean.bits.clone()
    if num_blocks % 32:
        bits[..., -1] |= ~((1 << num_blocks % 32) - 1)
    mask = BlockMask(bits, clean.grid)
    assert torch.equal(mask.to_dense(), keep)
    assert torch.equal(mask.density(), clean.density())
    assert torch.equal(mask.transpose().bits, clean.transpose().bits)
    for ours, theirs in zip(mask.indices(), clean.indices(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_flex_round_trip_and_meaning(compiled):
    """Eager flex_attention evaluates the mask_mod, compiled it walks the lists: both agree."""
    from torch.nn.attention.flex_attention import flex_attention

    if compiled:
        flex_attention = torch.compile(flex_attention)
    grid = TokenGrid(5, 8, 16)
    keep = random_mask(10, 2, 3)
    keep[..., 0] = True
    mask = BlockMask.from_dense(keep, grid=grid)
    flex = mask.to_flex()
    q, k, v = (tokens(grid, 3, batch=2) for _ in range(3))
    out = nabla.block_sparse_attention(q, k, v, mask)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=flex), out, atol=1e-5, rtol=1e-4)
    back = BlockMask.from_flex(flex, grid=grid)
    assert torch.equal(back.bits, mask.bits)


def test_flex_of_a_broadcast_mask():
    from torch.nn.attention.flex_attention import flex_attention

    grid = TokenGrid(4, 16, 16)
    mask = nabla.sliding_tile_mask(grid, (3, 1, 1))
    q, k, v = (tokens(grid, 2, batch=2) for _ in range(3))
    torch.testing.assert_close(
        flex_attention(q, k, v, block_mask=mask.to_flex()),
        nabla.block_sparse_attention(q, k, v, mask),
    )


def test_flex_has_one_block_size():
    mask = nabla.sliding_tile_mask(TokenGrid(2, 9, 8), (1, 1, 1))
    with pytest.raises(ValueError, match="different sizes.*use to_dense"):
        mask.to_flex()


def test_partial_flex_blocks_are_refused():
    from torch.nn.attention.flex_attention import create_block_mask

    causal = create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 256, 256, "cpu", BLOCK_SIZE=64)
    with pytest.raises(ValueError, match="partial blocks"):
        BlockMask.from_flex(causal, grid=(4, 8, 8))


@pytest.mark.parametrize("frames", [2, 8])
def test_a_flex_mask_of_another_grid_is_refused(frames):
    flex = nabla.sliding_tile_mask((4, 8, 8), (1, 1, 1)).to_flex()
    with pytest.raises(ValueError, match=f"lists 4 key blocks, but .* has {frames}"):
        BlockMask.from_flex(flex, grid=(frames, 8, 8))


def test_negative_scores_have_no_mass(backend):
    scores = torch.tensor([-5.0, 1.0, -1.0, 3.0]).expand(1, 1, 4, 4)
    mask = nabla.select_blocks(scores, (4, 8, 8), top_p=0.9, backend=backend)
    assert mask.to_dense()[0, 0].tolist() == [[False, True, False, True]] * 4


def test_transpose_of_a_slice_is_refused():
    mask = BlockMask.from_dense(random_mask(4)[:, :, :2], grid=(4, 8, 8), q_block_offset=1)
    with pytest.raises(ValueError, match="2 rows of the 4 blocks"):
        mask.transpose()


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_diffusers(backend):
    """The mask that diffusers builds for Kandinsky 5, evaluated in float32."""
    from diffusers.models.transformers import transformer_kandinsky as kandinsky

    grid, window = TokenGrid(5, 32, 48), (3, 3, 3)
    for strength, top_p in ((0.2, 0.9), (0.5, 0.6), (1.0, 0.3)):
        q, k = smooth_tokens(grid, strength=strength), smooth_tokens(grid, strength=strength)
        sta = window_mask(grid, window)
        flex = kandinsky.nablaT_v2(q.transpose(1, 2), k.transpose(1, 2), sta, thr=top_p)
        theirs = BlockMask.from_flex(flex, grid=grid).to_dense()
        ours = nabla.create_block_mask(
            q, k, grid=grid, top_p=top_p, window=window, backend=backend
        ).to_dense()
        scores = pooled_scores(q, k, grid, 32**-0.5)
        shares = torch.full((2,), top_p, dtype=torch.float32).double()
        assert_selects(theirs, scores, shares, sta)
        assert_selects(ours, scores, shares, sta)
        assert (ours != theirs).float().mean() < 1e-4  # both are within the band around the cut


@pytest.mark.parametrize(
    "top_p, message",
    [
        (0.0, r"top_p=0.0 is not in \(0, 1\]"),
        (-0.5, r"top_p=-0.5 is not in \(0, 1\]"),
        (float("nan"), r"top_p=nan is not in \(0, 1\]"),
        (90, r"top_p=90 .*looks like a percentage.*0.9"),
        (101, r"top_p=101 is not in \(0, 1\]"),
        ([0.5, 2.0], r"top_p=2.0 is not in \(0, 1\]"),
        ([0.5], "top_p has 1 values: give one for each of 2 heads"),
        (torch.ones(3), r"top_p has shape \[3\]: give one value, or one for each of 2 heads"),
    ],
)
def test_bad_top_p(top_p, message):
    q = torch.zeros(1, 2, 128, 32)
    with pytest.raises(ValueError, match=message):
        nabla.create_block_mask(q, q, grid=(2, 8, 8), top_p=top_p)


@pytest.mark.parametrize("window", [(2, 3, 3), (3, 0, 3), (3, 3, -1), (3, 3)])
def test_bad_windows(window):
    q = torch.zeros(1, 2, 128, 32)
    with pytest.raises(ValueError, match="is not three odd extents .* in blocks"):
        nabla.create_block_mask(q, q, grid=(2, 8, 8), top_p=0.5, window=window)
    with pytest.raises(ValueError, match="is not three odd extents .* in blocks"):
        nabla.sliding_tile_mask((2, 8, 8), window)


def test_bad_dense_masks():
    with pytest.raises(ValueError, match="dtype torch.float32: give booleans"):
        BlockMask.from_dense(torch.ones(2, 2), grid=(2, 8, 8))
    with pytest.raises(ValueError, match=r"keep has shape \[1, 1, 2, 3\], but .* has 2 blocks"):
        BlockMask.from_dense(torch.ones(2, 3, dtype=torch.bool), grid=(2, 8, 8))
    with pytest.raises(ValueError, match="rows start at q_block_offset=-1"):
        BlockMask.from_dense(torch.ones(2, 2, dtype=torch.bool), grid=(2, 8, 8), q_block_offset=-1)


def test_bad_scores():
    grid = TokenGrid(2, 8, 8)
    with pytest.raises(ValueError, match="give float32 scores"):
        nabla.select_blocks(torch.ones(1, 1, 2, 2, dtype=torch.int64), grid, top_p=0.5)
    with pytest.raises(ValueError, match="3 columns, but .* has 2 blocks"):
        nabla.select_blocks(torch.ones(1, 1, 2, 3), grid, top_p=0.5)
    with pytest.raises(ValueError, match="2 rows from q_block_offset=1"):
        nabla.select_blocks(torch.ones(1, 1, 2, 2), grid, top_p=0.5, q_block_offset=1)
