"""Building the NABLA mask against the sort-based way in PyTorch, on the CPU.

    python -m benchmarks.block_mask [--heads 28] [--grid 61 32 48] [--dtype bfloat16] [--rounds 3]

The default is Kandinsky 5 Lite at 10 s: 28 heads of 64 channels, 1464 blocks. Sorting means: pool,
softmax, sort, cumulative sum, unsort, and the lists of blocks that FlexAttention takes. Nothing is
timed before the masks agree. Memory is the peak above the inputs, the mask included, as a share of
q + k + v.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import nabla
from benchmarks.timing import Seconds, heading, interleaved, peak_memory
from nabla import BlockMask, TokenGrid

TOP_P = 0.9
WINDOW = (11, 3, 3)
HEAD_DIM = 64


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Mask building on the CPU.")
    parser.add_argument("--heads", type=int, default=28)
    parser.add_argument("--grid", type=int, nargs=3, default=[61, 32, 48])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    grid = TokenGrid(*options.grid)
    shape = (options.heads, grid, getattr(torch, options.dtype))
    density, times, qkv = measure(*shape, options.rounds)
    print(heading("block mask: median (p20-p80) ms"))
    print(
        f"H={options.heads} blocks={grid.num_blocks} D={HEAD_DIM} {options.dtype} "
        f"top_p={TOP_P} window={WINDOW} density={density:.3f}"
    )
    for name, builder in (("ours", build), ("sorting", build_by_sorting)):
        share = peak_memory(prepare, builder, *shape) / qkv
        print(f"  {name:8} {times[name]} ms  memory {share:.1%} of q + k + v")
    print(f"  {times['sorting'].median / times['ours'].median:.1f}x faster")


def measure(
    heads: int, grid: TokenGrid, dtype: torch.dtype, rounds: int
) -> tuple[float, dict[str, Seconds], int]:
    """Return the density of the mask, the times of both ways, and the bytes of q + k + v."""
    q, k = inputs(heads, grid, dtype)
    density = check(q, k, grid)
    ways = {"ours": lambda: build(q, k, grid), "sorting": lambda: build_by_sorting(q, k, grid)}
    return density, interleaved(ways, rounds), 3 * q.numel() * q.element_size()


def inputs(heads: int, grid: TokenGrid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries and keys whose blocks differ, so that the mask is sparse as that of a model is."""
    q, k = (torch.empty(1, heads, grid.num_tokens, HEAD_DIM, dtype=dtype) for _ in range(2))
    torch.manual_seed(0)
    for head in range(heads):  # one head at a time: little memory
        blocks = torch.randn(grid.num_blocks, 1, HEAD_DIM)
        for x in (q, k):
            noise = torch.randn(grid.num_blocks, grid.block_size, HEAD_DIM)
            x[0, head] = (blocks + noise).flatten(0, 1)
    return q, k


def build(q: Tensor, k: Tensor, grid: TokenGrid) -> BlockMask:
    """Build the mask with the native kernels."""
    return nabla.create_block_mask(q, k, grid=grid, top_p=TOP_P, window=WINDOW, backend="cpu")


def build_by_sorting(q: Tensor, k: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Build the mask [B, H, N, N] and its lists (counts, indices) from sorted scores."""
    q_mean, k_mean = (x.unflatten(2, (-1, grid.block_size)).mean(3).float() for x in (q, k))
    scores = (q_mean @ k_mean.transpose(-2, -1) * HEAD_DIM**-0.5).softmax(-1)
    ranked, order = scores.sort(-1, descending=True)
    ranked = ranked.cumsum(-1) - ranked < TOP_P
    keep = torch.empty_like(ranked).scatter_(-1, order, ranked)
    keep |= nabla.sliding_tile_mask(grid, WINDOW).to_dense()
    return keep, keep.sum(-1), keep.int().argsort(-1, descending=True)


def check(q: Tensor, k: Tensor, grid: TokenGrid) -> float:
    """Compare the masks of one head up to blocks at the cut; return the density of the mask."""
    q, k = q[:, :1], k[:, :1]
    ours, theirs = build(q, k, grid).to_dense(), build_by_sorting(q, k, grid)[0]
    differing = (ours != theirs).float().mean().item()
    if differing > 1e-3:  # means in low precision move the cut by a few blocks
        raise SystemExit(f"wrong output, nothing is timed: {differing:.2%} of the blocks differ")
    return ours.float().mean().item()


def prepare(builder, heads: int, grid: TokenGrid, dtype: torch.dtype):
    """Inputs for peak_memory, and the run that it measures."""
    q, k = inputs(heads, grid, dtype)
    return lambda: builder(q, k, grid)


if __name__ == "__main__":
    main()
