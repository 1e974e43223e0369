"""Block selection by a full sort: the fewest blocks whose scores sum to top_p of the row."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla.bits import pack_bits
from nabla.grid import TokenGrid, Window
from nabla.reference.scores import pooled_scores


def select_blocks(
    scores: Tensor, top_p: Tensor, grid: TokenGrid, window: Window | None, q_block_offset: int
) -> Tensor:
    """Bits [B, H, Nq, ceil(Nk / 32)]: fewest blocks of a row that hold top_p of its scores."""
    always_kept = ~scores.isfinite()
    mass = scores.double().clamp(min=0).masked_fill(always_kept, 0)
    ranked, order = mass.sort(
        dim=-1, descending=True, stable=True
    )  # equal scores: lowest index first
    mass_before = ranked.cumsum(-1) - ranked
    wanted = top_p.double()[:, None, None]
    keep = (mass_before < wanted * mass.sum(-1, keepdim=True)) | (wanted >= 1)
    keep[..., 0] = True
    keep = torch.zeros_like(keep).scatter(-1, order, keep) | always_kept
    rows = slice(q_block_offset, q_block_offset + scores.shape[2])
    keep |= grid.kept_by_position(window, scores.device)[rows]
    return pack_bits(keep)


def create_block_mask(
    q: Tensor,
    k: Tensor,
    top_p: Tensor,
    grid: TokenGrid,
    window: Window | None,
    q_block_offset: int,
    scale: float,
) -> Tensor:
    """Bits [B, H, Nq, ceil(Nk / 32)] of the NABLA mask of q and k."""
    scores = pooled_scores(q, k, grid, q_block_offset, scale)
    return select_blocks(scores, top_p, grid, window, q_block_offset)
