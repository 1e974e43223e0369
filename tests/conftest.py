"""What every test shares: the backends of this machine, eager and compiled, reproducible inputs."""

import os

import hypothesis
import pytest
import torch

import nabla
from nabla import dispatch

hypothesis.settings.register_profile("ci", max_examples=30, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=1000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

BACKENDS = [name for name, status in nabla.backends().items() if status.available]
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else torch.get_num_threads())


def pytest_ignore_collect(collection_path):
    """Triton reads TRITON_INTERPRET once, so its interpreter has a session of its own."""
    if collection_path.name.startswith("test_"):
        is_for_the_interpreter = collection_path.name == "test_triton.py"
        return True if is_for_the_interpreter != dispatch.is_interpreted() else None


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # torch.empty is then filled with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def run(request):
    """Calls a function as it is, or compiled into one graph."""
    if not request.param:
        return lambda function, *args, **kwargs: function(*args, **kwargs)

    def run_compiled(function, *args, **kwargs):
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, backend="aot_eager")(*args, **kwargs)

    return run_compiled
