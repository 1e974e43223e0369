"""What the main loops of our CUDA kernels can reach at most, beside kernels in public use.

    python -m benchmarks.bounds

The rates of the latter are published, and show how far `benchmarks/issue_model.py` is from what is
measured: it leaves out what holds every kernel back, so it lies above them, by less than a fifth.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nabla
from benchmarks.issue_model import RATES, Attention, Bound, Chip, bound
from benchmarks.sass import Kernel, read_kernels

REFERENCE = Path(__file__).parent.parent / "build/reference"
UNIONS = (1.1, 1.3, 1.6)  # blocks that a CTA loads, per block that one of its rows keeps


@dataclass(frozen=True)
class Published:
    """A kernel in public use, with the rate that its authors published."""

    attention: Attention
    tflops: float
    source: str
    tokens: int  # of the measurement, in one sequence
    heads: int
    tile: tuple[int, int]  # query and key tokens of a tile

    def kernel(self) -> Kernel:
        """Read it."""
        (kernel,) = read_kernels(reference_file(), self.attention.pattern)
        return kernel

    def ratio(self, found: Bound) -> float:
        """The modelled rate of the whole measurement over the published one."""
        rows = self.heads * self.tokens / self.tile[0]
        multiprocessors = Chip(self.attention.architecture)["multiprocessors"]
        waves = math.ceil(self.heads * math.ceil(self.tokens / self.tile[0]) / multiprocessors)
        steps = self.tokens / self.tile[1]
        # A row begins with scores and ends with values that nothing overlaps: about a step.
        share = rows / multiprocessors / waves * steps / (steps + 1)
        return found.tflops * share / self.tflops

    def compare(self, found: Bound) -> str:
        """A line of both."""
        return f"{found}, {self.ratio(found):.2f} of the published {self.tflops:.0f}"


FLASH_ATTENTION_3 = "FlashAttention-3 paper, H100 SXM5, 16k tokens, not causal (arXiv 2407.08608)"
HOPPER_NAME = (
    "FlashAttnFwdSm90INS1_25CollectiveMainloopFwdSm90ILi2EN4cute5tupleIJNS5_1CILi{cluster}EEE"
    ".*ILi{m}E.*ELi{d}ENS_10bfloat16_tEfNS_4arch4Sm90E(Lb0E){{7}}Lb{rs}ELb1E(Lb0E){{3}}EENS1_21"
)
PUBLISHED = (
    Published(
        Attention(
            label="FlashAttention-3 D=128",
            pattern=HOPPER_NAME.format(cluster=2, m=176, d=128, rs=1),
            architecture="sm_90a",
            head_dim=128,
            warps=2,
            sharing=2,
            stages=2,
            multicast=2,
        ),
        tflops=648,
        source=FLASH_ATTENTION_3,
        tokens=16384,
        heads=16,
        tile=(128, 176),
    ),
    Published(
        Attention(
            label="FlashAttention-3 D=64",
            pattern=HOPPER_NAME.format(cluster=1, m=192, d=64, rs=0),
            architecture="sm_90a",
            head_dim=64,
            warps=3,
            sharing=3,
            stages=2,
        ),
        tflops=497,
        source=FLASH_ATTENTION_3,
        tokens=16384,
        heads=32,
        tile=(192, 192),
    ),
    Published(
        Attention(
            label="FlashAttention-2 D=128",
            pattern=r"CollectiveMainloopFwdSm80ILi4ELi1ELb0E.*ILi64E.*ELi128ENS_10bfloat16_tEfNS"
            r"_4arch4Sm80E(Lb0E){6}Lb1ELb0EEENS1_21",
            architecture="sm_80",
            head_dim=128,
            warps=1,
            sharing=2,
            stages=2,
            ctas=2,
        ),
        tflops=230,
        source="FlashAttention-2 paper, A100, its best (arXiv 2307.08691)",
        tokens=16384,
        heads=16,
        tile=(128, 64),
    ),
)


def _forward_sm90(head_dim: int, warps: int, stages: int) -> Attention:
    return Attention(
        label=f"sm_90a forward D={head_dim}",
        pattern=f"attention_forward_kernel.*8BFloat16ELi{head_dim}E",
        architecture="sm_90a",
        head_dim=head_dim,
        warps=warps,
        sharing=warps,
        stages=stages,
    )


def _backward_sm90(head_dim: int, stages: tuple[int, int]) -> Iterator[Attention]:
    """Its two passes."""
    passes = (("dk, dv", 0, 4, 2, stages[0]), ("dq", 1, 3, 3, stages[1]))
    for name, number, products, warps, of_ring in passes:
        yield Attention(
            label=f"sm_90a backward of {name} D={head_dim}",
            pattern=f"attention_backward_kernel.*8BFloat16ELi{head_dim}EL.*PassE{number}E",
            architecture="sm_90a",
            head_dim=head_dim,
            warps=warps,
            sharing=warps,
            stages=of_ring,
            products=products,
        )


def _forward_sm80(head_dim: int, ctas: int) -> Attention:
    return Attention(
        label=f"sm_80 forward D={head_dim}",
        pattern=f"attention_forward_kernel.*8BFloat16ELi{head_dim}E",
        architecture="sm_80",
        head_dim=head_dim,
        warps=1,
        sharing=2,
        stages=2,
        ctas=ctas,
        spans_members=True,
    )


def _backward_sm80(head_dim: int, ctas: int) -> Iterator[Attention]:
    """One pass for all, and the two of the deterministic mode."""
    passes = (
        ("", "keys", "Lb1E", 5, 1),
        (" of dk, dv", "keys", "Lb0E", 4, 0),
        (" of dq", "queries", "", 3, 0),
    )
    for name, kernel, argument, products, tiles_added in passes:
        yield Attention(
            label=f"sm_80 backward{name} D={head_dim}",
            pattern=f"attention_backward_{kernel}_kernel.*8BFloat16ELi{head_dim}E{argument}",
            architecture="sm_80",
            head_dim=head_dim,
            warps=1,
            sharing=1,
            stages=3,
            ctas=ctas,
            products=products,
            tiles_added=tiles_added,
        )


KERNELS = (
    _forward_sm90(128, warps=3, stages=6),
    _forward_sm90(64, warps=4, stages=11),
    *_backward_sm90(128, stages=(3, 4)),
    *_backward_sm90(64, stages=(8, 8)),
    _forward_sm80(128, ctas=2),
    _forward_sm80(64, ctas=2),
    *_backward_sm80(128, ctas=2),
    *_backward_sm80(64, ctas=3),
)


def module_file() -> Path:
    """Return the compiled kernels of this package."""
    spec = importlib.util.find_spec("nabla._cuda")
    if spec is None or spec.origin is None:
        reason = Path(nabla.__file__).parent / "_cuda_build.txt"
        why = reason.read_text().strip() if reason.exists() else "it was not installed"
        raise FileNotFoundError(f"there is no nabla._cuda: {why}")
    return Path(spec.origin)


@cache
def compiled(attention: Attention) -> Kernel:
    """Read one of `KERNELS`."""
    kernels = read_kernels(module_file(), attention.pattern)
    (kernel,) = (k for k in kernels if k.architecture == attention.architecture)
    return kernel


def reference_file() -> Path:
    """Return the kernels of `PUBLISHED`, unpacked from the wheel that make fetches."""
    unpacked = REFERENCE / "fa3_fwd/_C.abi3.so"
    if not unpacked.exists():
        wheels = sorted(REFERENCE.glob("fa3_fwd-*.whl"))
        if not wheels:
            raise FileNotFoundError(f"{REFERENCE} has no wheel of fa3-fwd: run make model")
        with zipfile.ZipFile(wheels[-1]) as wheel:
            wheel.extract(str(unpacked.relative_to(REFERENCE)), REFERENCE)
    return unpacked


def main() -> int:
    """Print the assumptions, what is published and our bounds; 1 if something is missing."""
    for rate in RATES:
        print(f"{rate.name:26} {rate.sm_90a:7g} {rate.sm_80:7g} {rate.unit:9} {rate.source}")
    missing = 0
    for lines in (published_lines, our_lines):
        try:
            for line in lines():
                print(line)
        except FileNotFoundError as error:
            print(f"benchmarks.bounds: {error}", file=sys.stderr)
            missing = 1
    return missing


def published_lines() -> Iterator[str]:
    """A line for each kernel in public use."""
    for published in PUBLISHED:
        yield published.compare(bound(published.kernel().main_loop(), published.attention))


def our_lines() -> Iterator[str]:
    """A line for each of our kernels and each union."""
    for attention in KERNELS:
        loop = compiled(attention).main_loop()
        for union in UNIONS:
            yield str(bound(loop, attention, union))


if __name__ == "__main__":
    sys.exit(main())
