"""A bundle that draws: what it was loaded with, and one call at a time.

`Pipeline.draw` hands a request on to `sdrt.runtime.drawing.draw.draw`, which shows how pictures come about.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self, Unpack

import numpy as np
from numpy.typing import NDArray

import sdrt
from sdrt.runtime.backends.backend import RequestShape
from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.backends.registry import AUTO, choose_backend, open_device
from sdrt.runtime.bundle.bundle import ALWAYS, Bundle, Verify
from sdrt.runtime.checks import whole_from
from sdrt.runtime.devices.device import Device
from sdrt.runtime.drawing import loading
from sdrt.runtime.drawing.adapter_loader import AdapterLoader
from sdrt.runtime.drawing.adapters import Adapters
from sdrt.runtime.drawing.callbacks import Hook
from sdrt.runtime.drawing.draw import split_into_batches
from sdrt.runtime.drawing.ensemble import draw_all
from sdrt.runtime.drawing.initial_latents import with_device_latents
from sdrt.runtime.drawing.parts import Parts
from sdrt.runtime.drawing.shapes import ShapeCache
from sdrt.runtime.drawing.text_encoders import open_tokenizers
from sdrt.runtime.drawing.vae import VaeEncoder
from sdrt.runtime.errors import UsageError
from sdrt.runtime.request.build import build_interpolation, build_request
from sdrt.runtime.request.options import DrawOptions
from sdrt.runtime.request.output import PipelineOutput
from sdrt.runtime.request.recipes import check_embeddings
from sdrt.runtime.request.request import Request
from sdrt.runtime.request.sizes import checked_size, latent_shape
from sdrt.runtime.samplers.noise import DEFAULT_RNG, Rng, noise_source
from sdrt.runtime.system.c_library import trim_memory
from sdrt.runtime.system.forks import keep_in_children
from sdrt.runtime.system.side_by_side import SideBySide
from sdrt.runtime.text.tokenizer import Tokenizer

MAX_THREADS: Final = 1024  # a mistyped number must not start a million


class Pipeline(AdapterLoader):
    """Draws from one bundle. Components are loaded once and stay loaded; calls reuse all buffers.

    Several may live in one process. One draws for one call at a time, and refuses another meanwhile: give
    each thread its own. `close`, or a ``with`` block, gives everything back.

    Attributes:
        bundle: The bundle that it draws from.
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
        load_more: Callable[[str], Executor] | None = None,
        tokenizers: Sequence[Tokenizer] | None = None,
        lora_dir: str | Path | None = None,
    ) -> None:
        """Use `Pipeline.load`. The pipeline owns the device and the executors.

        ``load_more`` loads a component that not every drawing needs; ``tokenizers`` are opened if need be.
        """
        super().__init__(bundle, lora_dir)
        self.backend = backend
        self.backend_reasons = tuple(reasons)
        self._device = device
        self._executors = dict(executors)
        self._load_more = load_more
        self._encoder = loading.condition_encoder(bundle, executors, device, tokenizers)
        # Nothing here leads back to the pipeline: when its last user lets go, threads and memory are free.
        load = partial(loading.executor_of, self._executors, load_more, "vae_encoder")
        vae_encoder = VaeEncoder(load, device, bundle.manifest)
        shapes = ShapeCache(device, self._executors, bundle.manifest)
        adapters = Adapters(bundle, executors, self._encoder, device)
        labels = loading.label_encoder(bundle, executors, device)
        self._parts = Parts(device, adapters, self._encoder, vae_encoder, shapes, labels)
        self._refiner: Pipeline | None = None
        self._closed = False
        self._cancelled = threading.Event()
        self._interrupt = False  # see `sdrt.runtime.drawing.callbacks.Interruptible`
        self._busy = threading.Lock()
        self._process = os.getpid()
        keep_in_children(self)

    @classmethod
    def load(
        cls,
        path: str | Path | Bundle | None = None,
        *,
        refiner: str | Path | Bundle | None = None,
        backend: str = AUTO,
        device: int | None = None,
        stream: Any = None,
        threads: int | None = None,
        verify: Verify = True,
        request_shape: RequestShape | None = None,
        lora_dir: str | Path | None = None,
    ) -> Self:
        """Open a bundle, choose a backend and load the components on it.

        Args:
            path: The bundle's folder, or an opened bundle; by default the embedded one.
            refiner: A second bundle, loaded beside it on the same backend; with ``refine_from`` it draws the
                end of the schedule.
            backend: A name in `sdrt.runtime.backends.backend.BACKENDS`; ``auto`` takes the first
                of these that can run this bundle here.
            device: Number of the GPU; by default 0, or the stream's.
            stream: A caller's CUDA stream to work in, an object with ``__cuda_stream__`` or a handle; by
                default a private one.
            threads: On the CPU, threads that work at once; by default one per usable core.
            verify: Compare every file's SHA-256 with the manifest, unless that was done before and the file
                was not touched since; ``"always"``: also then, and what was prepared of the files too; False:
                only the sizes.
            request_shape: What will be asked for: ``auto`` then takes a backend that admits it.
            lora_dir: A folder of LoRAs, with all that is below: where names in prompts (``<lora:name:0.8>``)
                and in ``loras`` are looked for; by default for the embedded model its own.

        Raises:
            BundleError: The bundle is missing, damaged or of another format.
            BackendError: The backend is not installed or cannot run the bundle.
            UsageError: No such backend, no such folder, a number of threads below 1, or a GPU for a backend
                of the CPU.
        """
        if threads is not None:
            whole_from("threads", threads, 1, MAX_THREADS)
        bundle = path if isinstance(path, Bundle) else Bundle.open(path, verify=False)
        if device is not None:
            loading.check_gpu(device, stream)
        choice = choose_backend(bundle, backend, request_shape, device=device or 0)
        if device is not None and choice.gpu is None:
            against = f" ({'; '.join(choice.reasons[:-1])})" if choice.reasons[:-1] else ""
            raise UsageError(
                f"device is {device}, the number of a GPU: the backend {choice.name} runs on the CPU{against}"
            )
        if verify:
            bundle.verify(again=verify == ALWAYS)
        if choice.gpu is None and not bundle.embedded:
            from sdrt.runtime.admission.records import admit  # what sdrt ships need not wait for it

            admit(bundle, bundle.manifest.record.required, choice.name, verify=bool(verify))
        with ExitStack() as undo:
            opened = open_device(choice, stream)
            load = partial(loading.load_component, bundle, choice, opened, threads, verify)
            components = SideBySide(load, loading.needed(bundle), loading.AT_ONCE)
            undo.callback(components.leave, opened.close)
            tokenizers = open_tokenizers(bundle)  # meanwhile
            executors = components.results()
            pipeline = cls(bundle, executors, opened, choice.name, choice.reasons, load, tokenizers, lora_dir)
            undo.pop_all()
            if refiner is not None:
                undo.callback(pipeline.close)
                alike = partial(Pipeline.load, backend=choice.name, device=device, stream=stream)
                load_second = partial(alike, threads=threads, verify=verify)
                pipeline._refiner = loading.load_refiner(bundle.manifest, refiner, load_second)
                pipeline._also_taught = (pipeline._refiner,)
                undo.pop_all()
        return pipeline

    def close(self) -> None:
        """Give back buffers, graphs, engines and the device. Closing again does nothing.

        Nor does it in a child that a fork made: what there is belongs to the parent.

        Raises:
            UsageError: It is drawing.
        """
        if os.getpid() != self._process:
            return
        with self._alone():
            if self._closed:
                return
            self._closed = True
            if self._refiner is not None:
                self._refiner.close()
            for executor in self._executors.values():
                executor.close()
            self._load_more = None
            del self._encoder, self._parts
            self._executors.clear()
            self._device.close()
        trim_memory()

    def __del__(self, at_the_end: Callable[[], bool] = sys.is_finalizing) -> None:
        """Free everything now, and give the memory back to the system: the allocator would keep much."""
        self.__dict__.clear()
        if not at_the_end():
            trim_memory()

    def __enter__(self) -> Self:
        """The pipeline itself."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied.

        Raises:
            UsageError: Always; it says what to do.
        """
        raise UsageError(
            "a pipeline cannot be pickled or copied, it holds threads and a device's memory: hand on the "
            f"bundle's path, {str(self.bundle.path)!r}, and call Pipeline.load with it where it is to draw"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See `close`."""
        self.close()

    def __call__(
        self, prompt: str | Sequence[str] | None = None, **options: Unpack[DrawOptions]
    ) -> PipelineOutput:
        """Draw.

        Args:
            prompt: One text, or a list of P texts; None where a picture alone says what to draw.
            **options: See `sdrt.runtime.request.options.DrawOptions`.

        Raises:
            UsageError: An argument is unknown or out of range (the message says what is allowed), or another
                call is drawing.
            NumericsError: A component gave NaN or infinity; the message names it.
            BackendError: The engines do not admit this shape, or the device has too little memory.
            CancelledError: `cancel` was called. After any of these the pipeline is as usable as before.
        """
        started = time.perf_counter()
        return self._draw(self.request(prompt, **options), started)

    def request(self, prompt: str | Sequence[str] | None = None, **options: Unpack[DrawOptions]) -> Request:
        """Check the arguments of a call, and read the pictures among them; nothing is drawn.

        Any thread may, while another draws.

        Args:
            prompt: As for a call.
            **options: As for a call.

        Returns:
            What `draw` takes. Seeds that were left to us are drawn already, files of LoRAs are read.

        Raises:
            UsageError: As a call.
        """
        refiner = None if self._refiner is None else self._refiner.bundle.manifest
        return build_request(self.bundle.manifest, prompt, options, self._loras, refiner)

    def draw(self, request: Request) -> PipelineOutput:
        """Draw a request as it is; drawing it again gives the same pictures.

        Args:
            request: What `request` gave, of this pipeline or another of the same bundle.

        Raises:
            UsageError: The request is of another bundle, names textual inversions that are not loaded, or
                another call is drawing.
            NumericsError: As a call.
            BackendError: As a call.
            CancelledError: As a call.
        """
        return self._draw(request, time.perf_counter())

    def interpolate(
        self,
        prompt: str,
        to_prompt: str | None = None,
        *,
        frames: int,
        to_seed: int | None = None,
        **options: Unpack[DrawOptions],
    ) -> PipelineOutput:
        """Draw pictures on the way from one prompt or seed to another, both ends included.

        Embeddings and weights of LoRAs are mixed linearly, the noise spherically; a sampler's fresh noise and
        a given image's latents are the same in all frames. Of two prompts with different numbers of chunks
        the shorter is filled up with chunks of the empty text, so that its end is not quite the picture of
        the prompt alone.

        Args:
            prompt: The first frame's prompt.
            to_prompt: The last frame's prompt; by default the same.
            frames: How many, 2 to 1000.
            to_seed: The seed of the last frame's noise; by default the first frame's.
            **options: As for a call.

        Returns:
            As a call, the pictures in the order of the frames.

        Raises:
            UsageError: As a call, or nothing differs between the ends.
        """
        started = time.perf_counter()
        manifest = self.bundle.manifest
        request = build_interpolation(manifest, prompt, to_prompt, frames, to_seed, options, self._loras)
        return self._draw(request, started)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the pipeline was closed: load it again")

    def count_rows(self, request: Request) -> int:
        """How many steps the loop, and that of the refiner, will do for a request: for progress bars."""
        self._check_open()
        rows = len(request.sampling.table) * len(split_into_batches(request, self._parts))
        if request.refinement is not None and self._refiner is not None:
            rows += self._refiner.count_rows(request.refinement)
        return rows

    def cancel(self) -> None:
        """End the call that is drawing, from its callback or from another thread, before its next step.

        The call raises `CancelledError`. On a GPU steps that were queued still run. Without a call that is
        drawing, nothing happens.
        """
        self._cancelled.set()

    def initial_latents(
        self,
        seeds: int | Sequence[int],
        height: int | None = None,
        width: int | None = None,
        *,
        rng: Rng = DEFAULT_RNG,
    ) -> NDArray[np.float32]:
        """The unit-variance noise that a call with these seeds starts from, float32 [N, C, h, w].

        That of a call with an image is a later draw: `sdrt.runtime.request.picture.draws_at_start`.
        """
        size = checked_size(self.bundle.manifest, height, width)
        given = seeds if isinstance(seeds, Sequence) else [seeds]
        return noise_source(rng, given).draw(0, latent_shape(self.bundle.manifest, *size))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other calls out, which would write into the same buffers, and other processes."""
        if os.getpid() != self._process:
            raise UsageError(
                "the pipeline was loaded before this process was forked from another, where its threads "
                "have stayed: call Pipeline.load in the child"
            )
        if not self._busy.acquire(blocking=False):
            raise UsageError(
                "the pipeline is drawing already, in another thread or around this callback: wait for it, or "
                "load a second pipeline"
            )
        try:
            yield
        finally:
            self._busy.release()

    def _draw(self, request: Request, started: float) -> PipelineOutput:
        if request.manifest is not self.bundle.manifest and request.manifest != self.bundle.manifest:
            raise UsageError("the request is of another bundle: make it with this pipeline's own request")
        second = None if request.refinement is None else request.refinement.manifest
        if second is not None and (self._refiner is None or second != self._refiner.bundle.manifest):
            raise UsageError("the request wants a refiner that this pipeline was not loaded with")
        check_embeddings(request.embeddings, self._embeddings)
        with self._alone():
            self._check_open()
            self._cancelled.clear()
            self._interrupt = False
            request = with_device_latents(self._device, request)
            refiner = None if self._refiner is None else self._refiner._parts
            hook = partial(Hook, self, cancelled=self._cancelled)
            output = draw_all(request, self._recipes(request), self._parts, refiner, hook)
        output.timings["total"] = time.perf_counter() - started
        return output

    def _recipes(self, request: Request) -> list[dict[str, Any]]:
        provenance = self.bundle.manifest.provenance
        origin = {
            "backend": self.backend,
            "model": str(provenance.get("source", "unknown")),
            "model_sha256": str(provenance.get("source_sha256", "")),
            "version": sdrt.__version__,
        }
        return [{**recipe, **self._named_embeddings(recipe), **origin} for recipe in request.recipes()]

    def _named_embeddings(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """The embeddings of textual inversion that a recipe's texts may name, with their files' SHA-256."""
        texts = f"{recipe['prompt']} {recipe['negative_prompt']} {recipe.get('to_prompt', '')}".lower()
        named = {name: digest for name, digest in self._embeddings.items() if name.lower() in texts}
        return {"embeddings": named} if named else {}
