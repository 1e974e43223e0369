"""The sort-based mask builder of public NABLA: pool, softmax, sort, cumulative sum, unsort, lists.

Compiled on a GPU, as it is used; on a CPU eager, where compiling the sorts gains nothing. Softmax
and sum are in float32, as they are under autocast; means are in the dtype of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import nabla
from benchmarks.peers.peer import Peer, needs
from nabla import TokenGrid


def build(q: Tensor, k: Tensor, near: Tensor, top_p: float, block: int) -> tuple[Tensor, ...]:
    """Booleans [B, H, N, N], counts and lists of the kept blocks."""
    q_mean, k_mean = (x.unflatten(2, (-1, block)).mean(3) for x in (q, k))
    scores = (q_mean @ k_mean.transpose(-2, -1) * q.shape[-1] ** -0.5).float().softmax(-1)
    values, order = scores.sort(-1)
    kept = (values.cumsum(-1) >= 1 - top_p).int().gather(-1, order.argsort(-1)).bool() | near
    return kept, kept.sum(-1), kept.int().argsort(-1, descending=True)


@functools.cache
def compiled() -> Callable[..., tuple[Tensor, ...]]:
    """The builder, compiled once for all shapes of a run."""
    return torch.compile(build, dynamic=True)


def builder(
    q: Tensor, k: Tensor, grid: TokenGrid, top_p: float, window: tuple[int, int, int] | None
) -> Callable[[], tuple[Tensor, ...]]:
    """Build lists for one window, which is computed once."""
    mask = nabla.sliding_tile_mask(grid, window or (1, 1, 1), device=q.device)
    near = mask.to_dense().contiguous()  # strides, too, are compiled for
    function = compiled() if q.device.type == "cuda" else build
    return lambda: function(q, k, near, top_p, grid.block_size)


PEERS = (Peer("sorting", "mask", needs("torch", "torch", devices=("cuda", "cpu")), builder),)
