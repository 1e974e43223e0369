"""The shapes that count: self-attention of the public models that run NABLA; plain sequences.

    attention   4 H S^2 D              FLOPs of dense attention in one layer; its backward 2.5 times
    linear      2 S (6 C^2 + 2 C F) + 4 S L C   all else in the layer: projections, cross-attention
                                       to L text tokens, feed-forward
    bound       (linear + attention) / (linear + density * attention)   of the speed-up of a layer

Random queries and keys keep about `top_p` of the blocks, so a benchmark makes masks of a stated
density: `densities` are the fractions of 64 x 64 blocks that trained models keep.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nabla import TokenGrid


@dataclass(frozen=True)
class Model:
    """What surrounds the attention of a workload.

    Args:
        layers: Layers with that attention.
        model_dim: Channels of a token (C).
        ff_dim: Channels within the feed-forward (F).
        text_tokens: Tokens that cross-attention reads (L); 0 leaves it out.
        calls: Forward passes that make one clip: steps, twice with guidance, times tiles.
    """

    layers: int
    model_dim: int
    ff_dim: int
    text_tokens: int
    calls: int


@dataclass(frozen=True)
class Workload:
    """Self-attention of one layer.

    Args:
        name: How results call it.
        extents: Latent tokens (frames, height, width) after patchify.
        heads: Heads, of queries and keys alike.
        head_dim: Channels of a head.
        top_p: The attention mass that the model keeps.
        window: Its sliding tile window in blocks, or None.
        densities: Fractions of the blocks to measure at.
        model: What surrounds it; None for a bare sequence.
        block: Extents of a block in tokens.
    """

    name: str
    extents: tuple[int, int, int]
    heads: int
    head_dim: int
    top_p: float
    window: tuple[int, int, int] | None
    densities: tuple[float, ...]
    model: Model | None = None
    block: tuple[int, int, int] = (1, 8, 8)

    @property
    def grid(self) -> TokenGrid:
        """The grid of the tokens."""
        return TokenGrid(*self.extents, block=self.block)

    @property
    def flops(self) -> int:
        """Floating-point operations of dense attention; its backward has 2.5 times that."""
        return 4 * self.heads * self.grid.num_tokens**2 * self.head_dim

    @property
    def linear_flops(self) -> int:
        """Floating-point operations of everything else in a layer."""
        if self.model is None:
            return 0
        tokens, dim = self.grid.num_tokens, self.model.model_dim
        products = 6 * dim**2 + 2 * dim * self.model.ff_dim
        return 2 * tokens * products + 4 * tokens * self.model.text_tokens * dim

    def bound(self, density: float) -> float:
        """The speed-up of a layer at which the kept blocks and all else cost no more than dense."""
        total = self.linear_flops + self.flops
        return total / (self.linear_flops + density * self.flops)

    def reduced(self, *, heads: int | None = None, frames: int | None = None) -> Workload:
        """The same with fewer heads and frames, for machines that the whole is too much for."""
        count, height, width = self.extents
        return replace(
            self,
            heads=min(heads or self.heads, self.heads),
            extents=(min(frames or count, count), height, width),
        )

    def reduction(self, used: Workload) -> str:
        """Say what of this workload `used` leaves out; empty if nothing."""
        parts = []
        if used.heads != self.heads:
            parts.append(f"{used.heads} of {self.heads} heads")
        if used.extents != self.extents:
            tokens, whole = used.grid.num_tokens, self.grid.num_tokens
            parts.append(
                f"{used.extents[0]} of {self.extents[0]} frames ({tokens:,} of {whole:,} tokens)"
            )
        return ", ".join(parts)


LITE = Model(layers=32, model_dim=1792, ff_dim=7168, text_tokens=256, calls=100)
PRO = Model(layers=60, model_dim=4096, ff_dim=16384, text_tokens=256, calls=100)
WAN = Model(layers=40, model_dim=5120, ff_dim=13824, text_tokens=512, calls=100)
SR = Model(layers=32, model_dim=1792, ff_dim=7168, text_tokens=0, calls=18)  # 2 steps of 9 tiles

WORKLOADS = (
    # Kandinsky 6 SR, a tile of 512 x 768
    Workload("k6-sr-tile", (31, 32, 48), 28, 64, 0.8, (11, 7, 7), (0.4, 0.3), SR),
    # Kandinsky 5 Video Lite, 10 s, 512 x 768
    Workload("k5-lite-10s", (61, 32, 48), 28, 64, 0.9, (11, 3, 3), (0.5, 0.2, 0.1), LITE),
    # Kandinsky 5 Video Pro, 10 s, 512 x 768
    Workload("k5-pro-10s-sd", (61, 32, 48), 32, 128, 0.9, (11, 3, 3), (0.5, 0.2, 0.1), PRO),
    # Kandinsky 5 Video Pro, 5 s, 768 x 1280
    Workload("k5-pro-5s-hd", (31, 48, 80), 32, 128, 0.8, (11, 3, 3), (0.2, 0.1, 0.05), PRO),
    # Wan 2.1 14B, 81 frames of 768 x 1280, as in table 1 of the NABLA paper
    Workload("wan14b-720p", (21, 48, 80), 40, 128, 0.4, (11, 3, 3), (0.2, 0.1, 0.075), WAN),
    # Kandinsky 5 Video Pro, 10 s, 768 x 1280
    Workload("k5-pro-10s-hd", (61, 48, 80), 32, 128, 0.7, (11, 3, 3), (0.2, 0.1, 0.05), PRO),
)
BY_NAME = {workload.name: workload for workload in WORKLOADS}


def sequence(tokens: int, head_dim: int, *, heads: int = 2) -> Workload:
    """A plain sequence: one row of 64-token blocks."""
    return Workload(
        "sequence", (1, 1, tokens), heads, head_dim, 0.5, None, (0.1,), block=(1, 1, 64)
    )
