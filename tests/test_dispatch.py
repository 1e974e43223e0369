"""The choice of a backend as a pure function."""

import pytest
import torch

from nabla import backends, dispatch


def test_every_backend_has_a_status():
    assert list(backends()) == [backend.name for backend in dispatch.BACKENDS]
    assert backends()["reference"].available
    for status in backends().values():
        assert status.reason
        assert status.available == (status.reason == "available")


def test_the_reference_takes_everything():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for head_dim in (1, 3, 64, 1000):
            name = dispatch.resolve(
                "reference", device="cpu", head_dim=head_dim, dtype=dtype, block_size=64
            )
            assert name == "reference"


def test_auto_takes_the_first_that_fits(monkeypatch):
    fast = dispatch.Backend(
        "fast", ("cpu",), (torch.float32,), range(32, 129, 32), (64,), lambda: None
    )
    monkeypatch.setattr(dispatch, "BACKENDS", (fast, *dispatch.BACKENDS))

    def resolve(backend="auto", **change):
        options = {"device": "cpu", "head_dim": 64, "dtype": torch.float32, "block_size": 64}
        return dispatch.resolve(backend, **options | change)

    assert resolve() == "fast"
    assert resolve(head_dim=None) == "fast"
    assert resolve(dtype=torch.float64) == "reference"
    assert resolve(head_dim=48) != "fast"
    assert resolve(block_size=16) != "fast"
    with pytest.raises(ValueError, match="fast: head_dim is 48, it takes 32 to 128 in steps of 32"):
        resolve("fast", head_dim=48)
    with pytest.raises(
        ValueError, match="fast: the dtype is torch.float64, it takes torch.float32"
    ):
        resolve("fast", dtype=torch.float64)
    with pytest.raises(ValueError, match="fast: blocks have 16 tokens, it takes 64"):
        resolve("fast", block_size=16)
    with pytest.raises(ValueError, match="fast: the tensors are on cuda, it takes cpu"):
        resolve("fast", device="cuda")


@pytest.mark.parametrize(
    "spec, cuda, reason",
    [
        (None, "13.0", "triton is not installed"),
        (object(), None, "torch is built without CUDA"),
        (object(), "13.0", "no CUDA device"),
    ],
)
def test_without_a_gpu_triton_says_why_it_is_not_there(monkeypatch, spec, cuda, reason):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status = backends()["triton"]
    assert not status.available
    assert status.reason.startswith(reason)
    with pytest.raises(ValueError, match=f"triton: {reason}.*Available on this machine: "):
        dispatch.resolve("triton", device="cpu", head_dim=64, dtype=torch.float32, block_size=64)


def test_a_missing_backend_says_why_and_what_is_there(monkeypatch):
    missing = dispatch.Backend(
        "missing", ("cpu",), (torch.float32,), (64,), (64,), lambda: "its module is not built"
    )
    monkeypatch.setattr(dispatch, "BACKENDS", (missing, *dispatch.BACKENDS))
    assert backends()["missing"] == (False, "its module is not built")
    with pytest.raises(ValueError, match="missing: its module is not built.*machine: .*reference"):
        dispatch.resolve("missing", device="cpu", head_dim=64, dtype=torch.float32, block_size=64)
