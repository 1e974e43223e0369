"""TokenGrid against an enumeration of its tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import block_runs, window_mask

from nabla import TokenGrid

BLOCKS = [(1, 8, 8), (1, 4, 4), (2, 4, 4), (2, 8, 8), (1, 2, 8), (1, 1, 64), (4, 4, 4)]


@st.composite
def grids(draw, max_extent=19, extra=True):
    extent = st.integers(1, max_extent)
    return TokenGrid(
        draw(st.integers(1, 4)),
        draw(extent),
        draw(extent),
        block=draw(st.sampled_from(BLOCKS)),
        extra=draw(st.integers(0, 140)) if extra else 0,
    )


@given(grids())
def test_blocks_are_runs(grid):
    runs = block_runs(grid)
    starts = [start for start, _ in runs] + [grid.num_tokens]
    assert grid.num_blocks == len(runs)
    assert grid.num_tokens == runs[-1][1]
    assert grid.starts().tolist() == starts
    assert [grid.block_start(block) for block in range(len(starts))] == starts
    assert grid.is_ragged == any(stop - start != grid.block_size for start, stop in runs)


@given(grids(), st.data())
def test_positions_find_their_block(grid, data):
    position = data.draw(st.integers(0, grid.num_tokens - 1))
    block = grid.block_at(position)
    assert grid.block_start(block) <= position < grid.block_start(block + 1)
    assert grid.block_at(grid.num_tokens) == grid.num_blocks


@given(grids(), st.data())
def test_tokens_are_counted_in_whole_blocks(grid, data):
    first = data.draw(st.integers(0, grid.num_blocks - 1))
    last = data.draw(st.integers(first + 1, grid.num_blocks))
    tokens = grid.block_start(last) - grid.block_start(first)
    assert grid.count_blocks(tokens, first) == last - first
    if grid.block_start(last) - grid.block_start(last - 1) > 1:
        with pytest.raises(ValueError, match="no whole number of blocks"):
            grid.count_blocks(tokens - 1, first)


@given(grids(max_extent=12), st.tuples(*[st.sampled_from([1, 3, 5])] * 3) | st.none())
def test_kept_by_position(grid, window):
    assert torch.equal(grid.kept_by_position(window), window_mask(grid, window))


@given(grids())
def test_ints_round_trip(grid):
    again = TokenGrid.from_ints(grid.as_ints())
    assert again == grid and hash(again) == hash(grid)


def test_a_block_may_be_a_list():
    assert hash(TokenGrid(2, 8, 8, [1, 4, 4])) == hash(TokenGrid(2, 8, 8, (1, 4, 4)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 8, 8), r"grid \(0, 8, 8\) has an extent below 1"),
        ((1, 8, 8, (1, 7, 8)), r"block \(1, 7, 8\) is not .* 16, 32, 64, 128"),
        ((1, 8, 8, 64), "block=64 is not three extents"),
        ((1, 8.0, 8), "grid has an extent 8.0: give a whole number"),
        ((1, 8, 8, (8, 8)), r"block \(8, 8\) is not three"),
        ((1, 8, 8, (1, 8, 8), -1), "extra=-1 is negative"),
    ],
)
def test_bad_grids(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenGrid(*arguments)


def test_offset_outside():
    with pytest.raises(ValueError, match="q_block_offset=4 is outside the 4 blocks"):
        TokenGrid(1, 16, 16).count_blocks(64, 4)
