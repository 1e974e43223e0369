"""End to end: a clip from noise.

tiny            the trained tiny model, all steps of it, dense against NABLA: measured
real models     calls * (step + (layers - layers of that step) * block), from the measured rows of
                block.py: extrapolated, and called so
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.accuracy import Accuracy, check_attention, sampled
from benchmarks.block import weight_bytes
from benchmarks.block_attention import full_mask
from benchmarks.case import Case, Contest, Shape
from benchmarks.results import OURS, Row
from benchmarks.timing import Seconds
from benchmarks.workloads import BY_NAME, Model, Workload
from nabla import TokenGrid

if TYPE_CHECKING:  # the other stages run without what the model needs
    from kandinsky_model.attention import VisualAttention
    from kandinsky_model.model import CrossDiT

STAGE = "generate"
PATCH = 2  # latent rows and columns of a token


def tiny(frames: int, calls: int) -> Workload:
    """The trained tiny model at a length of so many frames of 16 x 16 tokens."""
    model = Model(layers=5, model_dim=128, ff_dim=512, text_tokens=1, calls=calls)
    return Workload("tiny", (frames, 16, 16), 4, 32, 0.5, (3, 1, 1), (0.3,), model)


def cost(shape: Shape) -> float:
    """FLOPs of one round: two clips."""
    used = shape.workload
    assert used.model is not None
    return 2.0 * used.model.calls * used.model.layers * (used.linear_flops + used.flops)


def contest(shape: Shape) -> Contest:
    """All steps of the tiny model, dense and with the attention that it was trained with."""
    from kandinsky_model.attention import DenseAttention, NablaAttention
    from kandinsky_model.checkpoint import load_checkpoint
    from kandinsky_model.demo import WEIGHTS
    from kandinsky_model.sampler import empty_text, sample

    used = shape.workload
    assert used.model is not None
    model = load_checkpoint(WEIGHTS, dtype=shape.dtype).to(shape.device)
    channels = model.config.out_visual_dim
    noise = torch.randn(
        1, used.extents[0], PATCH * used.extents[1], PATCH * used.extents[2], channels
    ).to(shape.device, shape.dtype)
    text = tuple(x.to(shape.device, shape.dtype) for x in empty_text(model.config, 1))
    sparse = model.default_attention()
    assert isinstance(sparse, NablaAttention)
    watched = _Watched(sparse)
    _call(model, noise, text, watched)
    density = sum(watched.densities) / len(watched.densities)
    cases = []
    for name, attention, kept in (("dense", DenseAttention(), 1.0), (OURS, sparse, density)):
        per_layer = used.linear_flops + kept * used.flops
        row = shape.row(
            STAGE,
            name,
            mask="dense" if kept == 1 else "built",
            density=kept,
            flops=used.model.calls * used.model.layers * per_layer,
            bytes=used.model.calls * (weight_bytes(model) + 2 * noise.nbytes),
            values={"calls": used.model.calls, "bound": used.bound(density)},
        )

        def run(attention: VisualAttention = attention) -> Tensor:
            calls = used.model.calls
            return sample(model, noise, text, num_steps=calls, attention=attention)

        def check(attention: VisualAttention = attention) -> Accuracy:
            watched = _Watched(attention, check=True)
            _call(model, noise, text, watched)
            return max(watched.found, key=lambda accuracy: accuracy.error / accuracy.allowed)

        cases.append(Case(row, run, check))
    return Contest(cases)


def extrapolate(rows: Sequence[Row]) -> list[Row]:
    """Clips of the real models from measured blocks and steps of them, at the shape of those."""
    found = []
    blocks = {_what(row): row for row in rows if row.part == "block" and row.seconds}
    for step in rows:
        block, workload = blocks.get(_what(step)), BY_NAME.get(step.workload)
        if step.stage != "block" or step.part != "step" or block is None or not step.seconds:
            continue
        assert workload is not None and workload.model is not None and block.seconds
        model, layers = workload.model, step.values["layers"]
        more = model.layers - layers
        of_step, of_block = step.seconds, block.seconds
        times = (model.calls * (a + more * b) for a, b in zip(of_step, of_block, strict=True))
        reason = (
            f"extrapolated to {model.calls} calls of {model.layers} layers from measured calls of "
            f"{layers}"
        )
        if step.reduced:
            reason += f", for a clip of {step.reduced}"
        found.append(
            replace(
                step,
                stage=STAGE,
                part="",
                status="extrapolated",
                reason=reason,
                seconds=Seconds(*times),
                flops=0.0,
                bytes=0.0,
                rounds=0,
                error=None,
                allowed=None,
                relative=block.relative,
                values=step.values | {"calls": model.calls, "layers": model.layers},
            )
        )
    dense = {row.workload: row for row in found if row.implementation != OURS}
    return [_relative_to(row, dense.get(row.workload)) for row in found]


def _relative_to(row: Row, dense: Row | None) -> Row:
    if dense is None or dense.seconds is None or row.seconds is None or row.relative is None:
        return row
    median = row.seconds.median / dense.seconds.median
    spread = median / row.relative.median
    low, high = row.relative.low * spread, row.relative.high * spread
    return replace(row, relative=row.relative._replace(median=median, low=low, high=high))


def _what(row: Row) -> tuple:
    return row.workload, row.implementation, row.mask, row.asked, row.tokens, row.dtype


@dataclass
class _Watched:
    """An attention of which the densities, and if asked the errors, are noted."""

    attention: VisualAttention
    check: bool = False
    densities: list[float] = field(default_factory=list)
    found: list[Accuracy] = field(default_factory=list)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        """Attend as `attention` does."""
        from kandinsky_model.attention import NablaAttention

        out = self.attention(q, k, v, grid)
        mask = full_mask(grid, q.device)
        if isinstance(self.attention, NablaAttention):
            mask = self.attention.mask(q, k, grid)
        self.densities.append(float(mask.density()))
        if self.check:
            self.found.append(check_attention(out, q, k, v, sampled(mask)))
        return out


def _call(model: CrossDiT, noise: Tensor, text, attention: VisualAttention) -> None:
    from kandinsky_model.sampler import sample

    sample(model, noise, text, num_steps=1, attention=attention)
