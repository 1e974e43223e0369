"""What only a CUDA device can show, of every backend that runs there (`make gpu-check`).

Accuracy at the usual sizes, graphs, streams, devices, no synchronisation, more than 2^31 elements.
"""

import pytest
import torch
from oracle import assert_selects, pooled_scores, window_mask
from test_block_attention import check, gradients, problem
from test_block_mask import smooth_tokens

import nabla
from nabla import BlockMask, TokenGrid, cuda, dispatch

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
BACKENDS = [b.name for b in dispatch.BACKENDS if "cuda" in b.devices and b.unavailable() is None]
KERNELS = [name for name in BACKENDS if name != "reference"]
GRID = TokenGrid(3, 20, 28, extra=10)
OPTIONS = {"grid": GRID, "top_p": 0.6, "window": (1, 3, 1), "order": "block"}


@pytest.fixture(autouse=True)
def _on_the_device():
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=KERNELS)
def kernels(request):
    """A backend that launches and never waits."""
    return request.param


def tensors(grid=GRID, heads=2, head_dim=64, dtype=torch.bfloat16):
    return [smooth_tokens(grid, heads, head_dim, dtype) for _ in range(4)]


def attend(q, k, v, dout, backend, **options):
    """(out, dq, dk, dv) of nabla.attention."""
    out = nabla.attention(q, k, v, **{**OPTIONS, "backend": backend, **options})
    return out, *torch.autograd.grad(out, (q, k, v), dout)


def requiring_grad(*xs):
    return [x.detach().clone().requires_grad_() for x in xs]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("grid", [TokenGrid(3, 16, 24), GRID], ids=["whole", "ragged"])
def test_attention(backend, grid, head_dim, dtype):
    check(*problem(grid, (4, 2), head_dim, dtype, batch=2), grid, backend)


@pytest.mark.parametrize("is_deterministic", [True, False], ids=["deterministic", "fast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("backend", [name for name in KERNELS if name == "cuda"], indirect=True)
def test_kernels_of_sm_80(backend, head_dim, dtype, is_deterministic):
    """On any device: the driver compiles them where it is newer."""
    torch.use_deterministic_algorithms(is_deterministic)
    with cuda.kernels_of(80):
        check(*problem(GRID, (4, 2), head_dim, dtype, batch=2, empty=True), GRID, backend)


def test_gradients_through_lse(backend):
    q, k, v, dout, keep = problem(GRID, (4, 2), 64, torch.bfloat16)
    check(q, k, v, dout, keep, GRID, backend, dlse=torch.randn(q.shape[:3]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_masks(backend, head_dim, dtype):
    q, k, *_ = tensors(heads=3, head_dim=head_dim, dtype=dtype)
    top_p = (0.3, 0.7, 0.95)
    mask = nabla.create_block_mask(q, k, grid=GRID, top_p=top_p, window=(3, 1, 1), backend=backend)
    exact = pooled_scores(q, k, GRID, head_dim**-0.5)
    shares = torch.tensor(top_p, dtype=torch.float32).double()
    assert_selects(mask.to_dense(), exact, shares, window_mask(GRID, (3, 1, 1)))


@pytest.mark.parametrize("num_blocks", [3660, 8192])
def test_long_rows_are_selected_as_the_reference_does(kernels, num_blocks):
    grid = TokenGrid(num_blocks, 8, 8)
    scores = torch.rand(1, 2, 3, num_blocks) ** 8
    options = {"top_p": 0.8, "window": (11, 1, 1)}
    ours = nabla.select_blocks(scores, grid, **options, backend=kernels).to_dense()
    exact = nabla.select_blocks(scores, grid, **options, backend="reference").to_dense()
    assert (ours != exact).sum() <= 2 * 3  # what is within rounding of the cut


def test_a_mask_takes_little_memory(kernels):
    """10 s of HD video: 32 heads, 3,660 blocks; besides q, k and the mask itself."""
    grid = TokenGrid(61, 48, 80)
    q = torch.randn(1, 32, grid.num_tokens, 128, dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mask = nabla.create_block_mask(q, q, grid=grid, top_p=0.7, window=(11, 3, 3), backend=kernels)
    assert torch.cuda.max_memory_allocated() - before - mask.bits.nbytes < 256e6


@pytest.mark.parametrize("order", ["raster", "block"])
def test_nothing_waits_for_the_device(kernels, order):
    inputs, options = requiring_grad(*tensors()), {"top_p": (0.4, 0.7), "order": order}
    expected = attend(*inputs, kernels, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = attend(*inputs, kernels, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


def test_a_captured_graph_replays_with_another_mask(kernels):
    first, second = tensors(), tensors()
    captured, options = requiring_grad(*first), {"top_p": (0.4, 0.7)}
    attend(*captured, kernels, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = attend(*captured, kernels, **options)
    masks = []
    for replayed in (first, second):
        with torch.no_grad():
            for x, y in zip(captured, replayed, strict=True):
                x.copy_(y)
        graph.replay()
        expected = attend(*requiring_grad(*replayed), kernels, **options)
        for x, y in zip(results, expected, strict=True):
            assert torch.equal(x, y)
        mask = nabla.create_block_mask(*replayed[:2], grid=GRID, top_p=0.6, backend=kernels)
        masks.append(mask.bits)
    assert not torch.equal(*masks)


def test_a_captured_graph_replays_with_other_bits(kernels):
    q, k, v, dout, keep = problem(GRID, (2, 2), 64, torch.bfloat16)
    bits = BlockMask.from_dense(torch.zeros_like(keep), grid=GRID).bits
    mask = BlockMask(bits, GRID)

    def ours(q, k, v):
        return nabla.block_sparse_attention(q, k, v, mask, return_lse=True, backend=kernels)

    gradients(ours, q, k, v, dout)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = gradients(ours, q, k, v, dout)
    for new in (keep, ~keep, torch.zeros_like(keep)):
        bits.copy_(BlockMask.from_dense(new, grid=GRID).bits)
        graph.replay()
        for x, y in zip(results, gradients(ours, q, k, v, dout), strict=True):
            assert torch.equal(x, y)


def test_a_side_stream(kernels):
    """What is computed on a stream is ordered by that stream alone."""
    inputs = requiring_grad(*tensors())
    expected = attend(*inputs, kernels)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(x) for x in inputs]
        torch.cuda._sleep(10_000_000)  # the default stream would read zeros
        for x, y in zip(late, inputs, strict=True):
            x.copy_(y.detach())
        actual = attend(*(x.requires_grad_() for x in late), kernels)
    stream.synchronize()
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


def test_another_device_than_the_current_one(kernels):
    """The last device; where there is one only, it is the current one."""
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    inputs = tensors()
    expected = attend(*requiring_grad(*inputs), kernels)
    actual = attend(*requiring_grad(*(x.to(last) for x in inputs)), kernels)
    for x, y in zip(actual, expected, strict=True):
        assert x.device == last
        assert torch.equal(x.cpu(), y.cpu())


def test_compiled(kernels):
    inputs = requiring_grad(*tensors())
    expected = attend(*inputs, kernels)
    torch.compiler.reset()
    compiled = torch.compile(nabla.attention, fullgraph=True)
    out = compiled(*inputs[:3], **OPTIONS, backend=kernels)
    actual = out, *torch.autograd.grad(out, inputs[:3], inputs[3])
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_that_need_not_be_deterministic(kernels, head_dim, dtype):
    torch.use_deterministic_algorithms(False)
    check(*problem(GRID, (4, 2), head_dim, dtype, batch=2), GRID, kernels)


@pytest.mark.parametrize("is_deterministic", [True, False], ids=["deterministic", "fast"])
def test_a_captured_training_step(kernels, is_deterministic):
    """Mask, attention, gradients and the optimizer in one graph, against steps in eager mode."""
    torch.use_deterministic_algorithms(is_deterministic, warn_only=True)
    x, target = torch.randn(2, 1, GRID.num_tokens, 2, 64, dtype=torch.bfloat16)
    start = torch.randn(3, 64, 64, dtype=torch.bfloat16) / 8

    def training():
        weights = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([weights], lr=1e-4)

        def step():
            q, k, v = ((x @ w).transpose(1, 2) for w in weights)
            out = nabla.attention(q, k, v, **OPTIONS, backend=kernels).transpose(1, 2)
            optimizer.zero_grad(set_to_none=False)
            (out.float() - target.float()).square().sum().backward()
            optimizer.step()

        weights.grad = torch.zeros_like(weights)
        return weights, step

    eager, step = training()
    for _ in range(4):
        step()
    captured, step = training()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
    if is_deterministic:
        assert torch.equal(captured, eager)
    else:
        torch.testing.assert_close(captured, eager, atol=2e-2, rtol=2e-2)
    assert not torch.equal(captured, start)


def test_deterministic(kernels):
    inputs = requiring_grad(*tensors(TokenGrid(6, 40, 40), heads=8))
    first = attend(*inputs, kernels, grid=(6, 40, 40))
    for _ in range(5):
        for x, y in zip(attend(*inputs, kernels, grid=(6, 40, 40)), first, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dim", [1, 2], ids=["between heads", "between tokens"])
def test_inputs_spread_over_more_than_2_31_elements(kernels, dim):
    grid = TokenGrid(2, 9, 16)
    inputs = tensors(grid)
    steps = inputs[0].shape[dim] - 1
    spread = [2**31 + 512, 0, 64, 1]
    spread[dim] = (2**31 + steps - 1) // steps + 64
    if dim == 2:
        spread[1] = 64 * 4  # heads and tensors side by side
    memory = torch.empty(2**31 + 2**20, dtype=torch.bfloat16)
    if dim == 1:
        spread[dim] = 2**31
        spread[2] = 64 * 4
    far = []
    for index, x in enumerate(inputs[:3]):
        start = 64 * index
        view = memory[start:].as_strided(x.shape, spread, memory.storage_offset() + start)
        far.append(view.copy_(x))
    options = {"grid": grid, "backend": kernels}
    expected = attend(*requiring_grad(*inputs[:3]), inputs[3], **options)
    actual = attend(*(x.requires_grad_() for x in far), inputs[3], **options)
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


def test_more_than_2_31_elements_of_results(kernels):
    """Queries that are one head, expanded: out and dq have more than 2^31 elements."""
    grid = TokenGrid(64, 8, 8)
    one = [x for x in tensors(grid, heads=1, head_dim=128)]
    heads = 2**31 // one[0].numel() + 1
    q, dout = (x.expand(-1, heads, -1, -1) for x in (one[0], one[3]))
    mask = nabla.sliding_tile_mask(grid, (3, 1, 1), device=DEVICE)

    def results(q, k, v, dout):
        q = q.detach().requires_grad_()
        out = nabla.block_sparse_attention(q, k, v, mask, backend=kernels)
        return out.detach(), *torch.autograd.grad(out, q, dout)

    expected = results(*one)
    actual = results(q, one[1], one[2], dout)
    for x, y in zip(actual, expected, strict=True):
        assert x.numel() > 2**31
        for head in (0, heads // 2, heads - 1):
            assert torch.equal(x[:, head], y[:, 0])


@pytest.mark.parametrize(
    "dtype, head_dim", [(torch.bfloat16, 64), (torch.float16, 128)], ids=["64", "128"]
)
@pytest.mark.parametrize("is_deterministic", [True, False], ids=["deterministic", "fast"])
def test_small_shapes_for_the_sanitizer(kernels, dtype, head_dim, is_deterministic):
    """Every kernel on a ragged grid; compute-sanitizer looks for reads and writes out of bounds."""
    torch.use_deterministic_algorithms(is_deterministic, warn_only=True)
    grid = TokenGrid(2, 9, 12, extra=5)
    inputs = requiring_grad(*tensors(grid, 2, head_dim, dtype))
    for x in attend(*inputs, kernels, grid=grid):
        assert x.isfinite().all()
