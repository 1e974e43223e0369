"""Booleans as bits: bit j % 32 of int32 word j // 32 is boolean j of a row."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(keep: Tensor) -> Tensor:
    """Return int32 [..., ceil(N / 32)] of booleans [..., N]; the bits past N are zero."""
    padded = torch.nn.functional.pad(keep, (0, -keep.shape[-1] % 32))
    words = padded.to(torch.int32).unflatten(-1, (-1, 32))
    return (words << _shifts(keep.device)).sum(-1, dtype=torch.int32)


def unpack_bits(bits: Tensor, num: int) -> Tensor:
    """Return booleans [..., num] of int32 [..., ceil(num / 32)]; the bits past num are ignored."""
    return (bits[..., None] >> _shifts(bits.device) & 1).bool().flatten(-2)[..., :num]


def count_bits(bits: Tensor, num: int) -> Tensor:
    """Return how many of the first `num` bits of each row are set: int32 [...]."""
    used = (num - 1) % 32 + 1  # bits of the last word
    last = bits[..., -1:] << (32 - used)  # the others leave at the top
    words = torch.cat([bits[..., :-1], last], -1)
    words = words - (words >> 1 & 0x55555555)  # sums of 2 bits, then of 4, 8 and 32
    words = (words & 0x33333333) + (words >> 2 & 0x33333333)
    words = words + (words >> 4) & 0x0F0F0F0F
    return (words * 0x01010101 >> 24).sum(-1, dtype=torch.int32)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(32, dtype=torch.int32, device=device)
