"""Video Sparse Attention of FastVideo (package fastvideo-kernel): its Triton and its
ThunderKittens kernels, of which the latter run on Hopper only."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.peer import Peer, needs
from nabla import BlockMask

HEAD_DIMS = (64, 128)


def by_function(name: str) -> Callable[..., Callable[[], Tensor]]:
    """Attention by one of its functions, which all take lists and the sizes of the key blocks.

    What they take in their layout is refused where it would be something else: they do not check.
    """

    def prepare(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Callable[[], Tensor]:
        if q.dtype != torch.bfloat16 or q.shape[-1] not in HEAD_DIMS:
            raise ValueError(f"takes bfloat16 of D={HEAD_DIMS}, not {q.dtype} of D={q.shape[-1]}")
        if mask.grid.is_ragged or len(q) > 1:
            raise ValueError("takes whole blocks of one sequence")
        # The package has a function of the name of this module.
        module = importlib.import_module("fastvideo_kernel.block_sparse_attn")
        function = getattr(module, name)
        counts, indices = mask.indices()
        sizes = mask.grid.starts(q.device).diff().to(torch.int32)
        return lambda: function(q, k, v, indices, counts, sizes)[0]

    return prepare


ABSENT = needs("fastvideo_kernel", "pip install fastvideo-kernel")
GPU = ("cuda",)

PEERS = (
    Peer("vsa-triton", "sparse", ABSENT, by_function("block_sparse_attn_triton"), GPU),
    Peer("vsa-tk", "sparse", ABSENT, by_function("block_sparse_attn_sm90"), GPU),
)
