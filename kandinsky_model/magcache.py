"""MagCache: leaves out the visual blocks of a model call where their residual hardly changes.

residual  r_i = blocks(x_i) - x_i of call i;   its ratio = mean over tokens of |r_i| / |r_(i-1)|
left out  while the sum of |1 - product of ratios| over the calls left out stays under THRESHOLD,
          at most MAX_SKIPS in a row, and never in the first RETENTION of the calls
there     blocks(x_i) is taken as x_i + the residual of the last call that was computed
The ratios are measured in a run that computes every call (`RatioMeter`), one list for a checkpoint.
So what is left out is known before the first call.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kandinsky_model.files import replacing
from kandinsky_model.number import is_number
from kandinsky_model.pretrained import require

THRESHOLD = 0.12
MAX_SKIPS = 2
RETENTION = 0.2

Schedule = tuple[tuple[bool, ...], ...]
Blocks = Callable[[Tensor], Tensor]


class Cache(Protocol):
    """What stands between a model and its visual blocks, one model call after the other."""

    def __call__(self, blocks: Blocks, visual: Tensor) -> Tensor:
        """Tokens [B, S, C] behind the visual blocks."""

    @property
    def kept(self) -> dict[str, Tensor]:
        """What the calls of the next steps need of those before."""


def skip_schedule(ratios: Sequence[float], num_steps: int, *, branches: int = 2) -> Schedule:
    """Which model calls are left out.

    Args:
        ratios: From the second step on, with and without text in turn; those without text are 0
            where there was no guidance.
        num_steps: Euler steps; ratios measured over another number are taken at the nearest step.
        branches: Model calls per step: 2 with guidance, 1 (with the text) without it.

    Returns:
        [num_steps][branches], true where the visual blocks are left out.
    """
    if not isinstance(ratios, Sequence) or not all(is_number(x) and x >= 0 for x in ratios):
        raise ValueError(f"magcache ratios {_some(ratios)} must be finite numbers from 0")
    if not ratios or len(ratios) % 2:
        raise ValueError(
            f"magcache ratios {_some(ratios)} are {len(ratios)}: there must be two for every step "
            "but the first, as --measure-magcache writes them"
        )
    for branch, name in enumerate(("with", "without")[:branches]):
        if not all(ratios[branch::2]):
            raise ValueError(
                f"magcache ratios {_some(ratios)} of the calls {name} text are 0: they were "
                "measured without guidance; measure them with it, or set the guidance to 1"
            )
    schedule = [[False] * branches for _ in range(num_steps)]
    first = int(2 * num_steps * RETENTION)
    for branch in range(branches):
        of_step = _nearest([1.0, *ratios[branch::2]], num_steps)
        error, ratio, skips = 0.0, 1.0, 0
        for step in range(num_steps):
            if 2 * step + branch < first or step == 0:  # there is no residual before the first
                continue
            ratio *= of_step[step]
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


def _some(ratios: Any) -> str:
    if not isinstance(ratios, list | tuple):
        return repr(ratios)
    return f"[{', '.join(map(str, ratios[:4]))}{', ...' if len(ratios) > 4 else ''}]"


class MagCache:
    """Runs or leaves out the visual blocks.

    Args:
        schedule: See `skip_schedule`.
        start: Steps that were done before.
        kept: What `kept` was behind them.
    """

    def __init__(
        self, schedule: Schedule, *, start: int = 0, kept: Mapping[str, Tensor] | None = None
    ) -> None:
        self._schedule = schedule
        self._branches = len(schedule[0])
        self._call = start * self._branches
        self._residuals = dict(kept or {})

    def __call__(self, blocks: Blocks, visual: Tensor) -> Tensor:
        """See `Cache`."""
        step, branch = divmod(self._call, self._branches)
        self._call += 1
        name = f"residual_{branch}"
        if self._schedule[step][branch]:
            return visual + self._residuals[name].to(visual)
        out = blocks(visual)
        self._residuals[name] = out - visual
        return out

    @property
    def kept(self) -> dict[str, Tensor]:
        """The residuals that the next step adds."""
        step = self._call // self._branches
        skips = self._schedule[step] if step < len(self._schedule) else ()
        names = [f"residual_{branch}" for branch, skip in enumerate(skips) if skip]
        return {name: self._residuals[name] for name in names}


class RatioMeter:
    """Computes every call, and measures the ratios of a run."""

    def __init__(self) -> None:
        self.resume({}, branches=2)

    def resume(self, kept: Mapping[str, Tensor], *, branches: int) -> None:
        """Begin, or go on where another meter was.

        Args:
            kept: What `kept` was behind the steps that were done before; empty if there are none.
            branches: Model calls per step.
        """
        self._branches = branches
        self._norms = list(kept.get("norms", ()))
        self._measured = list(kept.get("ratios", ()))

    def __call__(self, blocks: Blocks, visual: Tensor) -> Tensor:
        """See `Cache`."""
        out = blocks(visual)
        norms = (out - visual).float().norm(dim=-1)
        if len(self._norms) == self._branches:  # those of the last step, this branch first
            self._measured.append((norms / self._norms.pop(0).to(norms)).mean())
        self._norms.append(norms)
        return out

    @property
    def kept(self) -> dict[str, Tensor]:
        """The last norm of every token [branches, B, S], and what was measured so far."""
        if not self._norms:
            return {}
        return {"norms": torch.stack(self._norms), "ratios": torch.tensor(self._measured)}

    @property
    def ratios(self) -> list[float]:
        """What `skip_schedule` takes."""
        values = [value.item() for value in self._measured]
        return values if self._branches == 2 else [x for value in values for x in (value, 0.0)]


def read_ratios(path: str | Path) -> list[float]:
    """Read ratios: a list, or under magcache.mag_ratios as in upstream's configurations.

    Args:
        path: A JSON or YAML file.
    """
    path = Path(path)
    yaml = require("yaml")  # JSON is YAML
    try:
        values: Any = yaml.safe_load(path.read_text())
        if isinstance(values, dict):
            values = values["magcache"]["mag_ratios"]
        if not isinstance(values, list) or not values:
            raise TypeError(f"found {values!r}")
        return [float(value) for value in values]  # YAML takes 1e-05 for text
    except FileNotFoundError:
        raise ValueError(
            f"magcache {path} does not exist: give upstream's configuration of the checkpoint "
            "(.yaml), or measure ratios in a run with --measure-magcache"
        ) from None
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"magcache {path} holds no ratios, neither a list of numbers nor "
            f"magcache.mag_ratios: {error!r}"
        ) from error


def write_ratios(ratios: Sequence[float], path: str | Path) -> None:
    """Write ratios as JSON, for `read_ratios` and for upstream."""
    values = [float(f"{ratio:.6g}") for ratio in ratios]
    with replacing(path) as draft:
        draft.write_text(json.dumps({"magcache": {"mag_ratios": values}}) + "\n")
