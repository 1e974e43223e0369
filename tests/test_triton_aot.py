"""Every Triton kernel, compiled ahead of time for every chip, without a GPU.

The functions of the backend run on meta tensors with a driver that names the chip, and compile what
they would launch. Shown are the resources of each kernel; checked is what a table entry promises.
"""

import re
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import nabla
from benchmarks import l2
from benchmarks.sass import resource_usage
from nabla import TokenGrid, dispatch
from nabla.triton import block_attention, block_mask, scores
from nabla.triton.config import CHIPS, REGISTERS, TABLE, table_key, tile_config

TENSOR_CORES = {90: "wgmma.mma_async", 100: "tcgen05.mma"}  # elsewhere mma.sync
TENSOR_MEMORY_COLUMNS = 512  # of a multiprocessor
SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # KiB of a multiprocessor
WHOLE, RAGGED = TokenGrid(3, 32, 32), TokenGrid(3, 30, 30, extra=7)


class Chip:
    """A driver that compiles for a chip; nothing can be launched."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return self.architecture

    def get_current_stream(self, device):
        return 0


@pytest.fixture(params=CHIPS, ids=lambda chip: f"sm_{chip}")
def architecture(request):
    return request.param


@pytest.fixture
def compiled(monkeypatch, architecture):
    """The kernels that the functions called have compiled, by name, the latest of each."""
    kernels = {}
    run = JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        (num_programs,) = grid  # other dimensions than the first end at 65,535
        assert num_programs < 2**31
        kernels[self.fn.__name__] = run(self, *args, grid=grid, warmup=True, **kwargs)

    monkeypatch.setattr(JITFunction, "run", record)
    monkeypatch.setattr(driver, "_active", Chip(architecture))
    monkeypatch.setattr(dispatch, "architecture", lambda device: architecture)
    monkeypatch.setattr(dispatch, "num_multiprocessors", lambda device: 100)
    return kernels


def resources(kernel, tmp_path):
    """What cuobjdump says that a kernel takes, such as REG and STACK."""
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    (used,) = resource_usage(binary).values()
    return used


def programs_per_sm(kernel, registers, architecture):
    """How many programs a multiprocessor holds at a time."""
    limits = [
        REGISTERS // (-(-registers // 8) * 8 * 32 * kernel.metadata.num_warps),
        SHARED[architecture] * 1024 // (kernel.metadata.shared + 1024),
    ]
    if tensor_memory := getattr(kernel.metadata, "tmem_size", 0):
        limits.append(TENSOR_MEMORY_COLUMNS // tensor_memory)
    return min(limits)


@pytest.fixture
def check(architecture, tmp_path, record_property):
    """No spills, and no more shared memory than there is; returns programs per multiprocessor."""

    def check(name, kernel):
        used = resources(kernel, tmp_path)
        per_sm = programs_per_sm(kernel, used["REG"], architecture)
        line = (
            f"sm_{architecture:<4} {name:32} {used['REG']:4} registers {used['STACK']:3} stack "
            f"{kernel.metadata.shared / 1024:6.1f} KiB shared {kernel.metadata.num_warps:3} warps "
            f"{per_sm:3} per multiprocessor"
        )
        record_property("resources", line)  # printed when the tests have run (see conftest.py)
        assert used["STACK"] == 0, f"{name} spills"
        assert kernel.metadata.shared <= CHIPS[architecture][0], name
        assert kernel.metadata.enable_fp_fusion is True
        return per_sm

    return check


def innermost_loops(ptx, operation):
    """The code of each loop that has an operation and no smaller loop that has it."""
    labels, loops = {}, []
    for line in re.finditer(r"^(\$L\w+):|\bbra(?:\.uni)?\s+(\$L\w+);", ptx, re.MULTILINE):
        label, target = line.groups()
        if label:
            labels[label] = line.start()
        elif target in labels and re.search(operation, ptx[labels[target] : line.start()]):
            loops.append((labels[target], line.start()))
    return [
        ptx[start:stop]
        for start, stop in loops
        if not any(start <= a and b <= stop and (a, b) != (start, stop) for a, b in loops)
    ]


TENSOR_PRODUCT = r"mma\.mma_async|\bmma\.sync|tcgen05\.mma"
LOADS = r"cp\.async\.(cg|bulk)"


def is_pipelined(ptx, operation):
    """Whether the loop that multiplies also copies, ahead, what it multiplies later."""
    loops = innermost_loops(ptx, operation)
    return bool(loops) and all(len(re.findall(LOADS, loop)) >= 2 for loop in loops)


def attend(grid, dtype, head_dim):
    """Run attention and its backward, two query heads on one key head, on nothing."""
    q, k = (
        torch.empty(1, h, grid.num_tokens, head_dim, dtype=dtype, device="meta") for h in (2, 1)
    )
    words = -(-grid.num_blocks // 32)
    bits = torch.empty(1, 2, grid.num_blocks, words, dtype=torch.int32, device="meta")
    out, lse = block_attention.attention_fwd(q, k, k, bits, grid, 0, 0.1)
    block_attention.attention_bwd(out, None, q, k, k, out, lse, bits, grid, 0, 0.1)


KERNELS = {
    "forward": "attention_fwd_kernel",
    "dq": "attention_bwd_dq_kernel",
    "dkdv": "attention_bwd_dkdv_kernel",
}


def check_attention(kernels, check, architecture, grid, dtype, head_dim):
    for direction, name in KERNELS.items():
        kernel = kernels[name]
        kind = f"{grid.block_size} {'ragged' if grid.is_ragged else 'whole'}"
        label = f"{direction} {str(dtype).removeprefix('torch.')} {head_dim} {kind}"
        per_sm = check(label, kernel)
        device = torch.device("meta")
        config = tile_config(direction, device, head_dim, dtype, grid.block_size)
        assert per_sm >= config.per_sm, f"{label}: {per_sm} programs fit"
        code = kernel.asm["ptx"]
        if dtype == torch.float32:
            assert "mma" not in code, f"{label}: products of float32 are exact"
        elif head_dim in (64, 96, 128) and grid.block_size == 64:
            assert TENSOR_CORES.get(architecture, "mma.sync") in code, label
        product = r"\bfma\.rn\.f32" if dtype == torch.float32 else TENSOR_PRODUCT
        assert is_pipelined(code, product), f"{label}: the loads are not pipelined"


@pytest.mark.parametrize("architecture", [80, 90], indirect=True, ids=lambda chip: f"sm_{chip}")
@pytest.mark.parametrize("stages", [1, 2])
def test_what_is_not_pipelined_is_noticed(compiled, architecture, stages, monkeypatch):
    key = table_key("forward", architecture, 64, torch.bfloat16)
    monkeypatch.setitem(TABLE, key, replace(TABLE[key], stages=stages))
    attend(WHOLE, torch.bfloat16, 64)
    code = compiled[KERNELS["forward"]].asm["ptx"]
    assert is_pipelined(code, TENSOR_PRODUCT) == (stages > 1)


@pytest.mark.parametrize("grid", [WHOLE, RAGGED], ids=["whole", "ragged"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention(compiled, check, architecture, grid, head_dim):
    attend(grid, torch.bfloat16, head_dim)
    check_attention(compiled, check, architecture, grid, torch.bfloat16, head_dim)


@pytest.mark.parametrize(
    "dtype, head_dim",
    [
        (torch.bfloat16, 96),
        (torch.bfloat16, 256),
        (torch.float16, 64),
        (torch.float16, 96),
        (torch.float16, 128),
        (torch.float32, 64),
        (torch.float32, 128),
        (torch.float32, 256),
    ],
    ids=str,
)
def test_attention_of_other_types_and_sizes(compiled, check, architecture, dtype, head_dim):
    attend(RAGGED, dtype, head_dim)
    check_attention(compiled, check, architecture, RAGGED, dtype, head_dim)


@pytest.mark.parametrize("architecture", [80, 90], indirect=True, ids=lambda chip: f"sm_{chip}")
@pytest.mark.parametrize("block", [(1, 4, 4), (2, 4, 4), (2, 8, 8)], ids=str)
def test_attention_of_other_blocks(compiled, check, architecture, block):
    grid = TokenGrid(3, 30, 30, block=block)
    attend(grid, torch.bfloat16, 128)
    check_attention(compiled, check, architecture, grid, torch.bfloat16, 128)


def select(num_blocks, dtype=torch.bfloat16, heads=1, head_dim=128):
    grid = TokenGrid(num_blocks, 8, 8)
    q = torch.empty(1, heads, grid.num_tokens, head_dim, dtype=dtype, device="meta")
    top_p = torch.empty(heads, device="meta")
    return block_mask.create_block_mask(q, q, top_p, grid, (11, 3, 3), 0, 0.1)


@pytest.mark.parametrize("num_blocks", [100, 1024, 3660, 8192])
def test_block_mask(compiled, check, num_blocks):
    select(num_blocks)
    for name, kernel in compiled.items():
        check(f"{name.removesuffix('_kernel')} {num_blocks}", kernel)


@pytest.mark.parametrize("architecture", [80], indirect=True, ids=lambda chip: f"sm_{chip}")
def test_scores(compiled, check):
    for dtype, head_dim in ((torch.bfloat16, 64), (torch.float16, 256), (torch.float32, 80)):
        q = torch.empty(1, 2, RAGGED.num_tokens, head_dim, dtype=dtype, device="meta")
        pooled = scores.pooled_scores(q, q, RAGGED, 0, 0.1)
        block_mask.select_blocks(pooled, torch.empty(2, device="meta"), RAGGED, None, 0)
        for name, kernel in compiled.items():
            check(f"{name.removesuffix('_kernel')} {head_dim}", kernel)


@pytest.mark.parametrize("architecture", [90], indirect=True, ids=lambda chip: f"sm_{chip}")
def test_selection_multiplies_exactly(compiled, architecture):
    select(1024)
    assert "mma" not in compiled["logits_kernel"].asm["ptx"]


@pytest.mark.parametrize("architecture", [90], indirect=True, ids=lambda chip: f"sm_{chip}")
def test_what_measures_l2_copies_in_bulk(compiled, check):
    """Into a ring deep enough to hide the latency, by programs that fit a multiprocessor."""
    table = torch.empty(l2.TILES * l2.TILE[0], l2.TILE[1], dtype=torch.bfloat16, device="meta")
    l2.read(table, torch.empty(264, l2.SHARES, device="meta"), l2.STEPS)
    kernel = compiled["read_tiles_kernel"]
    assert check("l2", kernel) >= l2.PER_SM
    (loop,) = innermost_loops(kernel.asm["ptx"], r"cp\.async\.bulk\.tensor")
    assert "mma" not in kernel.asm["ptx"] and "ld.global" not in loop
    tile = l2.TILE[0] * l2.TILE[1] * 2
    assert kernel.metadata.shared >= (l2.STAGES - 1) * tile


class NoHost(TorchDispatchMode):
    """Refuses what waits for a device: to read a value from it, or to copy one to it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero"), name
        result = function(*args, **kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        assert {x.device.type for x in tensors} == {"meta"}, name
        return result


@pytest.mark.parametrize("architecture", [90], indirect=True, ids=lambda chip: f"sm_{chip}")
def test_nothing_waits_for_the_device(compiled, architecture, monkeypatch):
    """Neither the stages as they are composed, nor what launches their kernels."""
    monkeypatch.delattr(torch, "tensor")  # it copies, and no mode sees that
    q, k, v = (
        torch.empty(2, h, RAGGED.num_tokens, 64, device="meta", requires_grad=True)
        for h in (4, 2, 2)
    )
    with NoHost():
        for top_p in (0.5, (0.3, 0.5, 0.7, 0.9)):
            options = {"grid": RAGGED, "top_p": top_p, "window": (1, 3, 1), "enable_gqa": True}
            nabla.attention(q, k, v, **options).sum().backward()
        attend(RAGGED, torch.bfloat16, 64)
        select(100)
    assert set(KERNELS.values()) | {"select_kernel", "block_mean_kernel"} <= compiled.keys()


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0

    def _release(self, size):
        self.bytes -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result._base is None:
            size = result.untyped_storage().nbytes()
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(result, self._release, size)
        return result


def extra_memory(function, *args):
    """What a function returns, and the most bytes that it needs besides."""
    with PeakMemory() as memory:
        results = function(*args)
    extra = memory.peak - sum(x.untyped_storage().nbytes() for x in tree_leaves(results))
    print(f"{function.__name__}: {extra / 1e6:.0f} MB")
    return results, extra


@pytest.mark.parametrize("architecture", [90], indirect=True, ids=lambda chip: f"sm_{chip}")
def test_ten_seconds_of_hd_video_take_little_memory(compiled, architecture):
    """32 heads, 3,660 blocks; besides what the stages take and return."""
    grid = TokenGrid(61, 48, 80)
    assert grid.num_blocks == 3660
    q = torch.empty(1, 32, grid.num_tokens, 128, dtype=torch.bfloat16, device="meta")
    top_p = torch.empty(32, device="meta")
    bits, mask = extra_memory(block_mask.create_block_mask, q, q, top_p, grid, None, 0, 0.1)
    options = (bits, grid, 0, 0.1)
    (out, lse), forward = extra_memory(block_attention.attention_fwd, q, q, q, *options)
    _, backward = extra_memory(
        block_attention.attention_bwd, out, None, q, q, q, out, lse, *options
    )
    assert max(mask, forward, backward) < 256e6
