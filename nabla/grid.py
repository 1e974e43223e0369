"""The token grid: which tokens there are, and which blocks of 64 they form.

    tokens      frames x height x width, raster order, then `extra` trailing tokens
    block order blocks in (t, h, w) raster, the tokens of a block in raster; then the extra tokens
    block b     the run [block_start(b), block_start(b + 1)) of the tokens in block order

Heights and widths that are no multiple of the block's give shorter blocks at the far edges; there
is no padding anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZES = (16, 32, 64, 128)

Window = tuple[int, int, int]


@dataclass(frozen=True)
class TokenGrid:
    """A grid of tokens, cut into blocks.

    Args:
        frames: Extent in time, in tokens.
        height: Extent in height, in tokens.
        width: Extent in width, in tokens.
        block: Extents (frames, height, width) of a block; their product is 16, 32, 64 or 128
            tokens.
        extra: Tokens that follow the grid (text beside video). They form blocks of their own, which
            attend to everything and are attended to by everything.

    Raises:
        ValueError: If an extent is not positive, or the block has an unsupported number of tokens.
    """

    frames: int
    height: int
    width: int
    block: tuple[int, int, int] = (1, 8, 8)
    extra: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.block, Sequence):
            raise ValueError(f"block={self.block!r} is not three extents such as (1, 8, 8)")
        for extent in (self.frames, self.height, self.width, *self.block, self.extra):
            if not isinstance(extent, int | torch.SymInt):
                raise ValueError(f"grid has an extent {extent!r}: give a whole number as an int")
        if self.frames < 1 or self.height < 1 or self.width < 1:
            raise ValueError(
                f"grid {(self.frames, self.height, self.width)} has an extent below 1: "
                "give the numbers of latent frames, rows and columns of tokens"
            )
        if len(self.block) != 3 or min(self.block) < 1 or math.prod(self.block) not in BLOCK_SIZES:
            raise ValueError(
                f"block {tuple(self.block)} is not three extents with a product of "
                f"{', '.join(map(str, BLOCK_SIZES))} tokens; (1, 8, 8) is the usual one"
            )
        if not isinstance(self.block, tuple):
            object.__setattr__(self, "block", tuple(self.block))  # a list has no hash
        if self.extra < 0:
            raise ValueError(
                f"extra={self.extra} is negative: give the number of trailing tokens, or 0"
            )

    @classmethod
    def sequence(cls, length: int) -> TokenGrid:
        """Return the grid of a plain sequence: one row of 64-token blocks."""
        return cls(1, 1, length, block=(1, 1, 64))

    @classmethod
    def from_ints(cls, ints: Sequence[int]) -> TokenGrid:
        """Return the grid that `as_ints` describes."""
        frames, height, width, block_frames, block_height, block_width, extra = ints
        return cls(frames, height, width, (block_frames, block_height, block_width), extra)

    def as_ints(self) -> list[int]:
        """Return the grid as seven integers, the form in which operators take it."""
        return [self.frames, self.height, self.width, *self.block, self.extra]

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Extents (frames, height, width) of the grid in blocks, ragged ones included."""
        return (
            -(-self.frames // self.block[0]),
            -(-self.height // self.block[1]),
            -(-self.width // self.block[2]),
        )

    @property
    def block_size(self) -> int:
        """Tokens in a whole block."""
        return self.block[0] * self.block[1] * self.block[2]

    @property
    def num_grid_tokens(self) -> int:
        """Tokens without the extra ones."""
        return self.frames * self.height * self.width

    @property
    def num_tokens(self) -> int:
        """Tokens, the extra ones included: the sequence length."""
        return self.num_grid_tokens + self.extra

    @property
    def num_grid_blocks(self) -> int:
        """Blocks without those of the extra tokens: the ones that are selected among."""
        frames, height, width = self.blocks
        return frames * height * width

    @property
    def num_blocks(self) -> int:
        """Blocks, those of the extra tokens included."""
        return self.num_grid_blocks + -(-self.extra // self.block_size)

    @property
    def is_ragged(self) -> bool:
        """Whether some block has fewer tokens than `block_size`."""
        return self.num_blocks * self.block_size != self.num_tokens

    def block_start(self, block: int) -> int:
        """Return the position, in block order, of a block's first token.

        Defined up to `num_blocks`, where it is `num_tokens`.
        """
        past = block - self.num_grid_blocks
        if past >= 0:
            return min(self.num_grid_tokens + past * self.block_size, self.num_tokens)
        _, rows, columns = self.blocks
        slab, rest = block // (rows * columns), block % (rows * columns)
        row, column = rest // columns, rest % columns
        slab_frames = min(self.block[0], self.frames - slab * self.block[0])
        row_height = min(self.block[1], self.height - row * self.block[1])
        in_slab = row * self.block[1] * self.width + row_height * column * self.block[2]
        return slab * self.block[0] * self.height * self.width + slab_frames * in_slab

    def block_at(self, position: int) -> int:
        """Return the block of the token at a position in block order; at the end, `num_blocks`."""
        if position >= self.num_tokens:
            return self.num_blocks
        past = position - self.num_grid_tokens
        if past >= 0:
            return self.num_grid_blocks + past // self.block_size
        _, rows, columns = self.blocks
        slab_tokens = self.block[0] * self.height * self.width
        slab, rest = position // slab_tokens, position % slab_tokens
        slab_frames = min(self.block[0], self.frames - slab * self.block[0])
        row_tokens = slab_frames * self.block[1] * self.width
        row, rest = rest // row_tokens, rest % row_tokens
        row_height = min(self.block[1], self.height - row * self.block[1])
        return (slab * rows + row) * columns + rest // (slab_frames * row_height * self.block[2])

    def starts(self, device: torch.device | str | None = None) -> Tensor:
        """Return the first position of every block, then `num_tokens`: int32 [num_blocks + 1]."""
        _, rows, columns = self.blocks
        block = torch.arange(self.num_grid_blocks, device=device)
        slab, row, column = block // (rows * columns), block // columns % rows, block % columns
        slab_frames = (self.frames - slab * self.block[0]).clamp(max=self.block[0])
        row_height = (self.height - row * self.block[1]).clamp(max=self.block[1])
        in_slab = row * self.block[1] * self.width + row_height * column * self.block[2]
        grid_starts = slab * self.block[0] * self.height * self.width + slab_frames * in_slab
        extra = torch.arange(self.num_blocks - self.num_grid_blocks + 1, device=device)
        extra_starts = (self.num_grid_tokens + extra * self.block_size).clamp(max=self.num_tokens)
        return torch.cat([grid_starts, extra_starts]).to(torch.int32)

    def kept_by_position(
        self, window: Window | None, device: torch.device | str | None = None
    ) -> Tensor:
        """Return the blocks that are kept whatever their content.

        Args:
            window: Odd extents (frames, height, width), in blocks, of the sliding tile window
                around each block, clipped at the borders; or None.
            device: Where the result is made.

        Returns:
            Booleans [num_blocks, num_blocks]: the window, and the rows and columns of extra tokens.
        """
        _, rows, columns = self.blocks
        block = torch.arange(self.num_grid_blocks, device=device)
        keep = torch.ones(self.num_blocks, self.num_blocks, dtype=torch.bool, device=device)
        inside = keep[: self.num_grid_blocks, : self.num_grid_blocks]
        if window is None:
            inside.fill_(False)
            return keep
        at = (block // (rows * columns), block // columns % rows, block % columns)
        for axis, extent in zip(at, window, strict=True):
            inside &= (axis[:, None] - axis).abs() <= extent // 2
        return keep

    def count_blocks(self, num_tokens: int, first_block: int = 0) -> int:
        """Return how many whole blocks `num_tokens` tokens from `first_block` on are.

        Raises:
            ValueError: If `first_block` is outside the grid, or the tokens do not end where a
                block does.
        """
        if first_block == 0 and num_tokens == self.num_tokens:
            return self.num_blocks
        if not 0 <= first_block < self.num_blocks:
            raise ValueError(
                f"q_block_offset={first_block} is outside the {self.num_blocks} blocks of {self}"
            )
        start = self.block_start(first_block)
        end = self.block_at(start + num_tokens)
        if num_tokens < 1 or self.block_start(end) != start + num_tokens:
            raise ValueError(
                f"{num_tokens} tokens from block {first_block} on are no whole number of blocks "
                f"of {self}, "
                f"which has {self.num_tokens} tokens in {self.num_blocks} blocks: "
                "give the grid of these tokens, or a slice that ends where a block does"
            )
        return end - first_block
