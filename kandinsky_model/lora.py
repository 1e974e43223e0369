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

from kandinsky_model.checkpoint import DTYPES, read_header
from kandinsky_model.config import CrossDiTConfig
from kandinsky_model.model import CrossDiT
from kandinsky_model.number import is_number

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
    adapter = Adapter(path)
    layers, factors = adapter.fitting(model), adapter.factors(scale)
    undo = []
    with torch.no_grad(), safe_open(adapter.path, framework="pt") as file:
        for name, layer in layers.items():
            weight: Any = layer.weight
            down, up = (x.to(weight.device) for x in adapter.halves(name, file))
            before = weight.data
            weight.data = (before.float() + factors[name] * (up @ down)).to(before.dtype)
            if removable:
                undo.append((weight, before, weight.data))
    return LoRA(adapter.path, adapter.trigger, tuple(layers), tuple(undo))


def check_lora(path: str | Path, config: CrossDiTConfig, *, scale: float = 1.0) -> "Adapter":
    """Raise the ValueError that `apply_lora` would raise on such a model."""
    with torch.device("meta"):
        model = CrossDiT(config)
    adapter = Adapter(path)
    adapter.fitting(model)
    adapter.factors(scale)
    return adapter


class Adapter:
    """An adapter before it is merged.

    Attributes:
        path: Its file.
        files: All that its effect depends on: the file, and the description beside it, if any.
        trigger: See `LoRA`.
    """

    def __init__(self, path: str | Path) -> None:
        header = read_header(path)
        if len(header.parts) != 1:
            raise ValueError(f"{header.path} is a checkpoint in {len(header.parts)} files, no LoRA")
        self.path, self.shapes, self.dtypes = header.path, header.shapes, header.dtypes
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
            metadata: dict[str, str] = file.metadata() or {}
        self.trigger = metadata.get("trigger", "")
        self.files: tuple[Path, ...] = (self.path,)
        self.config: dict[str, Any] = {}
        beside = [self.path.with_name(name) for name in CONFIGS]
        if "lora_adapter_metadata" in metadata:  # diffusers' key
            values = _parsed(metadata["lora_adapter_metadata"], self.path)
            self.config = {key.removeprefix("transformer."): x for key, x in values.items()}
        elif source := next((file for file in beside if file.is_file()), None):
            self.config, self.files = _parsed(_text(source), source), (self.path, source)
        _check_config(self.config, self.files[-1])

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
            elif not down[0]:
                problems.append(f"{name}: its rank is 0")
            if "alpha" in self.keys[name] and math.prod(self.shapes[self.keys[name]["alpha"]]) != 1:
                problems.append(f"{self.keys[name]['alpha']} is not one number")
        for key in (key for keys in self.keys.values() for key in keys.values()):
            if self.dtypes[key] not in DTYPES:
                problems.append(f"{key} is quantized ({self.dtypes[key]})")
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

    def halves(self, layer: str, file: Any) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of a layer, float32."""
        down, up = (file.get_tensor(self.keys[layer][part]) for part in ("lora_A", "lora_B"))
        return down.float(), up.float()

    def factors(self, scale: float) -> dict[str, float]:
        """What B A counts in each layer, or an error if that changes a weight beyond numbers."""
        if not is_number(scale):
            raise ValueError(f"LoRA scale {scale!r} must be a finite number; 1 is the usual one")
        found = {}
        with safe_open(self.path, framework="pt") as file:
            for layer in self.keys:
                factor = found[layer] = scale * self._scaling(layer, file)
                down, up = self.halves(layer, file)
                most = abs(factor) * down.shape[0] * down.abs().max().item() * up.abs().max().item()
                if not most <= torch.finfo(torch.float32).max:
                    raise ValueError(
                        f"{self.path} at scale {scale:g} changes {layer} by up to {most:g}; take "
                        "another scale, or fetch the file again"
                    )
        return found

    def _scaling(self, layer: str, file: Any) -> float:
        """alpha / r of a layer; with rank-stabilized LoRA alpha / sqrt(r)."""
        keys = self.keys[layer]
        rank = self.shapes[keys["lora_A"]][0]
        if "alpha" in keys:
            alpha = file.get_tensor(keys["alpha"]).item()
        else:
            alpha = self.config.get("lora_alpha", rank)
            for pattern, value in self.config.get("alpha_pattern", {}).items():
                if _matching(pattern).fullmatch(layer):
                    alpha = value
                    break
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))


def _parsed(text: str, source: Path) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} has no readable description of a LoRA: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source} has no readable description of a LoRA: it is no object")
    return {name: value for name, value in values.items() if value is not None}


def _text(source: Path) -> str:
    try:
        return source.read_text()
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} has no readable description of a LoRA: {error}") from error


def _check_config(config: Mapping[str, Any], source: Path) -> None:
    """Raise an error if what is read of peft's description is not what it should be."""
    patterns = config.get("alpha_pattern", {})
    if not isinstance(patterns, dict):
        raise ValueError(f"{source}: alpha_pattern {patterns!r} must be an object")
    alphas = {f"alpha_pattern {name!r}": value for name, value in patterns.items()}
    if "lora_alpha" in config:
        alphas["lora_alpha"] = config["lora_alpha"]
    for name, value in alphas.items():
        if not is_number(value):
            raise ValueError(f"{source}: {name} {value!r} must be a finite number")
    for name in ("use_rslora", "use_dora"):
        if not isinstance(value := config.get(name, False), bool):
            raise ValueError(f"{source}: {name} {value!r} must be true or false")
    for pattern in patterns:
        try:
            _matching(pattern)
        except re.error as error:
            raise ValueError(
                f"{source}: alpha_pattern {pattern!r} is no regular expression: {error}"
            ) from error


def _matching(pattern: str) -> re.Pattern[str]:
    """peft's: what a pattern matches may follow the names of the modules around it."""
    return re.compile(rf"(.*\.)?({pattern})")


def _without_prefix(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
