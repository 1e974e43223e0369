"""Attention over a sequence that several processes share, against one: forward and backward.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.distributed [--queries 1] [--heads 4]
        [--grid 4 32 48] [--rounds 3]

Runs on GPUs where every process has one, else on CPUs. `--queries` ranks share the query blocks,
the rest of the ranks the heads. Nothing is timed before the result equals that of one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import nabla
from nabla.distributed import HeadBalance, gather, shard, shard_sizes, ulysses_attention

TOP_P = 0.8
HEAD_DIM = 64


def main() -> None:
    """Print what the processes share and how long it takes them."""
    parser = argparse.ArgumentParser(description="Attention over a shared sequence.")
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--grid", type=int, nargs=3, default=[4, 32, 48])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    local_rank = dist.get_node_local_rank()
    on_gpu = local_rank < torch.cuda.device_count()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    shape = (options.queries, dist.get_world_size() // options.queries)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("queries", "heads"))
    lines = measure(nabla.TokenGrid(*options.grid), options.heads, options.rounds, mesh)
    if dist.get_rank() == 0:
        print(*lines, sep="\n")
    dist.destroy_process_group()


def measure(grid: nabla.TokenGrid, heads: int, rounds: int, mesh: DeviceMesh) -> list[str]:
    """Compare with one process and time both; return the lines of the report."""
    qkv = inputs(heads, grid, mesh.device_type)
    sizes, balance = shard_sizes(grid, mesh), HeadBalance()
    shards = [shard(x, 2, sizes, group=mesh) for x in qkv]
    options = {"grid": grid, "top_p": TOP_P, "order": "block"}

    def alone() -> list[Tensor]:
        return run(lambda *x: nabla.attention(*x, **options), qkv)

    def shared() -> list[Tensor]:
        options_here = options | {"group": mesh, "sizes": sizes, "balance": balance}
        return run(lambda *x: ulysses_attention(*x, **options_here), shards)

    shared()
    balance.step()
    errors = {
        name: ((gather(ours, 2, sizes, group=mesh) - one).abs().max() / one.abs().max()).item()
        for name, ours, one in zip(("out", "dq", "dk", "dv"), shared(), alone(), strict=True)
    }
    if not max(errors.values()) < 1e-4:
        raise SystemExit(f"wrong output, nothing is timed: relative errors {errors}")
    seconds = {"one process": seconds_of(alone, rounds), "shared": seconds_of(shared, rounds)}

    mask = nabla.create_block_mask(*qkv[:2], grid=grid, top_p=TOP_P)
    kept = mask.to_dense().sum((0, 2, 3))
    in_runs = torch.arange(heads).tensor_split(mesh["heads"].size())
    dealt = [torch.tensor(own) for own in balance.assignment]
    return [
        f"attention over {grid.num_tokens} tokens, {heads} heads of {HEAD_DIM} channels, "
        f"{mask.density():.2f} of the blocks kept",
        f"{mesh.size()} processes on {mesh.device_type}, queries x heads = {tuple(mesh.shape)}",
        "largest difference from one process: "
        + ", ".join(f"{name} {error:.0e}" for name, error in errors.items()),
        f"heads by kept blocks: {[own.tolist() for own in dealt]}, the busiest rank has "
        f"{busiest(kept, dealt):.2f} x the mean ({busiest(kept, in_runs):.2f} x in runs)",
        "forward and backward, median: "
        + ", ".join(f"{name} {1e3 * median:.0f} ms" for name, median in seconds.items()),
    ]


def inputs(heads: int, grid: nabla.TokenGrid, device: str) -> list[Tensor]:
    """q, k, v [1, H, S, D], the same on every rank; a head is the sparser, the higher its index."""
    generator = torch.Generator().manual_seed(0)
    shape = (heads, grid.num_tokens, HEAD_DIM)
    q, k, v = torch.randn(3, *shape, generator=generator).unbind()
    sharpness = torch.linspace(0.5, 1.0, heads)[:, None, None]
    blocks = torch.arange(grid.num_tokens) // grid.block_size
    content = torch.randn(heads, int(blocks[-1]) + 1, HEAD_DIM, generator=generator)[:, blocks]
    return [x[None].to(device) for x in (q + sharpness * content, k + sharpness * content, v)]


def run(attend: Callable[..., Tensor], qkv: list[Tensor]) -> list[Tensor]:
    """Out, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def seconds_of(case: Callable[[], object], rounds: int) -> float:
    """Median over as many rounds on every rank, which wait for each other."""
    times = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        case()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        dist.barrier()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def busiest(kept: Tensor, dealt) -> float:
    """Kept blocks of the rank with the most, in units of the mean."""
    sums = torch.stack([kept[own].sum() for own in dealt]).float()
    return (sums.max() / sums.mean()).item()


if __name__ == "__main__":
    main()
