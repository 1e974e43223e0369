"""What every test shares: the backends of this machine, eager and compiled, reproducible inputs."""

import os

import hypothesis
import pytest
import torch

from nabla import dispatch

hypothesis.settings.register_profile("ci", max_examples=30, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=1000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Without this, products on CUDA are refused where deterministic algorithms are asked for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Without the emulated CUDA kernels, which are slow: tests/test_cuda_*.py have their size.
BACKENDS = [
    b.name
    for b in dispatch.BACKENDS
    if "cpu" in b.devices and b.is_automatic and b.unavailable() is None
]
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else torch.get_num_threads())


def pytest_ignore_collect(collection_path):
    """Triton reads TRITON_INTERPRET once, so its interpreter has a session of its own."""
    name = collection_path.name
    is_other_test = name.startswith("test_") and name != "test_triton.py"
    return True if is_other_test and dispatch.is_interpreted() else None


TABLES = {  # by the property that a test records a line as
    "resources": "resources of the Triton kernels, compiled ahead of time",
    "cuda_resources": "resources of the CUDA kernels",
    "model": "what main loops can reach at most, by their SASS (benchmarks/issue_model.py)",
}


def pytest_terminal_summary(terminalreporter):
    """Print what tests have recorded as lines of tables, also of those that passed."""
    reports = [r for name in ("passed", "failed") for r in terminalreporter.stats.get(name, ())]
    for table, title in TABLES.items():
        lines = {value for r in reports for key, value in r.user_properties if key == table}
        if lines:
            terminalreporter.section(title)
            terminalreporter.write("\n".join(sorted(lines)) + "\n")


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    # torch.empty is then filled with NaN. The reference sums what CUDA cannot sum in a fixed order.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
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
