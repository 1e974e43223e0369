"""What an adapter has to say about a peer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from nabla.dispatch import architecture

Absent = Callable[[torch.device], str | None]


@dataclass(frozen=True)
class Peer:
    """Another implementation.

    Args:
        name: How results call it.
        role: What it computes: "dense" attention, "sparse" attention under a mask of blocks,
            "window" attention under a window of tokens, or a "mask".
        absent: Says why it cannot run on a device, or None.
        prepare: Makes a run of it, what it does once for a mask included.
            dense   (q, k, v) -> run;  run() is out [1, H, S, D]
            sparse  (q, k, v, mask) -> run
            window  (q, k, v, grid, kernel) with q, k, v in raster order -> run
            mask    (q, k, grid, top_p, window) -> run;  run() is (counts, lists) or booleans
        differentiable: Types of devices on which its output has gradients.
        block: Tokens of its blocks; 128 is given the mask that covers the one of 64.
        slower_from: Compute capability from which on it is slower than dense peers before it: there
            it is measured only if none of them is right.
    """

    name: str
    role: Literal["dense", "sparse", "window", "mask"]
    absent: Absent
    prepare: Callable[..., Callable[[], object]]
    differentiable: tuple[str, ...] = ()
    block: int = 64
    slower_from: int | None = None

    def is_fallback(self, device: torch.device) -> bool:
        """Whether it is measured only if no dense peer before it is right."""
        return self.slower_from is not None and (architecture(device) or 0) >= self.slower_from


def needs(module: str, package: str, *, devices: tuple[str, ...] = ("cuda",)) -> Absent:
    """Say of a module that it is not installed, or of a device that it does not run there."""

    def absent(device: torch.device) -> str | None:
        reasons = []
        if device.type not in devices:
            reasons.append(f"runs on {' and '.join(devices)}, not on {device.type}")
        if not _is_installed(module):
            reasons.append(f"not installed: {package}")
        return "; ".join(reasons) or None

    return absent


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False
