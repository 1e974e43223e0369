"""What the main loop of a kernel can reach at most, from its SASS: a model, no measurement.

One sub-partition of a multiprocessor is simulated, with the warps that compute on it; the other
three do the same at the same time. A warp issues in order, once its stall count and its scoreboard
barriers allow it and the pipe is free. The products of a warp group run asynchronously, one after
the other, and hold it up where it waits for them. The bound is the work of the loop over its
simulated time, or over the time in which L2 delivers the blocks, whichever is longer:

    TFLOP/s = multiprocessors * clock * FLOP / max(simulated, L2)

Not modelled: DRAM, the ends of rows, register banks, the instruction cache. `benchmarks/bounds.py`
has kernels whose rate is published. Half or one and a half times an assumed latency changes their
bounds by less than a tenth, another order of the warps that are ready by up to a quarter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

from benchmarks.sass import NO_BARRIER, Instruction, Loop

BLOCK = 64  # tokens
SUB_PARTITIONS = 4
WARP = 32


class Rate(NamedTuple):
    """An assumption of the model, for both chips, and where it comes from."""

    name: str
    unit: str
    sm_90a: float
    sm_80: float
    source: str


GUIDE = "CUDA C++ programming guide, throughput of native arithmetic instructions"
RATES = (
    Rate("multiprocessors", "", 132, 108, "white papers of H100 (SXM) and A100"),
    # Power limits an H100: this is the clock at which its tensor cores do what cuBLAS reaches in
    # bf16 at 8192^3 with normal data, 798 TFLOP/s. An A100 holds its boost clock.
    Rate("clock", "GHz", 1.476, 1.41, "README of pranjalssh/fast.cu; white paper of A100"),
    Rate("tensor", "FLOP/clk", 4096, 2048, "white papers: 989 and 312 TFLOP/s in bf16, dense"),
    Rate("fp32", "lanes/clk", 128, 64, GUIDE),
    Rate("alu", "lanes/clk", 64, 64, GUIDE + ": integers, compare, minimum, conversion"),
    Rate("exp2", "lanes/clk", 16, 16, GUIDE + ": ex2"),
    Rate("shuffle", "lanes/clk", 32, 32, GUIDE + ": warp shuffle"),
    Rate("shared", "B/clk", 128, 128, "programming guide: 32 banks of 4 bytes"),
    Rate("l2", "TB/s", 8.4, 3.6, "measured (benchmarks/l2.py); A100: 2,560 B/clk, by its slices"),
    Rate("latency of exp2", "clk", 20, 20, "assumed"),
    Rate("latency of shared memory", "clk", 30, 30, "assumed; also of shuffles and barriers"),
    Rate("latency of a product", "clk", 32, 32, "assumed, from the end of its slot to its result"),
    Rate("latency of a load", "clk", 700, 700, "assumed, from a released stage to a full one"),
)


class Chip:
    """The column of `RATES` for an architecture."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        self._rates = {rate.name: getattr(rate, architecture) for rate in RATES}

    def __getitem__(self, name: str) -> float:
        return self._rates[name]

    def cycles(self, pipe: str) -> float:
        """For how long an instruction of one warp takes a pipe of its sub-partition."""
        return WARP * SUB_PARTITIONS / self[pipe]


# Pipes by opcode. What is in none (uniform, control, special registers) takes an issue slot only.
PIPES = {
    "fp32": "FADD FFMA FMUL IMAD",
    "alu": "F2FP FMNMX FSEL FSETP I2FP IADD3 IMNMX ISETP LEA LOP3 MOV PLOP3 PRMT SEL SHF VIADD "
    "VIMNMX",
    "exp2": "MUFU",
    "memory": "ATOMS LDGSTS LDS LDSM SHFL STS STSM",
}
PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}


class Product(NamedTuple):
    """A matrix product of a warp group (HGMMA) or of four warps, one a sub-partition (HMMA)."""

    flop: int
    shared_bytes: int  # read by the product itself
    is_asynchronous: bool


def product_of(instruction: Instruction) -> Product | None:
    """What an instruction multiplies, if it does; inputs have 2 bytes."""
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.", instruction.opcode):
        m, n, k = map(int, found.groups())
        a_is_shared = not re.match(r"R\d+, R\d+", instruction.operands)
        return Product(2 * m * n * k, 2 * k * (n + m * a_is_shared), True)
    if found := re.match(r"HMMA\.(16)(8)(16|8)\.", instruction.opcode):
        return Product(2 * math.prod(map(int, found.groups())) * SUB_PARTITIONS, 0, False)
    return None


def shared_bytes(instruction: Instruction) -> int:
    """Bytes of shared memory that an instruction of one warp moves, other than by products."""
    if instruction.name in ("LDSM", "STSM"):
        return 8 * 16 * int(instruction.opcode.rsplit(".", 1)[-1])
    if instruction.name in ("LDS", "STS", "LDGSTS"):
        width = re.search(r"\.(128|64|U?16|U?8)\b", instruction.opcode)
        return WARP * (int(width[1].strip("U")) // 8 if width else 4)
    return 0


class Step(NamedTuple):
    """An instruction as the simulation needs it."""

    pipe: str
    cycles: float  # of its pipe
    latency: float  # until its write barrier counts down
    shared: float  # cycles of shared memory, by all sub-partitions
    stall: int
    waits: tuple[int, ...]  # the barriers that have to be at zero
    write: int  # the barrier that counts down with the result, or NO_BARRIER
    read: int  # the barrier that counts down when the operands are read, or NO_BARRIER
    is_asynchronous: bool  # a product
    closes_group: bool  # of asynchronous products
    groups: int  # that may be in flight past this wait; -1: it does not wait for products
    barrier: str  # "turn", "pass", "meet" or empty


def steps_of(path: Iterable[Instruction], chip: Chip, copied_bytes: float = 0) -> tuple[Step, ...]:
    """Prepare a way through a loop; meanwhile `copied_bytes` go into or out of shared memory."""
    path = tuple(path)
    products = sum(product_of(instruction) is not None for instruction in path)
    return tuple(_step(i, chip, copied_bytes / products if products else 0) for i in path)


def _step(instruction: Instruction, chip: Chip, copied_bytes: float) -> Step:
    pipe = PIPE_OF.get(instruction.name, "")
    product = product_of(instruction)
    latency = chip["latency of exp2"] if pipe == "exp2" else chip["latency of shared memory"]
    moved: float = shared_bytes(instruction) * SUB_PARTITIONS
    cycles = 0.0
    if product:
        pipe, cycles = "tensor", product.flop / chip["tensor"]
        moved = product.shared_bytes + (copied_bytes if product.is_asynchronous else 0)
    elif pipe == "memory":
        cycles = max(chip.cycles("shuffle"), moved / chip["shared"])
    elif pipe:
        cycles = chip.cycles(pipe)
    groups = -1
    if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        groups = int(instruction.operands.split(",")[-1], 16)
    return Step(
        pipe=pipe,
        cycles=cycles,
        latency=latency,
        shared=moved / chip["shared"],
        stall=max(1, instruction.stall),
        waits=tuple(b for b in range(6) if instruction.wait_mask >> b & 1),
        write=instruction.write_barrier,
        read=instruction.read_barrier,
        is_asynchronous=product is not None and product.is_asynchronous,
        closes_group=instruction.name == "HGMMA" and "gsb0" in instruction.operands,
        groups=groups,
        barrier=_barrier(instruction),
    )


def _barrier(instruction: Instruction) -> str:
    """What a named barrier is for: in turn (its number is computed), or to meet the whole CTA."""
    if instruction.name != "BAR":
        return ""
    name, *count = (operand.strip() for operand in instruction.operands.split(","))
    if count and count[0] in ("0x20", "0x80"):
        return ""  # the own warp or warp group only
    if name.startswith("R"):
        return "pass" if ".ARV" in instruction.opcode else "turn"
    return "" if ".ARV" in instruction.opcode else "meet"


class Warp:
    """One warp of the simulated sub-partition."""

    def __init__(self, programs: Sequence[tuple[Step, ...]], cta: list[Warp]) -> None:
        self.programs = programs  # ways through the loop, in turn, again and again
        self.cta = cta  # the warps of its CTA, which it joins
        self.round = self.position = 0
        self.ready = 0.0
        self.barriers = [0.0] * 6  # when each counts down to zero
        self.groups: list[float] = []  # when each group of asynchronous products ends
        self.turns = 0 if cta else 1
        self.is_met = False  # it waits for its CTA
        self.ends: list[float] = []  # of rounds
        cta.append(self)

    @property
    def step(self) -> Step:
        """The next instruction."""
        return self.programs[self.round % len(self.programs)][self.position]

    def advance(self, time: float) -> None:
        """Go on to the next instruction."""
        self.position += 1
        if self.position == len(self.programs[self.round % len(self.programs)]):
            self.position = 0
            self.round += 1
            self.ends.append(time)


class SubPartition:
    """A quarter of a multiprocessor: one instruction a cycle, and its pipes."""

    def __init__(self, chip: Chip, warps: Sequence[Warp], stages: int) -> None:
        self.chip, self.warps, self.stages = chip, warps, stages
        self.clock = 0.0
        self.latest: Warp | None = None
        # Until when each pipe is taken. FP32 instructions go to either half of 128 lanes.
        self.pipes = {pipe: [0.0] for pipe in (*PIPES, "tensor")}
        self.pipes["fp32"] *= 2 if chip["fp32"] > 64 else 1
        self.shared = 0.0  # until when shared memory is busy

    def run(self) -> Warp:
        """Issue the next instruction; return its warp."""
        # The scheduler goes on with the same warp, else takes the youngest (arXiv 2503.20481).
        time, _, index = min(
            (self._earliest(warp), warp is not self.latest, -index)
            for index, warp in enumerate(self.warps)
        )
        if time == math.inf:
            raise RuntimeError("every warp waits for another: the loop is not what it seems")
        warp = self.latest = self.warps[-index]
        self.clock = time + 1
        self._issue(warp, warp.step, time)
        warp.advance(time)
        return warp

    def _earliest(self, warp: Warp) -> float:
        """When a warp can issue its next instruction, as far as that is known."""
        step = warp.step
        time = max(self.clock, warp.ready)
        for barrier in step.waits:
            time = max(time, warp.barriers[barrier])
        if step.pipe and not step.is_asynchronous:
            time = max(time, min(self.pipes[step.pipe]))
        if 0 <= step.groups < len(warp.groups):
            last = warp.groups[len(warp.groups) - step.groups - 1]
            time = max(time, last + self.chip["latency of a product"])
        if warp.is_met or (step.barrier == "turn" and not warp.turns):
            return math.inf
        if warp.position == 0 and warp.round >= self.stages:
            released = warp.round - self.stages
            if any(len(other.ends) <= released for other in warp.cta):
                return math.inf
            last = max(other.ends[released] for other in warp.cta)
            time = max(time, last + self.chip["latency of a load"])
        return time

    def _issue(self, warp: Warp, step: Step, time: float) -> None:
        if step.is_asynchronous:
            self._multiply(warp, step, time)
        elif step.pipe:
            pipe = self.pipes[step.pipe]
            pipe[pipe.index(min(pipe))] = time + step.cycles * len(pipe)
            if step.shared:
                self.shared = max(self.shared, time) + step.shared
        for barrier, latency in ((step.write, step.latency), (step.read, 8.0)):
            if barrier != NO_BARRIER:
                at = time + max(latency, step.cycles)
                warp.barriers[barrier] = max(warp.barriers[barrier], at)
        warp.ready = time + step.stall
        if step.barrier == "turn":
            warp.turns -= 1
        elif step.barrier == "pass":
            warp.cta[(warp.cta.index(warp) + 1) % len(warp.cta)].turns += 1
        elif step.barrier == "meet":
            warp.is_met = True
            if all(other.is_met for other in warp.cta):
                for other in warp.cta:
                    other.is_met = False
                    other.ready = time + self.chip["latency of shared memory"]

    def _multiply(self, warp: Warp, step: Step, time: float) -> None:
        """Queue an asynchronous product. Its operands may arrive one product ahead of their use."""
        (busy,) = self.pipes["tensor"]
        start = max(busy, time, self.shared - step.cycles)
        self.shared = max(self.shared, start) + step.shared
        end = max(start + step.cycles, self.shared)
        self.pipes["tensor"] = [end]
        if step.closes_group:
            warp.groups.append(end)


def simulate(
    programs: Sequence[Sequence[tuple[Step, ...]]],
    chip: Chip,
    *,
    ctas: int = 1,
    stages: int = 2,
    rounds: int = 48,
    apart: float = 0.0,
) -> float:
    """Return the cycles that a round of the loop takes, once it is in its stride.

    Args:
        programs: Of each warp of a CTA on the sub-partition, its ways through the loop in turn.
        chip: The rates.
        ctas: CTAs that a multiprocessor holds.
        stages: Rounds that a warp may be ahead of the others of its CTA.
        rounds: How many to simulate; the second half is measured.
        apart: Cycles between the first instructions of a warp and the next.

    Returns:
        Cycles in which every warp has gone round the loop once.
    """
    warps = []
    for _ in range(ctas):
        cta: list[Warp] = []
        warps += [Warp(program, cta) for program in programs]
    for index, warp in enumerate(warps):
        warp.ready = index * apart
    sub_partition = SubPartition(chip, warps, stages)
    ends: list[float] = []
    while len(ends) < rounds * len(warps):
        warp = sub_partition.run()
        if warp.position == 0:
            ends.append(warp.ends[-1])
    half = len(ends) // 2
    return (ends[-1] - ends[half - 1]) / (len(ends) - half) * len(warps)


APART = (0.0, 25.0, 75.0, 125.0, 225.0, 325.0)  # cycles between the starts of warps, that are tried


@dataclass(frozen=True)
class Attention:
    """What a loop computes, as far as its SASS does not tell."""

    label: str
    pattern: str  # in the mangled name of the kernel
    architecture: str
    head_dim: int
    warps: int  # of a CTA on a sub-partition: warp groups on sm_90a
    sharing: float  # blocks of a CTA that one load of a block into shared memory serves
    stages: int  # rounds of the loop that the ring of a CTA holds
    ctas: int = 1  # on a multiprocessor
    products: int = 2  # matrix products of a 64x64 block: 2 forward, 5 backward in one pass
    tiles_loaded: int = 2  # [64, head_dim] of 2 bytes, for each block
    tiles_added: int = 0  # [64, head_dim] of 4 bytes that it adds in global memory
    multicast: int = 1  # CTAs that one read of L2 serves
    # Each warp has rows of the two query blocks, and multiplies for those that keep a block; else
    # it has rows of one, and never sees what that one does not keep.
    spans_members: bool = False

    @property
    def flop(self) -> int:
        """Of a 64x64 block."""
        return 2 * self.products * BLOCK * BLOCK * self.head_dim

    @property
    def added_bytes(self) -> float:
        """Copied out of shared memory for a 64x64 block."""
        return 4 * BLOCK * self.head_dim * self.tiles_added

    def filled_bytes(self, union: float) -> float:
        """Copied into shared memory for a 64x64 block."""
        return 2 * BLOCK * self.head_dim * self.tiles_loaded * union / self.sharing

    def l2_bytes(self, union: float) -> float:
        """To and from L2 for a 64x64 block."""
        return self.filled_bytes(union) / self.multicast + self.added_bytes


class Bound(NamedTuple):
    """Cycles of a multiprocessor for each 64x64 block, and the rate that they allow."""

    label: str
    union: float  # blocks loaded / blocks of one row that are kept
    tensor: float
    exp2: float
    fp32: float
    alu: float
    shared: float
    l2: float
    issue: float
    simulated: float
    tflops: float
    bottleneck: str

    def __str__(self) -> str:
        cycles = " ".join(f"{name} {getattr(self, name):4.0f}" for name in self._fields[2:10])
        return (
            f"{self.label:24} union {self.union:.1f}: {cycles} clk per 64x64 block, "
            f"bound {self.tflops:3.0f} TFLOP/s by {self.bottleneck}"
        )


def bound(loop: Loop, attention: Attention, union: float = 1.0) -> Bound:
    """Return what a main loop can reach at most.

    Args:
        loop: Of the kernel as it was compiled.
        attention: What it computes.
        union: Blocks that a CTA loads, per block that one of its rows keeps: 1 if it has but one.
    """
    chip = Chip(attention.architecture)
    union = union if attention.sharing > 1 else 1.0
    ways = _ways(loop, attention, union)
    copied = attention.filled_bytes(union) + attention.added_bytes

    def blocks_of(way: Sequence[Instruction]) -> float:
        flop = sum(product.flop for i in way if (product := product_of(i)))
        return flop / attention.flop

    steps = {way: steps_of(way, chip, copied * blocks_of(way)) for way in {*chain(*ways)}}
    programs = [[steps[way] for way in of_warp] for of_warp in ways]
    length = len(programs[0])
    # Warps that come into step may stay so, and get in each other's way; a bound is of the best.
    cycles = min(
        simulate(
            programs,
            chip,
            ctas=attention.ctas,
            stages=attention.stages,
            rounds=2 * length * math.ceil(16 / length),
            apart=apart,
        )
        for apart in APART
    )
    blocks = sum(map(blocks_of, ways[0]))  # of one warp in all of its ways through the loop
    simulated = cycles * length / (blocks * attention.warps * attention.ctas)
    issued = [step for program in programs[0] for step in program]

    def of_pipe(pipe: str) -> float:
        return sum(step.cycles for step in issued if step.pipe == pipe) / blocks

    bytes_per_clock = chip["l2"] * 1e3 / chip["clock"] / chip["multiprocessors"]
    resources = {
        "tensor": of_pipe("tensor"),
        "exp2": of_pipe("exp2"),
        "fp32": of_pipe("fp32"),
        "alu": of_pipe("alu"),
        "shared": sum(step.shared for step in issued) / blocks,
        "l2": attention.l2_bytes(union) / bytes_per_clock,
        "issue": len(issued) / blocks,
    }
    slowest = max(resources, key=lambda name: resources[name])
    clocks = max(simulated, resources["l2"])
    return Bound(
        label=attention.label,
        union=union,
        **resources,
        simulated=simulated,
        tflops=attention.flop / clocks * chip["multiprocessors"] * chip["clock"] / 1e3,
        bottleneck=slowest if resources[slowest] > 0.95 * clocks else "waits",
    )


def _ways(loop: Loop, attention: Attention, union: float) -> list[list[tuple[Instruction, ...]]]:
    """Ways through the blocks of a union, for each warp: of its own, and of others that it sees."""
    warps = attention.warps
    if union == 1 or not attention.spans_members:
        return [[loop.path]] * warps
    kept_rounds = 20  # of a row
    rounds = round(kept_rounds * union)
    # What a row does not keep is kept by the other one, and neither row's blocks are those of both.
    others = 2 * (rounds - kept_rounds)
    gaps = {int(i * rounds / others) for i in range(others)}
    return [[loop.part if i in gaps else loop.path for i in range(rounds)]] * warps


def with_waits_first(loop: Loop) -> Loop:
    """A copy of a loop that waits for each group of products as soon as it is issued."""
    waits = [i for i in loop.path if i.opcode.startswith("WARPGROUP.DEPBAR")]
    path = []
    for instruction in loop.path:
        if instruction not in waits:
            path.append(instruction)
        if instruction.name == "HGMMA" and "gsb0" in instruction.operands:
            path.append(replace(waits[0], operands="gsb0, 0x0"))
    return replace(loop, path=tuple(path))


def overlapped(loop: Loop, name: str) -> float:
    """The share of a loop's instructions of a name that are issued with products in flight."""
    steps = steps_of(loop.path, Chip("sm_90a"))
    in_flight = 0
    for _ in range(2):  # what is in flight at the end is so at the beginning
        found = []
        for instruction, step in zip(loop.path, steps, strict=True):
            if step.groups >= 0:
                in_flight = min(in_flight, step.groups)
            in_flight += step.closes_group
            if instruction.name == name:
                found.append(in_flight > 0)
    return sum(found) / len(found)
