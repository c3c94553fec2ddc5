"""One shape's share of the device: the loop, the decoder, and how a batch of images goes through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdrt.runtime.callbacks import StepHook
from sdrt.runtime.decode import ImageDecoder
from sdrt.runtime.denoise import DenoiseLoop
from sdrt.runtime.devices import Device
from sdrt.runtime.executors import Executor
from sdrt.runtime.noise import NoiseSource, noise_source
from sdrt.runtime.output import Collected, DeviceCollected
from sdrt.runtime.prompt_chunks import Prompt
from sdrt.runtime.prompts import PromptEncoder
from sdrt.runtime.request import Request


@dataclass(frozen=True, slots=True)
class Shape:
    """What buffers and graphs are made for: N images, the latents' height and width, guidance or not."""

    images: int
    height: int
    width: int
    guided: bool


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
        encoder: PromptEncoder,
        factor: int,
    ) -> None:
        """Allocate and bind the loop; the decoder follows when it is first wanted.

        Raises:
            DeviceMemoryError: The buffers do not fit.
            BackendError: An engine does not admit this shape.
        """
        self._device, self._decoder_executor, self._encoder = device, decoder, encoder
        self._decoder: ImageDecoder | None = None
        size = (shape.height, shape.width)
        self._loop = DenoiseLoop(device, unet, shape.images, size, guided=shape.guided, factor=factor)

    def prepare(self, request: Request, *, decodes: bool) -> None:
        """Make what the request needs beyond the loop, before anything is drawn; errors as `__init__`."""
        # The decoder first: it wants more scratch memory than the U-Net, whose graph then has it in common.
        if decodes and self._decoder is None:
            self._decoder = ImageDecoder(self._decoder_executor, self._device, self._loop)
        self._loop.prepare(draws_noise=_drawn_on_device(request))

    def draw(
        self,
        request: Request,
        batch: Sequence[int],
        collected: Collected | DeviceCollected,
        on_step: StepHook | None,
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
        rows = [Prompt(request.prompts[image]) for image in batch]
        if request.guided:
            rows = [*(Prompt(request.negative_prompts[image]) for image in batch), *rows]
        timer = self._device.timer()
        self._encoder.write(rows, loop)
        timer.mark("text_encoder")
        self._denoise(request, batch, rows, on_step)
        timer.mark("denoise")
        if decodes and self._decoder is not None:
            self._decoder.decode()
            timer.mark("vae_decoder")
        if isinstance(collected, DeviceCollected):
            self._raise_faults(request, rows)
            collected.add(loop, batch[0])
        else:
            result = loop.result(pixels=decodes)
            self._encoder.raise_faults(result.faults, request.table, rows)
            collected.add(result.latents, result.pixels)
        return timer.seconds()

    def _denoise(
        self, request: Request, batch: Sequence[int], rows: Sequence[Prompt], on_step: StepHook | None
    ) -> None:
        """Queue the whole loop. Nothing here waits, but a callback that asks for latents."""
        loop, table = self._loop, request.table
        shape = tuple(loop.noise.shape[1:])
        source = noise_source(request.rng, [request.seeds[image] for image in batch])
        loop.start(
            table,
            request.guidance_scale,
            seeds=source.seeds,
            latents=_initial(request, batch, source, shape),
            time_ids=_time_ids(request, len(rows)),
        )
        uploads_noise = table.uses_noise and not _drawn_on_device(request)
        for step in range(len(table.timesteps)):
            if uploads_noise:
                loop.set_noise(source.step(step, shape))
            loop.step()
            if on_step is not None:
                on_step(loop, table, step, lambda: self._raise_faults(request, rows))

    def _raise_faults(self, request: Request, rows: Sequence[Prompt]) -> None:
        self._encoder.raise_faults(self._loop.faults(), request.table, rows)


def _drawn_on_device(request: Request) -> bool:
    """Whether each step draws its noise there; PyTorch's CPU generator runs on the host alone."""
    return request.table.uses_noise and request.rng == "philox"


def _initial(request: Request, batch: Sequence[int], source: NoiseSource, shape: tuple[int, ...]) -> Any:
    """What the loop starts from: given latents, noise made on the host, or None for noise of the device."""
    if isinstance(request.latents, np.ndarray):
        return request.latents[list(batch)]
    if request.latents is not None:
        return [request.latents[image] for image in batch]
    return None if request.rng == "philox" else source.initial(shape)


def _time_ids(request: Request, rows: int) -> np.ndarray[Any, Any] | None:
    if not request.sizes:
        return None
    return np.array([[number for pair in request.sizes.values() for number in pair]] * rows, np.float32)
