"""The Triton kernels: in Triton's interpreter on any machine, or on a GPU.

The interpreter is slow, so shapes are tiny, and odd in every way. It runs this file, and nothing
else, where TRITON_INTERPRET=1 is set (see conftest.py); `make gpu-check` runs it on the device.
What is true of every backend is told by its tests: some run here, with this module's `backend`.
"""

import pytest
import test_block_attention
import test_block_mask
import test_ops
import test_scores
import torch
from oracle import assert_selects, block_runs, pooled_scores, window_mask
from test_block_attention import problem
from test_block_mask import smooth_tokens

import nabla
from nabla import BlockMask, TokenGrid, backends, dispatch
from nabla.bits import pack_bits
from nabla.triton import block_mask as triton_block_mask
from nabla.triton import blocks, config, tune

SHARED = (
    test_block_attention.test_a_gradient_without_strides,
    test_block_attention.test_a_mask_that_keeps_nothing,
    test_block_attention.test_a_nan_query_stays_in_its_row,
    test_block_attention.test_garbage_bits_are_ignored,
    test_block_attention.test_gradients_of_peaked_rows,
    test_block_attention.test_huge_scores_stay_finite,
    test_block_attention.test_poison_at_the_end_of_a_short_block,
    test_block_attention.test_scales_that_are_not_positive,
    test_block_mask.test_equal_tokens_tie_on_ragged_grids,
    test_block_mask.test_negative_scores_have_no_mass,
    test_block_mask.test_tensor_top_p_out_of_range_keeps_one_or_all,
    test_block_mask.test_top_p_one_keeps_blocks_of_no_mass,
    test_block_mask.test_uniform_scores_keep_exactly_the_share,
    test_block_mask.test_what_is_not_finite_is_kept_and_changes_nothing_else,
    test_ops.test_fakes_match_strides_and_dtypes,
    test_scores.test_block_mean_of_a_slice,
    test_scores.test_scores_do_not_depend_on_low_precision_modes,
    test_scores.test_what_is_not_finite_is_marked,
)
globals().update((test.__name__, test) for test in SHARED)

HALVES = (torch.bfloat16, torch.float16)
IS_INTERPRETED = dispatch.is_interpreted()
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
pytestmark = [] if IS_INTERPRETED else pytest.mark.gpu


@pytest.fixture
def backend():
    return "triton"


@pytest.fixture(autouse=True)
def _on_the_device():
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _equal_products_tie(request, monkeypatch):
    """Where a test needs products of equal rows to be equal, as they are on a device.

    The interpreter takes those of numpy, whose BLAS rounds differently by where a row lies in the
    matrix, on some processors. In double precision that is rounded away.
    """
    tie = test_block_mask.test_equal_tokens_tie_on_ragged_grids
    if not (IS_INTERPRETED and request.function is tie):
        return
    from triton.runtime import interpreter

    matmul = interpreter.np.matmul

    def in_double(a, b, dtype):
        return matmul(a, b, dtype="float64").astype(dtype)

    monkeypatch.setattr(interpreter.np, "matmul", in_double)


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """A program computes several tiles, so that its list is written more than once."""
    monkeypatch.setattr(config.TileConfig, "programs", lambda self, device: 3)


def test_auto_chooses_kernels_but_not_the_interpreter():
    assert backends()["triton"] == (True, "available")
    options = {"device": DEVICE, "head_dim": 16, "dtype": torch.float32, "block_size": 16}
    assert dispatch.resolve("triton", **options) == "triton"
    assert (dispatch.resolve("auto", **options) == "triton") is not IS_INTERPRETED


ATTENTION = {
    "one short block": (TokenGrid(1, 3, 3), torch.float32, (1, 1), 32, 1, {}),
    "float32, blocks of 16, extra": (
        TokenGrid(1, 5, 9, block=(1, 4, 4), extra=3),
        torch.float32,
        (2, 1),
        16,
        2,
        {},
    ),
    "bfloat16, ragged, grouped, empty rows": (
        TokenGrid(2, 9, 8),
        torch.bfloat16,
        (4, 2),
        48,
        1,
        {"empty": True},
    ),
    "float16, ragged, batch": (TokenGrid(1, 8, 17), torch.float16, (1, 1), 64, 2, {}),
    "blocks of 32, empty rows": (
        TokenGrid(3, 5, 6, block=(2, 4, 4)),
        torch.float32,
        (3, 1),
        32,
        1,
        {"empty": True},
    ),
    "blocks of 128, whole": (TokenGrid(4, 8, 8, block=(2, 8, 8)), HALVES[0], (1, 1), 80, 1, {}),
    "blocks of 128, ragged": (TokenGrid(3, 9, 8, block=(2, 8, 8)), HALVES[1], (1, 1), 16, 1, {}),
    "all kept": (TokenGrid(2, 8, 16), torch.bfloat16, (2, 2), 128, 1, {"share": 1.0}),
    "widest heads": (TokenGrid(1, 9, 9), torch.float32, (1, 1), 256, 1, {}),
    "widest heads, half": (TokenGrid(1, 8, 9), torch.float16, (1, 1), 208, 1, {}),
}


@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
def test_attention(backend, case):
    grid, dtype, heads, head_dim, batch, options = case
    arguments = problem(grid, heads, head_dim, dtype, batch, **options)
    test_block_attention.check(*arguments, grid, backend)


@pytest.mark.parametrize(
    "architecture, dtype, head_dim",
    [
        (80, torch.float32, 64),
        (80, torch.bfloat16, 256),
        (86, torch.float16, 96),
        (90, torch.bfloat16, 96),
        (100, torch.float16, 64),
        (121, torch.float32, 256),
    ],
    ids=str,
)
def test_attention_as_it_is_cut_on_a_chip(backend, monkeypatch, architecture, dtype, head_dim):
    if IS_INTERPRETED:
        monkeypatch.setattr(dispatch, "architecture", lambda device: architecture)
    grid = TokenGrid(1, 9, 8, block=(2, 8, 8), extra=67)
    test_block_attention.check(*problem(grid, (1, 1), head_dim, dtype), grid, backend)


def test_large_scores(backend):
    grid = TokenGrid(1, 16, 16)
    q, k, v, dout, keep = problem(grid, (4, 4))
    test_block_attention.check(q * 30, k * 30, v, dout, keep, grid, backend)


def test_what_attends_to_nothing_is_zero_and_reaches_nothing(backend):
    """Queries and gradients that are NaN in empty rows, and keys that are and in no row.

    They are past the end of short blocks, whose tiles would reach into them.
    """
    grid = TokenGrid(1, 5, 9, block=(1, 4, 4), extra=3)
    q, k, v, dout, keep = problem(grid, (2, 1), 16)
    keep[..., 3, :] = False
    keep[..., 4] = False
    rows, columns = (slice(*block_runs(grid)[block]) for block in (3, 4))
    mask = BlockMask.from_dense(keep, grid=grid)
    dlse = torch.randn(q.shape[:3])

    def ours(q, k, v):
        return nabla.block_sparse_attention(q, k, v, mask, return_lse=True, backend=backend)

    results = []
    for value in (0.0, torch.nan):
        for x in (q, dout, dlse):
            x[:, :, rows] = value
        for x in (k, v):
            x[:, :, columns] = value
        results.append(test_block_attention.gradients(ours, q, k, v, dout, dlse))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    out, lse, dq, dk, dv = results[1]
    assert (lse[:, :, rows] == -torch.inf).all()
    assert (out[:, :, rows] == 0).all() and (dq[:, :, rows] == 0).all()
    assert (dk[:, :, columns] == 0).all() and (dv[:, :, columns] == 0).all()


def test_gradients_through_lse(backend):
    grid = TokenGrid(1, 9, 10)
    q, k, v, dout, keep = problem(grid, (2, 1))
    test_block_attention.check(q, k, v, dout, keep, grid, backend, dlse=torch.randn(q.shape[:3]))


@pytest.mark.parametrize("first, last", [(0, 1), (1, 4), (2, 5)])
def test_slices_of_the_queries(backend, first, last):
    grid = TokenGrid(2, 5, 9, block=(2, 4, 4), extra=40)
    q, k, v, dout, keep = problem(grid)
    rows = slice(grid.block_start(first), grid.block_start(last))
    test_block_attention.check(
        q[:, :, rows], k, v, dout[:, :, rows], keep[:, :, first:last], grid, backend, first
    )


@pytest.mark.parametrize(
    "layout", test_block_attention.LAYOUTS.values(), ids=test_block_attention.LAYOUTS
)
def test_strides(backend, layout):
    grid = TokenGrid(1, 5, 9, block=(1, 4, 4), extra=5)
    q, k, v, dout, keep = problem(grid, (2, 1), batch=2)
    test_block_attention.check(*(layout(x) for x in (q, k, v)), dout, keep, grid, backend)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (1, 1)], ids=str)
def test_masks_for_any_batch_and_heads(backend, shape):
    grid = TokenGrid(1, 5, 9, block=(1, 4, 4))
    q, k, v, dout, keep = problem(grid, batch=2)
    keep = keep[: shape[0], : shape[1]].expand(2, 2, -1, -1)  # the mask's bits have strides of 0
    mask = BlockMask.from_dense(keep[: shape[0], : shape[1]], grid=grid)
    whole = BlockMask.from_dense(keep.contiguous(), grid=grid)
    results = [
        test_block_attention.gradients(
            lambda q, k, v, m=m: nabla.block_sparse_attention(
                q, k, v, m, return_lse=True, backend=backend
            ),
            q,
            k,
            v,
            dout,
        )
        for m in (mask, whole)
    ]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_expanded_inputs(backend):
    grid = TokenGrid(1, 9, 8)
    q, k, v, _, keep = problem(grid, batch=2)
    q, k, v = (x[:1, :1].expand(2, 2, -1, -1) for x in (q, k, v))
    dout = torch.ones(()).expand(q.shape)
    test_block_attention.check(q, k, v, dout, keep, grid, backend)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["k", "v"])
def test_poison_stays_in_rows_that_keep_it(backend, monkeypatch, poison, which):
    grid = TokenGrid(2, 6, 5, block=(1, 4, 4))  # ragged: the poisoned block has short neighbours
    monkeypatch.setattr(test_block_attention, "TokenGrid", lambda *_: grid)
    test_block_attention.test_poison_reaches_who_attends_to_it_and_no_one_else(
        backend, poison, which
    )


def test_deterministic(backend):
    grid = TokenGrid(1, 9, 10)
    q, k, v, dout, keep = problem(grid, (2, 1))
    mask = BlockMask.from_dense(keep, grid=grid)

    def ours(q, k, v):
        return nabla.block_sparse_attention(q, k, v, mask, return_lse=True, backend=backend)

    first, second = (test_block_attention.gradients(ours, q, k, v, dout) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("rows, columns", [(1, 1), (31, 33), (70, 130)])
def test_transposed_bits(rows, columns):
    keep = torch.rand(2, 2, rows, columns) < 0.5
    bits = pack_bits(keep)
    expected = pack_bits(keep.transpose(-2, -1))
    assert torch.equal(blocks.transposed_bits(bits, columns), expected)
    shared = bits[:, :1].expand(-1, 2, -1, -1)
    transposed = blocks.transposed_bits(shared, columns)
    assert torch.equal(transposed, expected[:, :1].expand(-1, 2, -1, -1))
    assert transposed.stride(1) == 0


def test_lists_longer_than_a_chunk():
    """More key blocks than are listed at a time."""
    grid = TokenGrid(1, 4, 4 * 300 + 1, block=(1, 4, 4))
    q, k, v, dout, keep = problem(grid, (1, 1), 16, share=0.02)
    rows = slice(0, grid.block_start(2))
    test_block_attention.check(
        q[:, :, rows], k, v, dout[:, :, rows], keep[:, :, :2], grid, "triton"
    )


MASKS = {
    "one block": (TokenGrid(1, 3, 3), torch.float32, (1, 1), 0.9, None, 1.0),
    "ragged, extra, window": (
        TokenGrid(3, 9, 20, extra=70),
        torch.float32,
        (2, 1),
        0.6,
        (1, 1, 3),
        1.0,
    ),
    "bfloat16": (TokenGrid(2, 16, 17), torch.bfloat16, (1, 1), 0.9, (3, 1, 1), 0.3),
    "all equal": (TokenGrid(5, 8, 8), torch.float16, (1, 1), 0.5, None, 0.0),
    "all kept": (TokenGrid(2, 9, 9), torch.float32, (1, 1), 1.0, None, 1.0),
    "more than 32 blocks": (
        TokenGrid(3, 9, 20, block=(1, 4, 4)),
        torch.float32,
        (1, 1),
        0.8,
        (3, 3, 3),
        1.0,
    ),
}


@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_masks(backend, case):
    grid, dtype, heads, top_p, window, strength = case
    q, k = (smooth_tokens(grid, h, dtype=dtype, strength=strength) for h in heads)
    mask = nabla.create_block_mask(q, k, grid=grid, top_p=top_p, window=window, backend=backend)
    top_p = torch.full((heads[0],), top_p, dtype=torch.float32).double()
    exact = pooled_scores(q, k, grid, 32**-0.5)
    assert_selects(mask.to_dense(), exact, top_p, window_mask(grid, window))


def test_stages_agree_with_the_fused_mask_in_any_chunks(backend, monkeypatch):
    """Rows and heads in pieces, slices of the queries, and scores made apart give the same bits."""
    grid = TokenGrid(3, 9, 20, block=(1, 4, 4), extra=9)
    q, k = smooth_tokens(grid, 2), smooth_tokens(grid, 1)
    first, last = 5, 40
    part = q[:, :, grid.block_start(first) : grid.block_start(last)]
    options = {"top_p": (0.5, 0.8), "window": (1, 3, 3), "backend": backend}
    whole = nabla.create_block_mask(q, k, grid=grid, **options)
    scores = nabla.pooled_scores(part, k, grid, q_block_offset=first, backend=backend)
    selected = nabla.select_blocks(scores, grid, q_block_offset=first, **options)
    assert torch.equal(selected.bits, whole.bits[:, :, first:last])
    for rows in (10, 50):
        monkeypatch.setattr(triton_block_mask, "CHUNK_BYTES", rows * grid.num_blocks * 4)
        mask = nabla.create_block_mask(part, k, grid=grid, q_block_offset=first, **options)
        assert torch.equal(mask.bits, selected.bits)


def test_scores(backend):
    grid = TokenGrid(2, 9, 17, extra=3)
    runs = block_runs(grid)
    q, k = (smooth_tokens(grid, heads, strength=0.3) for heads in (2, 1))
    scores = nabla.pooled_scores(q, k, grid, scale=0.5, backend=backend)
    assert torch.isinf(scores[..., -1:]).all() and torch.isinf(scores[:, :, -1:]).all()
    exact = pooled_scores(q, k, grid, 0.5)
    rows = len(runs) - 1
    torch.testing.assert_close(
        scores[..., :rows, :rows].double(), exact[..., :rows, :rows], atol=0, rtol=2e-5
    )


@pytest.mark.parametrize("top_p", [0.001, 0.25, 0.5, 0.7, 0.999])
def test_ties_are_kept_lowest_index_first(backend, top_p):
    values = torch.tensor([0.0, 0.125, 0.25, 1.0, 3.0])
    scores = values[torch.randint(5, (1, 1, 6, 6))]
    scores[..., 5] += 0.125
    mask = nabla.select_blocks(scores, TokenGrid(6, 8, 8), top_p=top_p, backend=backend)
    exact_p = torch.tensor(top_p).item()  # as float32
    for kept, row in zip(mask.to_dense()[0, 0].tolist(), scores[0, 0].tolist(), strict=True):
        expected = test_block_mask.fewest(row, exact_p)
        assert {j for j, is_kept in enumerate(kept) if is_kept} == expected


@pytest.mark.parametrize(
    "grid", [TokenGrid(2, 9, 10), TokenGrid(1, 5, 7, block=(1, 4, 4))], ids=str
)
def test_the_public_function(backend, run, grid):
    """nabla.attention, raster order, forward and backward, against the reference backend."""
    shape = (1, 2, grid.num_tokens, 32)
    q, k, v, dout = (torch.randn(shape) for _ in range(4))
    results = []
    for name in (backend, "reference"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        options = {"grid": grid, "top_p": 0.7, "window": (1, 3, 1), "backend": name}
        out = run(nabla.attention, *inputs, **options)
        results.append((out.detach(), *torch.autograd.grad(out, inputs, dout)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_tuning_takes_the_fastest_that_is_right(monkeypatch, tmp_path):
    """Among candidates that do not fit, and one that is faster and wrong."""
    key = config.table_key("forward", 80, 32, torch.float32)
    before = dict(config.TABLE)
    in_use = config.TABLE[key]
    right = config.TileConfig(32, 64, 4, 3, 1)
    broken = config.TileConfig(16, 64, 4, 3, 1)
    expected = torch.ones(2, 3)

    def run():
        if config.TABLE[key] == broken:
            return [expected * 1.5]
        if config.TABLE[key].stages == 2 and config.TABLE[key] != in_use:
            raise RuntimeError("out of resources")
        return [expected]

    def timer(run):
        run()
        return {in_use: 3.0, right: 1.0, broken: 0.5}.get(config.TABLE[key], 2.0)

    best = tune.fastest(key, 80, run, timer)
    assert best == right
    assert config.TABLE == before
    config.save_table(tmp_path / "tables" / "t.json", {key: best}, "a device")
    monkeypatch.setattr(config, "TABLE", dict(before))
    config.use_table(tmp_path / "tables" / "t.json")
    assert config.TABLE == {**before, key: right}


def test_tuning_all_kernels(monkeypatch, tmp_path):
    """The interpreter runs what is timed; nothing is clearly faster, so the table stays."""
    monkeypatch.setattr(dispatch, "architecture", lambda device: 80)
    two = [config.TileConfig(64, 64, 4, 2, 1), config.TileConfig(32, 64, 4, 2, 1)]
    monkeypatch.setattr(tune, "candidates", lambda key, shared: iter(two))
    timed, lines = [], []

    def timer(run):
        timed.append(run())
        return 1.0

    entries = tune.tune(
        tmp_path / "t.json",
        (torch.bfloat16,),
        (16,),
        device=torch.device(DEVICE),
        grid=TokenGrid(1, 8, 16),
        heads=1,
        timer=timer,
        report=lines.append,
    )
    assert {key[1] for key in entries} == {"forward", "dq", "dkdv"}
    assert all(config.TABLE[key] == entry for key, entry in entries.items())
    assert len(lines) == 3 and len(timed) == 9
    config.use_table(tmp_path / "t.json")


def test_candidates_fit_shared_memory():
    for key in config.TABLE:
        found = list(tune.candidates(key, 99 * 1024))
        assert len(found) == len(set(found))
        assert found
        for entry in found:
            tiles = (entry.rows + 2 * entry.stages * entry.step) * key[3] * key[2]
            assert tiles * entry.per_sm <= 99 * 1024


@pytest.mark.parametrize(
    "text, message",
    [
        ("nonsense", "no table of `nabla tune`"),
        ('{"entries": [{"key": ["sm80"], "config": {"rows": 1}}]}', "no table of `nabla tune`"),
        (
            '{"entries": [{"key": ["sm1", "dq", 2, 64], "config": '
            '{"rows": 64, "step": 64, "warps": 4, "stages": 2, "per_sm": 1}}]}',
            "entries of no kernel",
        ),
        (
            '{"entries": [{"key": ["sm80", "dq", 2, 64], "config": '
            '{"rows": 48, "step": 64, "warps": 4, "stages": 2, "per_sm": 1}}]}',
            "rows=48",
        ),
    ],
)
def test_bad_tables(text, message, tmp_path):
    before = dict(config.TABLE)
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        config.use_table(tmp_path / "t.json")
    assert config.TABLE == before
