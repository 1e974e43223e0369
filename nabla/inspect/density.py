"""What each head of each layer computes, step by step.

    density    kept blocks / all blocks, of every call
    retained   mass of the pooled map on the kept blocks       } of one query block of a call, drawn
    recall     mass of the exact attention on them             } at random, and one batch element

The two masses cost what one query block costs, so a run is hardly slower; over the steps they
average to those of the whole.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nabla.bits import count_bits, unpack_bits
from nabla.block_attention import block_sparse_attention
from nabla.block_mask import BlockMask
from nabla.inspect.observe import Call, observing
from nabla.scores import pooled_scores

# Blocks from which on every call is sampled, for a query block costs little there; of shorter ones,
# in proportion fewer, and the first of all.
SEQUENCE = 1024


@dataclass
class DensityReport:
    """Density, retained mass and recall per layer, head and step; NaN where nothing is known.

    Args:
        seed: Of the choice of query blocks.
    """

    seed: int = 0
    _cells: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def __call__(self, call: Call) -> None:
        """Measure a call of a model; does not synchronise with the device."""
        mask, num_blocks = call.mask, call.mask.grid.num_blocks
        kept = count_bits(mask.bits, num_blocks).sum(-1).float().mean(0)  # [H]
        cell = {"density": kept / (mask.bits.shape[2] * num_blocks)}
        if self._random.random() * SEQUENCE < num_blocks or not self._cells:
            batch = self._random.randrange(call.q.shape[0])
            row = self._random.randrange(mask.bits.shape[2])
            cell["retained"], cell["recall"] = _masses(call, batch, row)
        self._cells[call.step, call.layer] = cell

    @property
    def num_steps(self) -> int:
        """Forwards that were seen."""
        return 1 + max((step for step, _ in self._cells), default=-1)

    @property
    def num_layers(self) -> int:
        """Attention calls of a forward."""
        return 1 + max((layer for _, layer in self._cells), default=-1)

    def table(self, name: str) -> Tensor:
        """Return "density", "retained" or "recall" as float32 [steps, layers, heads] on the CPU.

        Layers may differ in their heads: the table is as wide as the widest, the rest is NaN.

        Raises:
            ValueError: If nothing has run yet.
        """
        if not self._cells:
            raise ValueError(
                "no attention call was seen: run the model inside the `with` statement, and see "
                "that its self-attention goes through nabla"
            )
        heads = max(cell["density"].numel() for cell in self._cells.values())
        table = torch.full((self.num_steps, self.num_layers, heads), math.nan)
        for (step, layer), cell in self._cells.items():
            if name in cell:
                table[step, layer, : cell[name].numel()] = cell[name].cpu()
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the three tables as lists [steps][layers][heads], None where nothing is known."""
        tables = {name: self.table(name) for name in ("density", "retained", "recall")}
        return {
            "steps": self.num_steps,
            "layers": self.num_layers,
            "heads": tables["density"].shape[-1],
            **{name: as_lists(table) for name, table in tables.items()},
        }

    def save(self, path: str | Path) -> Path:
        """Write `to_dict` as JSON; the folder is made if it is not there."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict()) + "\n")
        return path

    def draw(self, path: str | Path) -> Path:
        """Write a picture: what each head computes and keeps, and how that changes over the steps.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            ValueError: If nothing has run yet.
        """
        from nabla.inspect.density_picture import draw_density

        return draw_density(self, path)


@contextmanager
def density_report(model: nn.Module, *, seed: int = 0) -> Iterator[DensityReport]:
    """Record what a model attends to, within a `with` statement.

    Each forward of the model is a step, each attention call within it a layer. Works with whatever
    reaches nabla: attention(), CrossDiT, nabla.integrations; eager or compiled.

    Args:
        model: The module whose forward is a step: of a compiled one, what torch.compile returned.
        seed: Of the choice of the query blocks whose masses are measured.

    Returns:
        The report, which fills while the model runs.

    Raises:
        ValueError: If `model` is no module.
    """
    report = DensityReport(seed)
    with observing(model, report):
        yield report


def _masses(call: Call, batch: int, row: int) -> tuple[Tensor, Tensor]:
    """Retained mass and recall of one query block, each [H]."""
    mask, grid = call.mask, call.mask.grid
    block = mask.q_block_offset + row
    first = grid.block_start(block) - grid.block_start(mask.q_block_offset)
    tokens = slice(first, first + grid.block_start(block + 1) - grid.block_start(block))
    q, k, v = (x[batch, None] for x in (call.q[:, :, tokens], call.k, call.v))
    bits = mask.bits[batch, None, :, row, None]  # [1, H, 1, W]

    scores = pooled_scores(q, k, grid, scale=call.scale, q_block_offset=block)[0, :, 0]  # [H, Nk]
    ranked = scores.isfinite()
    kept = unpack_bits(bits[0, :, 0], grid.num_blocks)
    total = scores.where(ranked, 0).sum(-1)  # 0 in a row that keeps everything, whatever its score
    retained = torch.where(total > 0, scores.where(ranked & kept, 0).sum(-1) / total, 1.0)

    every_block = BlockMask(torch.full_like(bits, -1), grid, None, block)
    full = block_sparse_attention(q, k, v, every_block, scale=call.scale, return_lse=True)
    recall = (call.lse[batch, :, tokens] - full.lse[0]).exp().mean(-1)
    return retained, recall.float()


def as_lists(table: Any) -> Any:
    """A tensor as lists for JSON: six digits, None where nothing is known."""
    if isinstance(table, Tensor):
        table = table.tolist()
    if isinstance(table, list):
        return [as_lists(row) for row in table]
    return None if math.isnan(table) else float(f"{table:.6g}")


def as_tensor(table: Any) -> Tensor:
    """The inverse of `as_lists`, float32."""

    def known(x: Any) -> Any:
        return [known(row) for row in x] if isinstance(x, list) else math.nan if x is None else x

    return torch.tensor(known(table), dtype=torch.float32)
