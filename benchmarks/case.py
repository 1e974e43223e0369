"""What the stages hand to the suite: cases that are timed in turn, beside what they replace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.accuracy import Accuracy
from benchmarks.machine import name_of
from benchmarks.peers.peer import Peer
from benchmarks.results import OURS, Row
from benchmarks.workloads import Workload

ROUNDS_AT_LEAST = 4.5  # what a step takes at least, in rounds: the check, and three timed ones


@dataclass(frozen=True)
class Case:
    """One implementation on one input.

    Args:
        row: What it is; the suite adds what it measures.
        run: What is timed.
        check: Runs it and compares; raises WrongOutput. None where `run` is the yardstick itself.
        is_graph: Whether to time it, on a GPU, as a CUDA graph that is replayed back to back: its
            kernels without the launches, with a warm L2 cache. All others meet a cold one.
        is_fallback: Whether it is left out if a case before it is right.
    """

    row: Row
    run: Callable[[], object]
    check: Callable[[], Accuracy] | None = None
    is_graph: bool = False
    is_fallback: bool = False


@dataclass
class Contest:
    """Cases that are timed in turn.

    Args:
        cases: What may be the reference comes first: ratios are of the first case that is right.
        with_grad: Whether autograd records; the cases then run forward and backward.
    """

    cases: list[Case] = field(default_factory=list)
    with_grad: bool = False

    @property
    def references(self) -> list[Case]:
        """The cases that come before ours."""
        return list(takewhile(lambda case: case.row.implementation != OURS, self.cases))


class Pace(NamedTuple):
    """How fast a machine is now, and what it has measured before.

    Args:
        rates: FLOPs per second of dense attention by dtype, as measured.
        busy: How many times longer than alone all else takes.
        tokens: By workload and stage, those of a run to compare with.
        sparse: How many times longer FLOPs of kept blocks may take than those of `rates`.
    """

    rates: dict[torch.dtype, float]
    busy: float
    tokens: Mapping[tuple[str, str], int] = MappingProxyType({})
    sparse: float = 1.0

    def least_seconds(self, row: Row) -> float:
        """What a case takes at least, by its FLOPs: to be checked, and three rounds."""
        rates = {name_of(dtype): rate for dtype, rate in self.rates.items()}
        flops = row.flops + row.extra_flops
        if row.mask != "dense":
            flops *= self.sparse
        return ROUNDS_AT_LEAST * flops / rates[row.dtype] if row.dtype in rates else 0.0


@dataclass(frozen=True)
class Step:
    """A part of a preset.

    Args:
        stage: Whose cases it times.
        workload: The name of what it runs.
        dtype: Whose rate its operations take.
        flops: Of one round, about.
        seconds: That it takes beside that, whatever the machine's rate.
        measure: Adds rows to a suite, within so many seconds where it can.
    """

    stage: str
    workload: str
    dtype: torch.dtype
    flops: float
    measure: Callable[[Any, float], None]
    seconds: float = 0.0

    def least_seconds(self, pace: Pace) -> float:
        """What it takes with as few rounds as there have to be."""
        in_rounds = ROUNDS_AT_LEAST * self.flops / pace.rates[self.dtype]
        return pace.busy * self.seconds + in_rounds


@dataclass(frozen=True)
class Shape:
    """A workload as it is run.

    Args:
        workload: What is run, reduced or not.
        whole: The workload that it stands for.
        dtype: Of q, k and v.
        device: Where they are.
    """

    workload: Workload
    whole: Workload
    dtype: torch.dtype
    device: torch.device

    def row(self, stage: str, implementation: str, **values) -> Row:
        """A row of this shape."""
        used = self.workload
        return Row(
            stage,
            used.name,
            implementation,
            tokens=used.grid.num_tokens,
            heads=used.heads,
            head_dim=used.head_dim,
            dtype=name_of(self.dtype),
            reduced=self.whole.reduction(used),
            **values,
        )

    def inputs(self, *, distinct_blocks: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Fresh queries, keys and values [1, H, S, D] in block order.

        Args:
            distinct_blocks: Whether blocks differ in q and k, so that a mask of them is sparse.
        """
        used = self.workload
        grid = used.grid
        size = (1, used.heads, grid.num_tokens, used.head_dim)
        q, k, v = (torch.randn(size, device=self.device).to(self.dtype) for _ in range(3))
        if not distinct_blocks:
            return q, k, v
        content = torch.randn(used.heads, grid.num_blocks, used.head_dim, device=self.device)
        sizes = grid.starts(self.device).diff().long()
        content = content.to(self.dtype).repeat_interleave(sizes, 1)
        return q.add_(content), k.add_(content), v


@dataclass(frozen=True)
class MaskSpec:
    """Which mask to measure under: its kind, its density, and for nabla-like its correlation."""

    kind: str
    density: float
    correlation: float = 0.0

    def __str__(self) -> str:
        return f"nabla-like {self.correlation:g}" if self.kind == "nabla-like" else self.kind


def forward_bytes(shape: Shape) -> float:
    """q, k, v and out once, and the log-sum-exp."""
    used, size = shape.workload, torch.empty((), dtype=shape.dtype).element_size()
    return used.heads * used.grid.num_tokens * (4 * used.head_dim * size + 4)


def with_role(
    peers: list[Peer], role: str, device: torch.device, *, with_grad: bool = False
) -> list[Peer]:
    """The peers of a role that run on a device, with gradients if asked."""
    return [
        peer
        for peer in peers
        if peer.role == role
        and peer.absent(device) is None
        and (device.type in peer.differentiable or not with_grad)
    ]
