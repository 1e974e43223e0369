"""Every device gives the same masks, attention and gradients; streamed models need little of it."""

import pytest
import torch
from test_block_mask import smooth_tokens
from torch import nn

import nabla
from kandinsky_model import CrossDiT, CrossDiTConfig
from kandinsky_model.memory import crossdit, model_activations, streamed

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GRID = nabla.TokenGrid(3, 20, 28, extra=10)


def attend(device, dtype, backend="auto"):
    """The mask, out, lse and gradients of one problem, computed on a device, on the CPU in fp64."""
    torch.manual_seed(0)
    q, k, v = (smooth_tokens(GRID, heads=2, dtype=torch.float64) for _ in range(3))
    q, k, v = (x.to(device, dtype).requires_grad_() for x in (q, k, v))
    mask = nabla.create_block_mask(
        q, k, grid=GRID, top_p=0.7, window=(3, 1, 1), backend="reference"
    )
    out, lse = nabla.block_sparse_attention(q, k, v, mask, return_lse=True, backend=backend)
    gradients = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    assert mask.device.type == out.device.type == device
    return mask.to_dense().cpu(), *(x.double().cpu() for x in (out, lse, *gradients))


@pytest.mark.parametrize("device", DEVICES)
def test_double_precision_agrees_with_the_cpu(device):
    (mask, *values), (exact_mask, *exact) = (
        attend(name, torch.float64, "reference") for name in (device, "cpu")
    )
    assert torch.equal(mask, exact_mask)
    assert 0.1 < mask.float().mean() < 0.9
    for actual, expected in zip(values, exact, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_precision_is_close(device, dtype):
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    _, out, lse, *gradients = attend(device, dtype)
    _, exact_out, exact_lse, *exact_gradients = attend(device, torch.float64, "reference")
    pairs = zip((out, lse, *gradients), (exact_out, exact_lse, *exact_gradients), strict=True)
    for actual, exact in pairs:
        error = (actual - exact).abs().max() / exact.abs().max()
        assert error < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("top_p", [None, 0.5], ids=["dense", "nabla"])
def test_a_model_streamed_to_cuda(top_p):
    """The same bits as on the device, and no more memory there than two blocks and the rest."""
    config = CrossDiTConfig(
        model_dim=1024, ff_dim=4096, time_dim=256, num_text_blocks=2, num_visual_blocks=8,
        axes_dims=(16, 24, 24), top_p=top_p,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CrossDiT(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.cast(torch.bfloat16)
    inputs = [
        torch.randn(size, device="cuda", dtype=torch.bfloat16)
        for size in ((1, 4, 64, 64, config.input_dim), (1, 5, config.in_text_dim))
    ]
    inputs += [torch.randn(1, config.in_text_dim2, device="cuda", dtype=torch.bfloat16)]
    inputs += [torch.tensor([0.5], device="cuda")]
    with torch.no_grad():
        model.to("cuda")
        expected = model(*inputs)
        model.to("cpu")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with streamed(model, "cuda"):
            actual = [model(*inputs) for _ in range(3)]
        peak = torch.cuda.max_memory_allocated() - before
    assert all(torch.equal(x, expected) for x in actual)
    part = crossdit(config)
    assert peak < part.weights
    assert peak < 1.2 * (part.streamed + model_activations(config, 4 * 32 * 32))
