"""FlexAttention of torch, compiled: what public NABLA runs on, with the options that let it take
blocks of 64 tokens. The forward only: on a CPU there is no other, and on Hopper the backward takes
blocks of 64 only if it searches for its tiles, a minute for each shape."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.peers.peer import Peer, needs
from nabla import BlockMask

# Its own tiles are larger than a block, and so are the warps that it takes for them.
OPTIONS = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
# Lists by key block are for the backward, as large as those by query block; old torch makes them.
PARAMETERS = inspect.signature(FlexBlockMask.from_kv_blocks).parameters
WITHOUT_COLUMNS = {"compute_q_blocks": False} if "compute_q_blocks" in PARAMETERS else {}
SHAPES = 64  # that it is compiled for in a run; torch stops at eight


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """FlexAttention, compiled for each shape of a run."""
    torch._dynamo.config.recompile_limit = SHAPES
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
        **WITHOUT_COLUMNS,
    )
    options = {"kernel_options": OPTIONS} if q.device.type == "cuda" else {}
    return lambda: compiled()(q, k, v, block_mask=lists, **options)


PEERS = (Peer("flex", "sparse", needs("torch", "torch", devices=("cuda", "cpu")), attention),)
