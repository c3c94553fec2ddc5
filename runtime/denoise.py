"""The sampling loop: buffers of one shape, allocated once, and the one call that makes a step.

Everything that a step needs is on the device before the first one: the sampler's rows, the embeddings, the
seeds of the noise. The kernels count the steps themselves, so a step is the same graph each time, and the
host's share of it is one launch. Faults are words on the device, which are read with the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.guided_step import NO_FAULT, StepBuffers
from sdrt.kernels.sampler_row import COLUMNS, HISTORY, Column
from sdrt.runtime.arena import Arena, Sections
from sdrt.runtime.components import ComponentSpec
from sdrt.runtime.devices import Buffer, Device
from sdrt.runtime.executors import Executor
from sdrt.runtime.faults import MAX_ENCODERS, Faults
from sdrt.runtime.replay import replayable
from sdrt.runtime.solvers import SamplerTable

MAX_ROWS: Final = 2048  # that the table's buffer holds: two evaluations for each trained timestep, and a few

# What the U-Net reads beside the sample and the timestep, and who writes it: the text encoders all but
# `time_ids`, which are numbers of the request.
SAMPLE, TIMESTEP, TIME_IDS = "sample", "timestep", "time_ids"


class Result(NamedTuple):
    """What one download brings: float32 [N, C, h, w], uint8 [N, H, W, 3] if it was asked for, faults."""

    latents: NDArray[np.float32]
    pixels: NDArray[np.uint8] | None
    faults: Faults


class DenoiseLoop:
    """A loop for one number of images, one size, with or without guidance.

    Buffers live as long as the loop, so their addresses can be baked into a captured graph.

    Attributes:
        buffers: Of the step kernel.
        noise: float32 [N, C, h, w], unit-variance noise; what a run begins with is put there.
        pixels: uint8 [N, H, W, 3], where a decoder is to put the pictures, so that one download brings all.
        decoder_fault: int32 [1], not 0 if the decoder gave NaN or infinity.
        given_fault: int32 [1], not 0 if the latents that a caller brought hold NaN or infinity.
        text_faults: For each row of the batch int32 [1, MAX_ENCODERS].
        conditioning: For every other input of the U-Net that is made of texts, its rows [1, ...].
    """

    def __init__(
        self,
        device: Device,
        unet: Executor,
        images: int,
        size: tuple[int, int],
        *,
        guided: bool,
        factor: int = 1,
        context: int = 77,
    ) -> None:
        """Allocate every buffer and bind the U-Net to them.

        Args:
            device: Owns the buffers.
            unet: The U-Net's executor on that device.
            images: N, pictures drawn together.
            size: Height and width of the latents.
            guided: Whether the unconditional half runs too; the U-Net's batch is then 2·N.
            factor: Image pixels per latent and side.
            context: Embeddings that the U-Net reads of each text, if its graph leaves the number open.

        Raises:
            DeviceMemoryError: The buffers do not fit.
            BackendError: The engine does not admit this shape.
        """
        self._device, self._unet = device, unet
        rows = 2 * images if guided else images
        axes = {"rows": rows, "latent_height": size[0], "latent_width": size[1], "context": context}
        arena = Arena(device, _sections(unet.spec, axes, images, factor))
        self.arena = arena
        (output,) = unet.spec.outputs
        state = (images, *output.concrete(axes)[1:])
        self.buffers = StepBuffers(
            **{name: arena[name] for name in _STEP_BUFFERS},
            noise_pred=arena[output.name],
            history=arena.part("memory", 0, (HISTORY, *state)),
            saved=arena.part("memory", HISTORY * math.prod(state), state),
        )
        self.noise = arena["noise"]
        self.pixels = arena["pixels"]
        self.decoder_fault, self.given_fault = arena["decoder_fault"], arena["given_fault"]
        self.text_faults = arena.rows("text_faults")
        texts = [spec.name for spec in unet.spec.inputs if spec.name not in (SAMPLE, TIMESTEP, TIME_IDS)]
        self.conditioning = {name: arena.rows(name) for name in texts}
        self._setup = arena.span("rows", "given_fault")
        self._setup_bytes = self._setup.new_host_bytes()
        self._setup_arrays = self._setup.arrays(self._setup_bytes)
        self._faults = arena.span("fault", "text_faults")
        self._result = {False: arena.span("fault", "latents"), True: arena.span("fault", "pixels")}
        evaluate = unet.bind(
            {spec.name: arena[spec.name] for spec in unet.spec.inputs}, {output.name: arena[output.name]}
        )
        row = _row(device, evaluate, self.buffers)
        self._work = {False: row, True: _noisy_row(device, row, self.buffers)}
        self._graphs: dict[bool, Callable[[], None]] = {}  # by whether the step draws noise
        self._step = row

    def prepare(self, *, draws_noise: bool) -> None:
        """Make the graph of a step, if it was not made before; to be called before `start`.

        Args:
            draws_noise: Whether each step begins with fresh noise from the seeds, drawn on the device.
        """
        if draws_noise not in self._graphs:
            self._graphs[draws_noise] = replayable(self._device, self._work[draws_noise], [self._unet])
        self._step = self._graphs[draws_noise]

    def start(
        self,
        table: SamplerTable,
        guidance_scale: float,
        *,
        seeds: Sequence[int],
        latents: NDArray[np.float32] | Sequence[Buffer] | None = None,
        time_ids: NDArray[np.float32] | None = None,
    ) -> None:
        """Put a run's data into the buffers, in one upload, and x at the first row.

        Args:
            table: The sampler's rows.
            guidance_scale: w in ``u + w·(c − u)``; not read without guidance.
            seeds: One per image, of the noise.
            latents: float32 [N, C, h, w] of unit variance to start from, or N buffers [1, C, h, w] of the
                device; by default draw 0 of the seeds, drawn on the device.
            time_ids: [R, 6], SDXL's sizes, for a U-Net that reads them.
        """
        device = self._device
        setup = self._setup_arrays
        self._setup_bytes.fill(0)
        count = len(table.timesteps)
        setup["rows"][:count] = table.rows
        setup["timesteps"][:count] = table.timesteps
        setup["guidance_scale"][0] = guidance_scale
        setup["count"][0] = count
        setup["seeds"][:] = np.array(seeds, np.uint64)
        setup["one"][0] = 1
        setup["scales"][_INITIAL, Column.INPUT_SCALE] = table.init_noise_sigma
        setup["scales"][_UNIT, Column.INPUT_SCALE] = 1.0
        setup["fault"][0] = NO_FAULT
        if time_ids is not None:
            setup[TIME_IDS][...] = time_ids
        device.upload(self._setup_bytes, self._setup.buffer)
        if latents is None:
            device.philox_normal(self.noise, self.arena["seeds"])
        elif isinstance(latents, np.ndarray):
            device.upload(latents, self.noise)
        else:
            for source, target in zip(latents, self.arena.rows("noise"), strict=True):
                device.copy(source, target)
            device.check_finite(self.noise, self.given_fault)
        device.prepare_input(self._scaling(self.noise, self.buffers.latents, _INITIAL))
        # A NaN that an earlier run left in the ring would survive a coefficient of zero.
        device.clear(self.arena["memory"])
        device.prepare_input(self.buffers)

    def step(self) -> None:
        """One row: the noise if the row draws it, the U-Net on all rows of the batch, the step kernel."""
        self._step()

    def set_latents(self, latents: NDArray[np.float32]) -> None:
        """Replace x between two steps."""
        self._device.upload(latents, self.buffers.latents)
        self._device.prepare_input(self.buffers)

    def set_noise(self, noise: NDArray[np.float32]) -> None:
        """Give the next row its fresh noise: for noise that only the host can draw, one upload a step."""
        self._device.upload(noise, self.noise)

    def converted_latents(self, target: Buffer) -> StepBuffers:
        """What `Device.prepare_input` must be given to write x into ``target``, in its dtype."""
        return self._scaling(self.buffers.latents, target, _UNIT)

    def _scaling(self, source: Buffer, target: Buffer, scale: int) -> StepBuffers:
        """The kernel that scales the U-Net's input, on any latents: here by row ``scale`` of ``scales``."""
        arena = self.arena
        return replace(
            self.buffers,
            latents=source,
            sample=target,
            noise_pred=target,  # not read; the kernel is chosen by its dtype
            rows=arena.part("scales", scale * COLUMNS, (1, COLUMNS)),
            timesteps=arena["zero_timestep"],
            counter=arena["zero"],
            count=arena["one"],
        )

    def latents(self) -> NDArray[np.float32]:
        """A host copy of x, float32 [N, C, h, w]; waits."""
        return np.asarray(self._device.download(self.buffers.latents), dtype=np.float32)

    def faults(self) -> Faults:
        """The fault words alone; waits."""
        arrays = self._faults.arrays(self._device.download(self._faults.buffer))
        return _fault_words(arrays)

    def result(self, *, pixels: bool) -> Result:
        """Latents, fault words and, if asked for, pixels: one download, which waits."""
        span = self._result[pixels]
        arrays = span.arrays(self._device.download(span.buffer))
        return Result(arrays["latents"], arrays["pixels"] if pixels else None, _fault_words(arrays))


def _row(device: Device, evaluate: Callable[[], None], buffers: StepBuffers) -> Callable[[], None]:
    def row() -> None:
        evaluate()
        device.guided_step(buffers)

    return row


def _noisy_row(device: Device, row: Callable[[], None], buffers: StepBuffers) -> Callable[[], None]:
    def noisy_row() -> None:
        device.philox_normal(buffers.noise, buffers.seeds, buffers.counter)
        row()

    return noisy_row


_INITIAL, _UNIT = 0, 1  # rows of `scales`

# Fields of StepBuffers that are sections of the same name.
_STEP_BUFFERS: Final = (
    *("latents", "noise", "rows", "timesteps", "guidance_scale", "counter", "fault", "sample", "timestep"),
    *("seeds", "ticket", "count"),
)


def _sections(spec: ComponentSpec, axes: dict[str, int], images: int, factor: int) -> Sections:
    """What the loop's memory holds, in an order in which whatever is copied together lies together."""
    rows = axes["rows"]
    (output,) = spec.outputs
    channels, height, width = output.concrete(axes)[1:]
    state = (images, channels, height, width)
    inputs = {entry.name: (entry.concrete(axes), entry.dtype) for entry in spec.inputs}
    return {
        # Uploaded when a run starts …
        "rows": ((MAX_ROWS, COLUMNS), "float32"),
        "timesteps": ((MAX_ROWS,), "float32"),
        "guidance_scale": ((1,), "float32"),
        "counter": ((1,), "int32"),
        "count": ((1,), "int32"),
        "ticket": ((1,), "uint32"),
        "seeds": ((images,), "uint64"),
        "scales": ((2, COLUMNS), "float32"),
        "zero_timestep": ((1,), "float32"),
        "zero": ((1,), "int32"),
        "one": ((1,), "int32"),
        **{name: section for name, section in inputs.items() if name == TIME_IDS},
        # … and downloaded when it has ended, from here …
        "fault": ((1,), "int32"),
        "decoder_fault": ((1,), "int32"),
        "given_fault": ((1,), "int32"),
        # (uploaded up to here)
        "text_faults": ((rows, MAX_ENCODERS), "int32"),
        "latents": (state, "float32"),
        "pixels": ((images, height * factor, width * factor, 3), "uint8"),
        # … up to here.
        "memory": ((HISTORY + 1, *state), "float32"),  # the ring, and the saved x
        "noise": (state, "float32"),
        output.name: (output.concrete(axes), output.dtype),
        **{name: section for name, section in inputs.items() if name != TIME_IDS},
    }


def _fault_words(arrays: dict[str, NDArray[Any]]) -> Faults:
    return Faults(
        texts=arrays["text_faults"].astype(bool),
        given=bool(arrays["given_fault"][0]),
        unet=int(arrays["fault"][0]),
        decoder=bool(arrays["decoder_fault"][0]),
    )
