"""One CrossDiT block, and one denoising step, at the widths of a real model: dense against NABLA.

NABLA builds the mask of its own q and k, as it has to, and attends under one of a stated density:
random weights would keep nearly everything. A step is the model with all that surrounds its blocks,
of which it has as many as are said.

bound   (linear + attention) / (linear + density * attention): no kernel can do better
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import nabla
from benchmarks import block_attention
from benchmarks.accuracy import Accuracy, check_attention, sampled
from benchmarks.case import Case, Contest, MaskSpec, Shape
from benchmarks.results import OURS
from benchmarks.workloads import Workload
from nabla import BlockMask, TokenGrid

if TYPE_CHECKING:  # the other stages run without what the model needs
    from kandinsky_model.attention import VisualAttention
    from kandinsky_model.model import CrossDiT

STAGE = "block"
TEXT_DIM = 64  # of the text features that random text has; what reads them runs once a step
REFINERS = 1
LAYERS = {"cpu": 1, "cuda": 2}  # of a step; its other layers take what a block takes
# Torch's choice is not always the fastest of its dense kernels; on Hopper that is the first.
DENSE = [
    *(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
    *(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
]


@dataclass(frozen=True)
class StatedAttention:
    """Builds the mask of q and k, and attends under one whose density is known."""

    mask: BlockMask
    workload: Workload

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        """Attend over tokens [B, H, S, D] in block order."""
        nabla.create_block_mask(
            q, k, grid=grid, top_p=self.workload.top_p, window=self.workload.window
        )
        return nabla.block_sparse_attention(q, k, v, self.mask)


@dataclass(frozen=True)
class FastestDense:
    """Dense attention by the fastest kernel of torch that takes it."""

    attention: VisualAttention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        """Attend as `attention` does."""
        with sdpa_kernel(DENSE, set_priority=True):
            return self.attention(q, k, v, grid)


@dataclass
class Recorded:
    """An attention that keeps what the last call had and gave."""

    attention: VisualAttention
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        """Attend as `attention` does."""
        out = self.attention(q, k, v, grid)
        self.seen = [out, q, k, v]
        return out


def cost(shape: Shape, specs: Sequence[MaskSpec]) -> float:
    """FLOPs of one round: a block and a step of a few, for each mask and dense."""
    used = shape.workload
    each = (used.linear_flops + used.flops / used.bound(spec.density) for spec in specs)
    layers = 1 + LAYERS[shape.device.type]
    return 1.1 * layers * (used.linear_flops + used.flops + sum(each))


def contests(shape: Shape, specs: Sequence[MaskSpec]) -> list[Contest]:
    """A block, and a step: under dense attention, and under masks of every specification."""
    from kandinsky_model.attention import DenseAttention

    used = shape.workload
    assert used.model is not None, used
    layers = LAYERS[shape.device.type]
    runs = _Runs(random_model(used, layers, shape), shape)
    everything = block_attention.full_mask(used.grid, shape.device)
    about = {"implementation": "dense", "mask": "dense", "density": 1.0}
    attentions: list[tuple[dict, VisualAttention, BlockMask]] = [
        (about, FastestDense(DenseAttention()), everything)
    ]
    for spec in specs:
        mask = block_attention.make(spec, used.grid, used.heads, shape)
        about = {"implementation": OURS, "mask": str(spec), "asked": spec.density}
        about["density"] = float(mask.density())
        attentions.append((about, StatedAttention(mask, used), mask))
    return [
        Contest([_case(part, run, count, of_part, shape, *attention) for attention in attentions])
        for part, run, count, of_part in (
            ("block", runs.block, 1, runs.model.visual_transformer_blocks[0]),
            ("step", runs.step, layers, runs.model),
        )
    ]


def weight_bytes(module: nn.Module) -> float:
    """Of the parameters of a module, each moved once."""
    return float(sum(parameter.nbytes for parameter in module.parameters()))


def token_bytes(shape: Shape) -> int:
    """Of a token between two blocks."""
    assert shape.workload.model is not None
    return shape.workload.model.model_dim * shape.dtype.itemsize


def random_model(workload: Workload, layers: int, shape: Shape) -> CrossDiT:
    """A CrossDiT of these widths and so many layers, of random weights."""
    from kandinsky_model.config import CrossDiTConfig
    from kandinsky_model.model import CrossDiT, is_float32

    model, head_dim = workload.model, workload.head_dim
    assert model is not None
    config = CrossDiTConfig(
        model_dim=model.model_dim,
        ff_dim=model.ff_dim,
        time_dim=512,
        num_text_blocks=REFINERS,
        num_visual_blocks=layers,
        axes_dims=(head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8),
        in_text_dim=TEXT_DIM,
        in_text_dim2=TEXT_DIM,
    )
    with torch.device("meta"):
        found = CrossDiT(config)
    for name, parameter in found.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if is_float32(name) else shape.dtype)
    found.to_empty(device=shape.device)
    for name, parameter in found.named_parameters():
        is_norm = "norm" in name and name.endswith("weight")
        parameter.data.fill_(1.0) if is_norm else parameter.data.normal_(std=0.02)
    return found.requires_grad_(False)


class _Runs:
    """A block and a step of a model, on fresh inputs."""

    def __init__(self, model: CrossDiT, shape: Shape) -> None:
        from kandinsky_model.layers import rotary_3d

        used, dtype = shape.workload, shape.dtype
        assert used.model is not None
        self.model, self.grid = model, used.grid
        (frames, height, width), config = used.extents, model.config
        text_tokens = max(used.model.text_tokens, 1)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, device=shape.device).to(dtype)

        latents = (frames, 2 * height, 2 * width, config.input_dim)  # patches are (1, 2, 2)
        self.inputs = (
            randn(1, *latents),
            randn(1, text_tokens, TEXT_DIM),
            randn(1, TEXT_DIM),
            torch.tensor([0.5], device=shape.device),
        )
        cos, sin = rotary_3d(used.extents, config.axes_dims, device=shape.device)
        self.of_block = (
            randn(1, used.grid.num_tokens, config.model_dim),
            randn(1, text_tokens, config.model_dim),
            torch.randn(1, config.time_dim, device=shape.device),
            (nabla.fractal_flatten(cos, used.grid), nabla.fractal_flatten(sin, used.grid)),
        )

    def block(self, attention: VisualAttention) -> Tensor:
        """The first block."""
        return self.model.visual_transformer_blocks[0](
            *self.of_block, lambda q, k, v: attention(q, k, v, self.grid)
        )

    def step(self, attention: VisualAttention) -> Tensor:
        """The model; twice that with guidance."""
        return self.model(*self.inputs, attention=attention)


def _case(
    part: str,
    run: Callable[[VisualAttention], Tensor],
    layers: int,
    module: nn.Module,
    shape: Shape,
    about: dict,
    attention: VisualAttention,
    mask: BlockMask,
) -> Case:
    used, density = shape.workload, about["density"]
    values = {
        "layers": layers,
        "bound": used.bound(density),
        "bound_of_the_whole": shape.whole.bound(density),
    }
    flops = float(layers * (used.linear_flops + density * used.flops))
    moved = weight_bytes(module) + 2 * used.grid.num_tokens * token_bytes(shape)

    def check() -> Accuracy:
        recorded = Recorded(attention)
        run(recorded)
        return check_attention(*recorded.seen, sampled(mask))

    row = shape.row(STAGE, **about, part=part, flops=flops, bytes=moved, values=values)
    return Case(row, lambda: run(attention), check)
