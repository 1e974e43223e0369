"""scaled_dot_product_attention of torch: on a CPU its own choice, on a GPU cuDNN's and flash."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers.peer import Peer, needs


def attention(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Dense attention by the kernel that torch chooses."""
    return lambda: F.scaled_dot_product_attention(q, k, v)


def by_kernel(kernel: SDPBackend) -> Callable[..., Callable[[], Tensor]]:
    """Dense attention by one kernel."""

    def prepare(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    return prepare


def _only_on(device_type: str):
    def absent(device: torch.device) -> str | None:
        return None if device.type == device_type else f"for {device_type}; sdpa has other names"

    return absent


PEERS = (
    Peer("sdpa", "dense", _only_on("cpu"), attention, differentiable=("cpu",)),
    Peer(
        "sdpa-cudnn",
        "dense",
        needs("torch", "torch"),
        by_kernel(SDPBackend.CUDNN_ATTENTION),
        differentiable=("cuda",),
    ),
    Peer(
        "sdpa-flash",
        "dense",
        needs("torch", "torch"),
        by_kernel(SDPBackend.FLASH_ATTENTION),
        differentiable=("cuda",),
        slower_from=90,
    ),
)
