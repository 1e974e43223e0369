"""Triton kernels: NVIDIA GPUs from sm_80 on, and, in Triton's interpreter, any machine."""

from __future__ import annotations

import torch


def launch(kernel, num_programs: int, *args, num_warps: int, num_stages: int = 1, **constants):
    """Run a kernel on a grid of one dimension, on the device of its first tensor.

    The first dimension takes 2^31 - 1 programs where the others take 65,535.
    """
    with torch.cuda.device_of(args[0]):
        kernel[(num_programs,)](
            *args,
            **constants,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=True,
        )


def strides(x: torch.Tensor) -> tuple[int, ...]:
    """Return the strides of all dimensions but the last, which is contiguous."""
    return x.stride()[:-1]
