"""``guidance_rescale``: by how much each image's guided prediction is to shrink, against overexposure.

The reference in NumPy. A kernel with the same sums in the same order gives the same bits.

The kernel reads both halves once (`bytes_moved`): for SD 1.5 at 512², one image in half precision, 65,536
bytes, 0.02 µs at the 3.3 TB/s of an H100's memory. But one block does an image, some twelve operations in
double precision an element, about 200,000: what counts is how fast one multiprocessor does those. By its
data sheet an H100 does 64 a clock, a GeForce 2, where they come to some 50 µs beside an evaluation of several
milliseconds. More blocks would need a second launch, or sums in an order that is not fixed.
"""

from __future__ import annotations

import ctypes
import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.guided_step import StepBuffers, check_step_buffers, guided_prediction, row_count
from sdrt.kernels.launch import SUFFIX, Launch

LANES: Final = 256  # partial sums of an image, one for each thread of its block; a power of two


def guidance_rescale(buffers: StepBuffers) -> None:
    """Write each image's factor for the row at the counter: ``phi * std(c) / std(g) + 1 - phi``.

    c is the conditional half, g the guided prediction, and the standard deviations are over C, h and w (Lin
    et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4; diffusers'
    ``rescale_noise_cfg``). The step multiplies g by it. Where g is the same number everywhere there is
    nothing to rescale, and the factor is 1. After the last row nothing happens.

    Sums are of float64: of the differences from the image's first element, and of their squares. So nothing
    cancels that matters: the first element is at most sqrt(elements) standard deviations from the mean.

    Args:
        buffers: ``noise_pred`` must have both halves; phi is in ``guidance_rescale``, the factors go into
            ``factors``.
    """
    step = int(buffers.counter[0])
    if step >= row_count(buffers):
        return
    factors, phi = buffers.factors, buffers.guidance_rescale
    assert factors is not None
    assert phi is not None
    images = len(buffers.latents)
    conditional = _scatter(buffers.noise_pred[images:].astype(np.float32, copy=False))
    guided = _scatter(guided_prediction(buffers, buffers.rows[step]))
    share = np.float64(phi[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = share * np.sqrt(conditional / guided) + (1.0 - share)
    factors[...] = np.where(guided == 0.0, 1.0, factor)


def _scatter(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """float64 [N]: the sum of each image's squared deviations from its mean, n times the variance."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    differences = flat - flat[:, :1]
    total = _lane_sum(differences)
    scatter: NDArray[np.float64] = _lane_sum(differences * differences) - total * total / flat.shape[1]
    return scatter


def _lane_sum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums along the last axis: lane k adds elements k, k + LANES, … in turn; then lanes are added, half to
    half, until one is left."""
    images, elements = values.shape
    padded = np.zeros((images, -(-elements // LANES) * LANES))
    padded[:, :elements] = values
    lanes = np.zeros((images, LANES))
    for row in padded.reshape(images, -1, LANES).swapaxes(0, 1):
        lanes += row
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


class Params(ctypes.Structure):
    """``GuidanceRescaleParams`` of ``guidance_rescale.cuh``: addresses (0 for None), then sizes."""

    _fields_ = (
        ("noise_pred", ctypes.c_uint64),
        ("rows", ctypes.c_uint64),
        ("guidance_rescale", ctypes.c_uint64),
        ("counter", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("factors", ctypes.c_uint64),
        ("images", ctypes.c_uint32),  # N
        ("image_elements", ctypes.c_uint32),  # C·h·w
        ("capacity", ctypes.c_int32),  # the rows that count where count is None
    )


def launch(buffers: StepBuffers) -> Launch:
    """The launch that does what `guidance_rescale` does, one block for each image.

    Args:
        buffers: Device arrays (`sdrt.kernels.launch.DeviceArray`).

    Raises:
        ValueError: A shape or dtype is not what `StepBuffers` says, ``noise_pred`` has not both halves, or
            ``guidance_rescale`` or ``factors`` is missing.
    """
    check_step_buffers(buffers)
    images = int(buffers.latents.shape[0])
    if (rows := int(buffers.noise_pred.shape[0])) != 2 * images:
        raise ValueError(f"noise_pred has {rows} rows for {images} images: two for each are rescaled")
    needed = ("noise_pred", "rows", "guidance_rescale", "counter", "factors")
    arrays = {name: getattr(buffers, name) for name in needed}
    if missing := [name for name, array in arrays.items() if array is None]:
        raise ValueError(f"{' and '.join(missing)} missing: guidance is rescaled with both")
    if buffers.count is not None:
        arrays["count"] = buffers.count
    params = Params(
        **{name: array.address for name, array in arrays.items()},
        images=images,
        image_elements=math.prod(buffers.latents.shape[1:]),
        capacity=int(buffers.timesteps.shape[0]),
    )
    entry = f"guidance_rescale_{SUFFIX[np.dtype(buffers.noise_pred.dtype)]}"
    return Launch("guidance_rescale", entry, images, LANES, params)


def bytes_moved(buffers: StepBuffers) -> int:
    """Bytes that a launch must at least read; a number for each image is written."""
    return math.prod(buffers.noise_pred.shape) * np.dtype(buffers.noise_pred.dtype).itemsize
