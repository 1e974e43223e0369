"""Transformers of diffusers: where each has its self-attention, and its tokens change order.

before the transformer   the plan of the forward, from the shape of the latents
before the layers        tokens and RoPE to block order, once
after the layers         tokens back to raster order
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nabla.checks import check_top_p, check_window
from nabla.dispatch import check_backend
from nabla.grid import TokenGrid
from nabla.inspect import Calibration
from nabla.integrations.diffusers.attention import Plan
from nabla.integrations.diffusers.processors import (
    PLAN,
    HunyuanVideoNablaProcessor,
    Kandinsky5NablaProcessor,
    Kandinsky6SRNablaProcessor,
    NablaProcessor,
    WanNablaProcessor,
)
from nabla.reorder import fractal_flatten, fractal_unflatten

ATTRIBUTE = "_nabla"  # of a transformer: its Installed


class Installed:
    """NABLA on one transformer: its settings, its hooks, and the plan of the running forward."""

    host_processor: str
    processor: type[NablaProcessor]
    blocks: tuple[str, ...]  # lists of the layers
    attn: str  # self-attention in a layer
    video_dim: int  # of hidden_states, where frames, height and width begin
    host_reorders = False

    def __init__(self, model: Any, top_p: Any, window: Any, backend: str) -> None:
        self.model = model
        self.backend = backend
        default_top_p, default_window = self.made_for(model.config)
        if isinstance(top_p, Calibration) and window is None:
            default_window = top_p.window
        self.top_p = default_top_p if top_p is None else top_p
        self.window = check_window(default_window if window is None else window)
        self.patch = self.patch_size(model.config)
        self.layers = [layer for name in self.blocks for layer in getattr(model, name)]
        self.attentions = [getattr(layer, self.attn) for layer in self.layers]
        self.handles: list[Any] = []
        self.plan: Plan | None = None
        self.layer_top_p: Sequence[Any] = [None] * len(self.attentions)
        if isinstance(self.top_p, Calibration):
            self.layer_top_p = self.top_p.top_p
            if len(self.layer_top_p) != len(self.attentions):
                raise ValueError(
                    f"top_p is a calibration of {len(self.top_p)} layers, and "
                    f"{type(model).__name__} has {len(self.attentions)}: calibrate this model"
                )
        for module, layer_top_p in zip(self.attentions, self.layer_top_p, strict=True):
            host = getattr(module.processor, "host", module.processor)
            if type(host).__name__ != self.host_processor:
                raise ValueError(
                    f"self-attention of {type(model).__name__} has a {type(host).__name__}, which "
                    f"enable() would replace: set a {self.host_processor} before"
                )
            heads = module.num_heads if hasattr(module, "num_heads") else module.heads
            top_p = self.top_p if layer_top_p is None else layer_top_p
            check_top_p(top_p, heads, torch.device("cpu"))
        check_backend(backend)

    def made_for(self, config: Any) -> tuple[float, Sequence[int] | None]:
        """The top_p and window that the transformer was made for."""
        return 0.9, None

    def patch_size(self, config: Any) -> Sequence[int]:
        """Latents (frames, height, width) in a token."""
        return config.patch_size

    def install(self) -> None:
        """Set the processors and hooks."""
        for module, top_p in zip(self.attentions, self.layer_top_p, strict=True):
            module.set_processor(self.processor(module.processor, top_p))
        self.handles = [
            self.model.register_forward_pre_hook(self.before, with_kwargs=True),
            self.model.register_forward_hook(self.after, always_call=True),
            *self.hooks(),
        ]
        setattr(self.model, ATTRIBUTE, self)

    def remove(self) -> None:
        """Set the host's processors again, and remove the hooks."""
        for module in self.attentions:
            if isinstance(module.processor, NablaProcessor):
                module.set_processor(module.processor.host)
        for handle in self.handles:
            handle.remove()
        delattr(self.model, ATTRIBUTE)

    def hooks(self) -> list[Any]:
        """Register the hooks that bring the plan to the layers and change the order of tokens."""
        raise NotImplementedError

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Make the plan of a forward; there is none if the processors were set anew meanwhile."""
        ours = [isinstance(module.processor, NablaProcessor) for module in self.attentions]
        if not any(ours):
            return None
        if not all(ours):
            raise RuntimeError(
                f"{ours.count(False)} of {len(ours)} self-attentions have a processor that was set "
                "after enable(): call enable(pipe) or disable(pipe)"
            )
        shape = _argument(args, kwargs, 0, "hidden_states").shape
        video = shape[self.video_dim : self.video_dim + 3]
        grid = TokenGrid(*(size // patch for size, patch in zip(video, self.patch, strict=True)))
        parallel = getattr(self.model, "_parallel_config", None)
        is_cut = getattr(parallel, "context_parallel_config", None) is not None
        order = "raster" if is_cut and not self.host_reorders else "block"
        self.plan = Plan(grid, order, self.top_p, self.window, self.backend)
        return self.with_plan(args, kwargs)

    def with_plan(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of the transformer, changed as the plan asks for."""
        return args, kwargs

    def after(self, model: nn.Module, args: tuple, output: Any) -> None:
        """Forget the plan."""
        self.plan = None


class _Kandinsky5(Installed):
    """The plan travels in sparse_params, without which the host keeps raster order."""

    host_processor, processor = "Kandinsky5AttnProcessor", Kandinsky5NablaProcessor
    blocks, attn, video_dim = ("visual_transformer_blocks",), "self_attention", 1

    def made_for(self, config):
        if config.attention_type != "nabla":
            return 0.9, None
        window = (config.attention_wT, config.attention_wH, config.attention_wW)
        reach = None if None in window else [extent // 2 * 2 + 1 for extent in window]
        return 0.9 if config.attention_P is None else config.attention_P, reach

    def hooks(self):
        return [
            self.model.visual_rope_embeddings.register_forward_hook(self.after_rope),
            self.layers[0].register_forward_pre_hook(self.before_layers),
            self.model.out_layer.register_forward_pre_hook(self.before_output),
        ]

    def with_plan(self, args, kwargs):
        sparse_params = {"to_fractal": False, PLAN: self.plan}
        return _with_argument(args, kwargs, 7, "sparse_params", sparse_params)

    def after_rope(self, module, args, rope):
        return _flatten(rope.flatten(1, 3), self.plan).unflatten(1, rope.shape[1:4])

    def before_layers(self, module, args):
        visual, text, time, rope, sparse_params = args
        return _flatten(visual, (sparse_params or {}).get(PLAN)), text, time, rope, sparse_params

    def before_output(self, module, args):
        visual, *rest = args
        flat = _unflatten(visual.flatten(1, 3), self.plan)
        return flat.unflatten(1, visual.shape[1:4]), *rest


class _Kandinsky6SR(Installed):
    """The host reorders; the plan travels in the sparse_params that it makes for all layers."""

    host_processor, processor = "Kandinsky6SRAttnProcessor", Kandinsky6SRNablaProcessor
    blocks, attn, video_dim = ("visual_transformer_blocks",), "self_attention", 1
    host_reorders = True

    def made_for(self, config):
        return config.nabla_threshold, [extent // 2 * 2 + 1 for extent in config.nabla_window]

    def hooks(self):
        return [self.layers[0].register_forward_pre_hook(self.before_layers)]

    def before_layers(self, module, args):
        if self.plan is not None:  # else the layer is recomputed, and the plan is there already
            args[3][PLAN] = self.plan


class _Wan(Installed):
    """The plan travels behind the cosines and sines of RoPE."""

    host_processor, processor = "WanAttnProcessor", WanNablaProcessor
    blocks: tuple[str, ...] = ("blocks",)
    attn, video_dim = "attn1", 2
    rope_argument = 3  # of a layer
    rope_dim = 1  # of the tokens, in the cosines and sines

    def hooks(self):
        return [
            self.model.rope.register_forward_hook(self.after_rope),
            self.layers[0].register_forward_pre_hook(self.before_layers),
            self.model.proj_out.register_forward_hook(self.after_output),
        ]

    def with_plan(self, args, kwargs):
        timestep = _argument(args, kwargs, 1, "timestep")
        if timestep.dim() == 2:  # one per token
            timestep = _flatten(timestep, self.plan)
        return _with_argument(args, kwargs, 1, "timestep", timestep)

    def after_rope(self, module, args, rope):
        if self.plan is None:
            return rope
        return *(_flatten(x, self.plan, self.rope_dim) for x in rope), self.plan

    def before_layers(self, module, args):
        *_, plan = args[self.rope_argument]
        return _flatten(args[0], plan if isinstance(plan, Plan) else None), *args[1:]

    def after_output(self, module, args, out):
        return _unflatten(out, self.plan)


class _HunyuanVideo(_Wan):
    """As Wan, with text behind the video, of which the tokens that count are attended to."""

    host_processor, processor = "HunyuanVideoAttnProcessor2_0", HunyuanVideoNablaProcessor
    blocks, attn = ("transformer_blocks", "single_transformer_blocks"), "attn"
    rope_argument, rope_dim = 4, 0

    def patch_size(self, config):
        return config.patch_size_t, config.patch_size, config.patch_size

    def with_plan(self, args, kwargs):
        assert self.plan is not None
        if self.plan.order == "raster":
            raise ValueError(
                "context parallelism cuts the text of HunyuanVideo in pieces, which NABLA does not "
                "support: disable(pipe), or run without it"
            )
        mask = _argument(args, kwargs, 3, "encoder_attention_mask")
        lengths = mask.sum(1).tolist()  # waits for the device, once per forward
        one_length = len(set(lengths)) == 1
        self.plan = replace(self.plan, text_lengths=tuple(lengths[:1] if one_length else lengths))
        return args, kwargs


FAMILIES = {
    "Kandinsky5Transformer3DModel": _Kandinsky5,
    "Kandinsky6SRTransformer3DModel": _Kandinsky6SR,
    "WanTransformer3DModel": _Wan,
    "HunyuanVideoTransformer3DModel": _HunyuanVideo,
}


def _argument(args: tuple, kwargs: dict, index: int, name: str) -> Any:
    return kwargs[name] if name in kwargs else args[index]


def _with_argument(
    args: tuple, kwargs: dict, index: int, name: str, value: Any
) -> tuple[tuple, dict]:
    if index < len(args):
        return (*args[:index], value, *args[index + 1 :]), kwargs
    return args, {**kwargs, name: value}


def _flatten(x: Tensor, plan: Plan | None, dim: int = 1) -> Tensor:
    """Tokens in the order that the plan asks for."""
    return x if plan is None or plan.order == "raster" else fractal_flatten(x, plan.grid, dim)


def _unflatten(x: Tensor, plan: Plan | None, dim: int = 1) -> Tensor:
    """Tokens in raster order."""
    return x if plan is None or plan.order == "raster" else fractal_unflatten(x, plan.grid, dim)
