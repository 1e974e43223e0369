"""How the attention kernels are cut into programs: a table, and no search at run time.

An entry must compile without spills, fit the chip's shared memory, and `per_sm` programs of it
must fit a multiprocessor together: tests/test_triton_aot.py compiles every entry for every chip.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from nabla import dispatch

KIB = 1024
Key = tuple[str, str, int, int]  # family, direction, bytes of an element, head_dim up to
POWERS = ("rows", "step", "warps")  # are powers of 2
REGISTERS = 65536  # of a multiprocessor
# Shared memory that one program may have, and the family of entries.
CHIPS = {
    80: (163 * KIB, "sm80"),
    86: (99 * KIB, "sm86"),
    89: (99 * KIB, "sm86"),
    90: (227 * KIB, "sm90"),
    100: (227 * KIB, "sm100"),
    120: (99 * KIB, "sm86"),
}


@dataclass(frozen=True)
class TileConfig:
    """How one kernel runs.

    Args:
        rows: Tokens whose results a program computes at a time.
        step: Tokens of the other side that it visits at a time.
        warps: Warps of a program.
        stages: Depth of the pipeline of loads.
        per_sm: Programs that a multiprocessor holds.
    """

    rows: int
    step: int
    warps: int
    stages: int
    per_sm: int

    @property
    def registers(self) -> int:
        """Registers that a thread may have, so that `per_sm` programs fit the register file."""
        return min(REGISTERS // (self.per_sm * self.warps * 32) // 8 * 8, 255)

    def programs(self, device: torch.device) -> int:
        """Return how many programs a device holds at a time."""
        return self.per_sm * dispatch.num_multiprocessors(device)


# By direction, bytes of an element, and head_dim up to; then by family where it differs.
DEFAULTS = {
    ("forward", 2, 64): TileConfig(64, 64, 4, 2, 2),
    ("forward", 2, 128): TileConfig(64, 64, 4, 2, 2),
    ("forward", 2, 256): TileConfig(64, 32, 8, 2, 1),
    ("dq", 2, 64): TileConfig(64, 32, 4, 2, 2),
    ("dq", 2, 128): TileConfig(64, 32, 4, 2, 2),
    ("dq", 2, 256): TileConfig(64, 32, 8, 2, 1),
    ("dkdv", 2, 64): TileConfig(64, 16, 4, 2, 2),
    ("dkdv", 2, 128): TileConfig(64, 16, 4, 2, 2),
    ("dkdv", 2, 256): TileConfig(64, 32, 8, 2, 1),
    ("forward", 4, 64): TileConfig(32, 32, 4, 2, 2),
    ("forward", 4, 128): TileConfig(32, 16, 4, 2, 2),
    ("forward", 4, 256): TileConfig(32, 16, 8, 2, 1),
    ("dq", 4, 64): TileConfig(32, 16, 4, 2, 2),
    ("dq", 4, 128): TileConfig(16, 32, 4, 2, 1),
    ("dq", 4, 256): TileConfig(16, 16, 4, 2, 1),
    ("dkdv", 4, 64): TileConfig(16, 16, 4, 2, 2),
    ("dkdv", 4, 128): TileConfig(16, 16, 4, 2, 2),
    ("dkdv", 4, 256): TileConfig(16, 16, 8, 2, 1),
}
TABLE = {(family, *key): config for _, family in CHIPS.values() for key, config in DEFAULTS.items()}
TABLE |= {
    ("sm80", "dkdv", 2, 256): TileConfig(64, 16, 8, 2, 1),
    ("sm80", "dkdv", 4, 128): TileConfig(32, 32, 8, 2, 1),
    ("sm86", "forward", 2, 64): TileConfig(64, 32, 4, 2, 2),
    ("sm86", "forward", 2, 128): TileConfig(64, 32, 4, 2, 2),
    ("sm86", "forward", 4, 64): TileConfig(32, 16, 4, 2, 2),
    ("sm86", "dq", 4, 64): TileConfig(64, 16, 4, 2, 2),
    ("sm86", "dq", 2, 128): TileConfig(64, 32, 4, 2, 1),
    ("sm86", "dq", 2, 256): TileConfig(64, 16, 8, 2, 1),
    ("sm86", "dkdv", 2, 256): TileConfig(64, 16, 8, 2, 1),
    ("sm90", "forward", 4, 64): TileConfig(16, 32, 4, 2, 2),
    ("sm90", "dq", 2, 64): TileConfig(64, 32, 4, 2, 3),
    ("sm90", "dq", 4, 64): TileConfig(64, 16, 4, 2, 2),
    ("sm90", "dkdv", 2, 64): TileConfig(64, 32, 4, 2, 2),
    ("sm90", "dkdv", 2, 128): TileConfig(64, 32, 8, 2, 1),
    ("sm90", "dq", 2, 256): TileConfig(32, 32, 4, 2, 2),
    ("sm90", "dkdv", 2, 256): TileConfig(32, 32, 8, 2, 1),
    ("sm100", "forward", 2, 128): TileConfig(64, 32, 4, 2, 2),
    ("sm100", "dq", 2, 128): TileConfig(64, 64, 8, 2, 1),
    ("sm100", "dq", 2, 256): TileConfig(32, 32, 4, 2, 2),
    ("sm100", "dkdv", 2, 64): TileConfig(64, 32, 4, 2, 2),
    ("sm100", "dkdv", 2, 128): TileConfig(64, 32, 8, 2, 1),
    ("sm100", "dkdv", 2, 256): TileConfig(32, 32, 8, 2, 1),
}

# The interpreter takes as long for a large step as for a small one.
INTERPRETED = TileConfig(128, 128, 4, 1, 1)


def tile_config(
    direction: str, device: torch.device, head_dim: int, dtype: torch.dtype, block_size: int
) -> TileConfig:
    """Return how a kernel runs on a device: "forward", "dq" or "dkdv"."""
    architecture = dispatch.architecture(device)
    if architecture is None:
        config = INTERPRETED
    else:
        config = TABLE[table_key(direction, architecture, head_dim, dtype)]
    return replace(config, rows=min(config.rows, block_size), step=min(config.step, block_size))


def use_table(path: str | Path) -> None:
    """Use a table that `nabla tune` has written, in this process, over the one in this file.

    Args:
        path: The JSON file.

    Raises:
        ValueError: If it is no such table.
    """
    try:
        entries = {
            tuple(entry["key"]): TileConfig(**entry["config"])
            for entry in json.loads(Path(path).read_text())["entries"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no table of `nabla tune`: {error!r}; write one again"
        ) from None
    for config in entries.values():
        for name, value in asdict(config).items():
            if not isinstance(value, int) or value < 1 or (name in POWERS and value & (value - 1)):
                raise ValueError(f"{path} has an entry with {name}={value}; write one again")
    if unknown := entries.keys() - TABLE.keys():
        raise ValueError(f"{path} has entries of no kernel: {sorted(unknown)}; write one again")
    TABLE.update(entries)


def save_table(path: str | Path, entries: dict[Key, TileConfig], device: str) -> None:
    """Write entries for `use_table`, with the name of the device that they are measured on."""
    rows = [{"key": key, "config": asdict(config)} for key, config in entries.items()]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"device": device, "entries": rows}, indent=1) + "\n")


def nearest_chip(architecture: int) -> int:
    """Return the chip whose entries an architecture takes: itself, or the one before."""
    return max(chip for chip in CHIPS if chip <= architecture)


def table_key(direction: str, architecture: int, head_dim: int, dtype: torch.dtype) -> Key:
    """Return the key of a kernel's entry in the table."""
    _, family = CHIPS[nearest_chip(architecture)]
    channels = next(size for size in (64, 128, 256) if head_dim <= size)
    return family, direction, dtype.itemsize, channels
