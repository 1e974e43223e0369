"""Video Sparse Attention of FastVideo (package fastvideo-kernel): its Triton and its
ThunderKittens kernels, of which the latter run on Hopper only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.peer import Peer, needs
from nabla import BlockMask


def by_function(name: str) -> Callable[..., Callable[[], Tensor]]:
    """Attention by one of its functions, which all take lists and the sizes of the key blocks."""

    def prepare(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Callable[[], Tensor]:
        from fastvideo_kernel import block_sparse_attn

        function = getattr(block_sparse_attn, name)
        counts, indices = mask.indices()
        sizes = mask.grid.starts(q.device).diff().to(torch.int32)
        return lambda: function(q, k, v, indices, counts, sizes)[0]

    return prepare


ABSENT = needs("fastvideo_kernel", "pip install fastvideo-kernel")

PEERS = (
    Peer("vsa-triton", "sparse", ABSENT, by_function("block_sparse_attn_triton"), True),
    Peer("vsa-tk", "sparse", ABSENT, by_function("block_sparse_attn_sm90"), True),
)
