"""CrossDiT of Kandinsky 5 on NABLA attention: model, sampler, checkpoints, training, demo."""

from kandinsky_model.attention import (
    DenseAttention,
    MaskedAttention,
    NablaAttention,
    UlyssesAttention,
)
from kandinsky_model.config import PRESETS, CrossDiTConfig
from kandinsky_model.model import CrossDiT

__all__ = [
    "PRESETS",
    "CrossDiT",
    "CrossDiTConfig",
    "DenseAttention",
    "MaskedAttention",
    "NablaAttention",
    "UlyssesAttention",
]
