"""Buffers, bindings and graphs for batches of one shape, kept for the shapes that were drawn last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.devices.device import Device
from sdrt.runtime.drawing.loop import DenoiseLoop, StepKind
from sdrt.runtime.drawing.vae import VaeDecoder
from sdrt.runtime.errors import DeviceMemoryError
from sdrt.runtime.request.request import Request

MAX_CACHED_SHAPES: Final = 4  # each holds the buffers and graphs of one shape


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What buffers and graphs are made for.

    Attributes:
        images: How many are drawn together.
        height: Height of the latents.
        width: Width of the latents.
        guided: Whether there is room for guidance.
        chunks: How many chunks their prompts have.
    """

    images: int
    height: int
    width: int
    guided: bool
    chunks: int = 1


class ShapeResources:
    """The loop and the decoder of one shape.

    Attributes:
        loop: The sampling loop.
    """

    def __init__(
        self, shape: BatchShape, device: Device, executors: Mapping[str, Executor], manifest: Manifest
    ) -> None:
        """Allocate and bind the loop; the decoder follows when it is first wanted.

        Raises:
            DeviceMemoryError: The buffers do not fit.
            BackendError: An engine does not admit this shape.
        """
        self._device, self._decoder_executor = device, executors["vae_decoder"]
        self._decoder: VaeDecoder | None = None
        self.loop = DenoiseLoop(
            device,
            executors["unet"],
            shape.images,
            (shape.height, shape.width),
            guided=shape.guided,
            factor=manifest.latents.factor,
            context=manifest.tokens * shape.chunks,
            encoders=len(manifest.record.encoders),
            guided_rows=manifest.record.guided_rows,
        )

    def prepare(self, request: Request) -> None:
        """Make what the request needs beyond the loop, before anything is drawn; errors as `__init__`."""
        # The decoder first: it wants more scratch memory than the U-Net, whose graph then has it in common.
        if request.decodes and self._decoder is None:
            self._decoder = VaeDecoder(self._decoder_executor, self._device, self.loop)
        self.loop.prepare(set(step_kinds(request)))

    def decode(self) -> None:
        """Queue the decoding of the latents into pixels; only after `prepare` for a request that decodes."""
        assert self._decoder is not None
        self._decoder.decode()


class ShapeCache:
    """The shapes that were drawn last."""

    def __init__(self, device: Device, executors: Mapping[str, Executor], manifest: Manifest) -> None:
        """Keep what `ready` needs."""
        self._device, self._executors, self._manifest = device, executors, manifest
        self._shapes: OrderedDict[BatchShape, ShapeResources] = OrderedDict()

    def __len__(self) -> int:
        """How many shapes are kept."""
        return len(self._shapes)

    def clear(self) -> None:
        """Give all of their memory back."""
        self._shapes.clear()

    def ready(self, request: Request, images: int, chunks: int) -> ShapeResources:
        """What draws a shape, kept or new, prepared for the request.

        The one unused for longest makes room; all of them do where the device's memory is too small.

        Args:
            request: Gives size, guidance and kinds of steps.
            images: How many are drawn together.
            chunks: How many chunks their prompts have.

        Raises:
            DeviceMemoryError: The buffers do not fit.
            BackendError: An engine does not admit this shape.
        """
        factor = self._manifest.latents.factor
        shape = BatchShape(images, request.height // factor, request.width // factor, request.guided, chunks)
        try:
            return self._prepared(shape, request)
        except DeviceMemoryError:
            if not self._shapes:
                raise
            self._shapes.clear()
        return self._prepared(shape, request)

    def _prepared(self, shape: BatchShape, request: Request) -> ShapeResources:
        resources = self._shapes.pop(shape, None)
        if resources is None:
            while len(self._shapes) >= MAX_CACHED_SHAPES:
                self._shapes.popitem(last=False)
            resources = ShapeResources(shape, self._device, self._executors, self._manifest)
        resources.prepare(request)
        self._shapes[shape] = resources
        return resources


def step_kinds(request: Request) -> list[StepKind]:
    """What the step of each row of a request's table does."""
    sampling = request.sampling
    return [
        StepKind(
            guided=bool(weight > 1.0),
            draws_noise=request.draws_noise_on_device,
            rescales=sampling.guidance_rescale > 0 and bool(weight > 1.0),
            blends=request.blends,
            keeps_denoised=request.callbacks.want_denoised,
        )
        for weight in sampling.weights
    ]
