"""Attention over the kept blocks against dense attention of torch, on the CPU.

    python -m benchmarks.block_attention [--seqlens 8192 16384] [--head-dims 64 128] ...

FLOPs    of the kept blocks: 4 * density * S^2 * D * H forward, 2.5 times that backward
E        density * (time of F.scaled_dot_product_attention) / (our time): 1 where every kept block
         costs what it costs in dense attention
total E  the same with our time to build a mask of this size (top_p and window) added

Masks are random with a given density, which random queries and keys would not give. Nothing is
timed before rows of the output agree with the reference. Below the tables: a line through the times
over kept blocks, and the memory over tokens; out/block_attention.png shows both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import nabla
from benchmarks.timing import fit_line, heading, interleaved, peak_memory
from nabla import BlockMask, TokenGrid

HEADS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Block-sparse against dense attention on the CPU.")
    parser.add_argument("--seqlens", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.5, 1.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=Path("out/block_attention.png"))
    options = parser.parse_args()
    print(heading("block attention: median (p20-p80) ms"))
    times, memory = {}, {}
    for dtype in options.dtypes:
        for head_dim in options.head_dims:
            for seqlen in options.seqlens:
                times |= measure(seqlen, head_dim, DTYPES[dtype], options.densities, options.rounds)
    print("\nmemory above inputs, forward + backward, density 0.1, D=64, float32")
    for seqlen in sorted({min(options.seqlens) // 2, *options.seqlens, 2 * max(options.seqlens)}):
        memory[seqlen] = peak_memory(forward_and_backward, seqlen, 64, 0.1) / 2**20
        per_token = memory[seqlen] / seqlen * 1024
        print(f"  S={seqlen:<6} {memory[seqlen]:7.0f} MiB  {per_token:.1f} KiB per token")
    plot(times, memory, options.plot)


def measure(
    seqlen: int, head_dim: int, dtype: torch.dtype, densities: list[float], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Print the tables of one shape; return its curves: milliseconds over kept blocks."""
    q, k, v, grid = inputs(seqlen, head_dim, dtype)
    dout = torch.randn_like(q)
    masks = {density: random_mask(grid, density) for density in densities}
    for mask in masks.values():
        check(q, k, v, mask)

    def both(attend) -> None:
        torch.autograd.grad(attend(), (q, k, v), dout)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def sparse(density: float) -> Tensor:
        return nabla.block_sparse_attention(q, k, v, masks[density], backend="cpu")

    def build() -> BlockMask:
        return nabla.create_block_mask(q, k, grid=grid, top_p=0.5, window=(1, 1, 3), backend="cpu")

    forward = {"dense": dense, "mask": build}
    forward |= {str(density): lambda d=density: sparse(d) for density in densities}
    with torch.no_grad():
        seconds = interleaved(forward, rounds)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    backward = {"dense": lambda: both(dense)}
    backward |= {str(density): lambda d=density: both(lambda: sparse(d)) for density in densities}
    seconds_both = interleaved(backward, rounds)

    print(f"\nS={seqlen} H={HEADS} D={head_dim} {str(dtype).removeprefix('torch.')}")
    print(f"  mask {seconds['mask']} ms")
    curves = {}
    for name, times, work in (("forward", seconds, 1.0), ("forward+backward", seconds_both, 3.5)):
        flops = 4 * seqlen**2 * head_dim * HEADS * work
        speed = flops / times["dense"].median / 1e9
        print(f"  {name}: dense {times['dense']} ms, {speed:.0f} GFLOP/s")
        curve = curves[f"{name}, S={seqlen} D={head_dim} {str(dtype).removeprefix('torch.')}"] = []
        for density, mask in masks.items():
            ours, share = times[str(density)], float(mask.density())
            curve.append((share * HEADS * grid.num_blocks**2, ours.median * 1e3))
            ideal = share * times["dense"].median
            print(
                f"    density={share:.3f} {ours} ms"
                f"  {share * flops / ours.median / 1e9:4.0f} GFLOP/s"
                f"  {times['dense'].median / ours.median:5.1f}x dense"
                f"  E {ideal / ours.median:.2f}"
                f"  total E {ideal / (ours.median + seconds['mask'].median):.2f}",
                flush=True,
            )
        start, slope, deviation = fit_line(curve)
        print(
            f"    line: {start:.1f} ms + {slope * 1e3:.2f} us per kept block, "
            f"at most {deviation:.0%} off"
        )
    return curves


def plot(times: dict[str, list[tuple[float, float]]], memory: dict[int, float], path: Path) -> None:
    """Draw the times over kept blocks and the memory over tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in times.items():
        left.loglog(*zip(*curve, strict=True), "o-", markersize=3, linewidth=1, label=name)
    left.set(xlabel="kept blocks, all heads", ylabel="ms", title="time over kept blocks")
    left.legend(fontsize=5, ncols=2)
    right.plot(memory.keys(), memory.values(), "o-")
    right.set(xlabel="tokens", ylabel="MiB above inputs", title="memory, forward + backward")
    right.set_ylim(bottom=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"\ncurves in {path}")


def inputs(
    seqlen: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, TokenGrid]:
    """Random queries, keys and values of a plain sequence."""
    q, k, v = (torch.randn(1, HEADS, seqlen, head_dim).to(dtype) for _ in range(3))
    return q, k, v, TokenGrid.sequence(seqlen)


def random_mask(grid: TokenGrid, density: float) -> BlockMask:
    """A mask that keeps each block with the probability `density`."""
    keep = torch.rand(1, HEADS, grid.num_blocks, grid.num_blocks) < density
    return BlockMask.from_dense(keep, grid=grid)


def check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> None:
    """Compare the first rows with the reference; a benchmark of wrong output would be worthless."""
    blocks = slice(0, 2)
    rows = slice(0, mask.grid.block_start(2))
    part = BlockMask.from_dense(mask.to_dense()[:, :, blocks], grid=mask.grid)
    exact = nabla.block_sparse_attention(
        *(x.double() for x in (q[:, :, rows], k, v)), part, backend="reference"
    )
    ours = nabla.block_sparse_attention(q, k, v, mask, backend="cpu")[:, :, rows].double()
    error, tolerance = (ours - exact).abs().max().item(), 4 * torch.finfo(q.dtype).eps + 1e-6
    if not error <= tolerance:
        raise SystemExit(f"wrong output, nothing is timed: error {error:.2e} above {tolerance:.2e}")


def forward_and_backward(seqlen: int, head_dim: int, density: float):
    """Inputs for peak_memory, and the run that it measures."""
    q, k, v, grid = inputs(seqlen, head_dim, torch.float32)
    mask, dout = random_mask(grid, density), torch.randn_like(q)
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def run() -> None:
        out = nabla.block_sparse_attention(q, k, v, mask, backend="cpu")
        torch.autograd.grad(out, (q, k, v), dout)

    return run


if __name__ == "__main__":
    main()
