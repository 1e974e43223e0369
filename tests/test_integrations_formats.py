"""Masks as other libraries take them: what the fields say, and round trips."""

import pytest
import torch
import torch.nn.functional as F
from oracle import token_mask
from scipy.sparse import bsr_matrix

import nabla
from nabla import BlockMask, TokenGrid
from nabla.integrations.formats import (
    BSRMask,
    CudnnMask,
    from_bsr,
    from_cudnn,
    from_fa4,
    to_bsr,
    to_cudnn,
    to_fa4,
    to_flashinfer,
    to_token_mask,
)

WHOLE = TokenGrid(5, 16, 24)
RAGGED = TokenGrid(3, 12, 20, extra=30)


def random_mask(grid, batch=2, heads=3, density=0.3, rows=slice(None)):
    keep = torch.rand(batch, heads, grid.num_blocks, grid.num_blocks) < density
    keep[0, 0, 1] = False  # an empty row
    keep[0, 0, 2] = True
    offset = rows.start or 0
    return BlockMask.from_dense(keep[:, :, rows], grid=grid, q_block_offset=offset)


MASKS = {
    "random": random_mask(WHOLE),
    "one_for_all": random_mask(WHOLE, 1, 1),
    "slice": random_mask(WHOLE, rows=slice(4, 9)),
    "empty": random_mask(WHOLE, density=-1.0, rows=slice(0, 2)),
    "blocks_of_16": random_mask(TokenGrid(4, 8, 8, block=(1, 4, 4))),
}
ROUND_TRIPS = {
    "fa4": (to_fa4, from_fa4),
    "cudnn": (to_cudnn, from_cudnn),
    "bsr": (to_bsr, from_bsr),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("there, back", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_round_trip(mask, there, back):
    tensors = there(mask)
    again = back(tensors, grid=mask.grid, q_block_offset=mask.q_block_offset)
    assert torch.equal(again.bits, mask.bits)
    assert (again.grid, again.q_block_offset) == (mask.grid, mask.q_block_offset)


def test_lists_hold_what_is_kept():
    mask = MASKS["random"]
    keep = mask.to_dense()
    fa4, cudnn, bsr = to_fa4(mask), to_cudnn(mask), to_bsr(mask)
    assert fa4.block_size == (64, 64)
    assert not fa4.mask_block_cnt.any()
    for field in (*fa4[:4], *cudnn, *bsr):
        assert field.dtype == torch.int32
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in keep.shape[:3])).tolist():
        kept = keep[b, h, i].nonzero().flatten().tolist()
        assert fa4.full_block_idx[b, h, i, : fa4.full_block_cnt[b, h, i]].tolist() == kept
        assert cudnn.q2k_block_index[b, h, i, : cudnn.q2k_block_nums[b, h, i]].tolist() == kept
        start, stop = bsr.indptr[b, h, i : i + 2].tolist()
        assert bsr.indices[start:stop].tolist() == kept


def test_bsr_is_what_scipy_means():
    mask = MASKS["one_for_all"]
    indptr, indices = to_bsr(mask)
    data = torch.ones(len(indices), 2, 2).numpy()
    matrix = bsr_matrix((data, indices.numpy(), indptr[0, 0].numpy()))
    expected = mask.to_dense()[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(torch.from_numpy(matrix.toarray()).bool(), expected)
    assert torch.equal(from_bsr(BSRMask(indptr[0, 0], indices), grid=WHOLE).bits, mask.bits)


@pytest.mark.parametrize("grid", [WHOLE, RAGGED], ids=str)
@pytest.mark.parametrize("rows", [slice(None), slice(3, 6)], ids=["all", "slice"])
def test_formats_of_unequal_blocks(grid, rows):
    mask = random_mask(grid, rows=rows)
    tokens = token_mask(mask.to_dense(), grid, mask.q_block_offset)
    assert torch.equal(to_token_mask(mask), tokens)
    block_mask_map, row_sizes, column_sizes = to_flashinfer(mask)
    assert block_mask_map.shape == (6, *mask.shape[2:])
    for head, expected in enumerate(tokens.flatten(0, 1)):
        rebuilt = block_mask_map[head].repeat_interleave(row_sizes[head], 0)
        assert torch.equal(rebuilt.repeat_interleave(column_sizes[head], 1), expected)


def test_token_mask_is_for_sdpa():
    q, k, v = torch.randn(3, 2, 3, RAGGED.num_tokens, 32).unbind()
    mask = nabla.create_block_mask(q, k, grid=RAGGED, top_p=0.5)
    dense = F.scaled_dot_product_attention(q, k, v, to_token_mask(mask))
    sparse = nabla.block_sparse_attention(q, k, v, mask)
    torch.testing.assert_close(sparse, dense, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("there", [to_fa4, to_cudnn, to_bsr])
def test_one_block_size(there):
    with pytest.raises(ValueError, match="whose blocks differ in size, .* use to_flashinfer"):
        there(random_mask(RAGGED))


def test_partial_blocks_are_refused():
    tensors = to_fa4(MASKS["random"])
    partial = tensors._replace(mask_block_cnt=tensors.full_block_cnt)
    with pytest.raises(ValueError, match="tensors has partial blocks"):
        from_fa4(partial, grid=WHOLE)


@pytest.mark.parametrize("there, back", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_another_grid_is_refused(there, back):
    with pytest.raises(ValueError, match="has 2 blocks"):
        back(there(random_mask(WHOLE, density=1.0)), grid=(2, 8, 8))


BROKEN_LISTS = {
    "counted from 1": ([2, 2, 2, 2], [[1, 4]] * 4),
    "negative": ([1, 1, 1, 1], [[-1, 0]] * 4),
    "too long": ([3, 0, 0, 0], [[0, 1]] * 4),
    "negative length": ([-1, 0, 0, 0], [[0, 1]] * 4),
}


@pytest.mark.parametrize("counts, lists", BROKEN_LISTS.values(), ids=BROKEN_LISTS)
def test_lists_that_do_not_fit_are_refused(counts, lists):
    counts, lists = torch.tensor([[counts]]), torch.tensor([[lists]])
    with pytest.raises(ValueError, match="does not have, or counts .* there are 4 in"):
        from_cudnn(CudnnMask(lists, counts), grid=(1, 16, 16))


@pytest.mark.parametrize("indptr", [[0, 1, 2, 3, 6], [0, 3, 2, 3, 4], [-1, 1, 2, 3, 4]], ids=str)
def test_offsets_that_do_not_ascend_are_refused(indptr):
    bsr = BSRMask(torch.tensor(indptr), torch.arange(4))
    with pytest.raises(ValueError, match="indptr does not ascend within the 4 indices"):
        from_bsr(bsr, grid=(1, 16, 16))
