"""Tokens that several processes share: equal to one process, forward and backward.

What is computed in the same order is equal bit for bit: out and lse always, as a query block's sum
over its keys stays on one rank, and the gradients where all query heads of a key head and all query
blocks are on one rank. The `cpu` backend cuts its backward by the shape that a rank has, so that
there the gradients are compared with those of float64, as everywhere else.
"""

import itertools
import multiprocessing
import re
import shlex
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracle import assert_as_accurate_as
from torch.distributed.device_mesh import init_device_mesh

import nabla
from kandinsky_model import CrossDiT, CrossDiTConfig, NablaAttention, UlyssesAttention
from nabla.distributed import (
    HeadBalance,
    assign_heads,
    gather,
    shard,
    shard_sizes,
    ulysses_attention,
)

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
RAGGED = nabla.TokenGrid(2, 9, 20, extra=7)
EVEN = nabla.TokenGrid(2, 16, 16)


@pytest.fixture(scope="module")
def pool():
    """Four processes that import torch once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "nabla.distributed", "kandinsky_model"])
    with ProcessPoolExecutor(4, context) as executor:
        yield executor


@pytest.fixture
def on_ranks(pool, tmp_path):
    """Calls a function on each rank of a process group of its own; raises what one raises."""

    def call(world, function, *args):
        store = f"file://{tmp_path / 'store'}"
        futures = [
            pool.submit(_on_rank, store, rank, world, function, args) for rank in range(world)
        ]
        return [future.result(timeout=200) for future in futures]

    return call


def _on_rank(store, rank, world, function, args):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # torch.empty is then filled with NaN
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()


def ranks_of(layout):
    """The group of a layout: a number of processes, the first ones, or {axis: ranks}."""
    if isinstance(layout, dict):
        return init_device_mesh("cpu", tuple(layout.values()), mesh_dim_names=tuple(layout))
    return None if layout == dist.get_world_size() else dist.new_group(list(range(layout)))


def position(layout):
    """The number of this process among the shards."""
    if not isinstance(layout, dict) or list(layout)[0] == "queries":
        return dist.get_rank()
    return (
        dist.get_rank() % layout["queries"] * layout["heads"] + dist.get_rank() // layout["queries"]
    )


# Attention


QUERIES, BOTH = {"queries": 2}, {"queries": 2, "heads": 2}
CASES = {
    "even": dict(layout=2, grid=EVEN),
    "block_order": dict(layout=2, grid=EVEN, order="block", window=(1, 3, 1)),
    "five_heads_ragged": dict(layout=2, heads=5, window=(3, 1, 1), batch=2),
    "three_ranks": dict(layout=3, heads=4, window=(3, 1, 1)),
    "one_rank": dict(layout=1, heads=3),
    "four_ranks": dict(layout=4, heads=6, top_p=(0.2, 0.3, 0.4, 0.5, 0.6, 1.0)),
    "explicit_sizes": dict(layout=3, heads=3, sizes=(1, 340, 26), scale=0.3),
    "bfloat16": dict(layout=2, dtype=torch.bfloat16, window=(3, 1, 1)),
    "one_block": dict(layout=4, grid=nabla.TokenGrid(1, 2, 4)),
    "grouped": dict(layout=2, heads=8, kv_heads=2, batch=2),
    "grouped_unevenly": dict(layout=2, heads=6, kv_heads=3),
    "fewer_keys_than_ranks": dict(layout=4, heads=8, kv_heads=2, batch=2, inexact="kv"),
    "one_key_head": dict(layout=3, heads=6, kv_heads=1, dtype=torch.bfloat16, inexact="kv"),
    "balanced": dict(layout=2, heads=5, balanced=True, top_p=(1.0, 0.9, 0.2, 0.1, 0.1)),
    "balanced_groups": dict(layout=2, heads=6, kv_heads=3, balanced=True, batch=2),
    "queries": dict(layout=QUERIES, heads=1, inexact="kv"),
    "queries_in_block_order": dict(layout=QUERIES, order="block", inexact="kv", batch=2),
    "queries_in_place": dict(layout=QUERIES, order="block", whole_blocks=True, inexact="kv"),
    "queries_grouped": dict(layout={"queries": 3}, heads=4, kv_heads=2, inexact="kv"),
    "both": dict(layout=BOTH, heads=3, window=(3, 1, 1), inexact="kv", batch=2),
    "both_in_place": dict(layout=BOTH, heads=3, order="block", whole_blocks=True, inexact="kv"),
    "both_transposed": dict(layout={"heads": 2, "queries": 2}, heads=3, inexact="kv"),
    "both_balanced": dict(
        layout=BOTH, heads=4, balanced=True, top_p=(1, 0.9, 0.1, 0.1), inexact="kv",
    ),
}  # fmt: skip


def check_attention(
    backend, layout, grid=RAGGED, heads=4, kv_heads=None, batch=1, dtype=torch.float32, sizes=None,
    whole_blocks=False, balanced=False, inexact="", **options,
):  # fmt: skip
    """Compare the shard of this rank with one process: out, lse and the gradients of both."""
    group = ranks_of(layout)
    if isinstance(layout, int) and dist.get_rank() >= layout:
        return
    kv_heads = kv_heads or heads
    options = dict(top_p=0.5, order="raster", enable_gqa=heads != kv_heads) | options
    tokens = grid.num_tokens
    q, k, v = (torch.randn(batch, n, tokens, 32).mul(2) for n in (heads, kv_heads, kv_heads))
    dout, dlse = torch.randn(batch, heads, tokens, 32), torch.randn(batch, heads, tokens)
    q, k, v, dout = (x.to(dtype) for x in (q, k, v, dout))
    if whole_blocks:
        sizes = shard_sizes(grid, group)
    count = layout if isinstance(layout, int) else dist.get_world_size()
    cuts = sizes or [len(part) for part in torch.arange(tokens).tensor_split(count)]

    def mine(x):
        return x.split(list(cuts), 2)[position(layout)]

    def results(attend, q, k, v, dout, dlse):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out, lse = attend(q, k, v, grid=grid, return_lse=True, backend=backend, **options)
        gradients = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse.to(lse.dtype)))
        return [x.detach() for x in (out, lse, *gradients)]

    balance = HeadBalance() if balanced else None

    def shared(*args, **kwargs):
        return ulysses_attention(*args, group=group, sizes=sizes, balance=balance, **kwargs)

    local = [mine(x) for x in (q, k, v, dout, dlse)]
    ours = results(shared, *local)
    one = [mine(x) for x in results(nabla.attention, q, k, v, dout, dlse)]
    if balanced:
        before = results(shared, *local)
        balance.step()
        runs = tuple(map(tuple, torch.arange(kv_heads).tensor_split(len(balance.assignment))))
        assert balance.assignment != tuple(tuple(map(int, run)) for run in runs)
        ours = results(shared, *local)
        assert all(torch.equal(x, y) for x, y in zip(ours[:2], before[:2], strict=True))
    exact = [mine(x) for x in in_float64(q, k, v, dout, dlse, grid, backend, options)]
    names = ("out", "lse", "dq", "dk", "dv")
    for name, actual, low, truth in zip(names, ours, one, exact, strict=True):
        assert actual.dtype == low.dtype, name
        if name in ("out", "lse") or (backend == "reference" and name[1] not in inexact):
            assert torch.equal(actual, low), name
        else:
            assert_as_accurate_as(actual, low, truth, 3.0, truth.abs().max())


def in_float64(q, k, v, dout, dlse, grid, backend, options):
    """The same attention in float64, under the mask of the given precision."""
    raster = options["order"] == "raster"
    if raster:
        q, k, v, dout = (nabla.fractal_flatten(x, grid) for x in (q, k, v, dout))
        dlse = nabla.fractal_flatten(dlse, grid, -1)
    chosen = {name: options[name] for name in ("top_p", "window", "scale") if name in options}
    mask = nabla.create_block_mask(q, k, grid=grid, backend=backend, **chosen)
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    out, lse = nabla.block_sparse_attention(
        q, k, v, mask, scale=options.get("scale"), return_lse=True, backend="reference"
    )
    gradients = torch.autograd.grad((out, lse), (q, k, v), (dout.double(), dlse.double()))
    found = [out, lse[..., None], *gradients]
    if raster:
        found = [nabla.fractal_unflatten(x, grid) for x in found]
    return [found[0].detach(), found[1][..., 0].detach(), *found[2:]]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_one_process(on_ranks, backend, case):
    layout = case["layout"]
    world = max(layout, 2) if isinstance(layout, int) else 0
    for extent in layout.values() if isinstance(layout, dict) else ():
        world = extent * max(world, 1)
    on_ranks(world, _check_case, backend, case)


def _check_case(backend, case):
    check_attention(backend, **case)


# The rest


def test_gradients_of_some_inputs(on_ranks):
    on_ranks(2, _check_some_gradients)


def _check_some_gradients():
    q, k, v = (
        torch.randn(1, 2, EVEN.num_tokens, 32).tensor_split(2, 2)[dist.get_rank()] for _ in "qkv"
    )
    everything = None
    for needed in (("q", "k", "v"), ("k",), ("q", "v")):
        leaves = {name: x.clone() for name, x in zip("qkv", (q, k, v), strict=True)}
        for name in needed:
            leaves[name].requires_grad_()
        out = ulysses_attention(**leaves, grid=EVEN, top_p=0.5)
        out.square().sum().backward()
        everything = everything or {name: x.grad for name, x in leaves.items()}
        for name, x in leaves.items():
            assert (x.grad is None) == (name not in needed)
            assert x.grad is None or torch.equal(x.grad, everything[name])
    out = ulysses_attention(q, k, v, grid=EVEN, top_p=0.5)
    assert not out.requires_grad


@pytest.mark.parametrize("layout", [2, QUERIES], ids=["heads", "queries"])
def test_compiles_into_one_graph(on_ranks, layout):
    on_ranks(2, _check_compiled, layout)


def _check_compiled(layout):
    group = ranks_of(layout)
    q, k, v = (
        torch.randn(1, 2, EVEN.num_tokens, 32).tensor_split(2, 2)[dist.get_rank()].requires_grad_()
        for _ in "qkv"
    )

    def attend(q, k, v):
        return ulysses_attention(q, k, v, grid=EVEN, top_p=0.5, group=group)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found = [
        [out := function(q, k, v), *torch.autograd.grad(out.sum(), (q, k, v))]
        for function in (attend, compiled)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_autocast_sends_what_it_computes_in(on_ranks):
    on_ranks(2, _check_autocast)


def _check_autocast():
    q, k, v = (torch.randn(1, 2, EVEN.num_tokens, 32) for _ in "qkv")
    mine = [x.tensor_split(2, 2)[dist.get_rank()] for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = ulysses_attention(*mine, grid=EVEN)
        one = nabla.attention(q, k, v, grid=EVEN)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, one.tensor_split(2, 2)[dist.get_rank()])


def test_shard_and_gather_are_inverse(on_ranks):
    on_ranks(4, _check_shard_and_gather)


def _check_shard_and_gather():
    mesh = ranks_of(BOTH)
    sizes = shard_sizes(RAGGED, mesh)
    assert sum(sizes) == RAGGED.num_tokens
    starts = [sum(sizes[:rank]) for rank in range(5)]
    assert all(RAGGED.block_start(RAGGED.block_at(start)) == start for start in starts)
    x = torch.randn(2, RAGGED.num_tokens, 3).requires_grad_()
    part = shard(x, 1, sizes, group=mesh)
    assert part.shape[1] == sizes[dist.get_rank()]
    whole = gather(part, 1, sizes, group=mesh)
    assert torch.equal(whole, x)
    weight = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((whole * weight * (1 + dist.get_rank())).sum(), x)
    expected = torch.zeros_like(x)
    start = starts[dist.get_rank()]
    expected[:, start : start + part.shape[1]] = 10  # 1 + 2 + 3 + 4: the sum over the ranks
    torch.testing.assert_close(gradient, expected * weight)


# Mistakes


MISTAKES = {
    "tokens": (dict(tokens=100), "q has 100 tokens, but of the 512", "rank 1 refuses .* 100 toke"),
    "top_p": (dict(top_p=50), "top_p=50 .* percentage", "rank 1 refuses .*percentage"),
    "sizes": (dict(sizes=(0, 512)), r"sizes=\(0, 512\) are not the tokens of 2", "rank 1 refuses"),
    "type": (dict(q="q"), "q is a str: give a tensor", "rank 1 refuses .* q is a str"),
}  # fmt: skip
DIFFERENCES = {
    "dtype": (dict(dtype=torch.float64), "dtype is torch.float32 on rank 0 and torch.float64 on"),
    "batch": (dict(batch=2), "batch size is 1 on rank 0 and 2 on rank 1"),
    "heads": (dict(heads=4), r"number of heads is \(2, 2\) on rank 0 and \(4, 4\) on rank 1"),
    "grid": (dict(grid=(4, 16, 8)), "grid is .* on rank 0 and .* on rank 1"),
    "window": (dict(window=(1, 1, 1)), "window is None on rank 0"),
    "order": (dict(order="block"), "order is 'raster' on rank 0 and 'block' on rank 1"),
    "lse": (dict(return_lse=True), "return_lse is False on rank 0 and True on rank 1"),
    "backend": (dict(backend="flex"), "backend is 'auto' on rank 0 and 'flex' on rank 1"),
    "gradient": (dict(requires_grad=False), "need of a gradient is True on rank 0 and False on"),
}
MISTAKES |= {name: (change, words, words) for name, (change, words) in DIFFERENCES.items()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_one_rank_is_an_error_of_all(on_ranks, mistake):
    change, at_the_rank, elsewhere = MISTAKES[mistake]
    messages = on_ranks(2, _message, 1, change)
    assert re.search(at_the_rank, messages[1])
    assert re.search(elsewhere, messages[0])


def _message(
    rank=None, change=None, *, heads=2, tokens=256, kv_heads=None, kv_tokens=None, batch=1,
    dtype=torch.float32, requires_grad=True, layout=2, **options,
):  # fmt: skip
    """What a call raises. `change` is what rank `rank`, or every one if None, does otherwise."""
    if change is not None:
        return _message(**(change if rank in (None, dist.get_rank()) else {}))
    q = torch.randn(batch, heads, tokens, 32, dtype=dtype, requires_grad=requires_grad)
    k = torch.randn(batch, kv_heads or heads, kv_tokens or tokens, 32, dtype=dtype)
    arguments = dict(q=q, k=k, v=k, grid=EVEN, group=ranks_of(layout)) | options
    with pytest.raises((ValueError, TypeError)) as raised:
        ulysses_attention(**arguments)
    return str(raised.value)


BAD = {
    "too few heads": (dict(heads=1), "q has 1 heads, fewer than the 2 ranks .*'queries', 'heads'"),
    "grouped heads": (dict(kv_heads=1), "pass enable_gqa=True"),
    "keys": (dict(kv_tokens=99), "q has 256 tokens and k has 99"),
    "order": (dict(order="fractal"), "order='fractal' is unknown"),
    "too few sizes": (dict(sizes=(512,)), r"sizes=\(512,\) are not the tokens of 2 ranks"),
    "too few blocks": (
        dict(layout=QUERIES, grid=(1, 2, 4), tokens=4),
        "has 1 blocks, fewer than the 2 ranks of 'queries'",
    ),
    "unnamed mesh": (dict(layout={"rows": 2, "columns": 1}), r"dimensions \('rows', 'columns'\)"),
    "group": (dict(group="world"), "group is a str: give a ProcessGroup or a DeviceMesh"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input(on_ranks, change, message):
    for found in on_ranks(2, _message, None, change):
        assert re.search(message, found), found


def test_processes_outside_the_group_are_told(on_ranks):
    found = on_ranks(2, _outside)
    assert found[0] is None
    assert "group does not contain this process, rank 1" in found[1]


def _outside():
    group = dist.new_group([0])
    x = torch.randn(1, 1, EVEN.num_tokens, 32)
    try:
        ulysses_attention(x, x, x, grid=EVEN, group=group)
    except ValueError as error:
        return str(error)


def test_without_a_process_group():
    x = torch.zeros(1, 1, 64, 32)
    with pytest.raises(RuntimeError, match="no process group: start with torchrun"):
        ulysses_attention(x, x, x, grid=(1, 8, 8))


def test_a_balance_of_other_heads_is_refused(on_ranks):
    for message in on_ranks(2, _stale_balance):
        assert "balance has dealt ((0, 2), (1,)), but here 2 ranks share 2 heads" in message


def _stale_balance():
    balance = HeadBalance()
    balance.assignment = ((0, 2), (1,))
    return _message(balance=balance)


# Dealing heads


@pytest.mark.parametrize(
    "counts, num_ranks, expected",
    [
        ([1, 1, 1, 1], 2, ((0, 2), (1, 3))),
        ([9, 1, 1, 1], 2, ((0,), (1, 2, 3))),
        ([3, 9, 6, 5, 4], 3, ((1,), (0, 2), (3, 4))),
        ([0, 0, 0], 3, ((0,), (1,), (2,))),
        ([7, 0, 0, 0], 2, ((0,), (1, 2, 3))),
    ],
    ids=["equal", "one_long", "longest_first", "zeros", "no_rank_is_empty"],
)
def test_assign_heads(counts, num_ranks, expected):
    assert assign_heads(counts, num_ranks) == expected


def test_assign_heads_is_within_four_thirds_of_the_best():
    for _ in range(50):
        counts = torch.randint(1, 100, (7,)).tolist()
        busiest = max(sum(counts[head] for head in own) for own in assign_heads(counts, 3))
        best = min(
            max(
                sum(c for c, r in zip(counts, ranks, strict=True) if r == rank) for rank in range(3)
            )
            for ranks in itertools.product(range(3), repeat=7)
        )
        assert busiest <= (4 / 3 - 1 / 9) * best


def test_assign_heads_needs_as_many_as_ranks():
    with pytest.raises(ValueError, match="num_ranks=3 is not in 1 to 2, the number of heads"):
        assign_heads([1, 1], 3)


# The model


CONFIG = CrossDiTConfig(
    model_dim=128, ff_dim=256, time_dim=64, num_text_blocks=1, num_visual_blocks=2,
    axes_dims=(8, 12, 12), in_visual_dim=4, out_visual_dim=4, in_text_dim=24, in_text_dim2=12,
    top_p=0.5, window=(1, 1, 1),
)  # fmt: skip


@pytest.mark.parametrize("layout", [2, QUERIES], ids=["heads", "queries"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_the_model_equals_one_process(on_ranks, layout, checkpointing):
    on_ranks(2, _check_model, layout, checkpointing)


def _check_model(layout, checkpointing):
    model = CrossDiT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.gradient_checkpointing = checkpointing
    inputs = (
        torch.randn(1, 2, 24, 40, CONFIG.input_dim), torch.randn(1, 5, 24), torch.randn(1, 12),
        torch.rand(1),
    )  # fmt: skip
    weight = torch.randn(1, 2, 24, 40, 4)

    def results(attention):
        out = model(*inputs, attention=attention)
        return out.detach(), torch.autograd.grad((out * weight).sum(), list(model.parameters()))

    one, one_gradients = results(NablaAttention(CONFIG.top_p, CONFIG.window))
    shared = UlyssesAttention(CONFIG.top_p, CONFIG.window, group=ranks_of(layout))
    ours, gradients = results(shared)
    assert (ours - one).abs().max() < 1e-5 * one.abs().max()
    for name, actual, expected in zip(
        dict(model.named_parameters()), gradients, one_gradients, strict=True
    ):
        dist.all_reduce(actual)  # the mean over the ranks, as DDP makes it
        error = (actual / 2 - expected).abs().max()
        assert error < 1e-5 * expected.abs().max(), name


# The README


def test_the_example_of_the_readme_runs():
    (command,) = re.findall(r"^\.venv/bin/torchrun (.*)$", README, re.MULTILINE)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *shlex.split(command)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "queries x heads = (1, 2)" in result.stdout
    assert "largest difference from one process: out 0e+00" in result.stdout


def test_the_call_of_the_readme_runs(on_ranks):
    blocks = re.findall(r"^```py\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (code,) = (block for block in blocks if '"cuda", (2, 4)' in block)
    on_ranks(4, _run_readme, code.replace('"cuda", (2, 4)', '"cpu", (2, 2)'))


def _run_readme(code):
    grid = nabla.TokenGrid(3, 20, 28)
    q, k, v = (torch.randn(1, 5, grid.num_tokens, 32) for _ in "qkv")
    one = nabla.attention(q, k, v, grid=grid, top_p=0.9)
    q, k, v, one = (x.tensor_split(4, 2)[dist.get_rank()] for x in (q, k, v, one))
    names = dict(init_device_mesh=init_device_mesh, ulysses_attention=ulysses_attention)
    names |= dict(q=q, k=k, v=v, grid=grid)
    exec(code, names)
    assert torch.equal(names["out"], one)
