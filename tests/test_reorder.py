"""fractal_flatten and fractal_unflatten against an enumeration of the blocks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import block_tokens
from test_grid import grids

from nabla import TokenGrid, fractal_flatten, fractal_unflatten


@given(grids(), st.sampled_from([0, 1, 2, -1, -2, -3]))
def test_flatten_moves_tokens_to_their_blocks(grid, dim):
    order = torch.tensor([token for tokens in block_tokens(grid) for token in tokens])
    shape = [2, 3, 2]
    shape[dim] = grid.num_tokens
    x = torch.randn(shape)
    flat = fractal_flatten(x, grid, dim)
    assert torch.equal(flat, x.index_select(dim, order))
    assert torch.equal(fractal_unflatten(flat, grid, dim), x)


def test_reordering_is_differentiable():
    grid = TokenGrid(2, 9, 10, extra=3)
    x = torch.randn(1, 1, grid.num_tokens, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fractal_flatten(x, grid), x, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: fractal_unflatten(x, grid), x, fast_mode=True)


def test_reordering_compiles(run):
    grid, x = TokenGrid(3, 20, 17, extra=5), torch.randn(2, 3, 1025, 4)
    assert torch.equal(run(lambda x: fractal_unflatten(fractal_flatten(x, grid), grid), x), x)


def test_wrong_number_of_tokens():
    with pytest.raises(ValueError, match="x has 63 tokens along dim=-2, but .* has 64"):
        fractal_flatten(torch.zeros(1, 63, 2), TokenGrid(1, 8, 8))


def test_wrong_dim():
    with pytest.raises(ValueError, match="dim=3 is not a dimension of x, which has 2"):
        fractal_unflatten(torch.zeros(64, 2), TokenGrid(1, 8, 8), dim=3)
