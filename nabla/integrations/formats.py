"""Masks as other libraries' block-sparse attention takes them, and back.

to_fa4          FlashAttention 4      counts and lists of whole key blocks    [B, H, Nq], [.., Nk]
to_cudnn        cuDNN frontend        lists and counts of key blocks          [B, H, Nq, Nk], [..]
to_bsr          FlashInfer            rows of a block-sparse matrix           [B, H, Nq + 1], [n]
to_flashinfer   FlashInfer, variable  booleans, and the sizes of blocks       [B H, Nq, Nk], [..]
to_token_mask   SDPA and the like     booleans of tokens                      [B, H, Sq, Sk]

BlockMask itself has to_flex, from_flex, to_dense and from_dense. Tokens are in block order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nabla.block_mask import BlockMask
from nabla.grid import TokenGrid


class FA4Mask(NamedTuple):
    """The fields of flash_attn.cute.block_sparsity.BlockSparseTensorsTorch that NABLA fills."""

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]


def to_fa4(mask: BlockMask) -> FA4Mask:
    """Return the mask for FlashAttention 4, as `BlockSparseTensorsTorch(**to_fa4(mask)._asdict())`.

    Returns:
        Counts int32 [B, H, Nq] and lists int32 [B, H, Nq, Nk] of partial blocks (none), and of full
        ones (all that are kept), ascending; the block size (q, k) in tokens.

    Raises:
        ValueError: If blocks differ in size.
    """
    _check_one_block_size(mask, "FlashAttention 4")
    counts, indices = mask.indices()
    size = mask.grid.block_size
    return FA4Mask(torch.zeros_like(counts), indices, counts, indices.clone(), (size, size))


def from_fa4(
    tensors: FA4Mask, *, grid: TokenGrid | Sequence[int], q_block_offset: int = 0
) -> BlockMask:
    """Make a mask of FlashAttention 4's tensors, which have to hold full blocks only.

    Reads the partial blocks' counts, which synchronises with the device.

    Args:
        tensors: FA4Mask, or a BlockSparseTensorsTorch.
        grid: The grid of the tokens, or its (frames, height, width).
        q_block_offset: The query block that is row 0.

    Raises:
        ValueError: If there are partial blocks, or the tensors do not fit the grid.
    """
    if tensors.full_block_cnt is None or tensors.mask_block_cnt.any():
        raise ValueError(
            "tensors has partial blocks (mask_block_cnt), whose tokens a mask_mod decides: only "
            "masks of whole blocks can be converted"
        )
    return BlockMask.from_indices(
        tensors.full_block_cnt, tensors.full_block_idx, grid=grid, q_block_offset=q_block_offset
    )


class CudnnMask(NamedTuple):
    """The lists of key blocks that cuDNN's block-sparse attention takes."""

    q2k_block_index: Tensor
    q2k_block_nums: Tensor


def to_cudnn(mask: BlockMask) -> CudnnMask:
    """Return the mask for the block-sparse attention of the cuDNN frontend (`cudnn.BSA`).

    Returns:
        Lists int32 [B, H, Nq, Nk], in each row the kept key blocks, ascending, then the others; and
        how many are kept, int32 [B, H, Nq].

    Raises:
        ValueError: If blocks differ in size.
    """
    _check_one_block_size(mask, "cuDNN")
    counts, indices = mask.indices()
    return CudnnMask(indices, counts)


def from_cudnn(
    lists: CudnnMask, *, grid: TokenGrid | Sequence[int], q_block_offset: int = 0
) -> BlockMask:
    """Make a mask of cuDNN's lists.

    Reads whether they fit the grid, which synchronises with the device.

    Args:
        lists: Lists int32 [B, H, Nq, n] of key blocks, n at most Nk, and their lengths [B, H, Nq].
        grid: The grid of the tokens, or its (frames, height, width).
        q_block_offset: The query block that is row 0.

    Raises:
        ValueError: If the lists do not fit the grid.
    """
    indices, counts = lists
    return BlockMask.from_indices(counts, indices, grid=grid, q_block_offset=q_block_offset)


class BSRMask(NamedTuple):
    """A block-sparse matrix by rows: row i keeps the blocks indices[indptr[i] : indptr[i + 1]]."""

    indptr: Tensor
    indices: Tensor


def to_bsr(mask: BlockMask) -> BSRMask:
    """Return the mask as FlashInfer's block-sparse attention takes it, as SciPy's bsr_matrix.

    For BlockSparseAttentionWrapper, which has one mask for all heads, give a mask [1, 1, Nq, Nk],
    and `indptr[0, 0]`. Synchronises with the device.

    Returns:
        Offsets int32 [B, H, Nq + 1] into the list, and the kept key blocks of all rows, int32 [n].

    Raises:
        ValueError: If blocks differ in size.
    """
    _check_one_block_size(mask, "a BSR matrix")
    keep = mask.to_dense()
    batch, heads, rows, _ = keep.shape
    ends = keep.sum(-1).flatten().cumsum(0).view(batch, heads, rows)
    starts = torch.cat([ends.new_zeros(1), ends[..., -1].flatten()[:-1]]).view(batch, heads, 1)
    return BSRMask(torch.cat([starts, ends], -1).int(), keep.nonzero()[:, 3].int())


def from_bsr(
    bsr: BSRMask, *, grid: TokenGrid | Sequence[int], q_block_offset: int = 0
) -> BlockMask:
    """Make a mask of a block-sparse matrix.

    Reads whether it fits the grid, which synchronises with the device.

    Args:
        bsr: Offsets int32 [B, H, Nq + 1] or [Nq + 1], and key blocks int32 [n].
        grid: The grid of the tokens, or its (frames, height, width).
        q_block_offset: The query block that is row 0.

    Raises:
        ValueError: If the matrix does not fit the grid.
    """
    indptr, indices = bsr
    indptr = indptr.view(1, 1, -1) if indptr.dim() == 1 else indptr
    lengths = indptr.diff(dim=-1)
    if indptr.min() < 0 or indptr.max() > indices.numel() or lengths.min() < 0:
        raise ValueError(
            f"indptr does not ascend within the {indices.numel()} indices: give offsets as to_bsr "
            "makes them"
        )
    width = max(int(lengths.max()), 1)
    column = torch.arange(width, device=indptr.device)
    at = (indptr[..., :-1, None] + column).clamp(max=max(indices.numel() - 1, 0))
    lists = indices[at] if indices.numel() else torch.zeros_like(at)
    return BlockMask.from_indices(lengths, lists, grid=grid, q_block_offset=q_block_offset)


class FlashInferMask(NamedTuple):
    """What FlashInfer's VariableBlockSparseAttentionWrapper.plan takes."""

    block_mask_map: Tensor
    block_row_sz: Tensor
    block_col_sz: Tensor


def to_flashinfer(mask: BlockMask) -> FlashInferMask:
    """Return the mask for FlashInfer's variable block-sparse attention; blocks may differ in size.

    Samples and heads become one dimension of heads, as that attention has no batch.

    Returns:
        Booleans [B H, Nq, Nk], and the tokens of each query and key block, int32 [B H, Nq] and
        [B H, Nk].
    """
    keep = mask.to_dense().flatten(0, 1)
    sizes = mask.grid.starts(mask.device).diff()
    rows = sizes[mask.q_block_offset :][: keep.shape[1]]
    return FlashInferMask(
        keep, rows.expand(keep.shape[0], -1).clone(), sizes.expand(keep.shape[0], -1).clone()
    )


def to_token_mask(mask: BlockMask) -> Tensor:
    """Return the mask as booleans of tokens [B, H, Sq, Sk], for F.scaled_dot_product_attention.

    One byte for each pair of tokens: for small grids, tests and pictures.
    """
    sizes = mask.grid.starts(mask.device).diff().long()
    rows = sizes[mask.q_block_offset :][: mask.shape[2]]
    return mask.to_dense().repeat_interleave(rows, 2).repeat_interleave(sizes, 3)


def _check_one_block_size(mask: BlockMask, taker: str) -> None:
    if mask.grid.is_ragged:
        raise ValueError(
            f"mask has {mask.grid}, whose blocks differ in size, and {taker} has one block size: "
            "use to_flashinfer or to_token_mask, or a grid of whole blocks"
        )
