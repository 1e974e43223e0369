"""Neighborhood attention (package natten): a window of tokens around each token, moved inwards at
the borders. Its mask is its own, so it is measured beside the masks of blocks, not under them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.peers.peer import Peer, needs
from nabla import TokenGrid


def attention(
    q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, kernel: tuple[int, int, int]
) -> Callable[[], Tensor]:
    """Attention within a window; its layout is [B, T, H, W, heads, D] in raster order."""
    from natten.functional import na3d

    extents = (grid.frames, grid.height, grid.width)
    q, k, v = (x.transpose(1, 2).unflatten(1, extents).contiguous() for x in (q, k, v))
    return lambda: na3d(q, k, v, kernel_size=kernel).flatten(1, 3).transpose(1, 2)


PEERS = (Peer("natten", "window", needs("natten", "pip install natten"), attention),)
