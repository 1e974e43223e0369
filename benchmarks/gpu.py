"""The stages on a GPU against what they replace, at the shapes of real models, in bf16.

    python -m benchmarks.gpu OUT.json [--seconds 300] [--workloads k5-lite-10s ...]

machine   bandwidth of a copy (bytes read and written), rate of a matrix product
mask      building a NABLA mask / reading q and k once at that bandwidth / building it by sorting
forward   E = density * (fastest dense attention) / ours, beside compiled flex_attention
backward  E alike, of the backward alone; FLOPs are those of the kept blocks, 2.5 times the forward

Times are medians with the 20th and 80th percentile, of cases that run in turn. What gives wrong
output gets no time. The exit status is 1 if that was ours.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import nabla
from benchmarks.timing import Seconds, interleaved, summary
from benchmarks.workloads import WORKLOADS, Workload
from nabla import BlockMask
from nabla.bits import unpack_bits

DTYPE = torch.bfloat16
L2_BYTES = 256 << 20  # more than any GPU has
FLEX_OPTIONS = {"BLOCK_M": 64, "BLOCK_N": 64}  # its blocks are 64, and its own choice is larger
ROUND_SECONDS = 3.0  # that the rounds of a table may take together

Cases = dict[str, Callable[[], object]]


class WrongOutput(Exception):
    """What a kernel computed, and by how much it is wrong."""


def main() -> int:
    """Measure on the GPU at hand and write the rows; return the exit status."""
    parser = argparse.ArgumentParser(description="The stages on a GPU, against what they replace.")
    parser.add_argument("out", type=Path, help="where the rows are written, as JSON")
    parser.add_argument("--seconds", type=float, default=300, help="no case begins after that")
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--workloads", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: there is no CUDA device", file=sys.stderr)
        return 2
    chosen = [workload for workload in WORKLOADS if workload.name in options.workloads]
    benchmark = Benchmark(torch.device("cuda"), options.seconds, options.out)
    benchmark.run(chosen)
    return 1 if benchmark.failures else 0


class Benchmark:
    """Measures on one device and writes each row as soon as it is there.

    Args:
        device: Where to measure.
        seconds: After which no case begins.
        out: The file of the rows.
        compiler: What compiles the peers.
    """

    def __init__(
        self,
        device: torch.device,
        seconds: float,
        out: Path,
        compiler: Callable[..., Callable] = torch.compile,
    ) -> None:
        self.device, self.out = device, out
        self.deadline = time.monotonic() + seconds
        self.rows: list[dict] = []
        self.failures = 0
        self.bandwidth = 1.0  # bytes per second
        self.sort = compiler(build_by_sorting, dynamic=True)
        self.flex = compiler(flex_attention, dynamic=False)

    def run(self, workloads: Sequence[Workload]) -> None:
        """Measure all; the forward of every workload before any backward."""
        self.attempt("machine", self.measure_machine)
        stages = (self.measure_mask, self.measure_forward, self.measure_backward)
        for case, stage in zip(("mask", "forward", "backward"), stages, strict=True):
            for workload in workloads:
                self.attempt(case, lambda s=stage, w=workload: s(w), workload=workload.name)

    def emit(self, case: str, **row: object) -> None:
        """Add a row, print it, and write all rows."""
        self.rows.append({"case": case, **row})
        values = (f"{name}={_shown(value)}" for name, value in row.items())
        print(f"{case:9}", *values, flush=True)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.rows, indent=1) + "\n")

    def attempt(self, case: str, measure: Callable[[], None], **about: object) -> None:
        """Measure; what goes wrong becomes a row and a failure, and stops nothing else."""
        if time.monotonic() > self.deadline:
            self.emit(case, **about, skipped="out of time")
            return
        try:
            measure()
        except Exception as error:
            self.failures += 1
            self.emit(case, **about, error=f"{type(error).__name__}: {str(error)[:300]}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def timed(self, cases: Cases) -> dict[str, Seconds]:
        """Time cases in turn, after each has run once."""
        if self.device.type != "cuda":
            return interleaved(cases, rounds=3)
        flushed = torch.empty(L2_BYTES, dtype=torch.uint8, device=self.device)
        spans: dict[str, list[float]] = {name: [] for name in cases}
        rounds, done = 3, 0
        while done < rounds:
            began = time.monotonic()
            for name, case in cases.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flushed.zero_()  # empties the L2 cache, and gives the launches a head start
                start.record()
                case()
                end.record()
                end.synchronize()
                spans[name].append(start.elapsed_time(end) / 1e3)
            done += 1
            rounds = min(max(int(ROUND_SECONDS / (time.monotonic() - began)), 3), 20)
        return {name: summary(values) for name, values in spans.items()}

    def working(self, cases: Cases, **about: object) -> Cases:
        """Run the peers once; those that cannot run here get a row instead of a time."""
        kept = {}
        for name, case in cases.items():
            try:
                case()
            except Exception as error:
                what = f"{type(error).__name__}: {str(error)[:200]}"
                self.emit("peer", **about, implementation=name, error=what)
            else:
                kept[name] = case
        return kept

    def measure_machine(self) -> None:
        """Bandwidth of a copy, and the rate of a matrix product, on random data."""
        is_gpu = self.device.type == "cuda"
        source = torch.randn(1 << (30 if is_gpu else 20), device=self.device, dtype=DTYPE)
        target = torch.empty_like(source)
        size = 8192 if is_gpu else 128
        a, b = torch.randn(2, size, size, device=self.device, dtype=DTYPE)
        times = self.timed({"copy": lambda: target.copy_(source), "gemm": lambda: a @ b})
        self.bandwidth = 2 * source.nbytes / times["copy"].median
        self.emit("machine", what="copy", tb_per_s=self.bandwidth / 1e12, ms=_ms(times["copy"]))
        rate = 2 * size**3 / times["gemm"].median / 1e12
        self.emit("machine", what=f"gemm {size}", tflops=rate, ms=_ms(times["gemm"]))

    def measure_mask(self, workload: Workload) -> None:
        """Our mask builder against one pass over q and k, and against sorting."""
        q, k, _ = inputs(workload, self.device)
        options = {"grid": workload.grid, "top_p": workload.top_p, "window": workload.window}
        near = nabla.sliding_tile_mask(workload.grid, workload.window, device=self.device)
        near = near.to_dense()[0, 0]

        def ours() -> BlockMask:
            return nabla.create_block_mask(q, k, **options)

        check_mask(q, k, ours(), options)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            mask = ours()
            extra = torch.cuda.max_memory_allocated() - before - mask.bits.nbytes
            self.emit("mask", workload=workload.name, extra_mb=extra / 1e6)
        peers = {"sorting": lambda: self.sort(q, k, near, workload.grid, workload.top_p)}
        times = self.timed({"ours": ours, **self.working(peers, workload=workload.name)})
        once = (q.nbytes + k.nbytes) / self.bandwidth
        for name, spent in times.items():
            self.emit(
                "mask",
                workload=workload.name,
                implementation=name,
                ms=_ms(spent),
                times_reading_q_and_k=spent.median / once,
                speedup_of_ours=spent.median / times["ours"].median,
            )

    def measure_forward(self, workload: Workload) -> None:
        """Attention over masks of every density against the fastest dense attention, and flex."""
        q, k, v = inputs(workload, self.device)
        dense = {name: lambda f=f: f(q, k, v) for name, f in dense_attention(self.device).items()}
        fastest = self.measure_dense("forward", workload, dense, workload.flops)
        for density in workload.densities:
            mask = nabla_like_mask(workload, density, self.device)
            about = {"workload": workload.name, "density": float(mask.density())}

            def ours(mask: BlockMask = mask) -> tuple[Tensor, Tensor]:
                return nabla.block_sparse_attention(q, k, v, mask, return_lse=True)

            out, lse = ours()
            check_forward(q, k, v, mask, out, lse)
            lists = mask.to_flex()

            def flex(lists=lists) -> Tensor:
                return self.flex(q, k, v, block_mask=lists, kernel_options=FLEX_OPTIONS)

            def flex_is_right(flex=flex, out=out) -> None:
                _compare("flex_attention", flex(), out.double(), 4 * torch.finfo(DTYPE).eps)

            peers = {"flex": flex} if self.working({"flex": flex_is_right}, **about) else {}
            times = self.timed({"ours": ours, **peers})
            self.emit_sparse("forward", about, times, workload.flops, fastest)

    def measure_backward(self, workload: Workload) -> None:
        """The backward over masks of every density against the fastest dense one."""
        q, k, v = (x.requires_grad_() for x in inputs(workload, self.device))
        dout = torch.randn_like(q)

        def backward(attend: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
            out = attend()
            return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

        dense = {}
        for name, attend in dense_attention(self.device).items():
            case = {name: lambda f=attend: backward(lambda: f(q, k, v))()}
            if self.working(case, workload=workload.name):
                dense[name] = backward(lambda f=attend: f(q, k, v))
        fastest = self.measure_dense("backward", workload, dense, 2.5 * workload.flops)
        dense.clear()
        for density in workload.densities:
            mask = nabla_like_mask(workload, density, self.device)
            out, lse = nabla.block_sparse_attention(q, k, v, mask, return_lse=True)
            ours = backward(lambda out=out: out)
            check_backward(q, k, v, mask, out.detach(), lse.detach(), dout, ours())
            about = {"workload": workload.name, "density": float(mask.density())}
            times = self.timed({"ours": ours})
            self.emit_sparse("backward", about, times, 2.5 * workload.flops, fastest)

    def measure_dense(self, case: str, workload: Workload, dense: Cases, flops: float) -> float:
        """Time the dense attentions that run here; return the seconds of the fastest."""
        times = self.timed(self.working(dense, workload=workload.name))
        for name, spent in times.items():
            self.emit(
                case,
                workload=workload.name,
                implementation=name,
                density=1.0,
                ms=_ms(spent),
                tflops=flops / spent.median / 1e12,
            )
        return min((spent.median for spent in times.values()), default=float("nan"))

    def emit_sparse(
        self, case: str, about: dict, times: dict[str, Seconds], flops: float, dense: float
    ) -> None:
        """Add the rows of one mask; `dense` is the time of the fastest dense attention."""
        for name, spent in times.items():
            self.emit(
                case,
                **about,
                implementation=name,
                ms=_ms(spent),
                tflops=about["density"] * flops / spent.median / 1e12,
                E=about["density"] * dense / spent.median,
                speedup_over_dense=dense / spent.median,
                speedup_of_ours=spent.median / times["ours"].median,
            )


def inputs(workload: Workload, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [1, H, S, D] whose blocks differ, as those of a model do."""
    torch.manual_seed(0)
    grid = workload.grid
    q, k, v = (
        torch.randn(1, workload.heads, grid.num_tokens, workload.head_dim, device=device).to(DTYPE)
        for _ in range(3)
    )
    shape = (workload.heads, grid.num_blocks, 1, workload.head_dim)
    blocks = torch.randn(shape, device=device, dtype=DTYPE)
    for x in (q, k):
        x[0].unflatten(1, (grid.num_blocks, grid.block_size)).add_(blocks)
    return q, k, v


def nabla_like_mask(workload: Workload, density: float, device: torch.device) -> BlockMask:
    """A window or, in rows of different lengths, blocks that for the most part recur over time."""
    torch.manual_seed(0)
    grid = workload.grid
    near = nabla.sliding_tile_mask(grid, workload.window, device=device).to_dense()[0, 0]
    num_blocks, per_frame = grid.num_blocks, grid.num_blocks // grid.blocks[0]
    missing = (density - near.float().mean()).clamp(min=0) / (1 - near.float().mean())
    keep = torch.empty(1, workload.heads, num_blocks, num_blocks, dtype=torch.bool, device=device)
    for head in range(workload.heads):
        share = missing * (0.5 + torch.rand(per_frame, 1, device=device)).repeat(grid.blocks[0], 1)
        recurring = torch.rand(per_frame, num_blocks, device=device).repeat(grid.blocks[0], 1)
        own = torch.rand(num_blocks, num_blocks, device=device)
        is_recurring = recurring < 0.7 * share
        keep[0, head] = near | is_recurring | (own < 0.3 * share / (1 - 0.7 * share))
    return BlockMask.from_dense(keep, grid=grid)


def build_by_sorting(
    q: Tensor, k: Tensor, near: Tensor, grid: nabla.TokenGrid, top_p: float
) -> tuple[Tensor, Tensor]:
    """Build the lists of blocks (counts, indices) as public NABLA does, with three sorts."""
    q_mean, k_mean = (x.unflatten(2, (-1, grid.block_size)).mean(3) for x in (q, k))
    scores = (q_mean @ k_mean.transpose(-2, -1) * q.shape[-1] ** -0.5).float().softmax(-1)
    values, order = scores.sort(-1)
    kept = (values.cumsum(-1) >= 1 - top_p).int().gather(-1, order.argsort(-1)).bool() | near
    return kept.sum(-1), kept.int().argsort(-1, descending=True)


def dense_attention(device: torch.device) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The dense attentions that may run on a device, by name."""
    if device.type != "cuda":
        return {"sdpa": F.scaled_dot_product_attention}

    def sdpa(kernel: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v)

        return attend

    found = {"cudnn": sdpa(SDPBackend.CUDNN_ATTENTION), "flash": sdpa(SDPBackend.FLASH_ATTENTION)}
    try:
        fa3 = importlib.import_module("fa3_fwd_interface").flash_attn_func
    except ImportError:
        return found

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = fa3(*(x.transpose(1, 2) for x in (q, k, v)))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return found | {"fa3": attend}


# What is compared, in float64: some blocks of the first and the last head.


def check_mask(q: Tensor, k: Tensor, mask: BlockMask, options: dict) -> None:
    """Compare one head with the reference, up to blocks at the cut."""
    exact = nabla.create_block_mask(q[:, :1], k[:, :1], **options, backend="reference")
    ours = BlockMask(mask.bits[:, :1], mask.grid).to_dense()
    differing = (ours != exact.to_dense()).float().mean().item()
    if differing > 1e-4:
        raise WrongOutput(f"{differing:.2%} of the mask differs from the reference")


def check_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, out: Tensor, lse: Tensor
) -> None:
    """Rows of out and lse may have twice the error of masked SDPA in the same precision."""
    scale = q.shape[-1] ** -0.5
    for head, block in _samples(mask):
        rows = _tokens(mask, block)
        keep = _kept_tokens(mask, mask.bits[0, head, block])
        keys, values = k[0, head].double(), v[0, head].double()
        scores = (q[0, head, rows].double() @ keys.T * scale).masked_fill(~keep, -torch.inf)
        exact = scores.softmax(-1) @ values
        low = F.scaled_dot_product_attention(
            q[:, head, None, rows], k[:, head, None], v[:, head, None], keep[None, None, None]
        )
        _compare("out", out[0, head, rows], exact, 2 * (low[0, 0] - exact).abs().max().item())
        _compare("lse", lse[0, head, rows], scores.logsumexp(-1), 1e-4)


def check_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    gradients: Sequence[Tensor],
) -> None:
    """Rows of dq, dk and dv against their formulas, up to four roundings of the largest."""
    columns = mask.transpose()
    for head, block in _samples(mask):
        tokens, everything = _tokens(mask, block), slice(None)
        one_head = [x[0, head].detach().double() for x in (q, k, v, out, dout)]
        of_block = {
            "dq": (tokens, everything, _kept_tokens(mask, mask.bits[0, head, block])),
            "dkdv": (everything, tokens, _kept_tokens(mask, columns.bits[0, head, block])[:, None]),
        }
        dq, _, _ = _exact_gradients(*one_head, lse[0, head], *of_block["dq"])
        _, dk, dv = _exact_gradients(*one_head, lse[0, head], *of_block["dkdv"])
        for name, ours, exact in zip(("dq", "dk", "dv"), gradients, (dq, dk, dv), strict=True):
            allowed = 4 * torch.finfo(q.dtype).eps * exact.abs().max().item()
            _compare(name, ours[0, head, tokens], exact, allowed)


def _exact_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    rows: slice,
    columns: slice,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What some queries and keys of a head give to dq, dk and dv."""
    scale = q.shape[-1] ** -0.5
    delta = (dout[rows] * out[rows]).sum(-1, keepdim=True)
    p = (q[rows] @ k[columns].T * scale - lse[rows, None].double()).exp() * kept
    ds = p * (dout[rows] @ v[columns].T - delta) * scale
    return ds @ k[columns], ds.T @ q[rows], p.T @ dout[rows]


def _samples(mask: BlockMask) -> set[tuple[int, int]]:
    """Heads and blocks that are compared."""
    num_blocks = mask.grid.num_blocks
    blocks = (0, num_blocks // 2, num_blocks - 1)
    return {(head, block) for head in (0, mask.shape[1] - 1) for block in blocks}


def _tokens(mask: BlockMask, block: int) -> slice:
    return slice(mask.grid.block_start(block), mask.grid.block_start(block + 1))


def _kept_tokens(mask: BlockMask, bits: Tensor) -> Tensor:
    """Booleans [S] of a row of bits."""
    sizes = mask.grid.starts(bits.device).diff().long()
    return unpack_bits(bits, mask.grid.num_blocks).repeat_interleave(sizes)


def _compare(name: str, actual: Tensor, exact: Tensor, allowed: float) -> None:
    """Raise if the largest error is above what is allowed, beside a few roundings of float32."""
    error = (actual.detach().double() - exact).abs().max().item()
    allowed += 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()
    if not error <= allowed:
        raise WrongOutput(f"{name}: error {error:.2e} above {allowed:.2e}")


def _ms(seconds: Seconds) -> dict[str, float]:
    return {name: value * 1e3 for name, value in seconds._asdict().items()}


def _shown(value: object) -> str:
    if isinstance(value, dict):  # of milliseconds
        return f"{value['median']:.3f} ({value['p20']:.3f}-{value['p80']:.3f})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
