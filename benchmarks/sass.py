"""Reads compiled CUDA kernels: their resources, instructions, basic blocks and loops.

    for kernel in read_kernels("nabla/_cuda.so"):
        print(kernel.name, kernel.registers, len(kernel.main_loop().path))

The tools are cuobjdump and nvdisasm, which Triton's package and the CUDA toolkit carry. SASS is 128
bits an instruction from Volta to Hopper; the high word also holds how the instruction is scheduled.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

NO_BARRIER = 7
MATRIX = ("HGMMA", "HMMA")  # products of one warp group, of one warp


def cuobjdump() -> str:
    """Return the path of cuobjdump: Triton's own, or that of a CUDA toolkit."""
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        if path.exists():
            return str(path)
    found = shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError("cuobjdump is in no CUDA toolkit on PATH; pip install triton")
    return found


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction with its scheduling."""

    address: int
    predicate: str  # such as "@!P0", or empty
    opcode: str  # such as "HGMMA.64x64x16.F32.BF16"
    operands: str
    stall: int  # cycles until the warp may issue its next instruction
    write_barrier: int  # counts down once the result is written, NO_BARRIER for none
    read_barrier: int  # counts down once the operands are read, NO_BARRIER for none
    wait_mask: int  # the barriers that have to be at zero before it may issue

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a direct branch goes."""
        if self.name != "BRA":
            return None
        return int(self.operands.split(",")[-1].strip().strip("`()"), 16)

    @property
    def is_conditional(self) -> bool:
        """Whether a branch may fall through."""
        return bool(self.predicate) or "," in self.operands

    @property
    def highest_register(self) -> int:
        """The highest of the registers it names, and of those behind them that it uses; or -1."""
        registers = [int(number) for number in re.findall(r"\bR(\d+)", self.operands)]
        if self.name == "HGMMA":
            columns = int(self.opcode.split("x")[1])
            registers = [registers[0] + columns // 2 - 1, *(first + 3 for first in registers[1:])]
        elif self.name == "HMMA" or ".128" in self.opcode:
            registers = [first + 3 for first in registers]
        elif ".64" in self.opcode or ".64" in self.operands:
            registers = [first + 1 for first in registers]
        return max(registers, default=-1)

    def __str__(self) -> str:
        return " ".join(part for part in (self.predicate, self.opcode, self.operands) if part)


@dataclass(frozen=True)
class Loop:
    """A loop, innermost of those that multiply matrices, and one way through it.

    The path takes every matrix product that a way through the body can take, and of such ways the
    shortest: it finds barriers open, and leaves out what is for rare cases.
    """

    header: int
    blocks: frozenset[int]
    path: tuple[Instruction, ...]
    # Such a way by other products: of a stage of which less is multiplied; empty if there is none.
    part: tuple[Instruction, ...]

    def count(self, *names: str) -> int:
        """How many instructions of the path have one of these names."""
        return sum(instruction.name in names for instruction in self.path)


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    name: str  # mangled
    architecture: str  # such as "sm_90a"
    registers: int  # at launch
    stack: int  # bytes; nonzero means spills
    shared: int  # static bytes
    instructions: tuple[Instruction, ...] = field(repr=False)

    def find(self, *names: str) -> list[Instruction]:
        """The instructions whose opcode, without modifiers, is one of these."""
        return [instruction for instruction in self.instructions if instruction.name in names]

    @cached_property
    def blocks(self) -> dict[int, tuple[Instruction, ...]]:
        """Basic blocks by the address of their first instruction."""
        starts = {self.instructions[0].address}
        for instruction, following in zip(self.instructions, self.instructions[1:], strict=False):
            if instruction.target is not None:
                starts |= {instruction.target, following.address}
            elif instruction.name in ("EXIT", "RET", "BRX", "JMP"):
                starts.add(following.address)
        blocks: dict[int, list[Instruction]] = {}
        for instruction in self.instructions:
            if instruction.address in starts:
                current = blocks.setdefault(instruction.address, [])
            current.append(instruction)
        return {start: tuple(block) for start, block in blocks.items()}

    @cached_property
    def successors(self) -> dict[int, tuple[int, ...]]:
        """Where each basic block may go on."""
        starts = list(self.blocks)
        edges = {}
        for start, following in zip(starts, [*starts[1:], None], strict=True):
            last = self.blocks[start][-1]
            ends = last.name in ("EXIT", "RET", "JMP", "BRX") and not last.predicate
            falls = not ends and (last.target is None or last.is_conditional)
            to = [last.target] if last.target in self.blocks else []
            if falls and following is not None:
                to.append(following)
            edges[start] = tuple(dict.fromkeys(to))
        return edges

    def reachable(self, start: Instruction) -> list[Instruction]:
        """The instructions that may run after one."""
        (block,) = (b for b, code in self.blocks.items() if start in code)
        code = self.blocks[block]
        found = list(code[code.index(start) + 1 :])
        following = set().union(*(_reach(b, self.successors) for b in self.successors[block]))
        return found + [i for b in sorted(following) for i in self.blocks[b]]

    @cached_property
    def loops(self) -> dict[int, frozenset[int]]:
        """The blocks of each natural loop, by its header."""
        return _natural_loops(next(iter(self.blocks)), self.successors)

    def main_loop(self) -> Loop:
        """The innermost loop with matrix products; of several, the one with the most."""
        multiplying = {
            header: blocks
            for header, blocks in self.loops.items()
            if any(_products(self.blocks[b]) for b in blocks)
        }
        innermost = {
            header: blocks
            for header, blocks in multiplying.items()
            if not any(other < blocks for other in multiplying.values())
        }
        if not innermost:
            raise ValueError(f"no loop of {self.name} multiplies matrices")
        loops = [self._loop(header, blocks) for header, blocks in innermost.items()]
        return max(loops, key=lambda loop: _products(loop.path))

    def _loop(self, header: int, blocks: frozenset[int]) -> Loop:
        def way(header: int, allowed: Iterable[int]) -> tuple[Instruction, ...]:
            return _best_way(header, frozenset(allowed), self.blocks, self.successors)

        path = way(header, blocks)
        multiplied = {i.address for i in path if _products([i])}
        others = (b for b in blocks if all(i.address not in multiplied for i in self.blocks[b]))
        part = way(header, others)
        return Loop(header, blocks, path=path, part=part if _products(part) else ())


def read_kernels(path: str | Path, pattern: str = "") -> list[Kernel]:
    """Read the kernels of a cubin or shared object.

    Args:
        path: The compiled file.
        pattern: A regular expression that a mangled name has to contain.

    Returns:
        The kernels, in the order of their architectures and names.
    """
    usage = [row for row in _resource_usage(Path(path)) if re.search(pattern, row[1])]
    code = dict(_disassemble(Path(path), sorted({name for _, name, _ in usage}))) if usage else {}
    kernels = []
    for architecture, name, used in usage:
        # Of a cubin, cuobjdump tells the architecture beside the code only.
        key = (architecture, name) if architecture else next(k for k in code if k[1] == name)
        kernels.append(Kernel(name, key[0], used["REG"], used["STACK"], used["SHARED"], code[key]))
    return sorted(kernels, key=lambda kernel: (kernel.architecture, kernel.name))


def resource_usage(path: str | Path) -> dict[str, dict[str, int]]:
    """What cuobjdump says that each kernel takes, such as REG and STACK, by mangled name."""
    return {name: used for _, name, used in _resource_usage(Path(path))}


def _resource_usage(path: Path) -> Iterator[tuple[str, str, dict[str, int]]]:
    architecture = ""
    report = _run("--dump-resource-usage", path)
    for line in re.finditer(r"^arch = (\S+)|^ Function (\S+):\n(.*)", report, re.MULTILINE):
        architecture = line[1] or architecture
        if line[2] and "$" not in line[2]:
            fields = re.findall(r"\b([A-Z]+):(\d+)", line[3])
            yield architecture, line[2], {key: int(value) for key, value in fields}


_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([\w.]+)\s*(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/\n"
    r"\s+/\* 0x([0-9a-f]{16}) \*/",
    re.MULTILINE,
)


def _disassemble(
    path: Path, names: list[str]
) -> Iterator[tuple[tuple[str, str], tuple[Instruction, ...]]]:
    """The instructions of each kernel, by architecture and name."""
    listing = _run("--dump-sass", "--function", ",".join(names), path)
    architecture = ""
    for part in re.split(r"^(?=\tcode for |\t\tFunction : )", listing, flags=re.MULTILINE):
        if found := re.match(r"\tcode for (\S+)", part):
            architecture = found[1]
        elif found := re.match(r"\t\tFunction : (\S+)", part):
            yield (architecture, found[1]), tuple(map(_instruction, _LINE.finditer(part)))


def _instruction(line: re.Match[str]) -> Instruction:
    address, predicate, opcode, operands, high = line.groups()
    control = int(high, 16) >> 41
    return Instruction(
        address=int(address, 16),
        predicate=predicate or "",
        opcode=opcode,
        operands=operands,
        stall=control & 15,
        write_barrier=control >> 5 & 7,
        read_barrier=control >> 8 & 7,
        wait_mask=control >> 11 & 63,
    )


def _run(*arguments: str | Path) -> str:
    """What cuobjdump prints. It warns of functions that are in another part of the file."""
    command = [cuobjdump(), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"cuobjdump cannot read {arguments[-1]}: {result.stderr.strip()}")
    return result.stdout


def _products(instructions: Iterable[Instruction]) -> int:
    return sum(instruction.name in MATRIX for instruction in instructions)


def _natural_loops(
    entry: int, successors: Mapping[int, tuple[int, ...]]
) -> dict[int, frozenset[int]]:
    """Loops by their header, which dominates a block that branches back to it."""
    predecessors: dict[int, list[int]] = {node: [] for node in successors}
    for node, following in successors.items():
        for to in following:
            predecessors[to].append(node)
    reachable = _reach(entry, successors)
    dominators = {node: set(reachable) for node in reachable}
    dominators[entry] = {entry}
    changed = True
    while changed:
        changed = False
        for node in reachable - {entry}:
            before = [dominators[p] for p in predecessors[node] if p in reachable]
            new = set.intersection(*before) | {node}
            if new != dominators[node]:
                dominators[node], changed = new, True
    loops: dict[int, frozenset[int]] = {}
    for node in reachable:
        for header in dominators[node].intersection(successors[node]):
            body = _reach(node, predecessors, end=header)
            loops[header] = loops.get(header, frozenset()) | body
    return loops


def _reach(start: int, following: Mapping[int, Iterable[int]], end: int | None = None) -> set[int]:
    """What can be reached from a block, but for what is beyond the block `end`."""
    seen, todo = {start}, [start]
    while todo:
        node = todo.pop()
        new = set() if node == end else set(following[node]) - seen
        seen |= new
        todo += new
    return seen


def _best_way(
    header: int,
    allowed: frozenset[int],
    blocks: Mapping[int, tuple[Instruction, ...]],
    successors: Mapping[int, tuple[int, ...]],
) -> tuple[Instruction, ...]:
    """From the header back to it: most matrix products, then fewest instructions."""
    best: dict[int, tuple[tuple[int, int], tuple[int, ...]] | None] = {}

    def search(node: int, open_nodes: frozenset[int]):
        """The best way from a block back to the header; inner loops are gone through once."""
        if node in best:
            return best[node]
        ways = []
        for to in successors[node]:
            if to == header:
                ways.append(((0, 0), ()))
            elif to in allowed and to not in open_nodes:
                if (rest := search(to, open_nodes | {to})) is not None:
                    ways.append(rest)
        result = None
        if ways:
            (products, length), nodes = max(ways)
            block = blocks[node]
            result = ((products + _products(block), length - len(block)), (node, *nodes))
        best[node] = result
        return result

    found = search(header, frozenset({header})) if header in allowed else None
    return tuple(i for node in found[1] for i in blocks[node]) if found else ()
