"""How much of the attention mass each head of each layer has to keep.

    out_p        attention of a layer under the mask of top_p = p,   out  under all blocks
    error²       |out_p - out|² / |out|² of a layer, over its heads; the mean of the layers
    calibrated   p per layer and head with the least density whose error is the one asked for

Every call of the model is measured as it runs, with its own q, k and v: the error is that which a
layer adds, not what earlier layers hand on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nabla.bits import count_bits
from nabla.block_attention import block_sparse_attention
from nabla.block_mask import BlockMask, create_block_mask
from nabla.checks import check_window
from nabla.grid import Window
from nabla.inspect.density import as_lists, as_tensor
from nabla.inspect.observe import Call, observing

TOP_P = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
MEASURED = ("density", "retained", "error")
CALIBRATION, CURVES = "nabla calibration 1", "nabla calibration curves 1"  # formats of files


@dataclass(frozen=True)
class Calibration(Sequence):
    """The top_p of each layer and head: `calibration[layer]` is the top_p of `nabla.attention`.

    Args:
        top_p: One tuple a layer, in the order in which layers attend; in it one value a head.
        window: The sliding tile window that it was calibrated with, in blocks, or None.
        error: The relative error that it has on the inputs it was calibrated with.
        density: The density that it has there.
    """

    top_p: tuple[tuple[float, ...], ...]
    window: Window | None
    error: float
    density: float

    def __getitem__(self, layer):
        return self.top_p[layer]

    def __len__(self) -> int:
        return len(self.top_p)

    def save(self, path: str | Path) -> Path:
        """Write it as JSON; the folder is made if it is not there."""
        fields = {
            "format": CALIBRATION,
            "error": self.error,
            "density": self.density,
            "window": self.window,
            "top_p": self.top_p,
        }
        return _write(path, json.dumps(fields, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` has written.

        Raises:
            ValueError: If the file is no calibration.
        """
        with _reading(path, CALIBRATION) as fields:
            top_p = tuple(tuple(float(value) for value in layer) for layer in fields["top_p"])
            if not top_p or any(not 0 < value <= 1 for layer in top_p for value in layer):
                raise ValueError("a top_p is not in (0, 1]")
            window = check_window(fields["window"])
            return cls(top_p, window, float(fields["error"]), float(fields["density"]))


@dataclass(frozen=True)
class Curves:
    """What each head computes and how wrong it is, for each top_p; the last one keeps everything.

    Args:
        top_p: The values [P], ascending, the last 1.
        window: The sliding tile window in blocks, or None.
        density: Kept blocks / all blocks, [L, H, P]; NaN where a layer has fewer heads.
        retained: Mass of the exact attention on the kept blocks, as density.
        error: Squared error of the output of a head / squared norm of the output of its layer, as
            density: over the heads of a layer it sums to the square of the layer's relative error.
    """

    top_p: Tensor
    window: Window | None
    density: Tensor
    retained: Tensor
    error: Tensor

    def uniform(self) -> list[Calibration]:
        """One calibration for each top_p, the same for all layers and heads: what to compare to."""
        return [self._calibration(torch.full(self.shape, p)) for p in range(len(self.top_p))]

    def choose(self, error: float) -> Calibration:
        """Return the top_p per layer and head of least density that keeps an error.

        Args:
            error: The relative error to keep: root of the mean, over the layers, of the squared
                relative errors of their outputs.

        Raises:
            ValueError: If the error is not a positive number.
        """
        check_error(error)
        density = self.density.nan_to_num(0).flatten(0, 1)  # [L H, P]
        cost = self.error.nan_to_num(0).flatten(0, 1).double() / self.shape[0]
        at = _at_price(density, cost, error**2)
        left = error**2 - float(cost.gather(1, at).sum())
        while True:  # spend what is left: the step of any head that spares most for its error
            spared = density.gather(1, at) - density
            added = cost - cost.gather(1, at)
            rate = (spared / added.clamp(min=1e-12)).where((spared > 0) & (added <= left), -1)
            best = int(rate.argmax())
            if rate.view(-1)[best] <= 0:
                break
            head, p = divmod(best, len(self.top_p))
            left -= float(added[head, p])
            at[head] = p
        chosen = self._calibration(at.view(self.shape))
        uniform = [one for one in self.uniform() if one.error <= error]
        return min([chosen, *uniform], key=lambda one: one.density)

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, and heads of the widest."""
        return self.density.shape[0], self.density.shape[1]

    def _calibration(self, at: Tensor) -> Calibration:
        """The calibration with the top_p of index at [L, H]."""
        density, error = (x.gather(-1, at[..., None])[..., 0] for x in (self.density, self.error))
        rows = zip(self.top_p[at].tolist(), density.isfinite().tolist(), strict=True)
        return Calibration(
            tuple(
                tuple(round(p, 6) for p, is_head in zip(*row, strict=True) if is_head)
                for row in rows
            ),
            self.window,
            math.sqrt(float(error.nansum(-1).mean())),
            float(density.nanmean(-1).mean()),
        )

    def at(self, calibration: Calibration) -> dict[str, Tensor]:
        """Density, retained mass and squared error of each head under a calibration, each [L, H].

        Args:
            calibration: One that `choose` or `uniform` has made of these curves.
        """
        index = torch.zeros(*self.shape, 1, dtype=torch.long)
        for layer, values in enumerate(calibration):
            nearest = (torch.tensor(values)[:, None] - self.top_p).abs().argmin(1)
            index[layer, : len(values), 0] = nearest
        return {name: getattr(self, name).gather(-1, index)[..., 0] for name in MEASURED}

    def save(self, path: str | Path) -> Path:
        """Write them as JSON, lists [layers][heads][top_p]; its folder is made if need be."""
        fields = {"format": CURVES, "window": self.window, "top_p": as_lists(self.top_p)}
        fields |= {name: as_lists(getattr(self, name)) for name in MEASURED}
        return _write(path, json.dumps(fields))

    @classmethod
    def load(cls, path: str | Path) -> Curves:
        """Read what `save` has written.

        Raises:
            ValueError: If the file holds no curves.
        """
        with _reading(path, CURVES) as fields:
            top_p, *tables = (as_tensor(fields[name]) for name in ("top_p", *MEASURED))
            if any(x.ndim != 3 or x.shape != (*tables[0].shape[:2], len(top_p)) for x in tables):
                raise ValueError("its tables are not [layers][heads][top_p]")
            return cls(top_p, check_window(fields["window"]), *tables)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    top_p: Sequence[float] = TOP_P,
    window: Sequence[int] | None = None,
    progress: Callable[[Call], None] | None = None,
) -> Curves:
    """Measure, while a model runs, what every head would compute and lose with each top_p.

    The model runs as it is, and every one of its attention calls is computed once more densely and
    once with each top_p: run it densely (with top_p=1.0) to measure along the path of the dense
    model. Inputs of different lengths may follow each other; layers must not change.

    Args:
        model: Any module whose self-attention goes through nabla: attention(), CrossDiT,
            nabla.integrations. Of a compiled one, what torch.compile returned.
        run: Runs the model on a few inputs; what it returns is not read.
        top_p: The values to measure, each in (0, 1].
        window: Odd extents (frames, height, width), in blocks, of the window that is to be used
            with the calibration; or None.
        progress: Called after each attention call.

    Returns:
        The curves, from which `choose` takes a calibration.

    Raises:
        ValueError: If nothing went through nabla, or an argument is out of its range.
    """
    if not top_p or any(not 0 < value <= 1 for value in top_p):
        raise ValueError(f"top_p={top_p!r} must be values in (0, 1]")
    values = sorted({*map(float, top_p), 1.0})
    sums = _Sums(values, check_window(window), progress)
    with observing(model, sums):
        run()
    return sums.curves()


def check_error(error: float) -> None:
    """Raise an error if this is none that `choose` can keep."""
    if not (isinstance(error, int | float) and 0 < error < math.inf):
        raise ValueError(f"error={error!r} is not a positive number: 0.05 is 5 % of the output")


def _at_price(density: Tensor, cost: Tensor, budget: float) -> Tensor:
    """Indices [N, 1] of least density + price * cost, at the lowest price that keeps the budget.

    No other choice that costs as little has less density.
    """
    low, high = -30.0, 60.0  # powers of 2; at the highest only what costs nothing is taken
    for _ in range(60):
        middle = (low + high) / 2
        at = (density + 2.0**middle * cost).argmin(1, keepdim=True)
        if float(cost.gather(1, at).sum()) <= budget:
            high = middle
        else:
            low = middle
    return (density + 2.0**high * cost).argmin(1, keepdim=True)


class _Sums:
    """Sums over the calls of each layer: [H, P] by name."""

    def __init__(
        self, top_p: list[float], window: Window | None, progress: Callable[[Call], None] | None
    ) -> None:
        self.top_p, self.window, self.progress = top_p, window, progress
        self.layers: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def __call__(self, call: Call) -> None:
        """Measure one call with every top_p."""
        mask = call.mask
        every_block = BlockMask(
            torch.full_like(mask.bits, -1), mask.grid, None, mask.q_block_offset
        )
        exact = _attend(call, every_block)
        measured = [self._measure(call, value, exact) for value in self.top_p]
        layer = {name: torch.stack([m[name] for m in measured], -1) for name in measured[0]}
        layer["calls"] = torch.ones(1, 1)
        layer["energy"] = _energy(x.double() for x in exact.out.unbind(1))[:, None]
        if call.layer == len(self.layers):
            self.layers.append(layer)
        else:
            before = self.layers[call.layer]
            if before["energy"].shape != layer["energy"].shape:
                raise ValueError(
                    f"layer {call.layer} had {len(before['energy'])} heads in an earlier forward "
                    f"and has {len(layer['energy'])} now: calibrate one model at a time"
                )
            self.layers[call.layer] = {name: before[name] + layer[name] for name in layer}
        if self.progress is not None:
            self.progress(call)

    def _measure(self, call: Call, top_p: float, exact: Any) -> dict[str, Tensor]:
        """Sums over the queries of a call: density, retained mass, squared error, each [H]."""
        grid = call.mask.grid
        mask = create_block_mask(
            call.q,
            call.k,
            grid=grid,
            top_p=top_p,
            window=self.window,
            scale=call.scale,
            q_block_offset=call.mask.q_block_offset,
        )
        out, lse = _attend(call, mask)
        kept = count_bits(mask.bits, grid.num_blocks).double() / grid.num_blocks
        return {
            "density": kept.mean((0, 2)).cpu(),
            "retained": (lse.double() - exact.lse.double()).exp().mean((0, 2)).cpu(),
            "error": _energy(
                ours.double() - theirs.double()  # head by head: all of them would take much memory
                for ours, theirs in zip(out.unbind(1), exact.out.unbind(1), strict=True)
            ),
        }

    def curves(self) -> Curves:
        """The means over the calls."""
        if not self.layers:
            raise ValueError(
                "no attention call was seen: run() has to run the model, and the model's "
                "self-attention has to go through nabla (a CrossDiT with NablaAttention(1.0), a "
                "pipeline with nabla.integrations.diffusers.enable(pipe, top_p=1.0))"
            )
        heads = max(len(layer["energy"]) for layer in self.layers)

        def table(name: str, divisor: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
            full = torch.full((len(self.layers), heads, len(self.top_p)), math.nan)
            for row, layer in zip(full, self.layers, strict=True):
                row[: len(layer["energy"])] = (layer[name] / divisor(layer)).float()
            return full

        return Curves(
            torch.tensor(self.top_p),
            self.window,
            table("density", lambda layer: layer["calls"]),
            table("retained", lambda layer: layer["calls"]),
            table("error", lambda layer: layer["energy"].sum().clamp(min=1e-300)),
        )


def _energy(heads: Iterable[Tensor]) -> Tensor:
    """The sum of squares of each head, [H] float64."""
    return torch.stack([head.square().sum() for head in heads]).cpu()


def _write(path: str | Path, text: str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    return path


@contextmanager
def _reading(path: str | Path, form: str) -> Iterator[dict[str, Any]]:
    """The fields of a JSON file of a format; what is wrong with them becomes one error."""
    try:
        fields = json.loads(Path(path).read_text())
        if fields["format"] != form:
            raise ValueError(f"its format is {fields['format']!r}")
        yield fields
    except (ValueError, KeyError, TypeError) as error:
        what = form.removeprefix("nabla ").removesuffix(" 1")
        raise ValueError(
            f"{path} holds no {what} ({error!r}): write one with `nabla calibrate`"
        ) from None


def _attend(call: Call, mask: BlockMask):
    return block_sparse_attention(call.q, call.k, call.v, mask, scale=call.scale, return_lse=True)
