"""CrossDiT of Kandinsky 5 on NABLA attention: model, sampler, checkpoints, training, demo."""

from kandinsky_model.attention import (
    DenseAttention,
    MaskedAttention,
    NablaAttention,
    UlyssesAttention,
)
from kandinsky_model.config import ARCHITECTURES, CrossDiTConfig
from kandinsky_model.model import CrossDiT
from kandinsky_model.presets import PRESETS, Preset

__all__ = [
    "ARCHITECTURES",
    "PRESETS",
    "CrossDiT",
    "CrossDiTConfig",
    "DenseAttention",
    "MaskedAttention",
    "NablaAttention",
    "Preset",
    "UlyssesAttention",
]
