"""The choice of a backend as a pure function."""

import dataclasses

import pytest
import torch

from nabla import backends, cuda, dispatch


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


@pytest.fixture
def all_available(monkeypatch):
    """Every backend, as on a machine that has it."""
    available = [dataclasses.replace(b, unavailable=lambda: None) for b in dispatch.BACKENDS]
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(available))


def test_cuda_kernels_are_the_default_where_they_are_made_for(all_available):
    options = {"head_dim": 128, "dtype": torch.bfloat16, "block_size": 64, "device": "cuda"}
    expectations = {80: "cuda", 86: "cuda", 89: "cuda", 90: "cuda", 100: "triton"}
    for architecture, expected in expectations.items():
        assert dispatch.resolve("auto", **options, architecture=architecture) == expected
    assert dispatch.resolve("auto", **options | {"head_dim": 96}, architecture=90) == "triton"
    with pytest.raises(
        ValueError, match="cuda: the device is sm_100, it takes sm_80, sm_86, sm_89, sm_90"
    ):
        dispatch.resolve("cuda", **options, architecture=100)
    scores = {"head_dim": None, "dtype": torch.float32}
    assert dispatch.resolve("auto", **options | scores, architecture=90) == "cuda"


def test_the_kernels_of_this_installation_are_for_these_architectures():
    assert cuda.unavailable_reason() is None
    assert cuda.architectures() == {80: "sm_80", 86: "sm_86", 89: "sm_89", 90: "sm_90a"}
    assert set(cuda.architectures()) == set(dispatch.CUDA_ARCHITECTURES)


@pytest.mark.parametrize("choose", [cuda.emulation, cuda.kernels_of])
def test_an_architecture_without_kernels_is_refused(choose):
    with pytest.raises(ValueError, match="architecture=70 has no kernels: .*80, 86, 89, 90"):
        with choose(70):
            pass


def test_auto_never_emulates(all_available):
    options = {"head_dim": 64, "dtype": torch.bfloat16, "block_size": 64, "device": "cpu"}
    assert dispatch.resolve("cuda-emulated", **options) == "cuda-emulated"
    assert dispatch.resolve("auto", **options) == "cpu"
    with pytest.raises(ValueError, match="cuda-emulated: the tensors are on cuda, it takes cpu"):
        dispatch.resolve("cuda-emulated", **options | {"device": "cuda"})


@pytest.mark.parametrize(
    "why_not_loaded, cuda_version, why_no_device, expected",
    [
        ("no nvcc was found", "13.0", None, "no nvcc was found"),
        (None, None, None, "torch is built without CUDA"),
        (None, "13.0", "driver version is insufficient", "no CUDA device: driver version is insu"),
        (None, "13.0", None, "no CUDA device: torch finds none"),
    ],
)
def test_without_a_gpu_cuda_says_why_it_is_not_there(
    monkeypatch, why_not_loaded, cuda_version, why_no_device, expected
):
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: why_not_loaded)
    monkeypatch.setattr(cuda, "device_error", lambda: why_no_device)
    monkeypatch.setattr(torch.version, "cuda", cuda_version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status = backends()["cuda"]
    assert not status.available
    assert status.reason.startswith(expected)


def test_a_missing_backend_says_why_and_what_is_there(monkeypatch):
    missing = dispatch.Backend(
        "missing", ("cpu",), (torch.float32,), (64,), (64,), lambda: "its module is not built"
    )
    monkeypatch.setattr(dispatch, "BACKENDS", (missing, *dispatch.BACKENDS))
    assert backends()["missing"] == (False, "its module is not built")
    with pytest.raises(ValueError, match="missing: its module is not built.*machine: .*reference"):
        dispatch.resolve("missing", device="cpu", head_dim=64, dtype=torch.float32, block_size=64)
