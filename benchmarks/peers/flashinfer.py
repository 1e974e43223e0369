"""Variable block-sparse attention of FlashInfer (package flashinfer-python). Planning a mask copies
it to the host: that is its mask building, and is not timed with the attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.peer import Peer, needs
from nabla import BlockMask
from nabla.integrations.formats import to_flashinfer

WORKSPACE = 128 << 20


def attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Callable[[], Tensor]:
    """Attention under booleans of blocks and the sizes of the blocks, without a batch."""
    import flashinfer as library

    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=q.device)
    wrapper = library.VariableBlockSparseAttentionWrapper(workspace)
    heads, head_dim = q.shape[1], q.shape[-1]
    keep = BlockMask(mask.bits.expand(1, heads, -1, -1), mask.grid)
    wrapper.plan(*to_flashinfer(keep), heads, heads, head_dim, q_data_type=q.dtype)
    return lambda: wrapper.run(q[0], k[0], v[0])[None]


PEERS = (
    Peer("flashinfer", "sparse", needs("flashinfer", "pip install flashinfer-python"), attention),
)
