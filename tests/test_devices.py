"""Every device gives the same masks, attention and gradients."""

import pytest
import torch
from test_block_mask import smooth_tokens

import nabla

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
