"""The operators as PyTorch sees them: schemas, fakes, gradients, compile, export, vmap."""

import io

import pytest
import torch
from test_block_mask import smooth_tokens
from torch.utils._python_dispatch import TorchDispatchMode

import nabla
from nabla import BlockMask, TokenGrid, ops

GRID = TokenGrid(2, 9, 16, extra=3)
OFFSET = 1
DIFFERENTIABLE = {"attention_fwd"}


def arguments(name, requires_grad=False, layout="BHSD", backend="reference"):
    """Arguments of an operator: ragged, grouped heads, a slice of the queries."""

    def tensor(heads, size):
        if layout == "BSHD":
            return torch.randn(2, size, heads, 32).transpose(1, 2)
        return torch.randn(2, heads, size, 32)

    num_q = GRID.num_tokens - GRID.block_start(OFFSET)
    num_q_blocks = GRID.num_blocks - OFFSET
    q, k, v = tensor(4, num_q), tensor(2, GRID.num_tokens), tensor(2, GRID.num_tokens)
    for x in (q, k, v):
        x.requires_grad_(requires_grad)
    grid, top_p = GRID.as_ints(), torch.full((4,), 0.5)
    bits = torch.randint(1, 2**GRID.num_blocks, (2, 4, num_q_blocks, 1), dtype=torch.int32)
    if name == "block_mean":
        return q, grid, OFFSET, backend
    if name == "pooled_scores":
        return q, k, grid, OFFSET, 0.2, backend
    if name == "select_blocks":
        scores = torch.rand(2, 4, num_q_blocks, GRID.num_blocks, requires_grad=requires_grad)
        return scores, top_p, grid, [1, 3, 1], OFFSET, backend
    if name == "create_block_mask":
        return q, k, top_p, grid, [], OFFSET, 0.2, backend
    forward = (q, k, v, bits, grid, OFFSET, 0.2, backend)
    if name == "attention_fwd":
        return forward
    with torch.no_grad():
        out, lse = ops.attention_fwd(*forward)
    return torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *forward[3:]


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "requires_grad"])
@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_opcheck(name, requires_grad, layout):
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name != "attention_bwd" or not requires_grad:  # the backward has no gradient of its own
        utilities.append("test_aot_dispatch_dynamic")
    operator = getattr(torch.ops.nabla, name).default
    torch.library.opcheck(operator, arguments(name, requires_grad, layout), test_utils=utilities)


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_every_operator_is_whole(name):
    """A kernel for both devices, a fake, a gradient and a vmap rule are registered for each."""
    qualified = f"nabla::{name}"
    for key in ("CPU", "CUDA", "Autograd", "FuncTorchBatched"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key), key
    assert torch._library.simple_registry.singleton.find(qualified).fake_impl.kernel is not None


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_fakes_match_strides_and_dtypes(name, layout, backend):
    """Shapes, strides, dtypes and devices of what the tracer sees are those of what runs."""
    operator = getattr(torch.ops.nabla, name).default
    real_arguments = arguments(name, layout=layout, backend=backend)
    real = operator(*real_arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = operator(
            *(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in real_arguments)
        )
    single = isinstance(real, torch.Tensor)
    for x, y in zip([real] if single else real, [fake] if single else fake, strict=True):
        assert (x.shape, x.stride(), x.dtype, x.device) == (y.shape, y.stride(), y.dtype, y.device)


class Recorder(TorchDispatchMode):
    """Records the operators that run below autograd."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})


def test_the_backward_is_the_registered_one():
    """Without a formula PyTorch would differentiate the reference by itself: this would fail."""
    q, k, v = (smooth_tokens(GRID).requires_grad_() for _ in range(3))
    mask = nabla.sliding_tile_mask(GRID, (1, 1, 1))
    out = nabla.block_sparse_attention(q, k, v, mask)
    assert "nabla_attention_fwd" in out.grad_fn.name()
    with Recorder() as recorder:
        out.sum().backward()
    assert recorder.names.count("nabla.attention_bwd.default") == 1


def test_double_backward_is_refused():
    q = smooth_tokens(GRID).requires_grad_()
    mask = nabla.sliding_tile_mask(GRID, (1, 1, 1))
    out = nabla.block_sparse_attention(q, q, q, mask)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative.*create_graph"):
        gradient.sum().backward()


def test_forward_mode_is_refused():
    q = smooth_tokens(GRID)
    mask = nabla.sliding_tile_mask(GRID, (1, 1, 1))
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jvp(lambda q: nabla.block_sparse_attention(q, q, q, mask), (q,), (q,))


def test_vmap_is_refused():
    q = torch.randn(3, 1, 2, 128, 32)
    with pytest.raises(RuntimeError, match="nabla::.* has no vmap.*batch"):
        torch.func.vmap(lambda x: nabla.attention(x, x, x, top_p=0.5))(q)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_step(backend):
    q, k, v = (smooth_tokens(GRID) for _ in range(3))

    def step(q, k, v):
        return 3 * nabla.attention(q * 2, k, v + 1, grid=GRID, top_p=0.5, window=(1, 3, 1))

    torch.compiler.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-6 * eager.abs().max().item(), rtol=1e-5)


def test_a_mask_leaves_and_enters_compiled_code():
    grid = TokenGrid(3, 16, 16)
    q, k, v = (smooth_tokens(grid) for _ in range(3))
    torch.compiler.reset()
    build = torch.compile(nabla.create_block_mask, fullgraph=True, backend="aot_eager")
    attend = torch.compile(nabla.block_sparse_attention, fullgraph=True, backend="aot_eager")
    mask = build(q, k, grid=grid, top_p=0.5, window=(1, 1, 3))
    eager = nabla.create_block_mask(q, k, grid=grid, top_p=0.5, window=(1, 1, 3))
    assert isinstance(mask, BlockMask)
    assert torch.equal(mask.bits, eager.bits)
    assert (mask.grid, mask.window, mask.q_block_offset) == (grid, (1, 1, 3), 0)
    out = attend(q, k, v, mask)
    assert torch.equal(out, nabla.block_sparse_attention(q, k, v, mask))
    changed = BlockMask.from_dense(~mask.to_dense() | torch.eye(12).bool(), grid=grid)
    torch._dynamo.config.error_on_recompile = True
    try:  # another mask of the same grid is the same graph
        other = BlockMask(changed.bits, grid, (1, 1, 3))
        assert torch.equal(attend(q, k, v, other), nabla.block_sparse_attention(q, k, v, changed))
    finally:
        torch._dynamo.config.error_on_recompile = False


def test_dynamic_lengths_compile_once():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        lambda x: nabla.attention(x, x, x, top_p=0.5),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for length in (2113, 4096, 2500):
        x = torch.randn(1, 1, length, 16)
        assert torch.equal(compiled(x), nabla.attention(x, x, x, top_p=0.5))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Attention(torch.nn.Module):
    def __init__(self, grid=None):
        super().__init__()
        self.grid = grid

    def forward(self, q, k, v):
        return nabla.attention(q, k, v, grid=self.grid, top_p=0.5)


class Build(torch.nn.Module):
    def forward(self, q, k):
        return nabla.create_block_mask(q, k, grid=GRID, top_p=0.5, window=(1, 1, 1))


class Attend(torch.nn.Module):
    def forward(self, q, k, v, mask):
        return nabla.block_sparse_attention(q, k, v, mask)


def test_export():
    q, k, v = (smooth_tokens(GRID) for _ in range(3))
    exported = torch.export.export(Attention(GRID), (q, k, v))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count("nabla.create_block_mask.default") == 1
    assert targets.count("nabla.attention_fwd.default") == 1
    assert torch.equal(exported.module()(q, k, v), Attention(GRID)(q, k, v))


def test_export_of_dynamic_lengths():
    length = torch.export.Dim("length", min=2049, max=100_000)
    q, k, v = (torch.randn(1, 1, 3000, 16) for _ in range(3))
    exported = torch.export.export(
        Attention(), (q, k, v), dynamic_shapes={name: {2: length} for name in "qkv"}
    )
    x = torch.randn(1, 1, 2222, 16)
    assert torch.equal(exported.module()(x, x, x), Attention()(x, x, x))


def test_export_with_a_mask_as_output_and_input():
    q, k, v = (smooth_tokens(GRID) for _ in range(3))
    build = torch.export.export(Build(), (q, k))
    mask = build.module()(q, k)
    assert isinstance(mask, BlockMask)
    assert (mask.grid, mask.window) == (GRID, (1, 1, 1))
    attend = torch.export.export(Attend(), (q, k, v, mask))
    saved = io.BytesIO()
    torch.export.save(attend, saved)
    saved.seek(0)
    loaded = torch.export.load(saved)
    expected = nabla.attention(q, k, v, grid=GRID, top_p=0.5, window=(1, 1, 1), order="block")
    assert torch.equal(loaded.module()(q, k, v, mask), expected)


def test_masks_are_pytrees():
    mask = nabla.sliding_tile_mask(GRID, (1, 3, 1))
    leaves, structure = torch.utils._pytree.tree_flatten(mask)
    assert len(leaves) == 1 and leaves[0] is mask.bits
    again = torch.utils._pytree.tree_unflatten(leaves, structure)
    assert (again.grid, again.window) == (GRID, (1, 3, 1))
    assert (
        torch.utils._pytree.treespec_loads(torch.utils._pytree.treespec_dumps(structure))
        == structure
    )


def test_fake_tensors_go_through():
    with torch._subclasses.FakeTensorMode():
        q = torch.randn(1, 2, GRID.num_tokens, 16, device="cuda", dtype=torch.bfloat16)
        out = nabla.attention(q, q, q, grid=GRID, top_p=0.5, return_lse=True)
    assert (out.out.shape, out.out.dtype, out.out.device.type) == (q.shape, q.dtype, "cuda")
    assert (out.lse.shape, out.lse.dtype) == (q.shape[:3], torch.float32)
