"""Block-sparse attention of the cuDNN frontend (packages nvidia-cudnn-frontend and
nvidia-cutlass-dsl): blocks of 64 tokens on Hopper. Its backward is a function of its own, for
D=128 there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.peer import Peer, needs
from nabla import BlockMask
from nabla.integrations.formats import to_cudnn


def attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Callable[[], Tensor]:
    """Attention under lists of blocks; no row of a benchmark's masks is empty."""
    lists = to_cudnn(mask)
    return lambda: _Attention.apply(q, k, v, *lists)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, index: Tensor, counts: Tensor) -> Tensor:
        import cudnn

        found = cudnn.BSA.block_sparse_attention_forward(
            q, k, v, index, q2k_block_nums=counts, sparse_block_size=64
        )
        out, lse = found["o_tensor"], found["lse_tensor"]
        ctx.save_for_backward(q, k, v, out, lse, index, counts)
        return out

    @staticmethod
    def backward(ctx, *dout: Tensor) -> tuple[Tensor | None, ...]:
        import cudnn

        *tensors, index, counts = ctx.saved_tensors
        found = cudnn.BSA.block_sparse_attention_backward(
            dout[0].contiguous(), *tensors, index, q2k_block_nums=counts, sparse_block_size=64
        )
        return found["dq_tensor"], found["dk_tensor"], found["dv_tensor"], None, None


PEERS = (
    Peer(
        "cudnn-bsa",
        "sparse",
        needs("cudnn", "pip install nvidia-cudnn-frontend nvidia-cutlass-dsl"),
        attention,
        ("cuda",),
    ),
)
