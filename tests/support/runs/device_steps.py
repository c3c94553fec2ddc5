"""Buffers of a step on the host and on a device."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.guided_step import NO_FAULT, StepBuffers
from sdrt.kernels.sampler_row import COLUMNS, HISTORY, Column
from sdrt.runtime.devices.gpu.device import CudaDevice


def host_buffers(dtype: str, *, guided: bool, masked: bool = False, halves: int | None = None) -> StepBuffers:
    """Three rows of a made-up sampler that use every column, and every buffer that a step may have.

    ``halves`` of the next input are written: by default as many as were evaluated.
    """
    generator = np.random.default_rng(1)
    images, rest = 2, (4, 8, 8)
    state = (images, *rest)
    rows = 2 * images if guided else images
    prepared = images * halves if halves else rows

    def normal(shape: tuple[int, ...], kind: str = "float32") -> NDArray[Any]:
        return generator.normal(size=shape).astype(kind)

    table = normal((4, COLUMNS))
    table[:, Column.SAVE] = [1, 0, 1, 0]
    return StepBuffers(
        noise_pred=normal((rows, *rest), dtype),
        latents=normal(state),
        history=np.zeros((HISTORY, *state), np.float32),
        saved=np.zeros(state, np.float32),
        noise=normal(state),
        rows=table,
        timesteps=np.array([900, 600, 300, 0], np.float32),
        counter=np.zeros(1, np.int32),
        fault=np.full(1, NO_FAULT, np.int32),
        sample=np.zeros((prepared, *rest), dtype),
        timestep=np.zeros(prepared, np.float32),
        mask=generator.uniform(size=(images, 1, *rest[1:])).astype(np.float32) if masked else None,
        known=normal(state) if masked else None,
        known_noise=normal(state) if masked else None,
        factors=np.ones(images, np.float32) if guided else None,
        guidance_rescale=np.array([0.7], np.float32) if guided else None,
        denoised=np.zeros(state, np.float32),
        ticket=np.zeros(1, np.uint32),
        count=np.array([3], np.int32),
    )


def on_device(device: CudaDevice, host: StepBuffers) -> StepBuffers:
    """A copy of buffers of the host."""
    buffers: dict[str, Any] = {}
    for field in fields(host):
        array = getattr(host, field.name)
        if array is not None:
            buffers[field.name] = device.zeros(array.shape, array.dtype)
            device.upload(array, buffers[field.name])
    return replace(host, **buffers)


def assert_same(device: CudaDevice, buffers: StepBuffers, host: StepBuffers) -> None:
    """Every buffer holds the host's numbers, bit for bit."""
    for field in fields(host):
        array = getattr(host, field.name)
        if array is not None:
            found = device.download(getattr(buffers, field.name))
            np.testing.assert_array_equal(found, array, err_msg=field.name)
