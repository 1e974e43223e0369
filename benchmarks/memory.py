"""Peak memory above the inputs, over the tokens: attention forward and backward, and the mask.

On a CPU each implementation runs in a process of its own, whose peak the system knows (Linux); on a
GPU the allocator is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

import nabla
from benchmarks import block_mask, masks
from benchmarks.case import Shape
from benchmarks.results import OURS, Row
from benchmarks.timing import peak_memory

STAGE = "memory"
DENSITY = 0.1


def rows(shapes: Sequence[Shape], of_mask: Shape | None = None) -> list[Row]:
    """Attention of ours and of torch at every shape, and the mask of ours and by sorting at one."""
    found = []
    for name in (OURS, "sdpa"):
        density = DENSITY if name == OURS else 1.0
        peaks = _peaks(forward_and_backward, [(name, shape) for shape in shapes], shapes[0].device)
        for shape, peak in zip(shapes, peaks, strict=True):
            found.append(
                shape.row(
                    STAGE,
                    name,
                    part="forward + backward",
                    density=density,
                    values={"peak": peak, "per_token": peak / shape.workload.grid.num_tokens},
                )
            )
    if of_mask is not None:
        used = of_mask.workload
        size = torch.empty((), dtype=of_mask.dtype).element_size()
        qkv = 3 * used.heads * used.grid.num_tokens * used.head_dim * size
        for name in (OURS, "sorting"):
            (peak,) = _peaks(block_mask.prepare, [(name, of_mask)], of_mask.device)
            values = {"peak": peak, "share_of_qkv": peak / qkv}
            found.append(of_mask.row(STAGE, name, part="mask", values=values))
    return found


def forward_and_backward(name: str, shape: Shape) -> Callable[[], object]:
    """Inputs, and the run: ours under a random mask, or dense attention of torch."""
    q, k, v = shape.inputs()
    used, dout = shape.workload, torch.randn_like(q)
    mask = masks.random_mask(used.grid, used.heads, DENSITY, shape.device)
    qkv = [x.requires_grad_() for x in (q, k, v)]

    def run() -> None:
        if name == OURS:
            out = nabla.block_sparse_attention(*qkv, mask)
        else:
            out = F.scaled_dot_product_attention(*qkv)
        torch.autograd.grad(out, qkv, dout)

    return run


def _peaks(
    function: Callable[..., Callable[[], object]], calls: Sequence[tuple], device: torch.device
) -> list[int]:
    if device.type != "cuda":
        return peak_memory(function, calls)
    peaks = []
    for arguments in calls:
        run = function(*arguments)
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del run
        torch.cuda.empty_cache()
    return peaks
