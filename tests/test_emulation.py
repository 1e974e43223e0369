"""The emulator of CUDA kernels (csrc/emulation): instructions one by one, and planted faults.

What an instruction does with bytes, lanes and registers is written down here a second time, from
the tables of the PTX ISA, and never taken from the emulator.
"""

import itertools
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from nabla import _cuda_emulated as emulated

probes = emulated.probes

SCHEDULES = ("late", "eager", "random", "starving")
TYPES = {"bf16": (0, torch.bfloat16), "fp16": (1, torch.float16)}


@pytest.fixture(autouse=True)
def default_settings():
    yield
    emulated.configure()
    emulated.clear_memory()


def register(**tensors: Tensor) -> None:
    """Let kernels touch these tensors and no others; those named out_... may be written."""
    emulated.clear_memory()
    for name, tensor in tensors.items():
        emulated.register_memory(tensor.data_ptr(), tensor.nbytes, name.startswith("out_"), name)


# ---- shared memory as the PTX ISA lays matrices out ----

# 128-byte swizzle: where the eight 16-byte chunks of each of eight rows of 128 bytes lie.
SWIZZLE = (
    (0, 1, 2, 3, 4, 5, 6, 7),
    (1, 0, 3, 2, 5, 4, 7, 6),
    (2, 3, 0, 1, 6, 7, 4, 5),
    (3, 2, 1, 0, 7, 6, 5, 4),
    (4, 5, 6, 7, 0, 1, 2, 3),
    (5, 4, 7, 6, 1, 0, 3, 2),
    (6, 7, 4, 5, 2, 3, 0, 1),
    (7, 6, 5, 4, 3, 2, 1, 0),
)


def swizzled(row: int, column: int) -> int:
    """Byte of a 2-byte element in an atom of 8 rows of 64 columns."""
    return 128 * row + 16 * SWIZZLE[row][column // 8] + 2 * (column % 8)


def k_major(row: int, k: int, stride: int) -> int:
    """Byte of element (M or N, K): atoms of 8 rows and 64 columns of K, `stride` apart."""
    return row // 8 * stride + swizzled(row % 8, k)


def n_major(column: int, k: int, leading: int, stride: int) -> int:
    """Byte of element (N, K): atoms of 64 columns (N) and 8 rows (K)."""
    return column // 64 * leading + k // 8 * stride + swizzled(k % 8, column % 64)


# ---- fragments: figures of the PTX ISA for .m64nNk16 and .m16n8k16 ----


def accumulator_64(thread: int, i: int) -> tuple[int, int]:
    """(row, column) of d[i] of a thread of the warpgroup."""
    warp, lane = divmod(thread, 32)
    group, in_group = divmod(lane, 4)
    row = group if i % 4 < 2 else group + 8
    return 16 * warp + row, 8 * (i // 4) + 2 * in_group + i % 2


def operand_64(thread: int, r: int, half: int) -> tuple[int, int]:
    """(row, k) of the low or high half of register r of a."""
    warp, lane = divmod(thread, 32)
    group, in_group = divmod(lane, 4)
    i = 2 * r + half  # the ISA numbers the eight values a0 to a7
    row = group if i in (0, 1, 4, 5) else group + 8
    column = 2 * in_group + i % 2 if i < 4 else 2 * in_group + i % 2 + 8
    return 16 * warp + row, column


def test_fragments_at_the_corners():
    assert [accumulator_64(0, i) for i in range(5)] == [(0, 0), (0, 1), (8, 0), (8, 1), (0, 8)]
    assert [accumulator_64(31, i) for i in range(4)] == [(7, 6), (7, 7), (15, 6), (15, 7)]
    assert accumulator_64(127, 31) == (63, 63)
    assert [operand_64(0, r, 0) for r in range(4)] == [(0, 0), (8, 0), (0, 8), (8, 8)]
    assert operand_64(127, 3, 1) == (63, 15)


def bits(x: Tensor) -> np.ndarray:
    return x.contiguous().view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("n", [64, 128])
@pytest.mark.parametrize(
    "a_from, b_from",
    [("registers", "k-major"), ("registers", "n-major"), ("k-major", "k-major")],
)
@pytest.mark.parametrize("accumulate", [False, True], ids=["", "accumulate"])
def test_wgmma(dtype, n, a_from, b_from, accumulate):
    code, torch_dtype = TYPES[dtype]
    generator = torch.Generator().manual_seed(n)
    a = torch.randint(-8, 9, (64, 16), generator=generator).to(torch_dtype)
    b = torch.randint(-8, 9, (16, n), generator=generator).to(torch_dtype)
    before = torch.randint(-8, 9, (64, n), generator=generator).float()

    # What no element of a and b covers is NaN, so that it shows when it is read.
    image = np.full(64 << 10, 0xFF, np.uint8)

    def put(at: int, values: np.ndarray, place) -> None:
        for index in np.ndindex(values.shape):
            byte = at + place(*index)
            image[byte : byte + 2] = values[index].reshape(1).view(np.uint8)

    # a is the second product of 16 columns in its tile, b the third; their atoms lie apart.
    a_matrix, b_matrix = (0, 0, 0), (0, 0, 0)
    if a_from == "k-major":
        put(4096, bits(a), lambda m, k: k_major(m, k + 16, 2048))
        a_matrix = (4096 + 32, 0, 2048)
    if b_from == "k-major":
        put(24576, bits(b.T), lambda j, k: k_major(j, k + 32, 1024))
        b_matrix = (24576 + 64, 0, 1024)
    if b_from == "n-major":
        put(24576, bits(b.T), lambda j, k: n_major(j, k, 16384, 3072))
        b_matrix = (24576, 16384, 3072)

    threads = range(128)
    registers = torch.zeros(128, 4, 2, dtype=torch_dtype)
    for t, r, half in itertools.product(threads, range(4), range(2)):
        registers[t, r, half] = a[operand_64(t, r, half)]
    d = torch.empty(128, n // 2)
    for t, i in itertools.product(threads, range(n // 2)):
        d[t, i] = before[accumulator_64(t, i)]

    shared = torch.from_numpy(image)
    register(a=registers, image=shared, out_d=d)
    probes.wgmma(
        code,
        n,
        a_from == "registers",
        b_from == "n-major",
        accumulate,
        registers.data_ptr(),
        shared.data_ptr(),
        shared.nbytes,
        a_matrix,
        b_matrix,
        d.data_ptr(),
    )

    expected = a.float() @ b.float() + (before if accumulate else 0)
    actual = torch.full((64, n), float("nan"))
    for t, i in itertools.product(threads, range(n // 2)):
        actual[accumulator_64(t, i)] = d[t, i]
    assert torch.equal(actual, expected)


# ---- copies ----


def copy_tensor(x: Tensor, box: tuple[int, ...], at: tuple[int, ...], swizzle: bool) -> np.ndarray:
    """Shared memory after a copy of `box` at `at`, both innermost first; x has four dimensions."""
    size = x.element_size()
    image = torch.zeros(np.prod(box) * size, dtype=torch.uint8)
    register(x=x.as_strided((x.untyped_storage().nbytes() // size,), (1,), 0), out_image=image)
    extents, strides = list(x.shape)[::-1], [s * size for s in x.stride()][::-1]
    fields = (x.data_ptr(), size, extents, strides, list(box), swizzle)
    probes.copy(fields, list(at), 0, image.nbytes, image.data_ptr())
    return image.numpy()


@pytest.mark.parametrize(
    "at",
    [(0, 0, 0, 0), (0, 3, 1, 1), (64, 9, 2, 0), (0, -2, 0, 0), (100, 0, 0, 0), (-7, 10, 2, 1)],
    ids=str,
)
@pytest.mark.parametrize("swizzle", [False, True], ids=["plain", "swizzled"])
def test_copy_tensor(at, swizzle):
    x = torch.randn(2, 11, 3, 128).bfloat16().transpose(1, 2)  # [B, H, S, D], strided
    box = (64, 8, 1, 1)
    image = copy_tensor(x, box, at, swizzle)
    for row, column in np.ndindex(box[1], box[0]):
        c = [at[0] + column, at[1] + row, at[2], at[3]]
        inside = all(0 <= index < extent for index, extent in zip(c, x.shape[::-1], strict=True))
        expected = x[c[3], c[2], c[1], c[0]].item() if inside else 0.0
        byte = swizzled(row, column) if swizzle else 128 * row + 2 * column
        actual = torch.from_numpy(image[byte : byte + 2].copy()).view(torch.bfloat16).item()
        assert actual == expected, (row, column)


def test_copy_tensor_of_four_dimensions():
    x = torch.arange(4 * 5 * 6 * 8, dtype=torch.float32).view(4, 5, 6, 8)
    image = copy_tensor(x, (4, 3, 2, 2), (4, 2, 1, 1), swizzle=False)
    assert torch.equal(
        torch.from_numpy(image).view(torch.float32), x[1:3, 1:3, 2:5, 4:8].reshape(-1)
    )


def test_copy_bulk():
    x = torch.randn(64)
    image = torch.zeros(128, dtype=torch.uint8)
    register(x=x, out_image=image)
    unused = (x.data_ptr(), 4, [64, 1, 1, 1], [4, 256, 256, 256], [4, 1, 1, 1], False)
    probes.copy(unused, [0, 0, 0, 0], x[8:].data_ptr(), 128, image.data_ptr())
    assert torch.equal(image.view(torch.float32), x[8:40])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(data=2), "address is no multiple of 16"),
        (dict(strides=[2, 120, 960, 960]), "stride is no multiple of 16"),
        (dict(strides=[4, 128, 1024, 1024]), "innermost dimension is not contiguous"),
        (dict(box=[64, 300, 1, 1]), "box extent is not in 1 .. 256"),
        (dict(box=[4, 8, 1, 1], swizzle=False), "no multiple of 16 bytes"),
        (dict(box=[32, 8, 1, 1]), "has not 128 bytes"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_tensor_map(change, message):
    x, image = torch.zeros(16, 64).bfloat16(), torch.zeros(4096, dtype=torch.uint8)
    register(x=x, out_image=image)
    fields = dict(
        data=0, bytes=2, extents=[60, 8, 1, 1], strides=[2, 128, 1024, 1024], box=[64, 8, 1, 1]
    )
    fields |= dict(swizzle=True) | change
    fields["data"] += x.data_ptr()
    with pytest.raises(emulated.EmulationError, match=message):
        probes.copy(tuple(fields.values()), [0, 0, 0, 0], 0, 1024, image.data_ptr())


# ---- instructions of a warp ----

SHUFFLE, SHUFFLE_XOR, VOTE, REDUCE, CONVERT = range(5)
LDMATRIX, LDMATRIX_TRANS, MMA, COPY_ASYNC, ELECT, MATH, BITS = range(5, 12)


def run_warp(instruction, inputs, image=None, argument=0, dtype="bf16"):
    """(outputs [32, 8], shared memory) after an instruction with inputs [32, up to 8]."""
    registers = torch.zeros(32, 8, dtype=torch.int32)
    inputs = np.ascontiguousarray(np.asarray(inputs).reshape(32, -1)).astype(np.uint32)
    registers[:, : inputs.shape[1]] = torch.from_numpy(inputs.view(np.int32))
    image = torch.zeros(1024, dtype=torch.uint8) if image is None else image
    out = torch.zeros(32, 8, dtype=torch.int32)
    after = torch.zeros_like(image)
    register(inputs=registers, image=image, out_put=out, out_image=after)
    probes.warp(
        instruction,
        argument | (TYPES[dtype][0] << 31),
        registers.data_ptr(),
        image.data_ptr(),
        image.nbytes,
        out.data_ptr(),
        after.data_ptr(),
    )
    return out.numpy().view(np.uint32), after


LANES = np.arange(32)


def test_shuffles():
    values = LANES * 3 + 100
    source = (LANES * 7 + 5) % 64  # only the five low bits count
    out, _ = run_warp(SHUFFLE, np.stack([values, source], 1))
    assert np.array_equal(out[:, 0], values[source % 32])
    for by in (1, 2, 4, 8, 16, 5):
        out, _ = run_warp(SHUFFLE_XOR, values, argument=by)
        assert np.array_equal(out[:, 0], values[LANES ^ by])


@pytest.mark.parametrize("word", [0, 1, 0x80000000, 0xFFFFFFFF, 0x12345678], ids=hex)
def test_votes(word):
    out, _ = run_warp(VOTE, word >> LANES & 1)
    assert (out[:, 0] == word).all()
    assert (out[:, 1] == (word != 0)).all()


def test_reductions():
    x = np.random.default_rng(0).integers(0, 1 << 32, 32, dtype=np.uint64).astype(np.uint32)
    out, _ = run_warp(REDUCE, x)
    assert (out[:, 0] == x.astype(np.uint64).sum() % (1 << 32)).all()
    assert (out[:, 1] == x.max()).all()
    assert (out[:, 2] == x.min()).all()


def test_one_lane_is_elected_and_the_seed_decides_which():
    elected = set()
    for seed in range(8):
        emulated.configure(seed=seed)
        out, _ = run_warp(ELECT, LANES)
        assert out[:, 0].sum() == 1
        elected.add(int(out[:, 0].argmax()))
    assert len(elected) > 3


def test_bits():
    x = np.array([0, 1, 0x80000000, 0xFFFFFFFF, 0x00F0, 12] + [1 << i for i in range(26)])
    out, _ = run_warp(BITS, x)
    assert np.array_equal(out[:, 0], [int(v).bit_count() for v in x])
    assert np.array_equal(out[:, 1], [(int(v) & -int(v)).bit_length() - 1 if v else 32 for v in x])


@pytest.mark.parametrize("dtype", TYPES)
def test_conversions(dtype):
    torch_dtype = TYPES[dtype][1]
    special = [0.0, -0.0, 1.0, -1.0, 65504.0, 65519.9, 65520.0, 1e38, 3.4e38, 1e-8, 6e-8, 3e-8]
    special += [float("inf"), float("-inf"), 1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-11, 1 + 3 * 2**-11]
    special += [2**-14, 2**-14 * 0.999, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25, -(2.0**-140), 1e-40]
    rng = np.random.default_rng(0)
    for start in range(0, 1 << 16, 1 << 13):
        x = rng.standard_normal(32) * 10.0 ** rng.integers(-9, 9, 32)
        x[: len(special)] = special
        x = x.astype(np.float32)
        halves = (start + rng.integers(0, 1 << 13, 32)).astype(np.uint32)
        inputs = np.stack([x.view(np.uint32), x[::-1].view(np.uint32), halves | halves << 16], 1)
        out, _ = run_warp(CONVERT, inputs, dtype=dtype)
        rounded = bits(torch.from_numpy(x).to(torch_dtype)).astype(np.uint32)
        assert np.array_equal(out[:, 0], rounded | rounded[::-1] << 16)
        exact = torch.from_numpy(halves.astype(np.uint16).view(np.int16)).view(torch_dtype).float()
        for column in (1, 2):
            unpacked = torch.from_numpy(out[:, column].copy().view(np.float32))
            assert torch.equal(unpacked.nan_to_num(nan=1.5), exact.nan_to_num(nan=1.5))


def test_mathematics():
    x = np.linspace(-20, 20, 32).astype(np.float32)
    out, _ = run_warp(MATH, x.view(np.uint32))
    with np.errstate(invalid="ignore"):
        exact = np.exp2(x.astype(np.float64)), np.log2(x.astype(np.float64)), 1 / x
    for column in range(3):
        actual = out[:, column].copy().view(np.float32)
        np.testing.assert_allclose(actual, exact[column], rtol=4e-7)
    denormal = np.full(32, 1e-40, np.float32)
    out, _ = run_warp(MATH, denormal.view(np.uint32))
    assert (out[:, 0].copy().view(np.float32) == 1).all()
    assert (out[:, 1].copy().view(np.float32) == -np.inf).all()


# Rows of 16 bytes at places that do not overlap, for the matrices of ldmatrix.
ROWS = (LANES * 7 % 32) * 16


@pytest.mark.parametrize("transpose", [False, True], ids=["", "trans"])
def test_ldmatrix(transpose):
    image = torch.arange(512, dtype=torch.int16)
    inputs = np.zeros((32, 5))
    inputs[:, 4] = ROWS
    out, _ = run_warp(LDMATRIX_TRANS if transpose else LDMATRIX, inputs, image.view(torch.uint8))
    for lane, matrix, half in itertools.product(range(32), range(4), range(2)):
        row, column = lane // 4, 2 * (lane % 4) + half  # the ISA's figure for .m8n8
        if transpose:
            row, column = column, row
        expected = ROWS[8 * matrix + row] // 2 + column
        assert out[lane, matrix] >> 16 * half & 0xFFFF == expected


@pytest.mark.parametrize("dtype", TYPES)
def test_mma(dtype):
    torch_dtype = TYPES[dtype][1]
    a = torch.randint(-8, 9, (16, 16)).to(torch_dtype)
    b = torch.randint(-8, 9, (16, 8)).to(torch_dtype)
    a_bits, b_bits = bits(a).astype(np.uint32), bits(b).astype(np.uint32)
    inputs = np.zeros((32, 6), np.uint32)
    for lane in range(32):
        group, in_group = divmod(lane, 4)
        for i in range(8):  # a0 to a7
            row = group if i in (0, 1, 4, 5) else group + 8
            column = 2 * in_group + i % 2 + (0 if i < 4 else 8)
            inputs[lane, i // 2] |= a_bits[row, column] << 16 * (i % 2)
        for i in range(4):  # b0 to b3
            row = 2 * in_group + i % 2 + (0 if i < 2 else 8)
            inputs[lane, 4 + i // 2] |= b_bits[row, group] << 16 * (i % 2)
    out, _ = run_warp(MMA, inputs, dtype=dtype)
    expected = a.float() @ b.float()
    for lane, i in itertools.product(range(32), range(4)):
        row = lane // 4 + (0 if i < 2 else 8)
        column = 2 * (lane % 4) + i % 2
        before = i  # what the probe puts in d
        assert out[lane, i].view(np.float32) == expected[row, column] + before


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_copy_async(schedule):
    emulated.configure(schedule)
    image = torch.randint(0, 255, (512,), dtype=torch.uint8)
    inputs = np.zeros((32, 6))
    inputs[:, 4] = ROWS
    inputs[:, 5] = LANES % 17
    _, after = run_warp(COPY_ASYNC, inputs, image)
    for lane in range(32):
        row = torch.zeros(16, dtype=torch.uint8)
        valid = lane % 17
        row[:valid] = image[16 * lane : 16 * lane + valid]
        assert torch.equal(after[ROWS[lane] : ROWS[lane] + 16], row)


# ---- a pipeline, and what goes wrong in it ----

STEPS, CTAS = 5, 2


class Pipeline:
    """out[cta] = a (b_0 + b_1 + ...)^T; see csrc/emulation/probes/pipeline.cu."""

    def __init__(self):
        self.a = torch.randint(-3, 4, (64, 64)).bfloat16()
        self.b = torch.randint(-3, 4, (STEPS * 64, 64)).bfloat16()
        self.exact = self.a.float() @ self.b.float().view(STEPS, 64, 64).sum(0).T

    def run(self, fault: str = "none") -> bool:
        """Whether the result is right; raises what the emulator reports."""
        out = torch.full((CTAS, 64, 64), float("nan"))
        counter = torch.zeros(1)
        register(a=self.a, b=self.b, out_put=out, out_counter=counter)
        rows = [2, 128, 128 * 64 * STEPS, 128 * 64 * STEPS]
        b_map = (self.b.data_ptr(), 2, [64, 64 * STEPS, 1, 1], rows, [64, 64, 1, 1], True)
        probes.pipeline(
            probes.faults().index(fault),
            STEPS,
            b_map,
            self.a.data_ptr(),
            self.b.data_ptr(),
            out.data_ptr(),
            counter.data_ptr(),
            CTAS,
        )
        return torch.equal(out, self.exact.expand_as(out)) and counter.item() == CTAS


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("threads", [1, 2])
def test_pipeline(pipeline, schedule, threads):
    for seed in range(20):
        emulated.configure(schedule, seed, threads)
        assert pipeline.run(), seed


# What is reported of each fault, under every schedule.
FAULTS = {
    "no barrier after mbarrier_init": "initialised by thread 0 .* nothing orders this use|"
    "no mbarrier has been initialised",
    "no fence_mbarrier_init": "no fence_mbarrier_init follows",
    "no wait for a full stage": "wgmma .* written in copy_tensor_4d .* nothing orders|"
    "nothing has been written there",
    "no wait for an empty stage": "one arrival too many|race: .* nothing orders this",
    "no wgmma_fence": "no wgmma_fence lies between",
    "no wgmma_commit": "is read in wgmma .* nothing orders this write after",
    "no wgmma_wait": "is read in wgmma .* nothing orders this write after",
    "no fence_proxy_async": "written in store_shared .* no fence_proxy_async lies between",
    "no barrier between writes and reads": "race: .* nothing orders this (access|write) after",
    "no arrival at an empty stage": "deadlock",
    "stage released before its wgmma is done": "is read in wgmma .* nothing orders this write",
    "stage released by one warp for four": "is read in wgmma .* nothing orders this write after",
    "stage released by one lane before its warp has waited": "can complete before .* has seen",
    "two arrivals of one warp": "one arrival too many|is read in wgmma .* nothing orders|"
    "can complete before .* has seen|deadlock",
    "expect_tx too small": "deadlock(.|\n)* and -[0-9]+ bytes",
    "expect_tx of one copy of two": "expects too few bytes|deadlock|written in copy_bulk",
    "expect_tx too large": "deadlock(.|\n)* waits for 0 of 1 arrivals and 8192 bytes",
    "wrong parity of the full stage": "deadlock|written in copy_tensor_4d .* nothing orders|"
    "can complete before|nothing has been written there",
    "wrong parity of the empty stage": "deadlock(.|\n)*mbarrier_wait at .* for parity 0",
    "leading and stride bytes swapped": "wrong descriptor of b: .* multiples of 1024",
    "descriptor of a misaligned tile": "wrong descriptor of b: .* a multiple of 1024",
    "descriptor without swizzle": "wrong descriptor of b: it has not the 128-byte swizzle",
    "read past the end of shared memory": "load_shared .* shared memory out of bounds",
    "read past the end of a tensor": "load_global .* read of 2 bytes, 0 bytes past the end of 'b'",
    "write past the end of a tensor": "store_global .* 0 bytes past the end of 'out_put'",
    "write to an input": "write to 'a', which the kernel may only read",
    "race in shared memory": "race: .* written in store_shared .* nothing orders",
    "race between CTAs": "race: byte 0 of 'out_counter' was written by thread 0 of CTA",
    "copy in flight at exit": "copy_tensor_4d .* exits and nobody has waited",
    "wgmma in flight at exit": "wgmma at .* exits while a wgmma is in flight",
    "accumulators scaled in flight": "accumulators have changed in lane",
    "accumulators read in flight": "comes from an accumulator that wgmma still worked on",
    "registers of a changed in flight": "registers of a have changed in lane",
    "lanes at different collectives": "all 32 lanes have to make the same call",
    "barrier with two counts": "barrier 1 of [0-9]+ threads, but others have come to it as one of",
    "thread missing at a barrier": "deadlock(.|\n)*lane 13 exited(.|\n)*127 of 128 threads",
    "operand that nobody has written": "wgmma .* nothing has been written there",
    "misaligned store": "store_shared .* misaligned",
    "copy_async without wait": "destination of copy_async_16 .* no copy_async_wait",
    "copy_async without commit": "destination of copy_async_16 .* no copy_async_wait",
    "copy_async without barrier": "race: .* nothing orders this (access|write) after",
    "copy_async in flight at exit": "copy_async_16 .* exits while its copy is in flight",
    "ldmatrix without barrier": "ldmatrix .* written in store_shared .* nothing orders",
    "warps of a warpgroup at different wgmma": "the warps of a warpgroup issue different wgmma",
}


def test_every_fault_has_its_report():
    assert ["none", *FAULTS, "endless loop"] == probes.faults()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.replace(" ", "-"))
def test_fault(pipeline, fault, schedule):
    for seed in range(10):
        emulated.configure(schedule, seed)
        with pytest.raises(emulated.EmulationError) as error:
            pipeline.run(fault)
        assert re.search(FAULTS[fault], str(error.value)), f"seed {seed}: {error.value}"
        assert "kernel 'pipeline', CTA" in str(error.value)
        assert f"[schedule {schedule}, seed {seed}]" in str(error.value)
    assert pipeline.run(), "the process is as good as new"


def test_an_endless_loop_ends(pipeline):
    with pytest.raises(emulated.EmulationError, match="load_shared .* seems to loop for ever"):
        pipeline.run("endless loop")


def test_deadlock_tells_where_every_warp_waits(pipeline):
    with pytest.raises(emulated.EmulationError) as error:
        pipeline.run("no arrival at an empty stage")
    text = str(error.value)
    for warp in range(4):
        assert re.search(
            rf"warp {warp}: all lanes in mbarrier_wait at emulation/probes/pipeline.cu:\d+ "
            r"for parity 1 of the mbarrier at \d+\n",
            text,
        )
    assert re.search(
        r"warp 4: lane 0 in mbarrier_wait at emulation/probes/pipeline.cu:\d+ .*; lanes 1-31 exit",
        text,
    )
    assert re.search(r"mbarrier at \d+: phase 0 \(parity 0\) waits for 4 of 4 arrivals", text)


# Calls of the pipeline without which it is still right, and why.
BENIGN = {
    "sync_warp": "elect_one and wgmma_wait, which the lanes pass together, come after every wait",
}


def synchronising_calls(pipeline) -> list[str]:
    emulated.clear_report()
    assert pipeline.run()
    sites = [site for site in emulated.sites() if site[3]]
    return [f"{file}:{line}:{instruction}" for file, line, instruction, *_ in sites]


def test_every_synchronising_call_is_needed(pipeline):
    """Each is left out in turn: the emulator notices, or it is on the list above."""
    calls = synchronising_calls(pipeline)
    assert len(calls) >= 15
    survivors = set()
    for call in calls:
        caught = False
        for schedule in SCHEDULES:
            emulated.configure(schedule, seed=1, ignored=call)
            emulated.clear_report()
            try:
                caught |= not pipeline.run()
            except emulated.EmulationError:
                caught = True
            assert emulated.ignored_calls(), call
        if not caught:
            survivors.add(call)
    assert [call.split(":")[2] for call in survivors] == list(BENIGN), survivors


def test_the_same_seed_is_the_same_run(pipeline):
    def run(schedule: str, seed: int, threads: int) -> str:
        emulated.configure(schedule, seed, threads)
        with pytest.raises(emulated.EmulationError) as error:
            pipeline.run("race in shared memory")
        return str(error.value)

    reports = {run("random", seed, 1) for seed in range(20)}
    assert len(reports) > 10
    for seed in range(20):
        assert run("random", seed, 1) == run("random", seed, 2)


def test_the_seed_decides_in_which_order_ctas_add():
    def total(seed: int, threads: int) -> float:
        result = torch.zeros(1)
        register(out_result=result)
        emulated.configure("random", seed, threads)
        probes.sum(result.data_ptr(), 100)
        return result.item()

    totals = [total(seed, 1) for seed in range(10)]
    assert len(set(totals)) > 1
    assert totals == [total(seed, 2) for seed in range(10)]
    assert all(abs(x - sum(1 / (3 + i) for i in range(100))) < 1e-5 for x in totals)


def test_registers():
    emulated.clear_report()
    probes.registers(384, 24, 240)
    grants = {(warp, count) for kernel, warp, count in emulated.register_grants()}
    assert grants == {(w, 24 if w < 4 else 240) for w in range(12)}
    with pytest.raises(
        emulated.EmulationError, match="deadlock(.|\n)*registers that other warps hold"
    ):
        probes.registers(384, 24, 256)
    with pytest.raises(emulated.EmulationError, match="from 168 registers down to 200"):
        probes.registers(384, 200, 240)


def test_nothing_is_registered_unasked(pipeline):
    out = torch.zeros(1)
    emulated.clear_memory()
    with pytest.raises(emulated.EmulationError, match="no global memory is registered"):
        probes.sum(out.data_ptr(), 1)


def test_wrong_settings():
    with pytest.raises(ValueError, match="schedule 'sometimes': one of 'late'"):
        emulated.configure("sometimes")
