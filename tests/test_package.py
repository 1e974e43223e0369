"""The package: what importing it costs, the rules of its layout, its documents and its command."""

import ast
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import nabla
from nabla.cli import app, main
from nabla.inspect import draw_mask, environment, recall

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SOURCES = [
    path for package in ("nabla", "kandinsky_model") for path in ROOT.glob(f"{package}/**/*.py")
]


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a fresh Python that imports this checkout."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environ, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result


# Importing


def test_import_is_innocent():
    code = """
import sys, torch
before = set(sys.modules)
import nabla
files = [getattr(module, "__file__", "") or "" for name, module in sys.modules.items()
         if name.partition(".")[0] == "nabla"]
print([torch.cuda.is_initialized(), sorted(set(sys.modules) - before), files])
"""
    initialized, modules, files = ast.literal_eval(python("-c", code).stdout)
    assert not initialized
    optional = ("triton", "nabla.cpu", "nabla.triton", "nabla.cuda", "typer", "rich", "matplotlib")
    optional += ("nabla.integrations", "diffusers", "transformers")
    assert not [name for name in modules if name.startswith(optional)]
    assert files and all(file.endswith(".py") for file in files)


def test_import_is_fast():
    def milliseconds() -> float:
        """What `import nabla` takes after `import torch`, by the interpreter's own account."""
        report = python("-X", "importtime", "-c", "import torch; import nabla").stderr
        (line,) = re.findall(r"\|\s*(\d+) \| nabla$", report, re.MULTILINE)
        return int(line) / 1000

    assert statistics.median(milliseconds() for _ in range(3)) < 300


def test_public_names_are_few_and_documented():
    assert len(nabla.__all__) <= 13
    for name in nabla.__all__:
        assert (getattr(nabla, name).__doc__ or "").strip(), name


# The rules of the layout


RULES = {
    "torch.library is in ops.py": (r"torch\.library", r"nabla/ops\.py"),
    "data_ptr is in the native backends": (r"data_ptr", r"nabla/(cpu|cuda)/"),
    "compute capability is in dispatch.py": (r"get_device_capability", r"nabla/dispatch\.py"),
    "os.environ is in dispatch.py": (r"os\.environ|getenv", r"nabla/dispatch\.py"),
    "nothing is unpickled": (r"torch\.load\b|^\s*(import|from) pickle", r"(?!)"),
}


@pytest.mark.parametrize("pattern, home", RULES.values(), ids=RULES)
def test_layout(pattern, home):
    at_home = re.compile(home)
    strays = [
        f"{name}:{number}: {line.strip()}"
        for path in SOURCES
        if not at_home.match(name := path.relative_to(ROOT).as_posix())
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not strays, "\n".join(strays)


def test_environment_variables_are_few():
    names = set()
    for path in [ROOT / "setup.py", *SOURCES]:
        names |= set(re.findall(r"[\"'](NABLA_\w+)[\"']", path.read_text()))
    assert len(names) <= 3, names


def test_backends_do_not_import_each_other():
    backends = {path.parent.name for path in ROOT.glob("nabla/*/block_attention.py")}
    assert "reference" in backends
    for backend in backends:
        for path in ROOT.glob(f"nabla/{backend}/*.py"):
            imported = set(re.findall(r"nabla\.(\w+)", path.read_text()))
            assert imported & backends <= {backend}, path


# The documents


def code_blocks(language: str) -> list[str]:
    """The fenced blocks of the README in a language; "" for those that name none."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [code for fence, code in fences if fence == language]


@pytest.mark.parametrize(
    "code",
    code_blocks("python"),
    ids=["drop_in", "stages", "diffusers", "calibration", "presets"],
)
def test_readme_runs(code, tmp_path):
    python("-c", code, cwd=tmp_path)


def test_readme_commands_are_targets():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = re.findall(r"^make ([a-z-]+)", "\n".join(code_blocks("bash")), re.MULTILINE)
    assert commands
    assert set(commands) <= set(targets)


def test_readme_tree_is_true():
    (tree,) = [block for block in code_blocks("") if block.startswith("nabla/")]
    listed, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            listed.add(name)
        else:
            listed.add(folder + name)
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    tracked = {first_part(file) for file in files}
    for package in ("nabla/", "kandinsky_model/"):
        inside = [file.removeprefix(package) for file in files if file.startswith(package)]
        tracked |= {package + first_part(file) for file in inside}
    unremarkable = ("__init__.py", "__main__.py", "py.typed")
    missing = {name for name in tracked - listed if not name.endswith(unremarkable)}
    assert not missing, f"not in the README's tree: {sorted(missing)}"
    invented = listed - tracked
    assert not invented, f"in the README's tree, but not in git: {sorted(invented)}"


def first_part(path: str) -> str:
    head, slash, _ = path.partition("/")
    return head + slash


def test_readme_matrix_lists_the_backends():
    rows = re.findall(r"^\| `([\w-]+)` +\|", README, re.MULTILINE)
    assert rows == list(nabla.backends())


def test_constraints_are_exact_and_complete():
    import tomllib

    pins = re.findall(r"^([\w-]+)==[\d.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in wanted}
    assert names - {"nabla-attention"} <= set(pins)


# Inspection


@pytest.fixture
def example():
    torch.manual_seed(0)
    grid = nabla.TokenGrid(3, 12, 20, extra=10)
    q, k = torch.randn(2, 2, 4, grid.num_tokens, 32).mul(3).unbind()
    k = k[:, :2]
    return q, k, nabla.create_block_mask(q, k, grid=grid, top_p=0.5, window=(3, 1, 1))


def test_recall_is_the_retained_mass(example):
    q, k, mask = example
    sizes = mask.grid.starts().diff().long()
    keep = mask.to_dense().repeat_interleave(sizes, 2).repeat_interleave(sizes, 3)
    logits = q.double() @ k.double().repeat_interleave(2, 1).mT * 32**-0.5
    exact = (logits.softmax(-1) * keep).sum(-1).mean(-1)
    torch.testing.assert_close(recall(q, k, mask).double(), exact, rtol=1e-5, atol=1e-6)


def test_recall_of_everything_and_of_nothing(example):
    q, k, mask = example
    ones = torch.ones(1, 1, mask.grid.num_blocks, mask.grid.num_blocks, dtype=torch.bool)
    everything = nabla.BlockMask.from_dense(ones, grid=mask.grid)
    nothing = nabla.BlockMask.from_dense(~ones, grid=mask.grid)
    torch.testing.assert_close(recall(q, k, everything), torch.ones(2, 4))
    assert recall(q, k, nothing).eq(0).all()


def pixels(path: Path) -> torch.Tensor:
    """Colours of a picture, uint8 [height, width, 3]."""
    import numpy
    from PIL import Image

    return torch.from_numpy(numpy.array(Image.open(path).convert("RGB")))


def area(picture: torch.Tensor, colour: str) -> int:
    """The number of pixels of a colour, written #rrggbb."""
    return int((picture == torch.tensor(list(bytes.fromhex(colour[1:])))).all(-1).sum())


def test_draw_mask_draws_what_is_kept(example, tmp_path):
    from nabla.inspect.picture import DROPPED, IN_WINDOW, QUERY, SELECTED

    _, _, mask = example
    path = draw_mask(mask, tmp_path / "new" / "mask.png", heads=[0, 3], query_block=7, batch=1)
    picture = pixels(path)
    assert min(picture.shape[:2]) > 600
    for colour in (DROPPED, IN_WINDOW, QUERY, SELECTED):
        assert area(picture, colour) > 1000, colour
    right_half = picture[:, picture.shape[1] // 2 :]
    assert area(right_half, SELECTED) > 1000
    assert area(right_half, IN_WINDOW) > 1000


def test_draw_mask_of_all_and_of_nothing(tmp_path):
    from nabla.inspect.picture import DROPPED, SELECTED

    grid = nabla.TokenGrid(2, 16, 16)
    keep = torch.ones(8, 8, dtype=torch.bool)
    dense = pixels(draw_mask(nabla.BlockMask.from_dense(keep, grid=grid), tmp_path / "a.png"))
    empty = pixels(draw_mask(nabla.BlockMask.from_dense(~keep, grid=grid), tmp_path / "b.png"))
    assert area(dense, SELECTED) > 20 * area(empty, SELECTED)
    assert area(empty, DROPPED) > 20 * area(dense, DROPPED)


GRIDS = {
    "sequence": nabla.TokenGrid.sequence(300),
    "one_block": nabla.TokenGrid(1, 8, 8),
    "many_frames": nabla.TokenGrid(40, 8, 24),
    "deep_blocks": nabla.TokenGrid(7, 9, 9, block=(2, 4, 4)),
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_draw_mask_of_any_grid(grid, tmp_path):
    keep = torch.ones(grid.num_blocks, grid.num_blocks, dtype=torch.bool)
    path = draw_mask(nabla.BlockMask.from_dense(keep, grid=grid), tmp_path / "mask.png")
    assert path.stat().st_size > 1000


def test_draw_mask_of_a_slice(example, tmp_path):
    _, _, mask = example
    rows = nabla.BlockMask.from_dense(mask.to_dense()[:, :, 5:9], grid=mask.grid, q_block_offset=5)
    assert draw_mask(rows, tmp_path / "mask.png", query_block=8).exists()
    with pytest.raises(ValueError, match="query_block: 9 is not there, the mask has 5 to 8"):
        draw_mask(rows, tmp_path / "other.png", query_block=9)


@pytest.mark.parametrize("choice", [{"heads": [4]}, {"batch": 2}, {"query_block": 99}])
def test_draw_mask_names_what_is_not_there(example, choice, tmp_path):
    with pytest.raises(ValueError, match=next(iter(choice))):
        draw_mask(example[2], tmp_path / "mask.png", **choice)


def test_environment_says_what_there_is():
    facts = environment()
    assert facts["versions"]["nabla"] == nabla.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["backends"]["reference"]["available"]
    assert len(facts["devices"]) == torch.cuda.device_count()
    for backend in facts["backends"].values():
        assert backend["available"] or backend["reason"]


# The command


def command(*arguments: str):
    return CliRunner().invoke(app, arguments)


def test_info_prints_the_backends():
    result = command("info")
    assert result.exit_code == 0
    for word in ("torch", torch.__version__, *nabla.backends()):
        assert word in result.output


def test_info_as_json():
    result = command("info", "--json")
    assert result.exit_code == 0
    assert json.loads(result.output) == environment()


def test_mask_draws_an_example(tmp_path):
    path = tmp_path / "mask.png"
    result = command(
        "mask",
        "--grid",
        "2,16,24",
        "--window",
        "1,3,3",
        "--query",
        "0,0,2",
        "--heads",
        "2",
        "--out",
        str(path),
    )
    assert result.exit_code == 0, result.output
    assert path.stat().st_size > 1000
    densities = re.findall(r"^\d+ +(\d\.\d+) +(\d\.\d+)", result.output, re.MULTILINE)
    assert len(densities) == 2
    assert all(0 < float(value) <= 1 for row in densities for value in row)


@pytest.mark.parametrize("order", ["raster", "block"])
def test_mask_of_tensors(order, tmp_path):
    from safetensors.torch import save_file

    grid = nabla.TokenGrid(1, 16, 24)
    q, k = torch.randn(2, 3, grid.num_tokens, 16).mul(4).unbind()
    save_file({"q": q.contiguous(), "k": k.contiguous()}, tmp_path / "qk.safetensors")
    result = command(
        "mask",
        "--grid",
        "1,16,24",
        "--tensors",
        str(tmp_path / "qk.safetensors"),
        "--order",
        order,
        "--top-p",
        "0.5",
        "--out",
        str(tmp_path / "mask.png"),
    )
    assert result.exit_code == 0, result.output
    if order == "raster":
        q, k = nabla.fractal_flatten(q, grid), nabla.fractal_flatten(k, grid)
    mask = nabla.create_block_mask(q[None], k[None], grid=grid, top_p=0.5)
    assert f"density {mask.density():.3f}" in result.output


BAD = {
    "grid": (["--grid", "2,16"], "'2,16' is not three whole numbers"),
    "window": (["--grid", "1,8,8", "--window", "2,1,1"], "window"),
    "top_p": (["--grid", "1,8,8", "--top-p", "90"], "percentage"),
    "query": (["--grid", "1,8,8", "--query", "0,0,1"], "outside the (1, 1, 1) blocks"),
    "tensors": (["--tensors", "absent.safetensors"], "absent.safetensors"),
    "no tensors": (["--tensors", __file__], "cannot be read as safetensors"),
}


@pytest.mark.parametrize("arguments, words", BAD.values(), ids=BAD)
def test_bad_input_is_one_readable_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["nabla", "mask", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("nabla: ")
    assert words in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_runs_as_a_module():
    assert "reference" in python("-m", "nabla", "info").stdout


def test_unknown_option_is_a_usage_error():
    assert command("mask", "--nonsense").exit_code == 2


def test_tuning_needs_a_gpu(monkeypatch, tmp_path, capsys):
    why = "there is no GPU today"
    missing = nabla.dispatch.BackendStatus(False, why)
    monkeypatch.setattr(nabla, "backends", lambda: {"triton": missing})
    monkeypatch.setattr(sys, "argv", ["nabla", "tune", "--out", str(tmp_path / "t.json")])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    assert capsys.readouterr().err == f"nabla: tune measures Triton's kernels on a GPU: {why}\n"
    assert not list(tmp_path.iterdir())


def test_gpu_check_says_why_it_cannot_run():
    from benchmarks.gpu_check import missing

    reason = missing()
    if torch.cuda.is_available():
        assert reason is None
    else:
        assert "CUDA" in reason
        result = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu_check"], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 2
        assert result.stderr == f"gpu-check: {reason}\n"
