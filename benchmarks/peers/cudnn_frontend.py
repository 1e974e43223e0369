"""Block-sparse attention of the cuDNN frontend (packages nvidia-cudnn-frontend and
nvidia-cutlass-dsl): blocks of 64 tokens on Hopper."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.peers.peer import Peer, needs
from nabla import BlockMask
from nabla.integrations.formats import to_cudnn


def attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Callable[[], Tensor]:
    """Attention under lists of blocks; no row of a benchmark's masks is empty."""
    import cudnn

    lists = to_cudnn(mask)

    def run() -> Tensor:
        return cudnn.BSA.block_sparse_attention_forward(
            q,
            k,
            v,
            lists.q2k_block_index,
            q2k_block_nums=lists.q2k_block_nums,
            sparse_block_size=64,
        )["o_tensor"]

    return run


PEERS = (
    Peer(
        "cudnn-bsa",
        "sparse",
        needs("cudnn", "pip install nvidia-cudnn-frontend nvidia-cutlass-dsl"),
        attention,
    ),
)
