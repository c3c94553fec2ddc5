"""One shape's share of the device: the loop, the decoder, and how a batch of images goes through them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.devices.device import Device
from sdrt.runtime.drawing.callbacks import StepHook
from sdrt.runtime.drawing.faults import Faults
from sdrt.runtime.drawing.loop import DenoiseLoop, StepKind
from sdrt.runtime.drawing.output import Collected, DeviceCollected
from sdrt.runtime.drawing.starting_point import KnownPicture, blends, start_arguments
from sdrt.runtime.drawing.vae import VaeDecoder
from sdrt.runtime.errors import DeviceMemoryError
from sdrt.runtime.request.request import Request
from sdrt.runtime.samplers.noise import noise_source
from sdrt.runtime.samplers.table import SamplerTable

MAX_CACHED_SHAPES: Final = 4  # each holds the buffers and graphs of one shape


class ConditionEncoder(Protocol):
    """What an image is drawn from, prompts or a picture, as rows of the U-Net's inputs."""

    def chunks(self, condition: Any) -> int:
        """How many times the tokens of one text it takes; nothing is computed."""
        ...

    def write(self, rows: Sequence[Any], loop: DenoiseLoop, chunks: int) -> None:
        """Put what each row is drawn from into the loop's conditioning."""
        ...

    def raise_faults(self, faults: Faults, table: SamplerTable, rows: Sequence[Any]) -> None:
        """Raise what a run's fault words say."""
        ...


@dataclass(frozen=True, slots=True)
class Shape:
    """What buffers and graphs are made for.

    Attributes:
        images: N.
        height: Of the latents.
        width: Likewise.
        guided: Whether there is room for the unconditional half.
        chunks: Of the prompts.
    """

    images: int
    height: int
    width: int
    guided: bool
    chunks: int = 1


class Generation:
    """Buffers, bindings and graphs of one shape, and the order of work for a batch of images.

    Everything from the text encoders to the pixels is queued on the device without a wait; one download at
    the end brings latents, pixels and fault words.
    """

    def __init__(
        self,
        shape: Shape,
        device: Device,
        unet: Executor,
        decoder: Executor,
        encoder: ConditionEncoder,
        manifest: Manifest,
    ) -> None:
        """Allocate and bind the loop; the decoder follows when it is first wanted.

        Raises:
            DeviceMemoryError: The buffers do not fit.
            BackendError: An engine does not admit this shape.
        """
        self._device, self._decoder_executor, self._encoder = device, decoder, encoder
        self._manifest, self._chunks = manifest, shape.chunks
        self._decoder: VaeDecoder | None = None
        tokens = manifest.tokenizers[0].max_length if manifest.tokenizers else 1
        self._loop = DenoiseLoop(
            device,
            unet,
            shape.images,
            (shape.height, shape.width),
            guided=shape.guided,
            factor=manifest.latents.factor,
            context=tokens * shape.chunks,
            encoders=len(manifest.record.encoders),
        )

    def prepare(self, request: Request, hook: StepHook | None, *, decodes: bool) -> None:
        """Make what the request needs beyond the loop, before anything is drawn; errors as `__init__`."""
        # The decoder first: it wants more scratch memory than the U-Net, whose graph then has it in common.
        if decodes and self._decoder is None:
            self._decoder = VaeDecoder(self._decoder_executor, self._device, self._loop)
        self._loop.prepare(set(self._kinds(request, hook)))

    def draw(
        self,
        request: Request,
        batch: Sequence[int],
        collected: Collected | DeviceCollected,
        hook: StepHook | None,
        known: KnownPicture | None,
        *,
        decodes: bool,
    ) -> dict[str, float]:
        """Draw the images of the request that ``batch`` lists, and add them to ``collected``.

        Returns:
            Seconds per stage, by the device's clock.

        Raises:
            NumericsError: A component gave NaN or infinity; the message names it.
        """
        loop = self._loop
        rows = [request.conditions[image] for image in batch]
        if request.guided:
            rows = [*(request.negatives[image] for image in batch), *rows]
        timer = self._device.timer()
        self._encoder.write(rows, loop, self._chunks)
        timer.mark("text_encoder")
        self._denoise(request, batch, rows, hook, known)
        timer.mark("denoise")
        if decodes and self._decoder is not None:
            self._decoder.decode()
            timer.mark("vae_decoder")
        if isinstance(collected, DeviceCollected):
            self._raise_faults(request, rows)
            collected.add(batch, loop)
        else:
            result = loop.result(pixels=decodes)
            self._encoder.raise_faults(result.faults, request.sampling.table, rows)
            collected.add(batch, result.latents, result.pixels)
        return timer.seconds()

    def invert(
        self, request: Request, image: int, table: SamplerTable, known: KnownPicture, hook: StepHook
    ) -> NDArray[np.float32]:
        """The noise that a picture would be drawn from, float32 [1, C, h, w] of about unit variance.

        The loop of an unguided shape walks the table of DDIM inversion from the mean of the posterior: what a
        variation has of the picture does not depend on the seed.

        Args:
            request: The call.
            image: Number of the image whose prompt the inversion is told.
            table: Of `sdrt.runtime.samplers.timestep.inversion_table`.
            known: The picture.
            hook: Asked between steps whether the call was cancelled; the caller's function is not called.

        Raises:
            NumericsError: A component gave NaN or infinity.
        """
        loop = self._loop
        images = loop.buffers.latents.shape[0]
        rows = [request.conditions[image]] * images
        kind = StepKind(guided=False)
        loop.prepare({kind})
        self._encoder.write(rows, loop, self._chunks)
        plain = replace(
            request, latents=np.repeat(known.latents.mean, images, axis=0), latents_scale=1.0, picture=None
        )
        source = noise_source(request.rng, [request.seeds[image]] * images)
        batch = range(images)
        arguments = start_arguments(plain, batch, images, source, loop.noise.shape[1:], None, self._manifest)
        loop.start(table, np.ones(len(table), np.float32), **arguments)
        for _ in range(len(table)):
            hook.check()
            loop.step(kind)
        result = loop.result(pixels=False)
        self._encoder.raise_faults(result.faults, table, rows)
        return result.latents[:1]

    def _denoise(
        self,
        request: Request,
        batch: Sequence[int],
        rows: Sequence[Hashable],
        hook: StepHook | None,
        known: KnownPicture | None,
    ) -> None:
        """Queue the whole loop. Nothing here waits, but a callback that asks for latents."""
        loop, table = self._loop, request.sampling.table
        shape = tuple(loop.noise.shape[1:])
        source = noise_source(request.rng, [request.seeds[image] for image in batch])
        arguments = start_arguments(request, batch, len(rows), source, shape, known, self._manifest)
        loop.start(table, request.sampling.weights, **arguments)
        uploads_noise = table.uses_noise and not _drawn_on_device(request)
        for step, (kind, draw) in enumerate(zip(self._kinds(request, hook), table.draws, strict=True)):
            if hook is not None:
                hook.check()
                if hook.interrupted_after is not None:
                    break
            if uploads_noise and draw >= 0:
                loop.set_noise(source.draw(arguments["drawn"] + int(draw), shape))
            loop.step(kind)
            if hook is not None:
                hook(loop, table, step, lambda: self._raise_faults(request, rows))

    def _kinds(self, request: Request, hook: StepHook | None) -> list[StepKind]:
        """What each row's step does."""
        sampling, masked = request.sampling, blends(request, self._manifest)
        draws_noise = _drawn_on_device(request)
        return [
            StepKind(
                guided=bool(weight > 1.0),
                draws_noise=draws_noise,
                rescales=sampling.guidance_rescale > 0 and bool(weight > 1.0),
                blends=masked,
                keeps_denoised=hook is not None and hook.wants_denoised,
            )
            for weight in sampling.weights
        ]

    def _raise_faults(self, request: Request, rows: Sequence[Hashable]) -> None:
        self._encoder.raise_faults(self._loop.faults(), request.sampling.table, rows)


class Generations:
    """The shapes that were drawn last, each with its buffers, bindings and graphs."""

    def __init__(
        self,
        device: Device,
        executors: Mapping[str, Executor],
        encoder: ConditionEncoder,
        manifest: Manifest,
    ) -> None:
        """Keep what `ready` needs."""
        self._device, self._executors = device, executors
        self._encoder, self._manifest = encoder, manifest
        self._shapes: OrderedDict[Shape, Generation] = OrderedDict()

    def __len__(self) -> int:
        """How many shapes are kept."""
        return len(self._shapes)

    def clear(self) -> None:
        """Give all of their memory back."""
        self._shapes.clear()

    def ready(
        self, request: Request, images: int, chunks: int, hook: StepHook | None, *, decodes: bool
    ) -> Generation:
        """What draws a shape, kept or new, prepared for the request.

        The one unused for longest makes room; all of them do where the device's memory is too small.

        Args:
            request: Gives size and guidance.
            images: That are drawn together.
            chunks: Of their prompts.
            hook: What is called between the steps.
            decodes: Whether pictures are wanted, not only latents.

        Raises:
            DeviceMemoryError: The buffers do not fit.
            BackendError: An engine does not admit this shape.
        """
        factor = self._manifest.latents.factor
        shape = Shape(images, request.height // factor, request.width // factor, request.guided, chunks)
        try:
            return self._prepared(shape, request, hook, decodes=decodes)
        except DeviceMemoryError:
            if not self._shapes:
                raise
            self._shapes.clear()
        return self._prepared(shape, request, hook, decodes=decodes)

    def _prepared(
        self, shape: Shape, request: Request, hook: StepHook | None, *, decodes: bool
    ) -> Generation:
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
                self._manifest,
            )
        generation.prepare(request, hook, decodes=decodes)
        self._shapes[shape] = generation
        return generation


def _drawn_on_device(request: Request) -> bool:
    """Whether each step draws its noise there; PyTorch's CPU generator runs on the host alone."""
    return request.sampling.table.uses_noise and request.rng == "philox"
