"""The native CPU kernels with every instruction set of this machine, and their threads."""

import os
import platform
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from oracle import assert_selects, block_means, block_runs, fewest, pooled_scores, window_mask
from test_block_attention import check, gradients, problem
from test_block_mask import smooth_tokens
from test_scores import DTYPES

import nabla
from nabla import BlockMask, TokenGrid, cpu, dispatch

INSTRUCTION_SETS = [] if cpu.unavailable_reason() else cpu.instruction_sets()

# name: grid, heads of q, heads of k, head_dim
PROBLEMS = {
    "64-token blocks": (TokenGrid(3, 16, 16), 2, 2, 64),
    "short blocks and extra tokens": (TokenGrid(2, 11, 21, extra=70), 4, 2, 80),
    "16-token blocks": (TokenGrid(2, 9, 13, block=(1, 4, 4), extra=3), 3, 1, 48),
    "32-token blocks": (TokenGrid(3, 8, 10, block=(2, 4, 4)), 2, 1, 32),
    "128-token blocks": (TokenGrid(4, 13, 8, block=(2, 8, 8), extra=129), 2, 2, 128),
    "blocks of one token": (TokenGrid(1, 9, 9), 1, 1, 112),
    "the largest head": (TokenGrid(1, 8, 20), 2, 1, 256),
}


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    with cpu.use_instruction_set(request.param):
        yield request.param


@pytest.fixture
def threads():
    """Sets the number of threads of torch for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(q, k, v, dout, dlse, grid, keep):
    """All that the kernels compute for one problem."""
    mask = nabla.create_block_mask(q, k, grid=grid, top_p=0.6, window=(1, 3, 3), backend="cpu")
    scores = nabla.pooled_scores(q, k, grid, backend="cpu")
    given = BlockMask.from_dense(keep, grid=grid)

    def attend(q, k, v):
        return nabla.block_sparse_attention(q, k, v, given, return_lse=True, backend="cpu")

    return mask.bits, scores, *gradients(attend, q, k, v, dout, dlse)


def a_problem(dtype=torch.float32):
    grid = TokenGrid(3, 20, 44, extra=10)
    q, k, v, dout, keep = problem(grid, (4, 2), 48, dtype, batch=2)
    return q, k, v, dout, torch.randn(q.shape[:3]), grid, keep


def same_bits(ours, theirs):
    return all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


# Every instruction set


def test_this_installation_has_the_kernels():
    assert cpu.unavailable_reason() is None
    assert INSTRUCTION_SETS[-1] == "portable"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_attention(instruction_set, name, dtype):
    grid, heads, kv_heads, head_dim = PROBLEMS[name]
    check(*problem(grid, (heads, kv_heads), head_dim, dtype, batch=2), grid, "cpu")


def test_many_keys_of_very_different_scores(instruction_set):
    """Scores spread as a trained model's, values off 0: one chain of all keys rounds too much."""
    q, k, v, dout, keep = problem(TokenGrid(16, 16, 16), share=1.0)
    rows = slice(0, 256)
    q, k, v, dout, keep = 2 * q[:, :, rows], 2 * k, v + 3, dout[:, :, rows], keep[:, :, :4]
    check(q, k, v, dout, keep, TokenGrid(16, 16, 16), "cpu")


def test_scores_of_many_channels_round_little(instruction_set):
    """One chain of 256 sums is 4.7 roundings off, chains of 64 are 2.5; lse shows the scores."""
    grid, block = TokenGrid(4, 17, 17), 17  # a block of one token
    q, k, v, _, keep = problem(grid, head_dim=256)
    keep[:] = torch.arange(grid.num_blocks) == block
    mask = BlockMask.from_dense(keep, grid=grid)
    _, lse = nabla.block_sparse_attention(q, k, v, mask, scale=1.0, return_lse=True, backend="cpu")
    key = k[:, :, grid.block_start(block), :, None].double()
    scores = (q.double() @ key).squeeze(-1)
    errors = (lse - scores).square().mean().sqrt() / scores.square().mean().sqrt()
    assert errors < 3.5 * 2**-24


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_softmax_over_one_key_has_no_gradient(instruction_set, dtype):
    """To q and k exactly none, where many rows keep the one key and where one does."""
    grid, block = TokenGrid(4, 17, 17), 17  # a block of one token, at the corner of a frame
    q, k, v, dout, keep = problem(grid, head_dim=64, dtype=dtype)
    keep[:] = torch.arange(grid.num_blocks) == block
    for first, last in ((0, grid.num_blocks), (block, block + 1)):
        rows = slice(grid.block_start(first), grid.block_start(last))
        some = (q[:, :, rows], k, v, dout[:, :, rows], keep[:, :, first:last])
        check(*some, grid, "cpu", first)
        mask = BlockMask.from_dense(some[-1], grid=grid, q_block_offset=first)

        def attend(q, k, v, mask=mask):
            return nabla.block_sparse_attention(q, k, v, mask, return_lse=True, backend="cpu")

        _, _, dq, dk, _ = gradients(attend, *some[:4])
        assert not dq.any() and not dk.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_empty_rows_and_gradients_through_lse(instruction_set, dtype):
    grid = TokenGrid(3, 12, 20, extra=5)
    q, k, v, dout, keep = problem(grid, (4, 2), 64, dtype, empty=True)
    rows, blocks = slice(grid.block_start(2), grid.block_start(15)), slice(2, 15)
    q, dout, dlse = q[:, :, rows], dout[:, :, rows], torch.randn(1, 4, q[:, :, rows].shape[2])
    dlse = dlse.where(
        keep[:, :, blocks].any(-1).repeat_interleave(grid.starts().diff()[blocks].long(), -1), 0
    )
    check(q, k, v, dout, keep[:, :, blocks], grid, "cpu", 2, dlse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beside_the_tokens_is_read(instruction_set, dtype):
    """Tokens before and after, and channels beside those of the tensors, are NaN."""
    grid = TokenGrid(2, 11, 13, extra=7)
    tensors = *inputs, dout, keep = problem(grid, (2, 2), 48, dtype)
    surrounded = []
    for x in tensors[:4]:
        outer = torch.full((1, 4, x.shape[2] + 200, 81), torch.nan, dtype=dtype)
        inner = outer[:, 1:3, 100:-100, 17:65]
        surrounded.append(inner.copy_(x))
    check(*surrounded, keep, grid, "cpu")


@pytest.mark.parametrize("window", [None, (1, 3, 1)], ids=["no window", "window"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_masks_and_scores(instruction_set, name, dtype, window):
    grid, heads, kv_heads, head_dim = PROBLEMS[name]
    q = smooth_tokens(grid, heads, head_dim, dtype, batch=2, strength=1.0)
    k = smooth_tokens(grid, kv_heads, head_dim, dtype, batch=2, strength=1.0)
    mean = nabla.block_mean(q, grid, backend="cpu")
    torch.testing.assert_close(
        mean.double(), block_means(q, block_runs(grid)), atol=1e-6, rtol=1e-6
    )
    exact = pooled_scores(q, k, grid, head_dim**-0.5)
    scores = nabla.pooled_scores(q, k, grid, backend="cpu")
    video = grid.num_grid_blocks
    assert torch.isinf(scores[..., video:]).all() and torch.isinf(scores[:, :, video:]).all()
    ranked = scores[:, :, :video, :video].double()
    torch.testing.assert_close(ranked, exact[:, :, :video, :video], atol=0, rtol=3e-5)

    options = {"top_p": 0.7, "window": window, "backend": "cpu"}
    mask = nabla.create_block_mask(q, k, grid=grid, **options)
    top_p = torch.full((heads,), 0.7, dtype=torch.float32).double()
    always = window_mask(grid, window)
    assert_selects(mask.to_dense(), exact, top_p, always, closeness=6e-5)
    assert torch.equal(mask.bits, nabla.select_blocks(scores, grid, **options).bits)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("values", [1, 3, 50])
def test_ties(instruction_set, top_p, values):
    """Few candidates are put in order one by one, many equal ones are not: both are reached."""
    scores = torch.randint(1, values + 1, (1, 1, 4, 700)) / 4.0  # sums are exact in float32
    mask = nabla.select_blocks(scores, TokenGrid(700, 8, 8), top_p=top_p, backend="cpu")
    exact_p = torch.tensor(top_p).item()  # as float32
    for kept, row in zip(mask.to_dense()[0, 0], scores[0, 0].tolist(), strict=True):
        assert set(kept.nonzero().flatten().tolist()) == fewest(row, exact_p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions(instruction_set, dtype):
    """One token per block: its mean is itself, and attention to it alone gives it back, exactly."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every[every.isfinite()].repeat(2)[: 2**16].view(1, 1, -1, 32)
    grid = TokenGrid(x.shape[2], 1, 1)
    assert torch.equal(nabla.block_mean(x, grid, backend="cpu"), x.float())
    keep = torch.eye(grid.num_blocks, dtype=torch.bool)[None, None]
    mask = BlockMask.from_dense(keep, grid=grid)
    out = nabla.block_sparse_attention(
        torch.zeros_like(x), torch.zeros_like(x), x, mask, backend="cpu"
    )
    subnormal = x.abs() < torch.finfo(dtype).tiny
    if dtype == torch.bfloat16 and instruction_set == "avx512_bf16":
        assert torch.equal(
            out.where(~subnormal, 0), x.where(~subnormal, 0)
        )  # the dot product flushes
    else:
        assert torch.equal(out, x)


def test_the_rounding_of_the_result_is_to_nearest_even(instruction_set):
    """Two values of equal weight: their mean, with one more bit, is rounded as torch rounds it."""
    grid = TokenGrid(1024, 1, 2, block=(1, 4, 4))
    for dtype, low, high in ((torch.float16, 0.0, 70.0), (torch.bfloat16, 0.0, 70.0)):
        v = torch.empty(1, 1, grid.num_tokens, 32).uniform_(low, high).to(dtype)
        keep = torch.eye(grid.num_blocks, dtype=torch.bool)[None, None]
        mask = BlockMask.from_dense(keep, grid=grid)
        zero = torch.zeros_like(v)
        out = nabla.block_sparse_attention(zero, zero, v, mask, backend="cpu")
        mean = v.float().unflatten(2, (-1, 2)).mean(3).to(dtype)
        assert torch.equal(out, mean.repeat_interleave(2, 2))


AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
DOTS = AVX512 | {"avx512bf16"}

# name: features, the instruction sets in the order of preference
PROCESSORS = {
    "AMD Zen 4": (DOTS, ["avx512_bf16", "avx512", "avx2", "portable"]),
    "Intel Cooper Lake": (
        DOTS | {"intel", "cooperlake"},
        ["avx512_bf16", "avx512", "avx2", "portable"],
    ),
    "Intel with AMX": (DOTS | {"intel"}, ["avx512", "avx512_bf16", "avx2", "portable"]),
    "Intel Skylake server": (AVX512 | {"intel"}, ["avx512", "avx2", "portable"]),
    "Intel Xeon Phi": (AVX2 | {"avx512f", "intel"}, ["avx2", "portable"]),
    "AMD Zen 2": (AVX2, ["avx2", "portable"]),
    "without f16c": (DOTS - {"f16c"}, ["portable"]),
    "Intel Nehalem": ({"intel"}, ["portable"]),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_best_instruction_set_of_a_processor(name):
    features, expected = PROCESSORS[name]
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    chosen = cpu.native().instruction_sets(sorted(features))
    assert chosen == (expected if is_x86 else ["portable"])


def test_the_features_are_those_that_linux_finds():
    found = set(cpu.native().features())
    facts = dict(re.findall(r"^(\w+)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    flags = facts.get("flags", "").replace("avx512_bf16", "avx512bf16").split()
    assert found & DOTS == DOTS.intersection(flags)
    assert ("intel" in found) == (facts.get("vendor_id") == "GenuineIntel")
    assert INSTRUCTION_SETS == cpu.native().instruction_sets(sorted(found))


def test_instruction_sets_can_be_chosen():
    assert set(INSTRUCTION_SETS) <= {"avx512_bf16", "avx512", "avx2", "portable"}
    with cpu.use_instruction_set("portable"):
        with pytest.raises(
            ValueError, match="'sse9' is not among those of this machine: .*portable"
        ):
            with cpu.use_instruction_set("sse9"):
                pass
    with pytest.raises(ValueError, match="'sse9' is not available"):
        cpu.native().attention_forward("sse9")


def test_a_missing_field_is_an_error():
    with pytest.raises(KeyError, match="dtype"):
        cpu.native().attention_forward("portable")


# Threads and processes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_with_any_number_of_threads(threads, dtype):
    arguments = a_problem(dtype)
    threads(1)
    expected = everything(*arguments)
    for count in (2, 3, 7):
        threads(count)
        assert same_bits(everything(*arguments), expected)


def test_concurrent_callers(threads):
    threads(3)
    arguments = a_problem()
    expected = everything(*arguments)
    failures = []

    def work():
        for _ in range(5):
            if not same_bits(everything(*arguments), expected):
                failures.append(threading.current_thread().name)

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


def test_python_runs_meanwhile():
    grid = TokenGrid(16, 32, 32)
    q = torch.randn(1, 4, grid.num_tokens, 64)
    mask = BlockMask.from_dense(
        torch.ones(1, 1, grid.num_blocks, grid.num_blocks, dtype=torch.bool), grid=grid
    )
    caller = threading.Thread(
        target=nabla.block_sparse_attention, args=(q, q, q, mask), kwargs={"backend": "cpu"}
    )
    caller.start()
    steps = 0
    while caller.is_alive():
        time.sleep(0.001)
        steps += 1
    assert steps > 5


def test_a_forked_child_works(threads):
    """As a worker of a DataLoader does, after its parent has used the threads."""
    threads(3)
    torch.use_deterministic_algorithms(False)  # fills memory with the threads of OpenMP
    q, k, v, dout, dlse, grid, keep = a_problem()
    bits = BlockMask.from_dense(keep, grid=grid).bits
    arguments = (q, k, v, bits, grid, 0, 0.2)

    def attend():
        from nabla.cpu import block_attention

        out, lse = block_attention.attention_fwd(*arguments)
        return out, *block_attention.attention_bwd(
            dout, dlse, q, k, v, out, lse, bits, grid, 0, 0.2
        )

    expected = [x.numpy().tobytes() for x in attend()]
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        same = [x.numpy().tobytes() for x in attend()] == expected
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert [x.numpy().tobytes() for x in attend()] == expected


class Attended(torch.utils.data.Dataset):
    """What attention makes of random inputs, computed where an item is asked for."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        q, k, v = torch.randn(3, 1, 2, 200, 32, generator=torch.Generator().manual_seed(index))
        return nabla.attention(q, k, v, grid=(1, 10, 20), top_p=0.5, backend="cpu")


def test_the_workers_of_a_data_loader(threads):
    threads(3)
    expected = [Attended()[index] for index in range(4)]
    loaded = torch.utils.data.DataLoader(
        Attended(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    assert same_bits(loaded, expected)


def test_another_thread_may_use_many_grids():
    """Whatever is cached for a grid outlives the launch that reads it."""
    grid = TokenGrid(64, 8, 8)
    x = torch.randn(1, 1, grid.num_tokens, 32)
    mask = nabla.sliding_tile_mask(grid, (5, 1, 1))
    expected = nabla.block_sparse_attention(x, x, x, mask, backend="cpu")
    running = threading.Event()
    running.set()

    def use_grids():
        while running.is_set():
            for length in range(1, 200):
                tokens = torch.ones(1, 1, length, 32)
                nabla.block_mean(tokens, TokenGrid(1, 1, length, (1, 1, 16)), backend="cpu")

    other = threading.Thread(target=use_grids)
    other.start()
    try:
        for _ in range(30):
            out = nabla.block_sparse_attention(x, x, x, mask, backend="cpu")
            assert torch.equal(out, expected)
    finally:
        running.clear()
        other.join()


# The installation


def test_there_is_one_openmp_runtime():
    """That of torch: the kernels bring none and need none."""
    module = Path(cpu.native().__file__).read_bytes()
    assert b"libgomp" not in module and b"libomp" not in module


@pytest.mark.parametrize("recorded", ["cmake was missing when nabla was installed", None])
def test_without_kernels_the_reference_runs_and_the_reason_is_told(monkeypatch, tmp_path, recorded):
    def missing():
        raise ImportError("no module of that name")

    reason = tmp_path / "reason.txt"
    if recorded:
        reason.write_text(f"{recorded}\n")
    monkeypatch.setattr(cpu, "native", missing)
    monkeypatch.setattr(cpu, "REASON_FILE", reason)
    expected = recorded or "the module nabla._cpu does not load: no module of that name"
    assert nabla.backends()["cpu"] == (False, expected)
    x = {"device": "cpu", "head_dim": 64, "dtype": torch.float32, "block_size": 64}
    assert dispatch.resolve("auto", **x) == "reference"
    with pytest.raises(ValueError, match=expected):
        dispatch.resolve("cpu", **x)
