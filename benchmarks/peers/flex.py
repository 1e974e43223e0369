"""FlexAttention of torch, compiled: what public NABLA runs on, with the options that let it take
blocks of 64 tokens. On a CPU it has a forward only."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.peers.peer import Peer, needs
from nabla import BlockMask

TILES = {"BLOCK_M": 64, "BLOCK_N": 64}  # its own choice is larger than a block


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """FlexAttention, compiled once for all shapes of a run."""
    return torch.compile(flex_attention, dynamic=False)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Callable[[], Tensor]:
    """Attention under full blocks only, as public NABLA gives them: no mask_mod to evaluate."""
    counts, indices = mask.indices()
    lists = FlexBlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        indices,
        counts,
        indices.clone(),
        BLOCK_SIZE=mask.grid.block_size,
        seq_lengths=(mask.grid.num_tokens, mask.grid.num_tokens),
    )
    options = {"kernel_options": TILES} if q.device.type == "cuda" else {}
    return lambda: compiled()(q, k, v, block_mask=lists, **options)


PEERS = (Peer("flex", "sparse", needs("torch", "torch", devices=("cuda", "cpu")), attention),)
