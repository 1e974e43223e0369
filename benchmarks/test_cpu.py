"""What continuous integration keeps track of on a CPU, by pytest-benchmark: `make bench-ci`.

Outputs are checked before they are timed. Machines of CI differ, so there is no threshold here:
`nabla bench cpu --compare` is what judges, by ratios within one run.
"""

import pytest
import torch

from benchmarks import block_attention, block_mask, functional, train
from benchmarks.case import MaskSpec, Shape
from benchmarks.peers import chosen
from benchmarks.workloads import BY_NAME, sequence

CPU = torch.device("cpu")
PEERS = chosen(["sdpa", "sorting"])
SPECS = [MaskSpec("random", 0.1), MaskSpec("random", 0.5)]


def shape(workload):
    """A workload in float32 on the CPU."""
    return Shape(workload, workload, torch.float32, CPU)


def contests():
    """What is tracked: makers of contests, by name."""
    line = shape(sequence(2048, 64))
    lite = shape(BY_NAME["k5-lite-10s"].reduced(heads=2, frames=4))
    return {
        "forward": lambda: block_attention.contest(line, SPECS, PEERS),
        "forward_backward": lambda: train.contest(line, SPECS, PEERS),
        "mask": lambda: block_mask.contest(lite, PEERS),
        "stacked": lambda: functional.contest(shape(lite.workload.reduced(frames=1)), PEERS),
    }


CASES = [
    (name, index)
    for name, num in (("forward", 3), ("forward_backward", 3), ("mask", 2), ("stacked", 5))
    for index in range(num)
]


@pytest.mark.parametrize("name, index", CASES)
def test_speed(benchmark, name, index):
    """Time one case of one contest, after its output has been checked."""
    torch.manual_seed(0)
    contest = contests()[name]()
    case = contest.cases[index]
    row = case.row
    benchmark.group = name
    benchmark.extra_info.update(implementation=row.implementation, mask=row.mask, part=row.part)
    with torch.set_grad_enabled(contest.with_grad):
        case.check()
        benchmark.pedantic(case.run, rounds=5, warmup_rounds=1)
