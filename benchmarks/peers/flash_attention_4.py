"""FlashAttention 4 (package flash-attn-4): block-sparse, 128 tokens a block as it is published,
and 64 through its private entry, as its tile has to be as large as a block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.masks import dilated
from benchmarks.peers.peer import Peer, needs
from nabla import BlockMask


def by_block(block: int) -> Callable[..., Callable[[], Tensor]]:
    """Attention under a mask of blocks of so many tokens."""

    def prepare(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Callable[[], Tensor]:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import _flash_attn_fwd

        keep = mask.to_dense() if block == 64 else dilated(mask)[0]
        order = keep.to(torch.uint8).argsort(-1, descending=True, stable=True).int()
        counts = keep.sum(-1, dtype=torch.int32)
        lists = BlockSparseTensorsTorch(
            torch.zeros_like(counts),
            torch.zeros_like(order),
            counts,
            order,
            block_size=(block, block),
        )
        tiles = {"tile_mn": (64, 64)} if block == 64 else {}

        def run() -> Tensor:
            qkv = (x.transpose(1, 2) for x in (q, k, v))
            return _flash_attn_fwd(*qkv, block_sparse_tensors=lists, **tiles)[0].transpose(1, 2)

        return run

    return prepare


ABSENT = needs("flash_attn.cute", "pip install flash-attn-4")

PEERS = (
    Peer("fa4-128", "sparse", ABSENT, by_block(128), block=128),
    Peer("fa4-64", "sparse", ABSENT, by_block(64)),
)
