"""A prompt to pictures: tokenizer, text encoder, sampling loop, VAE decoder."""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

import sdrt
from sdrt.runtime.bundle import Bundle
from sdrt.runtime.decode import ImageDecoder
from sdrt.runtime.denoise import DenoiseLoop
from sdrt.runtime.devices import Device, HostDevice
from sdrt.runtime.errors import UsageError
from sdrt.runtime.executors import DEFAULT_BACKEND, Executor, load_executor
from sdrt.runtime.noise import DEFAULT_RNG, Rng, noise_source
from sdrt.runtime.prompts import PromptEncoder
from sdrt.runtime.request import Request, StepEndCallback, build_request, checked_size, latent_shape
from sdrt.runtime.schedule import check_integer
from sdrt.runtime.solvers import SamplerTable
from sdrt.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

OutputType = Literal["pil", "numpy", "latents"]
OUTPUT_TYPES: Final = ("pil", "numpy", "latents")
MAX_CACHED_LOOPS: Final = 4  # each holds the buffers of one shape
MAX_THREADS: Final = 1024  # a mistyped number must not start a million


_StepHook = Callable[["Pipeline", DenoiseLoop, SamplerTable, int], None]


class BlackImageWarning(UserWarning):
    """A picture came out all black; the message names the component that made it."""


@dataclass(frozen=True, slots=True)
class PipelineOutput:
    """What a call of `Pipeline` returns.

    Attributes:
        images: Pillow images, or one uint8 array [N, H, W, 3] for ``output_type="numpy"``; empty for
            ``"latents"``.
        latents: float32 [N, C, h, w], the final latents.
        recipes: For each image everything that drew it, as plain data: ``prompt``, ``negative_prompt``,
            ``seed``, ``height``, ``width``, ``num_inference_steps``, ``guidance_scale``, ``sampler``,
            ``karras``, ``eta``, ``rng``, ``backend``, ``model``, ``model_sha256``, ``version``.
        timings: Seconds of wall clock per stage: ``text_encoder``, ``denoise``, ``vae_decoder``, ``total``,
            and ``step``, the mean of one step.
    """

    images: Any
    latents: NDArray[np.float32]
    recipes: tuple[dict[str, Any], ...]
    timings: dict[str, float]


@dataclass(slots=True)
class _Clock:
    """Adds up the wall clock of named stages."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, started: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


class Pipeline:
    """Draws from one bundle. Components are loaded once and stay loaded; calls reuse all buffers.

    Not safe for calls from several threads at once: give each thread its own.
    """

    def __init__(
        self, bundle: Bundle, executors: Mapping[str, Executor], device: Device, backend: str
    ) -> None:
        """Use `Pipeline.load`."""
        manifest = bundle.manifest
        self.bundle = bundle
        self.backend = backend
        self._device = device
        self._unet = executors["unet"]
        self._encode = PromptEncoder(
            _load_tokenizer(bundle),
            executors["text_encoder"],
            device,
            output=manifest.text_output,
            batch=manifest.limits.min_batch,
        )
        self._decode = ImageDecoder(executors["vae_decoder"], device, factor=manifest.latents.factor)
        self._loops: OrderedDict[tuple[int, int, int, bool], DenoiseLoop] = OrderedDict()

    @classmethod
    def load(
        cls,
        path: str | Path | Bundle | None = None,
        *,
        backend: str = DEFAULT_BACKEND,
        threads: int | None = None,
        verify: bool = True,
    ) -> Pipeline:
        """Open a bundle and load its components.

        Args:
            path: The bundle's folder, or an opened bundle; by default the embedded one.
            backend: ``onnxruntime-cpu``.
            threads: Threads inside one operator; by default one per usable core.
            verify: Compare every file's SHA-256 with the manifest; otherwise only the sizes.

        Raises:
            BundleError: The bundle is missing, damaged or of a newer format.
            BackendError: The backend is not installed or cannot run the bundle.
            UsageError: No such backend, or a number of threads below 1.
        """
        if threads is not None:
            check_integer("threads", threads, 1, MAX_THREADS)
        bundle = path if isinstance(path, Bundle) else Bundle.open(path, verify=False)
        if verify:
            bundle.verify()
        # Two at a time: loading one is partly single-threaded. The largest first, it takes the longest.
        names = ("unet", "text_encoder", "vae_decoder")
        with ThreadPoolExecutor(max_workers=2, thread_name_prefix="sdrt-load") as pool:
            loading = [
                pool.submit(load_executor, bundle, name, backend=backend, threads=threads) for name in names
            ]
            executors = {name: future.result() for name, future in zip(names, loading, strict=True)}
        return cls(bundle, executors, HostDevice(), backend)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        rng: Rng = DEFAULT_RNG,
        sampler: str | None = None,
        karras: bool = False,
        eta: float = 0.0,
        latents: NDArray[np.float32] | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PipelineOutput:
        """Draw.

        Args:
            prompt: One text, or a list of P texts.
            negative_prompt: What to move away from: one text for all, or one per prompt.
            height: Pixels; by default the bundle's.
            width: Likewise.
            num_inference_steps: Rows of the sampler's table, that is evaluations of the U-Net.
            guidance_scale: w of classifier-free guidance; at 1 or below only the conditional half runs.
            num_images_per_prompt: K; N = P·K images are drawn, prompt by prompt.
            seed: Image i gets ``seed + i``; or a list of N seeds; by default random ones.
            rng: ``philox`` gives the noise of PyTorch's CUDA generator, ``cpu`` of its CPU generator.
            sampler: A name in `sdrt.runtime.solvers.SAMPLERS`; by default the bundle's.
            karras: Space the noise levels as Karras et al. 2022, eq. 5.
            eta: Share of fresh noise per step, for samplers that have it.
            latents: float32 [N, C, h, w] of unit variance, in place of noise drawn from the seeds.
            output_type: ``pil``, ``numpy`` or ``latents`` (no decoding).
            callback_on_step_end: Called as ``f(pipeline, step, timestep, {"latents": array})`` after each
                step of each batch of images; a dict it returns may hold ``latents`` to go on with. An
                exception it raises ends the run and leaves the pipeline usable.
            callback_on_step_end_tensor_inputs: What the callback is given; with ``()`` nothing is copied.

        Raises:
            UsageError: An argument is out of range; the message says what is allowed.
            NumericsError: A component gave NaN or infinity; the message names it.
        """
        started = time.perf_counter()
        if output_type not in OUTPUT_TYPES:
            raise UsageError(f"output_type is {output_type!r}: one of {', '.join(OUTPUT_TYPES)}")
        request = build_request(
            self.bundle.manifest,
            prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            rng=rng,
            sampler=sampler,
            karras=karras,
            eta=eta,
            latents=latents,
        )
        on_step = _step_hook(callback_on_step_end, callback_on_step_end_tensor_inputs)
        return self._draw(request, output_type, on_step, started)

    def initial_latents(
        self,
        seeds: int | Sequence[int],
        height: int | None = None,
        width: int | None = None,
        *,
        rng: Rng = DEFAULT_RNG,
    ) -> NDArray[np.float32]:
        """The unit-variance noise that a call with these seeds starts from, float32 [N, C, h, w]."""
        size = checked_size(self.bundle.manifest, height, width)
        given = seeds if isinstance(seeds, Sequence) else [seeds]
        return noise_source(rng, given).initial(latent_shape(self.bundle.manifest, *size))

    def _draw(
        self, request: Request, output_type: OutputType, on_step: _StepHook | None, started: float
    ) -> PipelineOutput:
        clock = _Clock()
        finals, pictures = [], []
        for batch in self._batches(len(request.prompts)):
            latents = self._denoise(request, batch, on_step, clock)
            finals.append(latents)
            if output_type != "latents":
                decoding = time.perf_counter()
                pictures.append(self._decode(latents))
                clock.add("vae_decoder", decoding)
        clock.seconds["step"] = clock.seconds["denoise"] / (len(request.table.timesteps) * len(finals))
        wanted = len(request.prompts)
        images: Any = []
        if pictures:
            pixels = np.concatenate(pictures)[:wanted]
            _warn_of_black(pixels)
            images = pixels if output_type == "numpy" else _pillow(pixels)
        clock.seconds["total"] = time.perf_counter() - started
        return PipelineOutput(images, np.concatenate(finals)[:wanted], self._recipes(request), clock.seconds)

    def _recipes(self, request: Request) -> tuple[dict[str, Any], ...]:
        provenance = self.bundle.manifest.provenance
        origin = {
            "backend": self.backend,
            "model": str(provenance.get("source", "unknown")),
            "model_sha256": str(provenance.get("source_sha256", "")),
            "version": sdrt.__version__,
        }
        return tuple({**recipe, **origin} for recipe in request.recipes())

    def _denoise(
        self, request: Request, batch: list[int], on_step: _StepHook | None, clock: _Clock
    ) -> NDArray[np.float32]:
        """Run the loop for one batch of images; float32 [n, C, h, w]."""
        started = time.perf_counter()
        texts = [request.prompts[image] for image in batch]
        if request.guided:
            texts = [request.negative_prompts[image] for image in batch] + texts
        embeddings = self._encode(texts)
        clock.add("text_encoder", started)
        started = time.perf_counter()
        shape = latent_shape(self.bundle.manifest, request.height, request.width)
        noise = noise_source(request.rng, [request.seeds[image] for image in batch])
        initial = noise.initial(shape) if request.latents is None else request.latents[batch]
        loop = self._loop(request, len(batch))
        table = request.table
        loop.start(initial * np.float32(table.init_noise_sigma), embeddings, table, request.guidance_scale)
        for step in range(len(table.timesteps)):
            if table.uses_noise:
                loop.set_noise(noise.step(step, shape))
            loop.step()
            if on_step is not None:
                on_step(self, loop, table, step)
        loop.raise_if_faulty(table)
        latents = loop.latents()
        clock.add("denoise", started)
        return latents

    def _loop(self, request: Request, images: int) -> DenoiseLoop:
        """The loop for a shape, from the cache or new; the one unused for longest makes room."""
        factor = self.bundle.manifest.latents.factor
        size = (request.height // factor, request.width // factor)
        key = (images, *size, request.guided)
        loop = self._loops.pop(key, None)
        if loop is None:
            while len(self._loops) >= MAX_CACHED_LOOPS:
                self._loops.popitem(last=False)
            loop = DenoiseLoop(self._device, self._unet, images, size, guided=request.guided)
        self._loops[key] = loop
        return loop

    def _batches(self, images: int) -> Iterator[list[int]]:
        """Cut N images into batches that the graphs admit; a last one that is too small repeats itself."""
        limits = self.bundle.manifest.limits
        for start in range(0, images, limits.max_batch):
            batch = list(range(start, min(start + limits.max_batch, images)))
            yield batch + [batch[-1]] * (limits.min_batch - len(batch))


def _step_hook(callback: StepEndCallback | None, tensors: Sequence[str]) -> _StepHook | None:
    """Wrap a user's callback so that the loop can call it; the latents are copied only if asked for."""
    if callback is None:
        return None
    if not callable(callback):
        raise UsageError(f"callback_on_step_end is {type(callback).__name__}: a function is wanted")
    if set(tensors) - {"latents"}:
        raise UsageError(f"callback_on_step_end_tensor_inputs is {tensors!r}: only 'latents' can be given")

    def on_step(pipeline: Pipeline, loop: DenoiseLoop, table: SamplerTable, step: int) -> None:
        given = {name: loop.latents() for name in tensors}
        changed = callback(pipeline, step, float(table.timesteps[step]), given)
        if changed is not None and not isinstance(changed, Mapping):
            raise UsageError(f"the callback returned {type(changed).__name__}: a dict or None is wanted")
        if changed and changed.get("latents") is not None:
            _replace_latents(loop, table, step, np.asarray(changed["latents"], dtype=np.float32))

    return on_step


def _replace_latents(loop: DenoiseLoop, table: SamplerTable, step: int, latents: NDArray[np.float32]) -> None:
    want = loop.buffers.latents.shape
    if latents.shape != want:
        raise UsageError(f"the callback gave latents of shape {list(latents.shape)}, {list(want)} is wanted")
    if not np.isfinite(latents).all():
        loop.raise_if_faulty(table)  # it may only have handed back what the unet gave
        raise UsageError(f"the callback gave latents with NaN or infinity after step {step + 1}")
    loop.set_latents(latents)


def _load_tokenizer(bundle: Bundle) -> Tokenizer:
    facts = bundle.manifest.tokenizer
    return Tokenizer.from_file(
        bundle.file(facts.file), max_length=facts.max_length, bos=facts.bos, eos=facts.eos, pad=facts.pad
    )


def _warn_of_black(pixels: NDArray[np.uint8]) -> None:
    for index in np.flatnonzero(~pixels.reshape(len(pixels), -1).any(axis=1)):
        warnings.warn(
            f"picture {index + 1} of {len(pixels)} is all black; its latents are finite, so the "
            "vae_decoder made it so",
            BlackImageWarning,
            stacklevel=2,
        )


def _pillow(pixels: NDArray[np.uint8]) -> list[Image]:
    from PIL import Image  # 20 ms that a caller who wants arrays need not spend

    return [Image.fromarray(picture) for picture in pixels]
