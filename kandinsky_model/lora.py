"""LoRA adapters: a low-rank change of linear layers, merged into their weights.

W <- W + scale * (alpha / r) * B A      A [r, in], B [out, r], in float32, then in the dtype of W
Files are safetensors of peft, diffusers or upstream: <prefix><layer>.lora_A[.default].weight and
lora_B. alpha is in <layer>.alpha, in the metadata of the file, in adapter_config.json or in
config_lora.json beside it; else it is r. What fits no layer is an error before a weight is touched.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kandinsky_model.checkpoint import Header, read_header
from kandinsky_model.config import CrossDiTConfig
from kandinsky_model.model import CrossDiT

CONFIGS = ("adapter_config.json", "config_lora.json")

_PREFIXES = ("base_model.model.", "transformer.")
_KEY = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A|lora_B)(\.default)?\.weight")
_SHOWN = 5


@dataclass(frozen=True)
class LoRA:
    """An adapter that has been merged.

    Attributes:
        path: Its file.
        trigger: Words that its authors want at the start of every prompt; often none.
        layers: The layers that it changed.
        undo: Parameter, its data before and after, of each layer; empty if it cannot be removed.
    """

    path: Path
    trigger: str
    layers: tuple[str, ...]
    undo: tuple[tuple[nn.Parameter, Tensor, Tensor], ...]

    def remove(self) -> None:
        """Put the weights back, bit for bit. Of several adapters, the last comes off first."""
        if not self.undo:
            raise ValueError(f"{self.path} cannot be removed: apply it with removable=True")
        for layer, (parameter, _, merged) in zip(self.layers, self.undo, strict=True):
            if not parameter.is_set_to(merged):
                raise ValueError(
                    f"{self.path} cannot be removed: {layer} has changed since; remove what was "
                    "applied later first"
                )
        for parameter, before, _ in self.undo:
            parameter.data = before


def apply_lora(
    model: CrossDiT, path: str | Path, *, scale: float = 1.0, removable: bool = False
) -> LoRA:
    """Merge an adapter into a model.

    Args:
        model: Changed in place.
        path: A safetensors file, or a folder with one.
        scale: Strength; 0 leaves the model as it is, negative values turn the effect around.
        removable: Whether to keep the weights that were there before, for `LoRA.remove`.

    Returns:
        What has been done.

    Raises:
        ValueError: The file is broken, is no LoRA, or does not fit the model.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale {scale} must be a finite number")
    adapter = _Adapter(read_header(path))
    layers = adapter.fitting(model)
    undo = []
    with torch.no_grad(), safe_open(adapter.path, framework="pt") as file:
        factors = {name: scale * adapter.scaling(name, file) for name in layers}
        for name, layer in layers.items():
            weight: Any = layer.weight
            down, up = (
                file.get_tensor(adapter.keys[name][part]).to(weight.device, torch.float32)
                for part in ("lora_A", "lora_B")
            )
            before = weight.data
            weight.data = (before.float() + factors[name] * (up @ down)).to(before.dtype)
            if removable:
                undo.append((weight, before, weight.data))
    trigger = adapter.metadata.get("trigger", "")
    return LoRA(adapter.path, trigger, tuple(layers), tuple(undo))


def check_lora(path: str | Path, config: CrossDiTConfig) -> None:
    """Raise the ValueError that `apply_lora` would raise on such a model; reads headers only."""
    with torch.device("meta"):
        model = CrossDiT(config)
    _Adapter(read_header(path)).fitting(model)


class _Adapter:
    """What a file says before its tensors are read."""

    def __init__(self, header: Header) -> None:
        if len(header.parts) != 1:
            raise ValueError(f"{header.path} is a checkpoint in {len(header.parts)} files, no LoRA")
        self.path, self.shapes = header.path, header.shapes
        self.keys: dict[str, dict[str, str]] = {}  # layer -> lora_A, lora_B, alpha -> key
        self.unknown: list[str] = []
        for key in header.shapes:
            name = _without_prefix(key)
            if match := _KEY.fullmatch(name):
                self.keys.setdefault(match["layer"], {})[match["part"]] = key
            elif name.endswith(".alpha"):
                self.keys.setdefault(name.removesuffix(".alpha"), {})["alpha"] = key
            else:
                self.unknown.append(key)
        with safe_open(self.path, framework="pt") as file:
            self.metadata: dict[str, str] = file.metadata() or {}
        self.config = self._config()

    def fitting(self, model: CrossDiT) -> dict[str, nn.Linear]:
        """The layers of a model that the adapter changes, or an error that names what fits none."""
        found = {
            name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
        }
        problems = []
        if self.unknown:
            problems.append(f"{len(self.unknown)} keys are of no LoRA: {_some(self.unknown)}")
        if strange := [name for name in self.keys if name not in found]:
            problems.append(f"{len(strange)} layers are not in the model: {_some(strange)}")
        halves = [
            name for name, keys in self.keys.items() if not {"lora_A", "lora_B"} <= keys.keys()
        ]
        if halves:
            problems.append(f"{len(halves)} layers lack lora_A or lora_B: {_some(halves)}")
        for name in self.keys.keys() - {*strange, *halves}:
            down, up = (self.shapes[self.keys[name][part]] for part in ("lora_A", "lora_B"))
            wanted = tuple(found[name].weight.shape)
            if len(down) != 2 or len(up) != 2 or (up[0], down[1]) != wanted or up[1] != down[0]:
                problems.append(f"{name}: B {list(up)} A {list(down)} is no {list(wanted)}")
        if not self.keys and not self.unknown:
            problems.append("it is empty")
        if self.config.get("use_dora"):
            problems.append("it is a DoRA, which scales weights too")
        if problems:
            raise ValueError(
                f"{self.path} does not fit as a LoRA: {'; '.join(problems[:_SHOWN])}. "
                "Is it for another model?"
            )
        return {name: found[name] for name in self.keys}

    def scaling(self, layer: str, file: Any) -> float:
        """alpha / r of a layer; with rank-stabilized LoRA alpha / sqrt(r)."""
        keys = self.keys[layer]
        rank = self.shapes[keys["lora_A"]][0]
        if "alpha" in keys:
            alpha = float(file.get_tensor(keys["alpha"]))
        else:
            alpha = self.config.get("lora_alpha", rank)
            for pattern, value in self.config.get("alpha_pattern", {}).items():
                if re.fullmatch(rf"(.*\.)?({pattern})", layer):
                    alpha = value
                    break
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _config(self) -> Mapping[str, Any]:
        """peft's description of the adapter, where there is one."""
        if "lora_adapter_metadata" in self.metadata:  # diffusers' key
            values = _parsed(self.metadata["lora_adapter_metadata"], self.path)
            return {key.removeprefix("transformer."): value for key, value in values.items()}
        for name in CONFIGS:
            source = self.path.with_name(name)
            if source.is_file():
                return _parsed(source.read_text(), source)
        return {}


def _parsed(text: str, source: Path) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} has no readable description of a LoRA: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source} has no readable description of a LoRA: it is no object")
    return values


def _without_prefix(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
