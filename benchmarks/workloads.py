"""One attention layer of each public model that runs NABLA: the shapes that count.

Random queries and keys keep about `top_p` of the blocks, so a benchmark makes masks of a stated
density: `densities` are the fractions of 64 x 64 blocks kept at which to measure.
"""

from __future__ import annotations

from dataclasses import dataclass

from nabla import TokenGrid


@dataclass(frozen=True)
class Workload:
    """Self-attention of one layer.

    Args:
        name: How results call it.
        extents: Latent tokens (frames, height, width) after patchify.
        heads: Heads, of queries and keys alike.
        head_dim: Channels of a head.
        top_p: The attention mass that the model keeps.
        window: Its sliding tile window, in blocks.
        densities: Fractions of the blocks to measure at.
    """

    name: str
    extents: tuple[int, int, int]
    heads: int
    head_dim: int
    top_p: float
    window: tuple[int, int, int]
    densities: tuple[float, ...]

    @property
    def grid(self) -> TokenGrid:
        """The grid of the tokens."""
        return TokenGrid(*self.extents)

    @property
    def flops(self) -> int:
        """Floating-point operations of dense attention; its backward has 2.5 times that."""
        return 4 * self.heads * self.grid.num_tokens**2 * self.head_dim


WORKLOADS = (
    # Kandinsky 6 SR, a tile of 512 x 768
    Workload("k6-sr-tile", (31, 32, 48), 28, 64, 0.8, (11, 7, 7), (0.4, 0.3)),
    # Kandinsky 5 Video Lite, 10 s, 512 x 768
    Workload("k5-lite-10s", (61, 32, 48), 28, 64, 0.9, (11, 3, 3), (0.5, 0.2, 0.1)),
    # Kandinsky 5 Video Pro, 10 s, 512 x 768
    Workload("k5-pro-10s-sd", (61, 32, 48), 32, 128, 0.9, (11, 3, 3), (0.5, 0.2, 0.1)),
    # Kandinsky 5 Video Pro, 5 s, 768 x 1280
    Workload("k5-pro-5s-hd", (31, 48, 80), 32, 128, 0.8, (11, 3, 3), (0.2, 0.1, 0.05)),
    # Wan 2.1 14B, 81 frames of 768 x 1280, as in table 1 of the NABLA paper
    Workload("wan14b-720p", (21, 48, 80), 40, 128, 0.4, (11, 3, 3), (0.2, 0.1, 0.075)),
    # Kandinsky 5 Video Pro, 10 s, 768 x 1280
    Workload("k5-pro-10s-hd", (61, 48, 80), 32, 128, 0.7, (11, 3, 3), (0.2, 0.1, 0.05)),
)
