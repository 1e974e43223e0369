"""MagCache: leaves out the visual blocks of a model call where their residual hardly changes.

residual  r_i = blocks(x_i) - x_i of call i;   its ratio ~ |r_i| / |r_(i-1)|, measured beforehand
left out  while the sum of |1 - product of ratios| over the calls left out stays under THRESHOLD,
          at most MAX_SKIPS in a row, and never in the first RETENTION of the calls
there     blocks(x_i) is taken as x_i + the residual of the last call that was computed
The ratios come with the preset, so what is left out is known before the first call.
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

THRESHOLD = 0.12
MAX_SKIPS = 2
RETENTION = 0.2

Schedule = tuple[tuple[bool, ...], ...]


def skip_schedule(magnitudes: Sequence[float], num_steps: int, *, branches: int = 2) -> Schedule:
    """Which model calls are left out.

    Args:
        magnitudes: The ratios from the second step on, with and without text in turn.
        num_steps: Euler steps; ratios measured over another number are taken at the nearest step.
        branches: Model calls per step: 2 with guidance, 1 (with the text) without it.

    Returns:
        [num_steps][branches], true where the visual blocks are left out.
    """
    if len(magnitudes) % 2 or not all(map(math.isfinite, magnitudes)):
        raise ValueError(f"magnitudes {list(magnitudes)} must be two finite numbers a step")
    schedule = [[False] * branches for _ in range(num_steps)]
    first = int(2 * num_steps * RETENTION)
    for branch in range(branches):
        ratios = _nearest([1.0, *magnitudes[branch::2]], num_steps)
        error, ratio, skips = 0.0, 1.0, 0
        for step in range(num_steps):
            if 2 * step + branch < first or step == 0:  # there is no residual before the first
                continue
            ratio *= ratios[step]
            error += abs(1.0 - ratio)
            skips += 1
            if error < THRESHOLD and skips <= MAX_SKIPS:
                schedule[step][branch] = True
            else:
                error, ratio, skips = 0.0, 1.0, 0
    return tuple(map(tuple, schedule))


def _nearest(values: list[float], length: int) -> list[float]:
    if length == 1:
        return values[-1:]
    scale = (len(values) - 1) / (length - 1)
    return [values[round(index * scale)] for index in range(length)]


class MagCache:
    """Runs or leaves out the visual blocks of one model call after the other.

    Args:
        schedule: See `skip_schedule`.
        start: Steps that were done before; the first call must not be one that is left out.
    """

    def __init__(self, schedule: Schedule, *, start: int = 0) -> None:
        self._calls = iter([
            (branch, skip) for step in schedule[start:] for branch, skip in enumerate(step)
        ])  # fmt: skip
        self._residuals: dict[int, Tensor] = {}

    def __call__(self, blocks: Callable[[Tensor], Tensor], visual: Tensor) -> Tensor:
        """Tokens [B, S, C] behind the visual blocks."""
        branch, skip = next(self._calls)
        if not skip:
            out = blocks(visual)
            self._residuals[branch] = out - visual
            return out
        return visual + self._residuals[branch]
