"""Stage 3: which key blocks each query block attends to.

    keep[i, j] = j is among the fewest blocks that hold `top_p` of scores[i]  (nucleus selection)
                 or |t_i - t_j| <= window_t // 2, and likewise in h and w     (sliding tile window)
                 or i or j is a block of extra tokens

A mask is a bitmask: one bit a block, 32 blocks an int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nabla import ops
from nabla.bits import count_bits, pack_bits, unpack_bits
from nabla.checks import (
    as_grid,
    cast_for_autocast,
    check_keys,
    check_scale,
    check_tensors,
    check_top_p,
    check_window,
    with_dense_layout,
)
from nabla.grid import TokenGrid, Window


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """The blocks that attend to each other.

    Bit j % 32 of word j // 32 of row i tells whether query block q_block_offset + i attends key
    block j. Dimensions B and H may be 1 for any batch size and any number of heads.

    Args:
        bits: int32 [B, H, Nq, ceil(Nk / 32)]. Bits past Nk have no meaning.
        grid: The grid of the keys, and of the queries or the part of them that the rows are.
        window: The sliding tile window that the mask contains, in blocks, or None.
        q_block_offset: The query block that is row 0.
    """

    bits: Tensor
    grid: TokenGrid
    window: Window | None = None
    q_block_offset: int = 0

    @classmethod
    def from_dense(
        cls, keep: Tensor, *, grid: TokenGrid | Sequence[int], q_block_offset: int = 0
    ) -> BlockMask:
        """Make a mask of booleans.

        Args:
            keep: Booleans [B, H, Nq, Nk] or [Nq, Nk]; True where a block attends.
            grid: The grid of the tokens, or its (frames, height, width).
            q_block_offset: The query block that is row 0.

        Raises:
            ValueError: If `keep` is not boolean or does not fit the grid.
        """
        grid = as_grid(grid)
        if keep.dim() == 2:
            keep = keep[None, None]
        rows = grid.num_blocks - q_block_offset
        if keep.dim() != 4 or keep.dtype != torch.bool:
            raise ValueError(
                f"keep has shape {list(keep.shape)} and dtype {keep.dtype}: give booleans [B, H, "
                "Nq, Nk]"
            )
        outside = not 0 <= q_block_offset < grid.num_blocks
        if outside or keep.shape[3] != grid.num_blocks or not 0 < keep.shape[2] <= rows:
            raise ValueError(
                f"keep has shape {list(keep.shape)}, but {grid} has {grid.num_blocks} blocks, "
                f"of which rows start at q_block_offset={q_block_offset}: give booleans [B, H, "
                "Nq, Nk]"
            )
        return cls(pack_bits(keep), grid, None, q_block_offset)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Nq, Nk)."""
        return *self.bits.shape[:3], self.grid.num_blocks

    @property
    def device(self) -> torch.device:
        """Where the bits are."""
        return self.bits.device

    def to(self, device: torch.device | str) -> BlockMask:
        """Return the mask on another device."""
        return BlockMask(self.bits.to(device), self.grid, self.window, self.q_block_offset)

    def to_dense(self) -> Tensor:
        """Return booleans [B, H, Nq, Nk]."""
        return unpack_bits(self.bits, self.grid.num_blocks)

    def density(self) -> Tensor:
        """Return kept blocks / all blocks: a scalar on the device (a float would synchronise)."""
        return self._counts().sum() / (self.bits[..., 0].numel() * self.grid.num_blocks)

    def indices(self) -> tuple[Tensor, Tensor]:
        """Return the kept blocks as lists.

        Returns:
            Counts int32 [B, H, Nq], and key blocks int32 [B, H, Nq, Nk]: in each row the kept ones,
            ascending, then the others.
        """
        order = self.to_dense().to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        return self._counts(), order.to(torch.int32)

    @classmethod
    def from_indices(
        cls,
        counts: Tensor,
        indices: Tensor,
        *,
        grid: TokenGrid | Sequence[int],
        q_block_offset: int = 0,
    ) -> BlockMask:
        """Make a mask of lists: the inverse of `indices`.

        Reads whether the lists fit, which synchronises with the device.

        Args:
            counts: How many blocks each row keeps, integers [B, H, Nq].
            indices: The key blocks of each row, integers [B, H, Nq, n]: first those it keeps, each
                once and in any order. The others are not read.
            grid: The grid of the tokens, or its (frames, height, width).
            q_block_offset: The query block that is row 0.

        Raises:
            ValueError: If the lists are longer than the grid has blocks, or do not fit it.
        """
        grid = as_grid(grid)
        num = grid.num_blocks
        if indices.shape[:-1] != counts.shape or indices.shape[-1] > num:
            raise ValueError(
                f"indices has shape {list(indices.shape)} and counts {list(counts.shape)}, but "
                f"{grid} has {num} blocks: give lists [B, H, Nq, n] with n at most {num}, and "
                "their lengths [B, H, Nq]"
            )
        listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
        fits = (counts >= 0) & (counts <= indices.shape[-1])
        fits = fits.all() & (~listed | (indices >= 0) & (indices < num)).all()
        _require(
            fits,
            "indices names a key block that the grid does not have, or counts is no length of its "
            "lists: blocks count from 0",
            f"; there are {num} in {grid}, and the lists have {indices.shape[-1]} entries",
        )
        columns = torch.where(listed, indices, num).long()  # unlisted ones: a spare column
        keep = torch.zeros(*counts.shape, num + 1, dtype=torch.bool, device=counts.device)
        keep = keep.scatter(-1, columns, True)[..., :num]
        return cls.from_dense(keep, grid=grid, q_block_offset=q_block_offset)

    def transpose(self) -> BlockMask:
        """Return the mask whose rows are the key blocks: which query blocks attend to each.

        Raises:
            ValueError: If the rows are a slice of the grid, so that the columns of the result
                would be one.
        """
        if self.shape[2] != self.shape[3]:
            raise ValueError(
                f"the mask has {self.shape[2]} rows of the {self.shape[3]} blocks of its grid, "
                "and columns "
                "are never a slice: use to_dense().transpose(-2, -1)"
            )
        return BlockMask(pack_bits(self.to_dense().transpose(-2, -1)), self.grid, self.window)

    def to_flex(self):
        """Return the mask as a torch.nn.attention.flex_attention.BlockMask.

        It holds full blocks only, and a mask_mod that reads the bits, so eager and compiled
        flex_attention agree.

        Raises:
            ValueError: If blocks differ in size, which flex_attention cannot express.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        if self.grid.is_ragged:
            raise ValueError(
                f"{self.grid} has blocks of different sizes, and flex_attention has one block "
                "size: "
                "use to_dense()"
            )
        counts, indices = self.indices()
        block_size, bits = self.grid.block_size, self.bits
        batch, heads = bits.shape[:2]

        def mask_mod(b, h, q_idx, kv_idx):
            key_block = kv_idx // block_size
            word = bits[b % batch, h % heads, q_idx // block_size, key_block // 32]
            return (word >> key_block % 32 & 1) != 0

        return FlexBlockMask.from_kv_blocks(
            torch.zeros_like(counts),
            indices,
            counts,
            indices.clone(),  # sharing one tensor breaks the compiled CPU kernel of torch 2.13
            BLOCK_SIZE=block_size,
            mask_mod=mask_mod,
            seq_lengths=(self.shape[2] * block_size, self.grid.num_tokens),
        )

    @classmethod
    def from_flex(
        cls, mask, *, grid: TokenGrid | Sequence[int], q_block_offset: int = 0
    ) -> BlockMask:
        """Make a mask of a torch.nn.attention.flex_attention.BlockMask that holds full blocks only.

        Reads the partial blocks' counts, which synchronises with the device.

        Args:
            mask: A flex_attention BlockMask, such as Kandinsky 5 in diffusers builds.
            grid: The grid of the tokens, or its (frames, height, width).
            q_block_offset: The query block that is row 0.

        Raises:
            ValueError: If the mask has partial blocks, or does not fit the grid.
        """
        grid = as_grid(grid)
        if tuple(mask.BLOCK_SIZE) != (grid.block_size, grid.block_size) or grid.is_ragged:
            raise ValueError(
                f"the flex mask has BLOCK_SIZE {tuple(mask.BLOCK_SIZE)}, but the blocks of {grid} "
                "have "
                f"{'up to ' if grid.is_ragged else ''}{grid.block_size} tokens: give its own grid"
            )
        message = (
            "the flex mask has partial blocks, whose tokens mask_mod decides: "
            "only masks of whole blocks can be converted"
        )
        _require(~mask.kv_num_blocks.any(), message)
        if mask.full_kv_num_blocks is None:
            raise ValueError(message)
        counts, indices = mask.full_kv_num_blocks, mask.full_kv_indices
        if indices.shape[-1] != grid.num_blocks:
            raise ValueError(
                f"the flex mask lists {indices.shape[-1]} key blocks, but {grid} has "
                f"{grid.num_blocks}: give its own grid"
            )
        return cls.from_indices(counts, indices, grid=grid, q_block_offset=q_block_offset)

    def _counts(self) -> Tensor:
        """Kept blocks of each row: int32 [B, H, Nq]."""
        return count_bits(self.bits, self.grid.num_blocks)

    def __repr__(self) -> str:
        batch, heads, rows, columns = self.shape
        return (
            f"BlockMask(B={batch}, H={heads}, Nq={rows}, Nk={columns}, grid={self.grid}, "
            f"window={self.window}, q_block_offset={self.q_block_offset}, device={self.device})"
        )


def _require(condition: Tensor, message: str, details: str = "") -> None:
    """Raise a ValueError unless a condition on values holds."""
    if torch.compiler.is_compiling():  # values are not known yet: checked when the graph runs
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message + details)


def sliding_tile_mask(
    grid: TokenGrid | Sequence[int],
    window: Sequence[int],
    *,
    device: torch.device | str | None = None,
) -> BlockMask:
    """Keep the blocks within a window around each block, clipped at the borders of the grid.

    Args:
        grid: The grid of the tokens, or its (frames, height, width).
        window: Odd extents (frames, height, width) of the window, in blocks.
        device: Where the mask is made.

    Returns:
        A mask [1, 1, N, N] for any batch size and number of heads. Blocks of extra tokens are kept.

    Raises:
        ValueError: If an extent is even or not positive.
    """
    grid, extents = as_grid(grid), check_window(window)
    keep = grid.kept_by_position(extents, device)[None, None]
    return BlockMask(pack_bits(keep), grid, extents)


def select_blocks(
    scores: Tensor,
    grid: TokenGrid | Sequence[int],
    *,
    top_p: float | Sequence[float] | Tensor,
    window: Sequence[int] | None = None,
    q_block_offset: int = 0,
    backend: str = "auto",
) -> BlockMask:
    """Keep, for each query block, the fewest key blocks that hold `top_p` of its scores.

    Args:
        scores: Scores [B, H, Nq, Nk] as of `pooled_scores`; not negative. One that is not finite
            marks a block that is kept and has no part in the rest.
        grid: The grid of the tokens, or its (frames, height, width).
        top_p: The share of a row's scores to keep, in (0, 1]; one value, or one per head. The
            values of a tensor are not inspected: at or below 0 one block is kept, at or above 1
            every block.
        window: Odd extents (frames, height, width), in blocks, around each block that are kept too.
        q_block_offset: The query block that is row 0 of the scores.
        backend: "auto", or the name of a backend (see `nabla.backends`).

    Returns:
        A mask whose every row keeps at least one block. Equal scores are kept lowest index first;
        top_p=1 keeps every block.

    Raises:
        ValueError: If an argument is out of its range, or the scores do not fit the grid.
    """
    grid = as_grid(grid)
    if (
        scores.dim() != 4
        or min(scores.shape) == 0
        or scores.dtype not in (torch.float32, torch.float64)
    ):
        raise ValueError(
            f"scores has shape {list(scores.shape)} and dtype {scores.dtype}: "
            "give float32 scores [B, H, Nq, Nk], as pooled_scores does"
        )
    if (
        scores.shape[3] != grid.num_blocks
        or not 0 <= q_block_offset <= grid.num_blocks - scores.shape[2]
    ):
        raise ValueError(
            f"scores has {scores.shape[2]} rows from q_block_offset={q_block_offset} on and "
            f"{scores.shape[3]} columns, but {grid} has {grid.num_blocks} blocks"
        )
    window = check_window(window)
    top_p = check_top_p(top_p, scores.shape[1], scores.device)
    bits = ops.select_blocks(
        scores.detach(), top_p, grid.as_ints(), window or (), q_block_offset, backend
    )
    return BlockMask(bits, grid, window, q_block_offset)


def create_block_mask(
    q: Tensor,
    k: Tensor,
    *,
    grid: TokenGrid | Sequence[int],
    top_p: float | Sequence[float] | Tensor,
    window: Sequence[int] | None = None,
    scale: float | None = None,
    q_block_offset: int = 0,
    backend: str = "auto",
) -> BlockMask:
    """Build the NABLA mask of q and k: `pooled_scores` and `select_blocks` in one.

    Args:
        q: Queries in block order [B, Hq, Sq, D]: all of the grid's, or those of the blocks from
            `q_block_offset` on.
        k: Keys of the whole grid in block order [B, Hk, S, D]; Hk divides Hq.
        grid: The grid of the tokens, or its (frames, height, width).
        top_p: The attention mass of the pooled map to keep, in (0, 1]; one value, or one per query
            head. The values of a tensor are not inspected: at or below 0 one block is kept, at or
            above 1 all.
        window: Odd extents (frames, height, width), in blocks, around each block that are kept too.
        scale: Factor of the products; D^-0.5 if None.
        q_block_offset: The block with which q begins.
        backend: "auto", or the name of a backend (see `nabla.backends`).

    Returns:
        A mask [B, Hq, Nq, Nk] whose every row keeps at least one block. It carries no gradient.

    Raises:
        ValueError: If an argument is out of its range, or the tensors do not match each other or
            the grid.
    """
    q, k = cast_for_autocast(q=q, k=k)
    check_tensors(q=q, k=k)
    grid, window = as_grid(grid), check_window(window)
    check_keys("k", k, grid)
    grid.count_blocks(q.shape[2], q_block_offset)
    top_p = check_top_p(top_p, q.shape[1], q.device)
    q, k = with_dense_layout(q.detach(), k.detach())
    scale = check_scale(scale, q.shape[-1])
    bits = ops.create_block_mask(
        q, k, top_p, grid.as_ints(), window or (), q_block_offset, scale, backend
    )
    return BlockMask(bits, grid, window, q_block_offset)


pytree.register_constant(TokenGrid)
pytree.register_pytree_node(
    BlockMask,
    lambda mask: ([mask.bits], (mask.grid, mask.window, mask.q_block_offset)),
    lambda tensors, context: BlockMask(*tensors, *context),
    serialized_type_name="nabla.BlockMask",
    to_dumpable_context=lambda context: [context[0].as_ints(), *context[1:]],
    from_dumpable_context=lambda context: (
        TokenGrid.from_ints(context[0]),
        context[1] and tuple(context[1]),
        context[2],
    ),
    flatten_with_keys_fn=lambda mask: (
        [(pytree.GetAttrKey("bits"), mask.bits)],
        (mask.grid, mask.window, mask.q_block_offset),
    ),
)
torch.serialization.add_safe_globals([BlockMask, TokenGrid])  # an exported program may hold them
