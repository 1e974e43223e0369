"""The `nabla` command.

nabla info [--json]    versions, devices, instruction sets, backends and why one is missing
nabla demo             dense and NABLA attention side by side on a real clip
nabla mask             picture of a block mask
nabla generate         a video or an image of Kandinsky 5, from its weights
nabla calibrate        the top_p of each layer and head of a model, for an error
nabla tune             fastest tiles of the Triton kernels on the GPU at hand
nabla bench            the benchmark suite, in a checkout
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import nabla
from nabla.grid import TokenGrid

app = typer.Typer(
    help="NABLA block-sparse attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


def main() -> None:
    """Run the command; bad input ends in one readable line and exit status 1."""
    try:
        app()
    except (ValueError, ModuleNotFoundError, OSError) as error:
        message = f"[bold red]nabla:[/] {escape(str(error))}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        raise SystemExit(1) from error


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show versions, the machine, and which backends it has."""
    from nabla.inspect import environment

    facts = environment()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    cpu = facts["cpu"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    for name, version in facts["versions"].items():
        table.add_row(name, version or "[dim]not installed[/]")
    table.add_row("python", facts["python"])
    table.add_row("platform", facts["platform"])
    table.add_row("cpu", f"{cpu['name']}, {cpu['threads']} threads used by torch")
    table.add_row("", f"{' '.join(cpu['instruction_sets'])} (torch runs {cpu['torch_capability']})")
    for index, device in enumerate(facts["devices"]):
        table.add_row(f"cuda:{index}", f"{device['name']}, {device['memory_gib']} GiB")
    if not facts["devices"]:
        table.add_row("cuda", "[dim]no device[/]")
    table.add_row("cuda kernels", " ".join(facts["cuda_kernels"]) or "[dim]not built[/]")
    console.print(table)
    console.print()
    status = Table("backend", "", "why", box=None, pad_edge=False)
    for name, backend in facts["backends"].items():
        mark = "[green]available[/]" if backend["available"] else "[yellow]missing[/]"
        status.add_row(name, mark, "" if backend["available"] else backend["reason"])
    console.print(status)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the video and the pictures.")] = Path("out"),
) -> None:
    """Continue a real clip with dense and with NABLA attention, side by side, and time both."""
    try:
        from kandinsky_model.demo import run
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; the demo needs: pip install 'nabla-attention[demo]'", name=error.name
        ) from error
    run(out)


@app.command()
def mask(
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("mask.png"),
    grid: Annotated[str, typer.Option(help="Tokens: frames,height,width.")] = "6,32,48",
    top_p: Annotated[float, typer.Option(help="Mass that a row keeps, in (0, 1].")] = 0.9,
    window: Annotated[
        str | None, typer.Option(help="Sliding tile window in blocks, odd: frames,height,width.")
    ] = None,
    query: Annotated[
        str | None, typer.Option(help="Query block to look at: t,h,w in blocks; else the middle.")
    ] = None,
    tensors: Annotated[
        Path | None,
        typer.Option(
            help="Safetensors file with q and k, [B, H, S, D] or [H, S, D]; else an example."
        ),
    ] = None,
    order: Annotated[
        Literal["raster", "block"], typer.Option(help="Order of the tokens in that file.")
    ] = "raster",
    heads: Annotated[int, typer.Option(min=1, help="Heads to draw.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the example.")] = 0,
) -> None:
    """Draw a block mask: of q and k in a file, or of an example with smooth content."""
    from nabla.inspect import draw_mask, recall

    token_grid = TokenGrid(*_three("--grid", grid))
    if tensors is None:
        q = k = _example(token_grid, heads, seed)
    else:
        q, k = _load(tensors)
    if order == "raster":
        q, k = nabla.fractal_flatten(q, token_grid), nabla.fractal_flatten(k, token_grid)
    extents = None if window is None else _three("--window", window)
    block_mask = nabla.create_block_mask(q, k, grid=token_grid, top_p=top_p, window=extents)
    block = None if query is None else _block_index(_three("--query", query), token_grid)
    draw_mask(block_mask, out, heads=range(min(heads, q.shape[1])), query_block=block)

    table = Table("head", "density", "attention mass kept", box=None, pad_edge=False)
    densities = block_mask.to_dense().float().mean((0, 2, 3))
    for head, values in enumerate(zip(densities, recall(q, k, block_mask).mean(0), strict=True)):
        table.add_row(str(head), *(f"{value:.3f}" for value in values))
    console.print(table)
    console.print(f"density {block_mask.density():.3f}, picture in {out}", highlight=False)


@app.command()
def tune(
    out: Annotated[Path, typer.Option(help="The table to write, JSON.")] = Path("tiles.json"),
    head_dims: Annotated[str, typer.Option(help="Channels of a head: 64,128")] = "64,128",
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Of the tensors.")
    ] = "bfloat16",
) -> None:
    """Measure tiles of the Triton kernels on this GPU, which takes minutes, and write the best."""
    if not (status := nabla.backends()["triton"]).available:
        raise ValueError(f"tune measures Triton's kernels on a GPU: {status.reason}")
    from nabla.triton.tune import tune

    sizes = [int(size) if size.strip().isdecimal() else 0 for size in head_dims.split(",")]
    if not all(size in range(16, 257, 16) for size in sizes):
        raise ValueError(f"--head-dims {head_dims!r} are not sizes of 16 to 256 in steps of 16")
    tune(out, [getattr(torch, dtype)], sizes, report=console.print)
    console.print(f"in a program: nabla.triton.config.use_table({str(out)!r})")


@app.command()
def bench(
    preset: Annotated[str, typer.Argument(help="What to run, such as cpu or k5-lite-10s.")],
    device: Annotated[str | None, typer.Option(help="cpu or cuda; else CUDA if any.")] = None,
    peers: Annotated[str | None, typer.Option(help="Peers to measure beside: sdpa,flex")] = None,
    only: Annotated[str | None, typer.Option(help="Stages and workloads: block_mask,train")] = None,
    json_lines: Annotated[
        Path | None, typer.Option("--json", help="Where to write the rows, as JSON lines.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Results of another run: exit status 1 if now slower.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="To take, about.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for pictures and report.")] = None,
) -> None:
    """Measure the kernels against dense attention and other libraries; write a report."""
    suite, report = _benchmarks()
    status = suite.bench(
        preset,
        device=device,
        peers=None if peers is None else [name.strip() for name in peers.split(",")],
        only=None if only is None else [name.strip() for name in only.split(",")],
        json=json_lines,
        compare=compare,
        seconds=seconds,
        out=out,
        say=report.rich,
    )
    raise typer.Exit(status)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    preset: Annotated[str, typer.Option(help="The model, such as video-lite-10s.")],
    weights: Annotated[Path | None, typer.Option(help="Folder of the weights.")] = None,
    image: Annotated[Path | None, typer.Option(help="First frame, or image to edit.")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH, multiples of 16 px.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length of the video.")] = None,
    steps: Annotated[int | None, typer.Option(help="Euler steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    shift: Annotated[float | None, typer.Option(help="Shift of the times.")] = None,
    negative: Annotated[str | None, typer.Option(help="What to guide away from.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The .mp4, .gif or .png to write.")] = None,
    attention: Annotated[Literal["nabla", "dense"] | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option(help="Mass that NABLA keeps, in (0, 1].")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="The same by layer and head: a file of nabla calibrate.")
    ] = None,
    magcache: Annotated[
        Path | None, typer.Option(help="Leave out calls that hardly differ, by ratios in a file.")
    ] = None,
    measure_magcache: Annotated[
        Path | None, typer.Option(help="Leave out nothing, and write the ratios to this file.")
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="A LoRA adapter of the model.")] = None,
    lora_scale: Annotated[float, typer.Option(help="Its strength.")] = 1.0,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; else CUDA if any.")] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep each part on the device only while it works.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what memory it takes, and stop.")
    ] = False,
    templates: Annotated[
        Literal["original", "diffusers"], typer.Option(help="Whose templates for the prompt.")
    ] = "original",
) -> None:
    """Generate a video or an image with the weights of Kandinsky 5.

    What an option leaves open is the preset's. Interrupted, the same command goes on where it was.
    """
    try:
        from kandinsky_model.attention import CalibratedAttention
        from kandinsky_model.generate import parse_size, run
        from kandinsky_model.magcache import read_ratios
        from kandinsky_model.request import Request
        from nabla.inspect import Calibration
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; generating needs: pip install 'nabla-attention[generate]'", name=error.name
        ) from error
    if calibration is not None and (attention or top_p is not None):
        raise ValueError(f"--calibration {calibration} says how to attend: no --attention, --top-p")
    request = Request(
        prompt,
        image=image,
        size=None if size is None else parse_size(size),
        seconds=seconds,
        num_steps=steps,
        guidance_scale=guidance,
        shift=shift,
        negative_prompt=negative,
        seed=seed,
        attention=attention
        if calibration is None
        else CalibratedAttention(Calibration.load(calibration)),
        top_p=top_p,
        magcache=None if magcache is None else read_ratios(magcache),
    )
    run(
        request,
        preset,
        weights,
        out=out,
        device=device,
        offload=offload,
        lora=lora,
        lora_scale=lora_scale,
        variant=templates,
        measure_magcache=measure_magcache,
        plan_only=plan,
    )


@app.command()
def calibrate(
    inputs: Annotated[
        list[str] | None, typer.Argument(help="Prompts to sample; of the tiny model, clips.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="The model, such as video-lite-10s; tiny needs no weights.")
    ] = "tiny",
    weights: Annotated[Path | None, typer.Option(help="Folder of the weights.")] = None,
    error: Annotated[
        float, typer.Option(help="To keep: 0.05 is 5 % of what a layer's attention puts out.")
    ] = 0.05,
    out: Annotated[Path, typer.Option(help="The calibration to write, .json.")] = Path(
        "out/calibration.json"
    ),
    curves: Annotated[
        Path | None, typer.Option(help="Choose of what a run has measured, and measure nothing.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Euler steps.")] = 8,
    image: Annotated[Path | None, typer.Option(help="First frame, or image to edit.")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH, multiples of 16 px.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length of the video.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; else CUDA if any.")] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep each part on the device only while it works.")
    ] = False,
) -> None:
    """Measure what each head of a model loses with each top_p, and choose by an error.

    Writes the calibration that generate takes, a table of all that was measured, and a picture.
    """
    try:
        from kandinsky_model import calibrate as calibration
        from kandinsky_model import presets
        from kandinsky_model.generate import parse_size
        from kandinsky_model.request import Request
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"{missing}; calibrating needs: pip install 'nabla-attention[demo,generate]'",
            name=missing.name,
        ) from missing
    from nabla.inspect import Curves

    calibration.check(out, error)
    if curves is not None:
        measured = Curves.load(curves)
    elif preset == calibration.TINY:
        if weights is not None:
            raise ValueError(f"--weights {weights} belong to a preset: name it by --preset")
        measured = calibration.of_tiny(inputs or [], steps)
    else:
        requests = [
            Request(
                prompt,
                image=image,
                size=None if size is None else parse_size(size),
                seconds=seconds,
                num_steps=steps,
                seed=seed,
            )
            for prompt in inputs or []
        ]
        row = presets.preset(preset)
        measured = calibration.of_preset(requests, row, weights, device=device, offload=offload)
    calibration.write(measured, error, out)


def _benchmarks() -> tuple[ModuleType, ModuleType]:
    """The suite and its report, from the checkout that this package is part of.

    They are not installed: results count with a commit, and a package called `benchmarks` among a
    user's others could be anyone's.
    """
    checkout = Path(nabla.__file__).resolve().parent.parent
    if not (checkout / "benchmarks" / "suite.py").exists():
        raise ModuleNotFoundError(
            f"nabla bench is part of the source, not of the package installed in {checkout}: in a "
            "checkout run `make setup`, then `.venv/bin/nabla bench`"
        )
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    try:
        return import_module("benchmarks.suite"), import_module("benchmarks.report")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; the benchmarks need: pip install 'nabla-attention[demo]'", name=error.name
        ) from error


def _three(option: str, text: str) -> tuple[int, int, int]:
    try:
        first, second, third = map(int, text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text!r} is not three whole numbers such as 6,32,48") from None
    return first, second, third


def _block_index(position: tuple[int, int, int], grid: TokenGrid) -> int:
    if not all(0 <= at < extent for at, extent in zip(position, grid.blocks, strict=True)):
        raise ValueError(f"--query {position} is outside the {grid.blocks} blocks of the grid")
    return (position[0] * grid.blocks[1] + position[1]) * grid.blocks[2] + position[2]


def _load(path: Path) -> tuple[Tensor, Tensor]:
    """q and k [B, H, S, D] of a safetensors file."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--tensors needs safetensors: pip install 'nabla-attention[model]'"
        ) from error
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error})") from error
    if not {"q", "k"} <= found.keys():
        raise ValueError(f"{path} holds {', '.join(sorted(found))}, but q and k are wanted")
    q, k = (found[name] if found[name].dim() == 4 else found[name][None] for name in "qk")
    return q, k


def _example(grid: TokenGrid, heads: int, seed: int) -> Tensor:
    """Queries that are also the keys, [1, heads, S, 64]: random fields, finer with each head."""
    generator = torch.Generator().manual_seed(seed)
    size = (grid.frames, grid.height, grid.width)
    fields = []
    for head in range(heads):
        coarse = [min(extent, 3 + head) for extent in size]
        noise = torch.randn(1, 64, *coarse, generator=generator)
        field = torch.nn.functional.interpolate(noise, size=size, mode="trilinear")
        fields.append(8 * torch.nn.functional.normalize(field.flatten(2), dim=1).mT)  # [1, S, 64]
    return torch.stack(fields, 1)
