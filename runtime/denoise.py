"""The sampling loop: buffers of one shape, allocated once, and the two calls that make a step."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.guided_step import NO_FAULT, StepBuffers
from sdrt.kernels.sampler_row import COLUMNS, HISTORY
from sdrt.runtime.devices import Device
from sdrt.runtime.errors import NumericsError
from sdrt.runtime.executors import Executor
from sdrt.runtime.solvers import SamplerTable

MAX_STEPS: Final = 1000  # rows that the table's buffer holds; Stable Diffusion trains as many timesteps


class DenoiseLoop:
    """A loop for one number of images, one size, with or without guidance.

    Buffers live as long as the loop, so their addresses can be baked into a captured graph.
    """

    def __init__(
        self, device: Device, unet: Executor, images: int, size: tuple[int, int], *, guided: bool
    ) -> None:
        """Allocate every buffer and bind the U-Net to them.

        Args:
            device: Owns the buffers.
            unet: The U-Net's executor on that device.
            images: N, pictures drawn together.
            size: Height and width of the latents.
            guided: Whether the unconditional half runs too; the U-Net's batch is then 2·N.
        """
        self._device = device
        rows = 2 * images if guided else images
        axes = {"rows": rows, "latent_height": size[0], "latent_width": size[1]}
        sample, timestep, embeddings = unet.spec.inputs
        (noise_pred,) = unet.spec.outputs
        state = (images, *noise_pred.concrete(axes)[1:])
        self._embeddings = device.zeros(embeddings.concrete(axes), embeddings.dtype)
        self.buffers = StepBuffers(
            noise_pred=device.zeros(noise_pred.concrete(axes), noise_pred.dtype),
            latents=device.zeros(state, "float32"),
            history=device.zeros((HISTORY, *state), "float32"),
            saved=device.zeros(state, "float32"),
            noise=device.zeros(state, "float32"),
            rows=device.zeros((MAX_STEPS, COLUMNS), "float32"),
            timesteps=device.zeros((MAX_STEPS,), "float32"),
            guidance_scale=device.zeros((1,), "float32"),
            counter=device.zeros((1,), "int32"),
            fault=device.zeros((1,), "int32"),
            sample=device.zeros(sample.concrete(axes), sample.dtype),
            timestep=device.zeros((1,), "float32"),
        )
        self._evaluate_unet = unet.bind(
            {
                sample.name: self.buffers.sample,
                timestep.name: self.buffers.timestep,
                embeddings.name: self._embeddings,
            },
            {noise_pred.name: self.buffers.noise_pred},
        )

    def start(
        self,
        latents: NDArray[np.float32],
        embeddings: NDArray[Any],
        table: SamplerTable,
        guidance_scale: float,
    ) -> None:
        """Put a run's data into the buffers.

        Args:
            latents: float32 [N, C, h, w], the sampler's x at the first row.
            embeddings: [rows, tokens, width], the unconditional half first.
            table: The sampler's rows.
            guidance_scale: w in ``u + w·(c − u)``; not read without guidance.
        """
        device, buffers = self._device, self.buffers
        count = len(table.timesteps)
        rows = np.zeros((MAX_STEPS, COLUMNS), np.float32)
        rows[:count] = table.rows
        timesteps = np.zeros(MAX_STEPS, np.float32)
        timesteps[:count] = table.timesteps
        device.upload(rows, buffers.rows)
        device.upload(timesteps, buffers.timesteps)
        device.upload(latents, buffers.latents)
        device.upload(embeddings, self._embeddings)
        device.upload(np.array([guidance_scale], np.float32), buffers.guidance_scale)
        device.upload(np.zeros(1, np.int32), buffers.counter)
        device.upload(np.full(1, NO_FAULT, np.int32), buffers.fault)
        # A NaN that an earlier run left in the ring would survive a coefficient of zero.
        device.upload(np.zeros(buffers.history.shape, np.float32), buffers.history)
        device.upload(np.zeros(buffers.saved.shape, np.float32), buffers.saved)
        device.prepare_input(buffers)

    def step(self) -> None:
        """One row: the U-Net on all rows of the batch, then the step kernel."""
        self._evaluate_unet()
        self._device.guided_step(self.buffers)

    def set_latents(self, latents: NDArray[np.float32]) -> None:
        """Replace x between two steps."""
        self._device.upload(latents, self.buffers.latents)
        self._device.prepare_input(self.buffers)

    def set_noise(self, noise: NDArray[np.float32]) -> None:
        """Give the next row its fresh noise, for samplers that add some."""
        self._device.upload(noise, self.buffers.noise)

    def latents(self) -> NDArray[np.float32]:
        """A host copy of x, float32 [N, C, h, w]."""
        return np.asarray(self._device.download(self.buffers.latents), dtype=np.float32)

    def raise_if_faulty(self, table: SamplerTable) -> None:
        """Raise NumericsError if the U-Net gave NaN or infinity at some row."""
        fault = int(self._device.download(self.buffers.fault)[0])
        if fault != NO_FAULT:
            raise NumericsError(
                f"the unet gave NaN or infinity at step {fault + 1} of {len(table.timesteps)} "
                f"(timestep {table.timesteps[fault]:g}); an fp16 overflow is likely: "
                "export the checkpoint with --dtype fp32, or lower the guidance scale"
            )
