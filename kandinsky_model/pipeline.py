"""Text, or text and an image, to a video or an image, as Kandinsky 5 does it.

prompt   -> TextEncoder -> features, and those of the negative prompt
image    -> VAE         -> latents of the first frame, or of the image to edit
noise    -> CrossDiT    -> latents, in num_steps Euler steps
latents  -> VAE         -> frames, uint8 [T, H, W, 3]

    pipeline = Pipeline.load("weights", "video-lite-10s", device="cuda")
    frames = pipeline(Request("a cat in a hat", seed=1))
    write_frames(frames, "cat.mp4")
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from kandinsky_model import presets
from kandinsky_model.attention import NablaAttention
from kandinsky_model.checkpoint import load_checkpoint
from kandinsky_model.files import check_writable
from kandinsky_model.folder import digest, find_parts, fingerprint
from kandinsky_model.lora import apply_lora, check_lora
from kandinsky_model.magcache import Cache, MagCache, RatioMeter
from kandinsky_model.memory import MODES, Mode, device_memory, streamed
from kandinsky_model.model import CrossDiT
from kandinsky_model.presets import Preset
from kandinsky_model.request import Job, Request
from kandinsky_model.sampler import Callback, Velocity, euler, guided_velocity, timesteps
from kandinsky_model.state import Arguments, load_state, save_state
from kandinsky_model.text import CONTENT, Text, TextEncoder, Variant
from kandinsky_model.vae import VAE
from nabla.inspect import Curves, calibrate
from nabla.inspect.observe import Call

P = TypeVar("P", TextEncoder, CrossDiT, VAE)
Inputs = dict[str, Tensor]

_CACHE = "cache."  # how the tensors of a cache are called in a state


class Part(Generic[P]):
    """A part of a pipeline, read when it is first used.

    Args:
        load: Reads it onto a device.
        device: Where it works.
    """

    def __init__(self, load: Callable[[torch.device], P], device: torch.device) -> None:
        self._load: Callable[[torch.device], P] = load
        self._device = device
        self._part: P | None = None
        self._home: torch.device | None = None  # where it is while it does not work

    @contextmanager
    def at_work(self, mode: Mode) -> Iterator[P]:
        """The part, on its device; how it gets there is told in `kandinsky_model.memory`."""
        home = self._device if mode == "resident" else torch.device("cpu")
        if home != self._home:
            self._part, self._home = None, home
        part = self._part = self._part or self._load(home)
        if home != self._device:
            with streamed(part, self._device, self._blocks(part, mode)):
                yield part
            return
        try:
            yield part
        finally:
            if mode != "resident":  # nowhere to go but out of memory
                self._part = None

    def _blocks(self, part: nn.Module, mode: Mode) -> Sequence[nn.Module] | None:
        if isinstance(part, TextEncoder):
            return part.blocks
        return None if isinstance(part, CrossDiT) and mode == "stream" else ()


class Pipeline:
    """One preset with its parts.

    Args:
        preset: What is generated, and how.
        load_text_encoder: Reads the text encoder onto a device, when it is first used.
        load_model: Likewise.
        load_vae: Likewise.
        device: Where they work.
        mode: "resident": they stay there. "offload": each is there only while it works, Qwen2.5-VL
            layer by layer. "stream": so does the model, block by block. None takes for every
            request the first of these that the memory allows which is free on the device now.
        fingerprint: What tells these weights from others, by the names of their files: an
            interrupted run goes on with the same ones only. Called by the first run with a state.
        trigger: What goes before every prompt.
    """

    def __init__(
        self,
        preset: Preset,
        load_text_encoder: Callable[[torch.device], TextEncoder],
        load_model: Callable[[torch.device], CrossDiT],
        load_vae: Callable[[torch.device], VAE],
        *,
        device: torch.device | str = "cpu",
        mode: Mode | None = None,
        fingerprint: Callable[[], Mapping[str, str]] = dict,
        trigger: str = "",
    ) -> None:
        if mode is not None and mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
        self.preset, self.device = preset, torch.device(device)
        self.trigger = trigger
        self._mode, self._memory = mode, device_memory(self.device)
        self._fingerprint = cache(fingerprint)
        self._text_encoder = Part(load_text_encoder, self.device)
        self._model = Part(load_model, self.device)
        self._vae = Part(load_vae, self.device)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        preset: str | Preset,
        *,
        device: torch.device | str | None = None,
        mode: Mode | None = None,
        lora: str | Path | None = None,
        lora_scale: float = 1.0,
        variant: Variant = "original",
    ) -> "Pipeline":
        """A pipeline on the weights in a folder.

        All are checked now, as far as headers and configs tell. The VAE is read now, for it is
        small; the rest when it is first used.

        Args:
            folder: See `kandinsky_model.folder` for what lies where.
            preset: One of `PRESETS`, or its name.
            device: None takes CUDA where there is a device, else the CPU.
            mode: See `Pipeline`.
            lora: An adapter for the model; its trigger words go before every prompt.
            lora_scale: Its strength.
            variant: Whose prompt templates, see `TextEncoder`.
        """
        preset = presets.preset(preset) if isinstance(preset, str) else preset
        device = pick_device(device)
        parts = find_parts(folder, preset)
        dtype = torch.float16 if preset.is_video else torch.bfloat16
        dtype = torch.float32 if device.type == "cpu" else dtype
        vae = VAE.load(parts.vae, is_video=preset.is_video, dtype=dtype)
        vae.check(preset.model)
        texts = parts.text_encoder, parts.tokenizer, parts.text_encoder_2, parts.tokenizer_2
        edits = preset.task == "image-to-image"
        TextEncoder.check(*texts, preset.model, images=edits, variant=variant)
        adapter = None
        if lora is not None:
            adapter = check_lora(lora, preset.model, scale=lora_scale)
        elif lora_scale != 1.0:
            raise ValueError(f"lora_scale {lora_scale!r} is the strength of a lora: give one too")

        def digests() -> dict[str, str]:
            found = fingerprint(parts) | {"templates": variant, "lora_scale": str(lora_scale)}
            files = () if adapter is None else adapter.files
            return found | {f"lora/{file.name}": digest(file) for file in files}

        def load_text_encoder(target: torch.device) -> TextEncoder:
            return TextEncoder.load(*texts, images=edits, variant=variant).to(target)

        def load_model(target: torch.device) -> CrossDiT:
            model = load_checkpoint(parts.model, config=preset.model, device=target)
            if lora is not None:
                apply_lora(model, lora, scale=lora_scale)
            return model

        return cls(
            preset,
            load_text_encoder,
            load_model,
            vae.to,
            device=device,
            mode=mode,
            fingerprint=digests,
            trigger="" if adapter is None else adapter.trigger,
        )

    def __call__(
        self,
        request: Request | str,
        *,
        state: str | Path | None = None,
        callback: Callback | None = None,
        meter: RatioMeter | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Generate a video or an image.

        Args:
            request: What to generate, or only the prompt.
            state: File to keep an interrupted run in. One that is there goes on where it stopped,
                with the same result; it stays until the caller deletes it.
            callback: Called after each step with the number of steps done and the latents
                [1, T', H / 8, W / 8, C].
            meter: Measures the ratios of MagCache meanwhile.
            progress: Whether to show progress bars.

        Returns:
            Frames [T, height, width, 3], uint8 on the CPU; an image is one frame.
        """
        job = self.resolve(request)
        latents = self._latents(job, state, callback, meter, progress=progress)
        with self._vae.at_work(self.mode(job)) as vae:
            return vae.decode(latents, progress="decoding" if progress else None)

    def latents(
        self,
        request: Request | str,
        *,
        state: str | Path | None = None,
        callback: Callback | None = None,
        meter: RatioMeter | None = None,
        progress: bool = True,
    ) -> Tensor:
        """The latents [1, T', H / 8, W / 8, C], float32, that `__call__` with these decodes."""
        return self._latents(self.resolve(request), state, callback, meter, progress=progress)

    def resolve(self, request: Request | str) -> Job:
        """A request in full, or an error that says what is wrong with it."""
        request = Request(request) if isinstance(request, str) else request
        return request.resolve(self.preset)

    def mode(self, job: Job) -> Mode:
        """How parts get to the device, or an error with the figures if it cannot hold the work."""
        fastest = job.plan(self._memory).check(self.device)
        return self._mode or fastest

    def arguments(self, job: Job, *, measures: bool = False) -> Arguments:
        """All that the result of a run depends on, and whether ratios are measured meanwhile."""
        run = {"device": self.device.type, "meter": measures}
        return {**job.arguments(), **run, **self._fingerprint()}

    @torch.no_grad()
    def _latents(
        self,
        job: Job,
        state: str | Path | None,
        callback: Callback | None,
        meter: RatioMeter | None,
        *,
        progress: bool,
    ) -> Tensor:
        if meter is not None and job.schedule is not None:
            raise ValueError("meter measures calls that magcache would leave out: give one of them")
        self.mode(job)
        path, found, arguments = None if state is None else Path(state), None, {}
        if path is not None:
            check_writable(path)
            arguments = self.arguments(job, measures=meter is not None)
            found = load_state(path, arguments)
        tensors, done = found or (self._inputs(job), 0)
        inputs = {name: x for name, x in tensors.items() if not name.startswith(_CACHE)}
        kept = {name.removeprefix(_CACHE): tensors[name] for name in tensors.keys() - inputs.keys()}
        cached: Cache | None = meter
        if meter is not None:
            meter.resume(kept, branches=1 + job.is_guided)
        elif job.schedule is not None:
            cached = MagCache(job.schedule, start=done, kept=kept)

        def keep(step: int, latents: Tensor) -> None:
            if path is not None:
                tensors = {} if cached is None else cached.kept
                tensors = {f"{_CACHE}{name}": tensor for name, tensor in tensors.items()}
                save_state(path, {**inputs, **tensors, "latents": latents}, step, arguments)
            if step and callback is not None:
                callback(step, latents)

        if found is None:
            keep(0, inputs["latents"])
        latents = self._sample(job, inputs, done, keep, cached, progress=progress)
        if "first_frame" in inputs:
            latents = torch.cat([inputs["first_frame"].to(latents), latents[:, 1:]], dim=1)
            latents = normalize_first_frames(latents)
        return latents

    def calibrate(
        self,
        requests: Sequence[Request],
        *,
        top_p: Sequence[float],
        progress: Callable[[Call], None] | None = None,
    ) -> Curves:
        """What each head of each layer would lose with each top_p, while requests are sampled.

        They are sampled with dense attention, whatever theirs is, and nothing is decoded.

        Args:
            requests: What to sample.
            top_p: See `nabla.inspect.calibrate`; the window is that of the preset.
            progress: See there; called `preset.model.num_visual_blocks` times a model call.
        """
        dense = NablaAttention(1.0)  # goes through nabla, which is where calibrate looks on
        jobs = [replace(request.resolve(self.preset), attention=dense) for request in requests]
        inputs = [self._inputs(job) for job in jobs]
        with self._model.at_work(self.mode(jobs[0])) as model:

            def run() -> None:
                for job, of_job in zip(jobs, inputs, strict=True):
                    times = timesteps(job.num_steps, shift=job.shift).to(self.device)
                    euler(
                        self._velocity(model, job, of_job),
                        of_job["latents"].to(self.device),
                        times,
                    )

            window = self.preset.window
            return calibrate(model, run, top_p=top_p, window=window, progress=progress)

    def _inputs(self, job: Job) -> Inputs:
        """All that the sampler starts from: noise, features of the text, latents of the image."""
        content = CONTENT[job.preset.task]
        source = job.image if content == "image-edit" else None
        with self._text_encoder.at_work(self.mode(job)) as encoder:
            text, pooled = encoder(self.trigger + job.prompt, content, source)
            inputs = {"text": text, "pooled": pooled}
            if job.is_guided:
                text, pooled = encoder(job.negative_prompt, content, source)
                inputs |= {"null_text": text, "null_pooled": pooled}
        generator = torch.Generator().manual_seed(job.seed)  # on the CPU: the same on every device
        shape = 1, *job.latent_shape, job.preset.model.in_visual_dim
        inputs["latents"] = torch.randn(shape, generator=generator)
        if job.image is not None:
            with self._vae.at_work(self.mode(job)) as vae:
                latents = vae.encode(job.image[None], generator=generator).float()
            inputs["source" if content == "image-edit" else "first_frame"] = latents
        return inputs

    def _sample(
        self,
        job: Job,
        inputs: Inputs,
        done: int,
        callback: Callback,
        cached: Cache | None,
        *,
        progress: bool,
    ) -> Tensor:
        if done == job.num_steps:
            return inputs["latents"].to(self.device)
        with self._model.at_work(self.mode(job)) as model:
            return euler(
                self._velocity(model, job, inputs, cached),
                inputs["latents"].to(self.device),
                timesteps(job.num_steps, shift=job.shift).to(self.device),
                start=done,
                callback=callback,
                progress="sampling" if progress else None,
            )

    def _velocity(
        self, model: CrossDiT, job: Job, inputs: Inputs, cached: Cache | None = None
    ) -> Velocity:
        """What a job follows from its noise."""

        def features(text: str, pooled: str) -> Text:
            device, dtype = self.device, model.dtype
            return inputs[text].to(device, dtype), inputs[pooled].to(device, dtype)

        return guided_velocity(
            model,
            features("text", "pooled"),
            null_text=features("null_text", "null_pooled") if job.is_guided else None,
            guidance_scale=job.guidance_scale,
            first_frame=inputs.get("first_frame"),
            source=inputs.get("source"),
            attention=job.attention,
            cache=cached,
        )


def pick_device(name: torch.device | str | None = None) -> torch.device:
    """The device of this name; None takes CUDA where there is a device, else the CPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device {str(name)!r} is not known: {error}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(name)!r} is neither cpu nor cuda")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise ValueError(
            f"device {str(name)!r} is not there: torch sees {count} of type {device.type}; see "
            "nabla info"
        )
    return device if device.type == "cuda" else torch.device("cpu")


def normalize_first_frames(latents: Tensor) -> Tensor:
    """Bring the first 4 frames nearer to the mean and the deviation of the next 5.

    Upstream does so behind image to video, against a jump after the given frame. Every frame keeps
    its mean within [-0.05, +0.1] and its deviation within [-0.1, +0.25] of what they were.

    Args:
        latents: [B, T, H, W, C], each taken for itself; up to 4 frames stay as they are.
    """
    if latents.shape[1] <= 4:
        return latents
    first, reference = latents[:, :4], latents[:, 4:9]
    mean, std = first.mean((2, 3, 4), keepdim=True), first.std((2, 3, 4), keepdim=True)
    wanted_mean = reference.mean((1, 2, 3, 4), keepdim=True).clamp(mean - 0.05, mean + 0.1)
    wanted_std = reference.std((1, 2, 3, 4), keepdim=True).clamp(std - 0.1, std + 0.25)
    first = (first - mean) / std * wanted_std + wanted_mean
    return torch.cat([first, latents[:, 4:]], dim=1)
