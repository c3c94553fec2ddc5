"""The sampling loop: buffers of one shape, allocated once, and the one call that makes a step.

Everything that a step needs is on the device before the first one: the sampler's rows, the embeddings, the
seeds of the noise. The kernels count the steps themselves, so steps of one kind are the same graph each time,
and the host's share of a step is one launch. Faults are words on the device, which are read with the result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdrt.kernels.guided_step import NO_FAULT, StepBuffers
from sdrt.kernels.philox_normal import NO_DRAW
from sdrt.kernels.sampler_row import COLUMNS, Column
from sdrt.runtime.backends.executor import Executor, replayable
from sdrt.runtime.bundle.families.components import SAMPLE, TIMESTEP
from sdrt.runtime.devices.arena import Arena
from sdrt.runtime.devices.device import Buffer, Device
from sdrt.runtime.drawing.buffers import (
    BLEND,
    DENOISED,
    RESCALE,
    ConditionalHalf,
    check_array,
    check_request_inputs,
    loop_sections,
    step_buffers,
)
from sdrt.runtime.drawing.faults import Faults
from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers.table import SamplerTable


@dataclass(frozen=True, slots=True)
class StepKind:
    """What a step does beside the U-Net and the row. Each combination that a run needs is a graph of its own.

    Attributes:
        guided: Whether all rows of a picture are evaluated, or the conditional one alone.
        draws_noise: Whether it begins with fresh noise from the seeds, drawn on the device, if the row adds
            any.
        rescales: Whether the guided prediction is rescaled (`sdrt.kernels.guidance_rescale`).
        blends: Whether the latents to keep are put back where the mask says so.
        keeps_denoised: Whether the model's guess of the clean latents is kept (`DenoiseLoop.denoised`).
    """

    guided: bool
    draws_noise: bool = False
    rescales: bool = False
    blends: bool = False
    keeps_denoised: bool = False

    def __post_init__(self) -> None:
        if self.rescales and not self.guided:
            raise UsageError("a step rescales without guidance: leave rescales out where guided is False")


class Result(NamedTuple):
    """What one download brings: float32 [N, C, h, w], uint8 [N, H, W, 3] if it was asked for, faults."""

    latents: NDArray[np.float32]
    pixels: NDArray[np.uint8] | None
    faults: Faults


class DenoiseLoop:
    """A loop for one number of images and one size, with room for guidance or without.

    Buffers live as long as the loop, so their addresses can be baked into a captured graph.

    Attributes:
        buffers: Of the step kernel, those that every step has.
        noise: float32 [N, C, h, w], unit-variance noise; what a run begins with is put there.
        pixels: uint8 [N, H, W, 3], where a decoder is to put the pictures, so that one download brings all.
        decoder_fault: int32 [1], not 0 if the decoder gave NaN or infinity.
        given_fault: int32 [1], not 0 if the latents that a caller brought hold NaN or infinity.
        text_faults: For each row of the batch int32 [1, encoders].
        conditioning: For every input of the U-Net that is made of texts or pictures, its rows [1, ...].
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
        encoders: int = 1,
        guided_rows: int = 2,
    ) -> None:
        """Allocate every buffer and bind the U-Net to them.

        Args:
            device: Owns the buffers.
            unet: The U-Net's executor on that device.
            images: N, pictures drawn together.
            size: Height and width of the latents.
            guided: Whether there is room for guidance: R, the U-Net's batch, is then ``guided_rows``·N. Steps
                may do without it.
            factor: Image pixels per latent and side.
            context: Embeddings that the cross-attention reads for each row, where the U-Net leaves it open.
            encoders: How many components make the conditioning; each has a fault word for each row.
            guided_rows: See `sdrt.runtime.bundle.families.record.Family.guided_rows`.

        Raises:
            DeviceMemoryError: The buffers do not fit.
            BackendError: The engine does not admit this shape.
        """
        self._device, self._unet, self._guided = device, unet, guided
        axes = {
            "rows": images * (guided_rows if guided else 1),
            "latent_height": size[0],
            "latent_width": size[1],
            "context": context,
        }
        arena = Arena(device, loop_sections(unet.spec, axes, images, factor, encoders))
        self.arena = arena
        self.buffers = step_buffers(arena, unet.spec)
        self.noise = arena["noise"]
        self.pixels = arena["pixels"]
        self.decoder_fault, self.given_fault = arena["decoder_fault"], arena["given_fault"]
        self.text_faults = arena.rows("text_faults")
        not_made = (SAMPLE, TIMESTEP, *unet.spec.of_request)
        made = [entry.name for entry in unet.spec.inputs if entry.name not in not_made]
        self.conditioning = {name: arena.rows(name) for name in made}
        self._setup = arena.span("rows", "given_fault")
        self._setup_bytes = self._setup.new_host_bytes()
        self._setup_arrays = self._setup.arrays(self._setup_bytes)
        self._faults = arena.span("fault", "text_faults")
        self._result = {False: arena.span("fault", "latents"), True: arena.span("fault", "pixels")}
        (output,) = unet.spec.outputs
        whole = unet.bind(
            {entry.name: arena[entry.name] for entry in unet.spec.inputs}, {output.name: arena[output.name]}
        )
        self._evaluations = {guided: _Evaluation(whole, arena[output.name])}
        self._copies_at_start: list[tuple[Buffer, Buffer]] = []
        self._steps: dict[StepKind, Callable[[], None]] = {}
        self._has_mask = False

    def prepare(self, kinds: Collection[StepKind]) -> None:
        """Bind and record what steps of these kinds need and is not there yet; to be called before `start`.

        Raises:
            UsageError: A guided step in a loop without room for it.
            DeviceMemoryError: What it needs does not fit.
            BackendError: The engine does not admit the conditional half alone.
        """
        for kind in kinds:
            if kind in self._steps:
                continue
            if kind.guided and not self._guided:
                raise UsageError(
                    "a guided step was asked of a loop without guidance: make it with guided=True"
                )
            if kind.guided not in self._evaluations:
                self._evaluations[kind.guided] = self._conditional_half()
            work = _work(self._device, self._evaluations[kind.guided], self._buffers_of(kind), kind)
            self._steps[kind] = replayable(self._device, work, [self._unet])

    def _conditional_half(self) -> _Evaluation:
        """The U-Net bound anew to the half that holds the conditional rows."""
        images = int(self.buffers.latents.shape[0])
        half = ConditionalHalf(self._device, self.arena, self._unet.spec, images)
        (output,) = self._unet.spec.outputs
        evaluate = self._unet.bind(half.inputs, {output.name: half.output})
        self._copies_at_start = half.copies_at_start
        return _Evaluation(evaluate, half.output, tuple(half.copies_each_step))

    def _buffers_of(self, kind: StepKind) -> StepBuffers:
        """What the step kernel is given: it does what it has buffers for."""
        names = [
            *(BLEND if kind.blends else ()),
            *(RESCALE if kind.rescales else ()),
            *(DENOISED if kind.keeps_denoised else ()),
        ]
        changes: dict[str, Any] = {name: self.arena[name] for name in names}
        return replace(self.buffers, noise_pred=self._evaluations[kind.guided].noise_pred, **changes)

    def start(
        self,
        table: SamplerTable,
        guidance: ArrayLike,
        *,
        seeds: Sequence[int],
        drawn: int = 1,
        latents: NDArray[np.float32] | Sequence[Buffer] | None = None,
        scale: float | None = None,
        known: NDArray[np.float32] | None = None,
        known_noise: NDArray[np.float32] | None = None,
        mask: NDArray[np.float32] | None = None,
        guidance_rescale: float = 0.0,
        image_guidance: float = 0.0,
        inputs: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        """Put a run's data into the buffers, all that is small in one upload, and x at the first row.

        What is made of texts must be in ``conditioning`` before.

        Args:
            table: The sampler's rows, n.
            guidance: float32 [n], w of each row in ``u + w·(c − u)``; read by guided steps.
            seeds: One per image, of the noise.
            drawn: How many draws of each seed's stream come before the first row's; by default that of the
                initial noise.
            latents: float32 [N, C, h, w] to start from, or N buffers [1, C, h, w] of the device; by default
                draw 0 of the seeds, drawn on the device.
            scale: x at the first row is ``scale`` times these; by default ``table.init_noise_sigma``, for
                latents of unit variance.
            known: float32 [N, C, h, w], the clean latents that steps which blend keep where the mask is 0.
            known_noise: float32 [N, C, h, w], what brings them to a row's noise level.
            mask: float32 [N, 1, h, w] in [0, 1]: 1 is drawn, 0 is kept. These three or none.
            guidance_rescale: phi in [0, 1], how far steps which rescale do so.
            image_guidance: v in ``u + w·(c − i) + v·(i − u)``, read where guidance has three parts.
            inputs: What the U-Net reads beside texts, for each of its R rows: all of its spec's
                ``of_request``, by name.

        Raises:
            UsageError: An array of another shape, one of those that belong together without the others, or an
                input of the U-Net that is missing.
        """
        given = dict(inputs or {})
        check_request_inputs(self._unet.spec, given)
        for name, array in given.items():
            check_array(name, array, tuple(self.arena[name].shape))
        blend = dict(zip(BLEND, (mask, known, known_noise), strict=True))
        self._check_blend(blend)
        check_array("guidance", np.asarray(guidance), (len(table),))

        scale = table.init_noise_sigma if scale is None else scale
        scales = np.stack(np.broadcast_arrays(guidance, image_guidance), axis=-1)
        self._upload_setup(table, scales, seeds, drawn, scale, guidance_rescale, given)
        for name in given.keys() - self._setup_arrays.keys():
            self._device.upload(given[name], self.arena[name])
        self._has_mask = mask is not None
        for name, kept in blend.items():
            if kept is not None:
                self._device.upload(kept, self.arena[name])
        for source, target in self._copies_at_start:
            self._device.copy(source, target)
        self._put_latents(latents)

    def _check_blend(self, blend: Mapping[str, NDArray[np.float32] | None]) -> None:
        there = {name: array for name, array in blend.items() if array is not None}
        if 0 < len(there) < len(blend):
            raise UsageError(
                f"of mask, known and known_noise only {' and '.join(there)} were given: give all, or none"
            )
        for name, array in there.items():
            check_array(name, array, tuple(self.arena[name].shape))

    def _upload_setup(
        self,
        table: SamplerTable,
        guidance: NDArray[Any],
        seeds: Sequence[int],
        drawn: int,
        scale: float,
        guidance_rescale: float,
        inputs: Mapping[str, NDArray[Any]],
    ) -> None:
        setup = self._setup_arrays
        self._setup_bytes.fill(0)
        count = len(table)
        setup["rows"][:count] = table.rows
        setup["rows"][:count, [Column.GUIDANCE, Column.IMAGE_GUIDANCE]] = guidance
        setup["timesteps"][:count] = table.timesteps
        setup["guidance_rescale"][0] = guidance_rescale
        setup["count"][0] = count
        setup["seeds"][:] = np.array(seeds, np.uint64)
        setup["draws"][:] = NO_DRAW
        setup["draws"][:count] = np.where(table.draws >= 0, drawn + table.draws, NO_DRAW)
        setup["one"][0] = 1
        setup["scales"][_INITIAL, Column.INPUT_SCALE] = scale
        setup["scales"][_UNIT, Column.INPUT_SCALE] = 1.0
        setup["fault"][0] = NO_FAULT
        for name in inputs.keys() & setup.keys():
            setup[name][...] = inputs[name]
        self._device.upload(self._setup_bytes, self._setup.buffer)

    def _put_latents(self, latents: NDArray[np.float32] | Sequence[Buffer] | None) -> None:
        """x at the first row, the U-Net's first input, and an empty memory."""
        device = self._device
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

    def step(self, kind: StepKind) -> None:
        """One row: what its kind says, the U-Net, the step kernel.

        Raises:
            UsageError: The kind was not prepared, or blends in a run that was started without a mask.
        """
        work = self._steps.get(kind)
        if work is None:
            raise UsageError(f"{kind} was not prepared: give it to prepare before the run starts")
        if kind.blends and not self._has_mask:
            raise UsageError(
                "a step blends, but the run has no mask: give mask, known and known_noise to start"
            )
        work()

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
            timestep=arena.part("timestep", 0, (target.shape[0],)),
            timesteps=arena["zero_timestep"],
            counter=arena["zero"],
            count=arena["one"],
        )

    def latents(self) -> NDArray[np.float32]:
        """A host copy of x, float32 [N, C, h, w]; waits."""
        return np.asarray(self._device.download(self.buffers.latents), dtype=np.float32)

    def denoised(self) -> NDArray[np.float32]:
        """A host copy of the guess of the clean latents that the last step which kept it made; waits.

        float32 [N, C, h, w]: ``X0_X·x + X0_M·m`` with x before that step.
        """
        return np.asarray(self._device.download(self.arena["denoised"]), dtype=np.float32)

    def faults(self) -> Faults:
        """The fault words alone; waits."""
        arrays = self._faults.arrays(self._device.download(self._faults.buffer))
        return _fault_words(arrays)

    def result(self, *, pixels: bool) -> Result:
        """Latents, fault words and, if asked for, pixels: one download, which waits."""
        span = self._result[pixels]
        arrays = span.arrays(self._device.download(span.buffer))
        return Result(arrays["latents"], arrays["pixels"] if pixels else None, _fault_words(arrays))


class _Evaluation(NamedTuple):
    """The U-Net on one set of rows: the call, what it writes, and (from, to) of what is copied before it."""

    evaluate: Callable[[], None]
    noise_pred: Buffer
    copies: tuple[tuple[Buffer, Buffer], ...] = ()


def _work(
    device: Device, evaluation: _Evaluation, buffers: StepBuffers, kind: StepKind
) -> Callable[[], None]:
    def work() -> None:
        if kind.draws_noise:
            device.philox_normal(buffers.noise, buffers.seeds, buffers.counter, buffers.draws)
        for source, target in evaluation.copies:
            device.copy(source, target)
        evaluation.evaluate()
        if kind.rescales:
            device.guidance_rescale(buffers)
        device.guided_step(buffers)

    return work


_INITIAL, _UNIT = 0, 1  # rows of `scales`


def _fault_words(arrays: dict[str, NDArray[Any]]) -> Faults:
    return Faults(
        texts=arrays["text_faults"].astype(bool),
        given=bool(arrays["given_fault"][0]),
        unet=int(arrays["fault"][0]),
        decoder=bool(arrays["decoder_fault"][0]),
    )
