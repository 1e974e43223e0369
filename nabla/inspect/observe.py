"""Looking on while a model attends.

    forward of the model   a step, counted from 0
    attention within it    a layer, counted from 0 in each step

An observer sees what the operator sees, so a model may be compiled, and may reach nabla in any way.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from nabla import ops
from nabla.block_mask import BlockMask
from nabla.grid import TokenGrid


@dataclass(frozen=True)
class Call:
    """One attention call of a model: q, k, v in block order, its mask and its lse.

    Args:
        step: Forwards of the model before this one.
        layer: Attention calls before this one in the same forward.
        q: Queries [B, Hq, Sq, D].
        k: Keys [B, Hk, Sk, D].
        v: Values, as k.
        mask: The blocks attended to, [B, Hq, Nq, Nk].
        scale: Factor of the products.
        lse: The logsumexp of the kept scores, [B, Hq, Sq].
    """

    step: int
    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    mask: BlockMask
    scale: float
    lse: Tensor


class Observer(Protocol):
    """Whatever takes calls."""

    def __call__(self, call: Call) -> None:
        """Look at a call; what it attends to itself is not observed."""


@contextmanager
def observing(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Show the attention calls of a model to an observer, within a `with` statement.

    Calls count while a forward of `model` runs, in the thread that runs it. Forwards that a CUDA
    graph replays and attention that activation checkpointing repeats are not forwards of their own:
    the former show nothing, the latter counts as more layers.

    Args:
        model: The module whose forward is a step: of a compiled one, what torch.compile returned.
        observer: What to show them to.

    Raises:
        ValueError: If `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: give the torch.nn.Module that runs")
    at = threading.local()
    steps = -1

    def begin(*_) -> None:
        nonlocal steps
        steps += 1
        at.step, at.layer = steps, 0

    def end(*_) -> None:
        at.step = None

    def observe(q, k, v, bits, grid: TokenGrid, q_block_offset, scale, lse) -> None:
        if getattr(at, "step", None) is None:
            return
        mask = BlockMask(bits, grid, None, q_block_offset)
        call = Call(at.step, at.layer, q, k, v, mask, scale, lse)
        step, at.step = at.step, None  # what the observer itself attends to is no call
        try:
            observer(call)
        finally:
            at.step, at.layer = step, at.layer + 1

    handles = (
        model.register_forward_pre_hook(begin),
        model.register_forward_hook(end, always_call=True),
    )
    ops.observers.append(observe)
    try:
        yield
    finally:
        ops.observers.remove(observe)
        for handle in handles:
            handle.remove()
