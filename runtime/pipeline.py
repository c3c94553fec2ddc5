"""A prompt to pictures: tokenizer, text encoder, sampling loop, VAE decoder."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

import sdrt
from sdrt.runtime.backends import (
    AUTO,
    Choice,
    RequestShape,
    choose_backend,
    load_executor,
    open_device,
)
from sdrt.runtime.bundle import Bundle
from sdrt.runtime.callbacks import StepEndCallback, StepHook, step_hook
from sdrt.runtime.devices import Device
from sdrt.runtime.errors import BackendError, DeviceMemoryError, UsageError
from sdrt.runtime.executors import Executor
from sdrt.runtime.generation import Generation, Shape
from sdrt.runtime.noise import DEFAULT_RNG, Rng, noise_source
from sdrt.runtime.output import (
    OUTPUT_TYPES,
    BlackImageWarning,
    Collected,
    DeviceCollected,
    OutputType,
    PipelineOutput,
)
from sdrt.runtime.prompts import PromptEncoder
from sdrt.runtime.request import (
    MAX_IMAGES,
    Request,
    build_request,
    checked_size,
    is_device_array,
    latent_shape,
)
from sdrt.runtime.schedule import check_integer
from sdrt.runtime.text_encoders import text_encoders

__all__ = ["BlackImageWarning", "Pipeline", "PipelineOutput"]

MAX_CACHED_SHAPES: Final = 4  # each holds the buffers and graphs of one shape
MAX_DEVICES: Final = 64
MAX_THREADS: Final = 1024  # a mistyped number must not start a million


class Pipeline:
    """Draws from one bundle. Components are loaded once and stay loaded; calls reuse all buffers.

    Several may live in one process. One draws for one call at a time, and refuses another meanwhile: give
    each thread its own. `close`, or a ``with`` block, gives everything back.

    Attributes:
        bundle: That it draws from.
        backend: The backend's name; of ``auto`` the one that was chosen.
        backend_reasons: What spoke for it, and against those before it.
    """

    def __init__(
        self,
        bundle: Bundle,
        executors: Mapping[str, Executor],
        device: Device,
        backend: str,
        reasons: Sequence[str] = (),
    ) -> None:
        """Use `Pipeline.load`. The pipeline owns the device and the executors."""
        limits = bundle.manifest.limits
        self.bundle = bundle
        self.backend = backend
        self.backend_reasons = tuple(reasons)
        self._device = device
        self._executors = dict(executors)
        self._encoder = PromptEncoder(
            text_encoders(bundle, executors),
            device,
            batch=limits.min_batch,
            most_texts=2 * min(limits.max_batch, MAX_IMAGES),
        )
        self._shapes: OrderedDict[Shape, Generation] = OrderedDict()
        self._closed = False
        self._busy = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | Path | Bundle | None = None,
        *,
        backend: str = AUTO,
        device: int | None = None,
        stream: Any = None,
        threads: int | None = None,
        verify: bool = True,
        request_shape: RequestShape | None = None,
    ) -> Self:
        """Open a bundle, choose a backend and load the components on it.

        Args:
            path: The bundle's folder, or an opened bundle; by default the embedded one.
            backend: ``tensorrt``, ``tensorrt-rtx``, ``onnxruntime-cuda`` or ``onnxruntime-cpu``; ``auto``
                takes the first of these that can run this bundle here.
            device: Number of the GPU; by default 0, or the stream's.
            stream: A caller's CUDA stream to work in, an object with ``__cuda_stream__`` or a handle; by
                default a private one.
            threads: On the CPU, threads inside one operator; by default one per usable core.
            verify: Compare every file's SHA-256 with the manifest; otherwise only the sizes.
            request_shape: What will be asked for: ``auto`` then takes a backend that admits it.

        Raises:
            BundleError: The bundle is missing, damaged or of a newer format.
            BackendError: The backend is not installed or cannot run the bundle.
            UsageError: No such backend, a number of threads below 1, or a GPU for a backend of the CPU.
        """
        if threads is not None:
            check_integer("threads", threads, 1, MAX_THREADS)
        bundle = path if isinstance(path, Bundle) else Bundle.open(path, verify=False)
        if device is not None:
            _check_gpu(device, stream)
        choice = choose_backend(bundle, backend, request_shape, device=device or 0)
        if device is not None and choice.gpu is None:
            against = f" ({'; '.join(choice.reasons[:-1])})" if choice.reasons[:-1] else ""
            raise UsageError(
                f"device is {device}, the number of a GPU: the backend {choice.name} runs on the CPU{against}"
            )
        if verify:
            bundle.verify()
        with ExitStack() as undo:
            opened = open_device(choice, stream)
            undo.callback(opened.close)
            executors = _load_executors(bundle, choice, opened, threads, verify=verify)
            pipeline = cls(bundle, executors, opened, choice.name, choice.reasons)
            undo.pop_all()
        return pipeline

    def close(self) -> None:
        """Give back buffers, graphs, engines and the device. Closing again does nothing.

        Raises:
            UsageError: It is drawing.
        """
        with self._alone():
            if self._closed:
                return
            self._closed = True
            for executor in self._executors.values():
                executor.close()
            self._shapes.clear()
            del self._encoder
            self._executors.clear()
            self._device.close()

    def __enter__(self) -> Self:
        """The pipeline itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See `close`."""
        self.close()

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
        eta: float | None = None,
        latents: Any = None,
        original_size: Sequence[int] | None = None,
        crops_coords_top_left: Sequence[int] | None = None,
        target_size: Sequence[int] | None = None,
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
            num_inference_steps: Noise levels that the run visits. Where a sampler evaluates the U-Net more
                often (heun, dpm2, pndm …), the callback and the timings count each evaluation as a step.
            guidance_scale: w of classifier-free guidance; at 1 or below only the conditional half runs.
            num_images_per_prompt: K; N = P·K images are drawn, prompt by prompt.
            seed: Image i gets ``seed + i``; or a list of N seeds; by default random ones.
            rng: ``philox`` gives the noise of PyTorch's CUDA generator, ``cpu`` of its CPU generator.
            sampler: A name in `sdrt.runtime.solvers.SAMPLERS`; by default the bundle's.
            karras: Space the noise levels as Karras et al. 2022, eq. 5.
            eta: Share of fresh noise per step, for samplers that have it; by default the sampler's own.
                A sampler that adds noise draws ``philox`` on the device, inside the step's graph; the CPU
                generator's numbers are made on the host, and each step then begins with an upload.
            latents: float32 [N, C, h, w] of unit variance, in place of noise drawn from the seeds: a NumPy
                array, or on a GPU an array of it (``__cuda_array_interface__`` or DLPack).
            original_size: Height and width of the picture that SDXL is to imitate; by default the picture's.
            crops_coords_top_left: Top and left of the crop that SDXL is to imitate; by default (0, 0).
            target_size: Height and width that SDXL is told; by default the picture's.
            output_type: ``pil``, ``numpy``, ``latents`` (no decoding), or ``device``: pictures and latents
                stay in the device's memory, and only fault words are downloaded.
            callback_on_step_end: Called as ``f(pipeline, step, timestep, {"latents": array})`` after each
                step of each batch of images; a dict it returns may hold ``latents`` to go on with. An
                exception it raises ends the run and leaves the pipeline usable.
            callback_on_step_end_tensor_inputs: What the callback is given: the latents cost one download a
                step; with ``()`` nothing is copied and nothing waits.

        Raises:
            UsageError: An argument is out of range (the message says what is allowed), or another call is
                drawing.
            NumericsError: A component gave NaN or infinity; the message names it.
            BackendError: The engines do not admit this shape, or the device has too little memory. After
                any of these the pipeline is as usable as before.
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
            original_size=original_size,
            crops_coords_top_left=crops_coords_top_left,
            target_size=target_size,
        )
        on_step = step_hook(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        with self._alone():
            if self._closed:
                raise UsageError("the pipeline was closed: load it again")
            return self._draw(self._with_device_latents(request), output_type, on_step, started)

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

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other calls out: they would write into the same buffers."""
        if not self._busy.acquire(blocking=False):
            raise UsageError(
                "the pipeline is drawing already, in another thread or around this callback: wait for it, or "
                "load a second pipeline"
            )
        try:
            yield
        finally:
            self._busy.release()

    def _draw(
        self, request: Request, output_type: OutputType, on_step: StepHook | None, started: float
    ) -> PipelineOutput:
        wanted = len(request.prompts)
        batches = list(self._batches(wanted))
        decodes = output_type != "latents"
        for images in sorted({len(batch) for batch in batches}):
            self._generation(request, images, decodes=decodes)  # what is refused is so before any drawing
        on_device = DeviceCollected(self._device, wanted) if output_type == "device" else None
        collected = on_device or Collected(output_type, wanted)
        seconds: dict[str, float] = {}
        for batch in batches:
            generation = self._generation(request, len(batch), decodes=decodes)
            stages = generation.draw(request, batch, collected, on_step, decodes=decodes)
            seconds = {stage: seconds.get(stage, 0.0) + value for stage, value in stages.items()}
        images, latents = collected.finish()
        seconds["step"] = seconds["denoise"] / (len(request.table.timesteps) * len(batches))
        seconds["total"] = time.perf_counter() - started
        return PipelineOutput(images, latents, self._recipes(request), seconds)

    def _recipes(self, request: Request) -> tuple[dict[str, Any], ...]:
        provenance = self.bundle.manifest.provenance
        origin = {
            "backend": self.backend,
            "model": str(provenance.get("source", "unknown")),
            "model_sha256": str(provenance.get("source_sha256", "")),
            "version": sdrt.__version__,
        }
        return tuple({**recipe, **origin} for recipe in request.recipes())

    def _generation(self, request: Request, images: int, *, decodes: bool) -> Generation:
        """What draws a shape, from the cache or new, ready for the request.

        The one unused for longest makes room; all of them do where the device's memory is too small.
        """
        factor = self.bundle.manifest.latents.factor
        shape = Shape(images, request.height // factor, request.width // factor, request.guided)
        try:
            return self._prepared(shape, request, decodes=decodes)
        except DeviceMemoryError:
            if not self._shapes:
                raise
            self._shapes.clear()
        return self._prepared(shape, request, decodes=decodes)

    def _prepared(self, shape: Shape, request: Request, *, decodes: bool) -> Generation:
        generation = self._shapes.pop(shape, None)
        if generation is None:
            while len(self._shapes) >= MAX_CACHED_SHAPES:
                self._shapes.popitem(last=False)
            generation = Generation(
                shape,
                self._device,
                self._executors["unet"],
                self._executors["vae_decoder"],
                self._encoder,
                self.bundle.manifest.latents.factor,
            )
        generation.prepare(request, decodes=decodes)
        self._shapes[shape] = generation
        return generation

    def _with_device_latents(self, request: Request) -> Request:
        """The request with a foreign device array as buffers of our device, one for each image."""
        if not is_device_array(request.latents):
            return request
        shape = latent_shape(self.bundle.manifest, request.height, request.width)
        want = (len(request.prompts), *shape)
        array = self._device.from_cuda_array(request.latents)
        if tuple(array.shape) != want or array.dtype != np.float32:
            raise UsageError(f"latents are {array.dtype}{list(array.shape)}: float32{list(want)} is wanted")
        each = array.nbytes // len(request.prompts)
        rows = [array.part(each * image, (1, *shape), np.float32) for image in range(len(request.prompts))]
        return replace(request, latents=rows)

    def _batches(self, images: int) -> Iterator[list[int]]:
        """Cut N images into batches that the graphs admit; a last one that is too small repeats itself."""
        limits = self.bundle.manifest.limits
        for start in range(0, images, limits.max_batch):
            batch = list(range(start, min(start + limits.max_batch, images)))
            yield batch + [batch[-1]] * (limits.min_batch - len(batch))


def _check_gpu(device: int, stream: object) -> None:
    if stream is not None:
        raise UsageError("device and stream were both given: a stream has its device, leave the number out")
    check_integer("device", device, 0, MAX_DEVICES - 1)


def _load_executors(
    bundle: Bundle, choice: Choice, device: Device, threads: int | None, *, verify: bool
) -> dict[str, Executor]:
    """Every component that a drawing needs.

    Two at a time: loading one is partly single-threaded. The largest first, it takes the longest.
    """
    names = sorted(bundle.manifest.required_components, key=lambda name: -_size(bundle, name))
    for name in names:
        if bundle.component(name).precision == "bf16":
            raise BackendError(
                f"{name} is in bfloat16, which the kernels around it do not read: "
                "export with --dtype fp16 or fp32"
            )
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="sdrt-load") as pool:
        loading = {
            name: pool.submit(
                load_executor,
                bundle,
                name,
                backend=choice.name,
                device=device,
                threads=threads,
                verify=verify,
            )
            for name in names
        }
        return {name: future.result() for name, future in loading.items()}


def _size(bundle: Bundle, component: str) -> int:
    return sum(entry.size for entry in bundle.component(component).files)
