"""NABLA: attention for video, image and other grid models that computes the blocks that matter."""

from nabla.block_attention import AttentionOutput, block_sparse_attention
from nabla.block_mask import BlockMask, create_block_mask, select_blocks, sliding_tile_mask
from nabla.dispatch import backends
from nabla.functional import attention
from nabla.grid import TokenGrid
from nabla.reorder import fractal_flatten, fractal_unflatten
from nabla.scores import block_mean, pooled_scores

__version__ = "0.1.0"

__all__ = [
    "TokenGrid",
    "fractal_flatten",
    "fractal_unflatten",
    "block_mean",
    "pooled_scores",
    "BlockMask",
    "sliding_tile_mask",
    "select_blocks",
    "create_block_mask",
    "AttentionOutput",
    "block_sparse_attention",
    "attention",
    "backends",
]
