"""The sizes of a CrossDiT: one row per public checkpoint family, and `tiny` for the demo.

tokens     latents [B, T, H, W, C] -> [B, T, H/2, W/2, model_dim], in heads of sum(axes_dims)
attention  `top_p` is None: dense;  else NABLA with that mass, OR-ed with `window` (in blocks)
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class CrossDiTConfig:
    """Architecture and attention of one CrossDiT; the field names are those of the public configs.

    Attributes:
        model_dim: Channels of a token; a multiple of the head dim.
        ff_dim: Hidden channels of a feed-forward layer.
        time_dim: Channels of the time embedding that drives every modulation.
        num_text_blocks: Refiner blocks over the text tokens.
        num_visual_blocks: Blocks over the visual tokens.
        axes_dims: Channels of a head rotated by (frame, row, column), even; a head has their sum.
        in_visual_dim: Channels of the latents.
        out_visual_dim: Channels of the velocity.
        in_text_dim: Channels of a text token.
        in_text_dim2: Channels of the pooled text.
        patch_size: Latent (frames, rows, columns) in a token.
        visual_cond: Whether the input also holds a condition and its mask: always in video models,
            and the image to edit in image to image (there upstream's instruct_type is "channel").
        rope_scale: Divisors of the (frame, row, column) positions.
        top_p: Attention mass that NABLA keeps in the pooled map; None attends densely.
        window: Odd block extents (frames, rows, columns) that NABLA always keeps, or None.
        block: Token extents (frames, rows, columns) of a block.
    """

    model_dim: int
    ff_dim: int
    time_dim: int
    num_text_blocks: int
    num_visual_blocks: int
    axes_dims: tuple[int, int, int]
    in_visual_dim: int = 16
    out_visual_dim: int = 16
    in_text_dim: int = 3584
    in_text_dim2: int = 768
    patch_size: tuple[int, int, int] = (1, 2, 2)
    visual_cond: bool = True
    rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    top_p: float | None = None
    window: tuple[int, int, int] | None = None
    block: tuple[int, int, int] = (1, 8, 8)

    def __post_init__(self) -> None:
        if self.model_dim % self.head_dim:
            raise ValueError(
                f"model_dim {self.model_dim} is not a multiple of the head dim {self.head_dim}, "
                f"the sum of axes_dims {self.axes_dims}"
            )
        if any(dim % 2 for dim in self.axes_dims):
            raise ValueError(f"axes_dims {self.axes_dims} must be even: RoPE rotates pairs")
        if self.window is not None and self.top_p is None:
            raise ValueError(f"window {self.window} needs top_p: dense attention has no window")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return sum(self.axes_dims)

    @property
    def input_dim(self) -> int:
        """Channels of the input: latents, and with `visual_cond` a condition and its mask."""
        return 2 * self.in_visual_dim + 1 if self.visual_cond else self.in_visual_dim

    @property
    def patch_volume(self) -> int:
        """Latent positions in one token."""
        return math.prod(self.patch_size)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CrossDiTConfig":
        """The inverse of `to_dict`; unknown names are an error."""
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(
                f"unknown config fields {unknown}; CrossDiTConfig lists the known ones"
            )
        arguments: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**arguments)

    def to_diffusers(self) -> dict[str, Any]:
        """The fields as config.json of diffusers' Kandinsky5Transformer3DModel has them.

        Names that start with an underscore are ours: diffusers reads over them.
        """
        frames, rows, columns = self.window or (None, None, None)
        sparse = self.top_p is not None
        return {
            "_class_name": _DIFFUSERS_CLASS,
            **{name: getattr(self, name) for name in _SHARED_FIELDS},
            "attention_type": "nabla" if sparse else "regular",
            "attention_P": self.top_p,
            "attention_wT": frames,
            "attention_wH": rows,
            "attention_wW": columns,
            "attention_add_sta": self.window is not None if sparse else None,
            "attention_method": "topcdf" if sparse else None,
            "_rope_scale": self.rope_scale,
            "_block": self.block,
        }

    @classmethod
    def from_diffusers(cls, values: dict[str, Any]) -> "CrossDiTConfig":
        """The inverse of `to_diffusers`; diffusers' own files leave `rope_scale` and `block` out.

        Raises:
            ValueError: The values are of another class, incomplete, or of another attention.
        """
        if values.get("_class_name", _DIFFUSERS_CLASS) != _DIFFUSERS_CLASS:
            raise ValueError(f"a {values['_class_name']} is no {_DIFFUSERS_CLASS}")
        if missing := [name for name in _SHARED_FIELDS if name not in values]:
            raise ValueError(f"config fields {missing} are missing")
        arguments = {name: values[name] for name in _SHARED_FIELDS}
        arguments |= {
            name: values[f"_{name}"] for name in ("rope_scale", "block") if f"_{name}" in values
        }
        kind = values.get("attention_type", "regular")
        if kind not in ("regular", "nabla"):
            raise ValueError(f"attention_type {kind!r} is neither 'regular' nor 'nabla'")
        if kind == "nabla":
            window = [values.get(f"attention_w{axis}") for axis in "THW"]
            arguments |= {"top_p": values.get("attention_P")}
            arguments |= {"window": None if None in window else window}
        return cls.from_dict(arguments)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> "CrossDiTConfig":
        """The architecture that tensors of these shapes are of, with dense attention.

        Heads are divided between (frame, row, column) as in all public checkpoints, 2 : 3 : 3, and
        patches are (1, 2, 2); positions are not scaled.

        Raises:
            ValueError: They are not those of a CrossDiT.
        """
        try:
            model_dim, patch_dim = shapes["visual_embeddings.in_layer.weight"]
            out_dim, _ = shapes["out_layer.out_layer.weight"]
            time_dim, _ = shapes["time_embeddings.in_layer.weight"]
            _, in_text_dim = shapes["text_embeddings.in_layer.weight"]
            _, in_text_dim2 = shapes["pooled_text_embeddings.in_layer.weight"]
            block = "visual_transformer_blocks.0"
            ff_dim, _ = shapes[f"{block}.feed_forward.in_layer.weight"]
            (head_dim,) = shapes[f"{block}.self_attention.query_norm.weight"]
        except (KeyError, ValueError) as error:
            raise ValueError(f"these are not the tensors of a CrossDiT: {error}") from None
        out_visual_dim = out_dim // math.prod(cls.patch_size)
        input_dim = patch_dim // math.prod(cls.patch_size)
        visual_cond = input_dim > out_visual_dim
        return cls(
            model_dim=model_dim,
            ff_dim=ff_dim,
            time_dim=time_dim,
            num_text_blocks=_count(shapes, "text_transformer_blocks"),
            num_visual_blocks=_count(shapes, "visual_transformer_blocks"),
            axes_dims=(head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8),
            in_visual_dim=(input_dim - 1) // 2 if visual_cond else input_dim,
            out_visual_dim=out_visual_dim,
            in_text_dim=in_text_dim,
            in_text_dim2=in_text_dim2,
            visual_cond=visual_cond,
        )

    def has_shapes_of(self, other: "CrossDiTConfig") -> bool:
        """Whether the tensors of both have the same names and shapes."""
        free = {name: getattr(other, name) for name in _SHAPELESS_FIELDS}
        return replace(self, **free) == other


_DIFFUSERS_CLASS = "Kandinsky5Transformer3DModel"
_SHAPELESS_FIELDS = ("rope_scale", "top_p", "window", "block")
_SHARED_FIELDS = [
    field.name for field in fields(CrossDiTConfig) if field.name not in _SHAPELESS_FIELDS
]


def _count(names: Iterable[str], blocks: str) -> int:
    """How many modules the list `blocks` has."""
    found = {int(name.split(".")[1]) for name in names if name.startswith(f"{blocks}.")}
    return max(found, default=-1) + 1


# Architectures as such: attention, and the divisors of positions, differ between their checkpoints.
ARCHITECTURES = {
    "video-lite": CrossDiTConfig(
        model_dim=1792, ff_dim=7168, time_dim=512, num_text_blocks=2, num_visual_blocks=32,
        axes_dims=(16, 24, 24),
    ),
    "video-pro": CrossDiTConfig(
        model_dim=4096, ff_dim=16384, time_dim=1024, num_text_blocks=4, num_visual_blocks=60,
        axes_dims=(32, 48, 48),
    ),
    "image-lite": CrossDiTConfig(
        model_dim=2560, ff_dim=10240, time_dim=512, num_text_blocks=2, num_visual_blocks=50,
        axes_dims=(32, 48, 48), visual_cond=False,
    ),
    "image-lite-i2i": CrossDiTConfig(
        model_dim=2560, ff_dim=10240, time_dim=512, num_text_blocks=2, num_visual_blocks=50,
        axes_dims=(32, 48, 48), visual_cond=True,
    ),
    "tiny": CrossDiTConfig(
        model_dim=128, ff_dim=512, time_dim=64, num_text_blocks=1, num_visual_blocks=5,
        axes_dims=(8, 12, 12), in_text_dim=32, in_text_dim2=32, rope_scale=(1.0, 0.4, 0.4),
        top_p=0.5, window=(3, 1, 1),
    ),
}  # fmt: skip
