"""What `nabla bench` can run.

cpu         the stages on plain sequences, mask building of Kandinsky 5 Lite at 10 s, the tiny
            model: what a CPU can show in five minutes
scaling     cost over tokens
gpu         what L2 delivers, and every stage of every real workload, what counts most first
smoke       a little of everything in a few seconds
<workload>  every stage of one real workload; on a CPU with fewer heads and frames, and says so
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks import (
    block,
    block_attention,
    block_mask,
    functional,
    generate,
    memory,
    reorder,
    scaling,
    scores,
    train,
)
from benchmarks.case import ROUNDS_AT_LEAST, MaskSpec, Pace, Shape, Step, with_role
from benchmarks.masks import CORRELATIONS
from benchmarks.peers.peer import Peer
from benchmarks.results import Row
from benchmarks.workloads import BY_NAME, WORKLOADS, Workload, sequence

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
TABLE_DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
TABLE_TOKENS = (8192, 16384)
TABLE_HEADS = 1  # E hardly depends on it, and five minutes are short
CPU_TOKENS = tuple(2**n for n in range(12, 17))
GPU_TOKENS = (16384, 32768, 65536, 131072, 250880)
CAPTURED_FRAMES = 32
SORT_SECONDS = 1.2e-7  # that sorting takes for each pair of blocks on a CPU, about
# Seconds that it takes to compile peers for a shape, and the sort-based mask once for all shapes.
COMPILED = {
    "cpu": {"flex": 20.0},
    "cuda": {"flex": 10.0, "vsa-triton": 15.0, "cudnn-bsa": 5.0},
}
SORTING_COMPILED = 15.0
LEADING = ("k5-lite-10s", "k5-pro-10s-sd")  # whose results count most, one of either head dim
MASK_HEADS = 4  # of a workload on a CPU: sorting takes a second a head
FEW_HEADS = 2
FEWEST_FRAMES = 2

Steps = Callable[[torch.device, list[Peer], Pace, float], list[Step]]


@dataclass(frozen=True)
class Preset:
    """What to run.

    Args:
        what: One line for people.
        dtypes: Whose rates it needs.
        steps: Makes the steps for a device, the peers, the pace, and the seconds there are.
        seconds: To take, by type of device.
    """

    what: str
    dtypes: tuple[torch.dtype, ...]
    steps: Steps
    seconds: dict[str, float]


def find(name: str, device: torch.device) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: If there is none, or it is not for this device.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown: give one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if device.type not in preset.seconds:
        raise ValueError(f"preset {name!r} is for {', '.join(preset.seconds)}, not {device.type}")
    return preset


def table_steps(device: torch.device, peers: list[Peer], pace: Pace, left: float) -> list[Step]:
    """Sequences of two lengths, two head dims and two precisions, forward and with the backward."""
    own = [peer for peer in peers if peer.name == "sdpa"]
    specs = [MaskSpec("random", density) for density in TABLE_DENSITIES]
    steps = [_mask_step(_shape(BY_NAME["k5-lite-10s"], torch.bfloat16, device), peers)]
    for dtype, head_dim, tokens in itertools.product(
        (torch.float32, torch.bfloat16), (64, 128), TABLE_TOKENS
    ):
        shape = _shape(sequence(tokens, head_dim, heads=TABLE_HEADS), dtype, device)
        steps += _attention_steps(shape, specs, own)
    tiny = _shape(generate.tiny(CAPTURED_FRAMES, 1), torch.bfloat16, device)
    steps += [_captured_step(tiny, own), *_generate_steps(device, frames=16, calls=4)]
    lengths = [_shape(sequence(n, 64, heads=2), torch.float32, device) for n in (4096, 8192, 16384)]
    steps.append(_memory_step(lengths, _shape(BY_NAME["k5-lite-10s"], torch.bfloat16, device)))
    return steps


def scaling_steps(device: torch.device, peers: list[Peer], pace: Pace, left: float) -> list[Step]:
    """Sequences of growing length."""
    is_gpu = device.type == "cuda"
    shapes = [
        _shape(
            sequence(tokens, 128 if is_gpu else 64, heads=24 if is_gpu else 1),
            torch.bfloat16,
            device,
        )
        for tokens in (GPU_TOKENS if is_gpu else CPU_TOKENS)
    ]
    return [_scaling_step(shape, peers) for shape in shapes]


def workload_steps(workloads: Sequence[Workload]) -> Steps:
    """Every stage of real workloads: on a GPU what counts most first, the leading ones together; on
    a CPU the forward of all before the backward of any."""

    def steps(device: torch.device, peers: list[Peer], pace: Pace, left: float) -> list[Step]:
        tiny = _shape(generate.tiny(CAPTURED_FRAMES, 1), torch.bfloat16, device)
        if device.type == "cuda":
            shapes = [_shape(workload, torch.bfloat16, device) for workload in workloads]
            leading = [shape for shape in shapes if _leads(shape)]
            others = [shape for shape in shapes if not _leads(shape)]
            return [
                *by_stage([_essential(shape, peers, pace) for shape in leading]),
                *(step for shape in others for step in _essential(shape, peers, pace)),
                *by_stage([_further(shape, peers, pace) for shape in shapes]),
                _captured_step(tiny, peers),
            ]
        plans = [_reduced(workload, device, peers, pace, left) for workload in workloads]
        return [*by_stage(plans), _captured_step(tiny, peers)]

    return steps


def gpu_steps(device: torch.device, peers: list[Peer], pace: Pace, left: float) -> list[Step]:
    """What L2 delivers to shared memory, and all of every workload."""

    def measure(suite, seconds: float) -> None:
        from benchmarks import l2  # which needs Triton

        if (reason := l2.absent(device)) is None:
            suite.race(l2.contest(device), seconds)
        else:
            suite.rows.append(Row(l2.STAGE, "", status="absent", reason=reason))

    of_l2 = Step("l2", "", torch.bfloat16, 0.0, measure, 3.0)
    return [of_l2, *workload_steps(WORKLOADS)(device, peers, pace, left)]


def smoke_steps(device: torch.device, peers: list[Peer], pace: Pace, left: float) -> list[Step]:
    """A little of everything."""
    lite = BY_NAME["k5-lite-10s"]
    small = replace(lite, extents=(4, 16, 16), heads=2, densities=(0.5,), window=(3, 1, 1))
    narrow = replace(
        small,
        head_dim=32,
        model=replace(lite.model, layers=2, model_dim=64, ff_dim=128, text_tokens=4, calls=2),
    )
    shape = Shape(small, lite, torch.bfloat16, device)
    specs = [MaskSpec("random", 0.3), MaskSpec("nabla-like", 0.5, 0.5)]
    own = [peer for peer in peers if peer.name in ("sdpa", "sorting")]
    lengths = [_shape(sequence(n, 64, heads=1), torch.float32, device) for n in (256, 512, 1024)]
    return [
        *_stage_steps(shape, own),
        *_attention_steps(replace(shape, dtype=torch.float32), specs, own),
        *_functional_steps(shape, own),
        *_block_steps(replace(shape, workload=narrow), specs[1:]),
        *_generate_steps(device, frames=2, calls=1),
        *(_scaling_step(one, own) for one in lengths),
        _memory_step(lengths[:2], None),
    ]


PRESETS = {
    "cpu": Preset(
        "the stages on plain sequences, and the tiny model",
        (torch.float32, torch.bfloat16),
        table_steps,
        {"cpu": 290.0},
    ),
    **{
        workload.name: Preset(
            f"every stage at the shape of {workload.name}",
            (torch.float32, torch.bfloat16),
            workload_steps([workload]),
            {"cpu": 180.0, "cuda": 300.0},
        )
        for workload in WORKLOADS
    },
    "scaling": Preset(
        "cost over tokens", (torch.bfloat16,), scaling_steps, {"cpu": 120.0, "cuda": 180.0}
    ),
    "gpu": Preset(
        "what L2 delivers, and every stage of every real workload",
        (torch.float32, torch.bfloat16),
        gpu_steps,
        {"cuda": 370.0},
    ),
    "smoke": Preset(
        "a little of everything",
        (torch.float32, torch.bfloat16),
        smoke_steps,
        {"cpu": 30.0, "cuda": 60.0},
    ),
}


def by_stage(plans) -> list[Step]:
    """The first steps of every plan, then the second ones, and so on."""
    rows = itertools.zip_longest(*plans)
    return [step for row in rows for step in row if step is not None]


def specs_of(workload: Workload) -> list[MaskSpec]:
    """Random masks of all densities, and NABLA-like ones of the model's by correlation in time."""
    found = [MaskSpec("random", density) for density in DENSITIES]
    middle = sorted(workload.densities)[len(workload.densities) // 2]
    found += [MaskSpec("nabla-like", middle, correlation) for correlation in CORRELATIONS]
    found += [
        MaskSpec("nabla-like", density, 0.5) for density in workload.densities if density != middle
    ]
    return found


def only(steps: Sequence[Step], names: Sequence[str]) -> list[Step]:
    """The steps of the named stages and workloads; what is named of neither kind is not asked for.

    Raises:
        ValueError: If a name is that of no step.
    """
    stages = {step.stage for step in steps}
    workloads = {step.workload for step in steps if step.workload}
    if unknown := [name for name in names if name not in stages | workloads]:
        raise ValueError(
            f"--only {', '.join(unknown)} are unknown: give some of "
            f"{', '.join(sorted(stages))}, {', '.join(sorted(workloads))}"
        )
    return [
        step
        for step in steps
        if (step.stage in names or not stages.intersection(names))
        and (step.workload in names or not workloads.intersection(names) or not step.workload)
    ]


def _leads(shape: Shape) -> bool:
    return shape.workload.name in LEADING


def _own(workload: Workload) -> list[MaskSpec]:
    """Masks of the densities of trained models; the sparsest, which takes the least time, first."""
    return [MaskSpec("nabla-like", density, 0.5) for density in sorted(workload.densities)]


def _essential(shape: Shape, peers: list[Peer], pace: Pace) -> list[Step]:
    """On a GPU, what models pay: the mask, attention, training and a layer, beside all peers."""
    own = _own(shape.workload)
    forward, backward = _attention_steps(shape, own, peers, pace)
    return [_mask_step(shape, peers), forward, backward, *_block_steps(shape, own)]


def _further(shape: Shape, peers: list[Peer], pace: Pace) -> list[Step]:
    """On a GPU, the other masks and stages, beside dense attention."""
    own = _own(shape.workload)
    others = [spec for spec in specs_of(shape.workload) if spec not in own]
    dense = [peer for peer in peers if peer.role == "dense"]
    forward, _ = _attention_steps(shape, others, dense, pace)
    reorder_step, scores_step, _ = _stage_steps(shape, peers)
    return [
        *_functional_steps(shape, peers),
        forward,
        *(reorder_step, scores_step, _memory_step([shape], shape)),
    ]


def _reduced(
    workload: Workload, device: torch.device, peers: list[Peer], pace: Pace, left: float
) -> list[Step]:
    """The same with as many frames as fit into the time, or as a run had that is compared with."""
    dtype = torch.bfloat16
    of_mask = Shape(workload.reduced(heads=MASK_HEADS), workload, dtype, device)
    fewer = [MaskSpec("nabla-like", density, 0.5) for density in workload.densities]

    def plan(frames: int, frames_of_block: int) -> list[Step]:
        few = workload.reduced(heads=FEW_HEADS, frames=frames)
        shape = Shape(few, workload, dtype, device)
        wide = Shape(workload.reduced(frames=frames_of_block), workload, dtype, device)
        forward, _ = _attention_steps(shape, specs_of(few), peers)
        _, backward = _attention_steps(shape, fewer, peers)
        return [
            *_stage_steps(of_mask, peers),
            forward,
            *_functional_steps(shape, peers),
            backward,
            *_block_steps(wide, fewer[-1:]),
            _memory_step([shape], None),
        ]

    def fits(frames: int, frames_of_block: int) -> bool:
        steps = plan(frames, frames_of_block)
        return sum(step.least_seconds(pace) for step in steps) <= left

    most, per_frame = workload.extents[0], workload.extents[1] * workload.extents[2]
    frames_of_block = next((n for n in (4, 3, 2) if fits(FEWEST_FRAMES, n)), 1)
    frames = max((n for n in range(2, most + 1) if fits(n, frames_of_block)), default=FEWEST_FRAMES)
    return plan(
        *(
            pace.tokens.get((workload.name, stage), per_frame * found) // per_frame
            for stage, found in ((train.STAGE, frames), (block.STAGE, frames_of_block))
        )
    )


def _shape(workload: Workload, dtype: torch.dtype, device: torch.device) -> Shape:
    return Shape(workload, workload, dtype, device)


def _step(stage: str, shape: Shape, flops: float, measure: Callable, seconds: float = 0.0) -> Step:
    return Step(stage, shape.workload.name, shape.dtype, flops, measure, seconds)


def _race(stage: str, shape: Shape, flops: float, make: Callable, seconds: float = 0.0) -> Step:
    """A step that times one contest, made when its turn comes."""
    return _step(stage, shape, flops, lambda suite, s: suite.race(make(), s), seconds)


def _mask_step(shape: Shape, peers: list[Peer]) -> Step:
    entries = shape.workload.heads * shape.workload.grid.num_blocks**2
    sorts = any(peer.role == "mask" for peer in peers)
    seconds = 1.0
    if shape.device.type == "cuda" and shape.workload.name == LEADING[0]:
        seconds += SORTING_COMPILED * sorts  # once, for all shapes
    if shape.device.type == "cpu":
        seconds += ROUNDS_AT_LEAST * entries * (SORT_SECONDS if sorts else SORT_SECONDS / 20)
    return _race(block_mask.STAGE, shape, 0.0, lambda: block_mask.contest(shape, peers), seconds)


def _stage_steps(shape: Shape, peers: list[Peer]) -> list[Step]:
    return [
        _race(reorder.STAGE, shape, 0.0, lambda: reorder.contest(shape, peers), 1.0),
        _race(scores.STAGE, shape, 0.0, lambda: scores.contest(shape, peers), 2.0),
        _mask_step(shape, peers),
    ]


def _attention_steps(
    shape: Shape, specs: list[MaskSpec], peers: list[Peer], pace: Pace | None = None
) -> tuple[Step, Step]:
    """Forward, and with the backward. With a pace, on a GPU, the peers count one by one."""
    names = {peer.name for peer in with_role(peers, "sparse", shape.device)}
    compiled = sum(COMPILED[shape.device.type].get(name, 0.0) for name in names)
    flops = block_attention.cost(shape, specs) * (2 if "flex" in names else 1)
    with_backward = train.cost(shape, specs)
    if pace is not None:

        def counts(with_grad: bool) -> dict[str, float]:
            dense, sparse = (
                [
                    peer
                    for peer in with_role(peers, role, shape.device, with_grad=with_grad)
                    if peer.slower_from is None
                ]
                for role in ("dense", "sparse")
            )
            is_twice = with_grad and block_attention.has_fast_gradients(shape.device)
            ours = 2 if is_twice else 1  # deterministic as well
            return {"dense": len(dense), "sparse": pace.sparse * (ours + len(sparse))}

        flops = block_attention.cost(shape, specs, **counts(False))
        with_backward = train.cost(shape, specs, **counts(True))
    return (
        _race(
            block_attention.STAGE,
            shape,
            flops,
            lambda: block_attention.contest(shape, specs, peers),
            compiled,
        ),
        _race(
            train.STAGE,
            shape,
            with_backward,
            lambda: train.contest(shape, specs, peers),
        ),
    )


def _captured_step(shape: Shape, peers: list[Peer]) -> Step:
    return _race(
        block_attention.STAGE,
        shape,
        1.5 * shape.workload.flops,
        lambda: block_attention.captured_contest(
            block_attention.STAGE, shape.workload.extents[0], shape, peers
        ),
        2.0,
    )


def _functional_steps(shape: Shape, peers: list[Peer]) -> list[Step]:
    flops = functional.cost(shape)
    return [_race(functional.STAGE, shape, flops, lambda: functional.contest(shape, peers))]


def _block_steps(shape: Shape, specs: list[MaskSpec]) -> list[Step]:
    def measure(suite, seconds: float) -> None:
        contests = block.contests(shape, specs)
        for contest in contests:
            suite.race(contest, seconds / len(contests))

    return [_step(block.STAGE, shape, block.cost(shape, specs), measure, 2.0)]


def _generate_steps(device: torch.device, *, frames: int, calls: int) -> list[Step]:
    shape = _shape(generate.tiny(frames, calls), torch.bfloat16, device)
    return [
        _race(generate.STAGE, shape, generate.cost(shape), lambda: generate.contest(shape), 2.0)
    ]


def _scaling_step(shape: Shape, peers: list[Peer]) -> Step:
    return _race(scaling.STAGE, shape, scaling.cost(shape), lambda: scaling.contest(shape, peers))


def _memory_step(shapes: list[Shape], of_mask: Shape | None) -> Step:
    flops = sum(2 * train.cost(shape, [MaskSpec("random", 0.1)]) for shape in shapes) / 4.5

    def measure(suite, seconds: float) -> None:
        suite.rows += memory.rows(shapes, of_mask)

    seconds = 25.0 if of_mask is not None else 12.0
    if shapes[0].device.type == "cuda":  # without processes of their own
        seconds = 2.0
    return _step(memory.STAGE, shapes[0], flops, measure, seconds)
