"""A prompt to pictures: tokenizer, text encoder, sampling loop, VAE decoder."""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

import sdrt
from sdrt.runtime.bundle import Bundle
from sdrt.runtime.denoise import MAX_STEPS, DenoiseLoop
from sdrt.runtime.devices import Device, HostDevice
from sdrt.runtime.errors import NumericsError, UsageError
from sdrt.runtime.executors import Executor, load_executor
from sdrt.runtime.noise import Rng, noise_source
from sdrt.runtime.request import (
    Request,
    StepEndCallback,
    check_options,
    checked_guidance,
    per_image_seeds,
    per_image_texts,
)
from sdrt.runtime.schedule import check_integer
from sdrt.runtime.solvers import SamplerTable, make_table
from sdrt.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

OutputType = Literal["pil", "numpy", "latents"]
OUTPUT_TYPES: Final = ("pil", "numpy", "latents")
MAX_CACHED_LOOPS: Final = 4  # each holds the buffers of one shape
MAX_CACHED_PROMPTS: Final = 64
MAX_THREADS: Final = 1024  # a mistyped number must not start a million


class PromptTruncatedWarning(UserWarning):
    """A prompt has more tokens than the model reads; the message quotes what was cut off."""


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

    def __init__(self, bundle: Bundle, *, backend: str, threads: int | None, device: Device) -> None:
        """Use `Pipeline.load`."""
        facts = bundle.manifest.tokenizer
        self.bundle = bundle
        self.backend = backend
        self._device = device
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="sdrt-load")
        self._executors: dict[str, Future[Executor]] = {
            name: self._pool.submit(load_executor, bundle, name, backend=backend, threads=threads)
            # The order of use, but the largest first: it takes the longest to load.
            for name in ("unet", "text_encoder", "vae_decoder")
        }
        self._tokenizer = Tokenizer.from_file(
            bundle.file(facts.file),
            max_length=facts.max_length,
            bos=facts.bos,
            eos=facts.eos,
            pad=facts.pad,
        )
        self._loops: OrderedDict[tuple[int, int, int, bool], DenoiseLoop] = OrderedDict()
        self._embeddings: OrderedDict[str, NDArray[Any]] = OrderedDict()

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        backend: str = "onnxruntime-cpu",
        threads: int | None = None,
        verify: bool = True,
    ) -> Pipeline:
        """Open a bundle and load its components.

        Args:
            path: The bundle's folder; by default the embedded bundle.
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
        bundle = Bundle.open(path, verify=verify)
        pipeline = cls(bundle, backend=backend, threads=threads, device=HostDevice())
        try:
            for name in pipeline._executors:
                pipeline._executor(name)
        finally:
            pipeline._pool.shutdown(wait=True)
        return pipeline

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
        rng: Rng = "philox",
        sampler: str | None = None,
        karras: bool = False,
        eta: float = 0.0,
        latents: NDArray[np.float32] | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepEndCallback | None = None,
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
                step; a dict it returns may hold ``latents`` to go on with. An exception it raises ends the
                run and leaves the pipeline usable.

        Raises:
            UsageError: An argument is out of range; the message says what is allowed.
            NumericsError: A component gave NaN or infinity; the message names it.
        """
        started = time.perf_counter()
        if output_type not in OUTPUT_TYPES:
            raise UsageError(f"output_type is {output_type!r}: one of {', '.join(OUTPUT_TYPES)}")
        defaults = self.bundle.manifest.defaults
        schedule = self.bundle.manifest.schedule
        steps = defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        check_integer("num_inference_steps", steps, 1, min(schedule.num_train_timesteps, MAX_STEPS))
        sampler = defaults.sampler if sampler is None else sampler
        check_options(sampler, karras, eta, rng, callback_on_step_end)
        prompts, negatives = per_image_texts(prompt, negative_prompt, num_images_per_prompt)
        seeds = per_image_seeds(seed, len(prompts))
        request = Request(
            prompts=prompts,
            negative_prompts=negatives,
            seeds=seeds,
            height=defaults.height if height is None else height,
            width=defaults.width if width is None else width,
            guidance_scale=checked_guidance(
                defaults.guidance_scale if guidance_scale is None else guidance_scale
            ),
            table=make_table(sampler, schedule, steps, karras=karras, eta=eta),
            karras=karras,
            eta=eta,
            rng=rng,
            latents=latents,
            callback=callback_on_step_end,
        )
        self._check_size(request.height, request.width)
        self._check_latents(request)
        return self._draw(request, output_type, started)

    def initial_latents(
        self, seeds: Sequence[int], height: int, width: int, *, rng: Rng = "philox"
    ) -> NDArray[np.float32]:
        """The unit-variance noise that a call with these seeds starts from, float32 [N, C, h, w]."""
        self._check_size(height, width)
        return noise_source(rng, seeds).initial(self._latent_shape(height, width))

    def _draw(self, request: Request, output_type: OutputType, started: float) -> PipelineOutput:
        clock = _Clock()
        finals, pictures = [], []
        for batch in self._batches(len(request.prompts)):
            latents = self._denoise(request, batch, clock)
            finals.append(latents)
            if output_type != "latents":
                pictures.append(self._decode(latents, clock))
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
        shared = {
            **request.recipe(),
            "backend": self.backend,
            "model": str(provenance.get("source", "unknown")),
            "model_sha256": str(provenance.get("source_sha256", "")),
            "version": sdrt.__version__,
        }
        return tuple(
            {"prompt": prompt, "negative_prompt": negative, "seed": seed, **shared}
            for prompt, negative, seed in zip(
                request.prompts, request.negative_prompts, request.seeds, strict=True
            )
        )

    def _denoise(self, request: Request, batch: list[int], clock: _Clock) -> NDArray[np.float32]:
        """Run the loop for one batch of images; float32 [n, C, h, w]."""
        started = time.perf_counter()
        embeddings = self._embed(request, batch)
        clock.add("text_encoder", started)
        started = time.perf_counter()
        shape = self._latent_shape(request.height, request.width)
        noise = noise_source(request.rng, [request.seeds[image] for image in batch])
        initial = noise.initial(shape) if request.latents is None else request.latents[batch]
        loop = self._loop(request, len(batch))
        table = request.table
        loop.start(initial * np.float32(table.init_noise_sigma), embeddings, table, request.guidance_scale)
        for step in range(len(table.timesteps)):
            if table.uses_noise:
                loop.set_noise(noise.step(step, shape))
            loop.step()
            if request.callback is not None:
                self._call_back(request.callback, loop, table, step)
        loop.raise_if_faulty(table)
        latents = loop.latents()
        clock.add("denoise", started)
        return latents

    def _call_back(
        self, callback: StepEndCallback, loop: DenoiseLoop, table: SamplerTable, step: int
    ) -> None:
        given = loop.latents()
        changed = callback(self, step, float(table.timesteps[step]), {"latents": given})
        if changed is not None and not isinstance(changed, Mapping):
            raise UsageError(f"the callback returned {type(changed).__name__}: a dict or None is wanted")
        if changed and changed.get("latents") is not None:
            latents = np.asarray(changed["latents"], dtype=np.float32)
            if latents.shape != given.shape:
                raise UsageError(
                    f"the callback gave latents of shape {list(latents.shape)}, {list(given.shape)} is wanted"
                )
            if not np.isfinite(latents).all():
                loop.raise_if_faulty(table)  # it may only have handed back what the unet gave
                raise UsageError(f"the callback gave latents with NaN or infinity after step {step + 1}")
            loop.set_latents(latents)

    def _loop(self, request: Request, images: int) -> DenoiseLoop:
        """The loop for a shape, from the cache or new; the one unused for longest makes room."""
        factor = self.bundle.manifest.latents.factor
        size = (request.height // factor, request.width // factor)
        key = (images, *size, request.guided)
        loop = self._loops.pop(key, None)
        if loop is None:
            while len(self._loops) >= MAX_CACHED_LOOPS:
                self._loops.popitem(last=False)
            unet = self._executor("unet")
            loop = DenoiseLoop(self._device, unet, images, size, guided=request.guided)
        self._loops[key] = loop
        return loop

    def _embed(self, request: Request, batch: list[int]) -> NDArray[Any]:
        """Text embeddings of one batch, the negative prompts' half first: [rows, tokens, width]."""
        texts = [request.prompts[image] for image in batch]
        if request.guided:
            texts = [request.negative_prompts[image] for image in batch] + texts
        for text in dict.fromkeys(texts):
            if text not in self._embeddings:
                self._embeddings[text] = self._encode(text)
            self._embeddings.move_to_end(text)
        embeddings = np.stack([self._embeddings[text] for text in texts])
        while len(self._embeddings) > MAX_CACHED_PROMPTS:
            self._embeddings.popitem(last=False)
        return embeddings

    def _encode(self, text: str) -> NDArray[Any]:
        """One text's embedding [tokens, width]. One at a time, so that it never depends on the others."""
        encoded = self._tokenizer.encode(text)
        if encoded.truncated_text:
            warnings.warn(
                f"the prompt is over {self._tokenizer.max_length - 2} tokens; "
                f"this end of it is not read: {encoded.truncated_text!r}",
                PromptTruncatedWarning,
                stacklevel=2,
            )
        executor = self._executor("text_encoder")
        minimum = self.bundle.manifest.limits.min_batch
        ids = np.tile(np.asarray(encoded.ids, dtype=np.int64), (minimum, 1))
        wanted = next(spec for spec in executor.spec.outputs if spec.name == self.bundle.manifest.text_output)
        result = self._device.zeros(wanted.concrete({"batch": minimum}), wanted.dtype)
        source = self._device.zeros(ids.shape, "int64")
        self._device.upload(ids, source)
        executor.bind({executor.spec.inputs[0].name: source}, {wanted.name: result})()
        embedding: NDArray[Any] = self._device.download(result)[0]
        if not np.isfinite(embedding).all():
            raise NumericsError(f"the text_encoder gave NaN or infinity for the prompt {text!r}")
        return embedding

    def _decode(self, latents: NDArray[np.float32], clock: _Clock) -> NDArray[np.uint8]:
        """Latents → uint8 [n, H, W, 3]."""
        started = time.perf_counter()
        executor = self._executor("vae_decoder")
        factor = self.bundle.manifest.latents.factor
        images, _, height, width = latents.shape
        axes = {
            "batch": images,
            "latent_height": height,
            "latent_width": width,
            "height": height * factor,
            "width": width * factor,
        }
        source, image = executor.spec.inputs[0], executor.spec.outputs[0]
        given = self._device.zeros(source.concrete(axes), source.dtype)
        decoded = self._device.zeros(image.concrete(axes), image.dtype)
        self._device.upload(latents, given)
        executor.bind({source.name: given}, {image.name: decoded})()
        if not np.isfinite(self._device.download(decoded)).all():
            raise NumericsError(
                "the vae_decoder gave NaN or infinity; if the bundle is fp16, export with --dtype fp32"
            )
        pixels = self._device.image_to_uint8(decoded)
        clock.add("vae_decoder", started)
        return pixels

    def _executor(self, name: str) -> Executor:
        return self._executors[name].result()

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        geometry = self.bundle.manifest.latents
        return geometry.channels, height // geometry.factor, width // geometry.factor

    def _check_size(self, height: int, width: int) -> None:
        limits = self.bundle.manifest.limits
        for name, size, limit in (
            ("height", height, limits.height),
            ("width", width, limits.width),
        ):
            if isinstance(size, bool) or not isinstance(size, int) or not limit.admits(size):
                raise UsageError(f"{name} is {size!r}: this bundle draws {limit} pixels")

    def _check_latents(self, request: Request) -> None:
        if request.latents is None:
            return
        given = request.latents
        want = (len(request.prompts), *self._latent_shape(request.height, request.width))
        if not isinstance(given, np.ndarray) or given.shape != want or given.dtype != np.float32:
            shown = f"{given.dtype}{list(given.shape)}" if isinstance(given, np.ndarray) else type(given)
            raise UsageError(f"latents are {shown}: a NumPy array float32{list(want)} is wanted")
        if not np.isfinite(given).all():
            raise UsageError("latents hold NaN or infinity")

    def _batches(self, images: int) -> Iterator[list[int]]:
        """Cut N images into batches that the graphs admit; a last one that is too small repeats itself."""
        limits = self.bundle.manifest.limits
        for start in range(0, images, limits.max_batch):
            batch = list(range(start, min(start + limits.max_batch, images)))
            yield batch + [batch[-1]] * (limits.min_batch - len(batch))


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
