"""``philox_normal``: fresh noise for each image, from its own seed, in one kernel.

The generator and what it agrees with are described in `sdrt.kernels.philox`. The kernel computes what the
NumPy code computes, the logarithm and the sine in double precision and rounded once. It moves 4 bytes an
element (`bytes_moved`): 65,536 for SD 1.5 at 512², 0.02 µs at the 3.3 TB/s of an H100's memory; the time goes
into the launch and some hundred double-precision operations an element.
"""

from __future__ import annotations

import ctypes
import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.launch import BLOCK, DeviceArray, Launch, blocks, check_array, element_count
from sdrt.kernels.philox import philox_normal

NO_DRAW: Final = -1  # of a row that adds no noise: what its stream gives next is the next row's


def fill_philox_normal(
    noise: NDArray[np.float32],
    seeds: NDArray[np.uint64],
    counter: NDArray[np.int32] | None = None,
    draws: NDArray[np.int32] | None = None,
    *,
    draw: int = 0,
) -> None:
    """The reference in NumPy: write one draw of each image's stream.

    Args:
        noise: float32 [N, ...], written, but for a row that draws nothing.
        seeds: uint64 [N].
        counter: int32 [1], the row that comes next, or None for draw ``draw``.
        draws: int32 [n], with a counter: which draw each row takes, or ``NO_DRAW``. Beyond the last row
            nothing is drawn.
        draw: 0 ≤ draw < 2**63.

    Raises:
        ValueError: Of counter and draws only one is there.
    """
    _check_pair(counter, draws)
    number = draw
    if counter is not None and draws is not None:
        row = int(counter[0])
        number = int(draws[row]) if row < len(draws) else NO_DRAW
        if number == NO_DRAW:
            return
    for image, seed in zip(noise, seeds, strict=True):
        image[...] = philox_normal(image.shape, int(seed), offset=number)


class Params(ctypes.Structure):
    """``PhiloxNormalParams`` of ``philox_normal.cuh``: addresses (0 for None), then numbers."""

    _fields_ = (
        ("noise", ctypes.c_uint64),
        ("seeds", ctypes.c_uint64),
        ("counter", ctypes.c_uint64),
        ("draws", ctypes.c_uint64),
        ("draw", ctypes.c_uint64),
        ("elements", ctypes.c_uint32),  # of all images
        ("image_elements", ctypes.c_uint32),  # of one image
        ("capacity", ctypes.c_int32),  # n, of draws
    )


def launch(
    noise: DeviceArray,
    seeds: DeviceArray,
    counter: DeviceArray | None = None,
    draws: DeviceArray | None = None,
    *,
    draw: int = 0,
) -> Launch:
    """The launch that does what `fill_philox_normal` does, on device arrays; arguments are its.

    Raises:
        ValueError: A shape or dtype is not the documented one, counter and draws are not both there, or draw
            is out of range.
    """
    check_array("noise", noise, noise.shape, ("float32",))
    if not noise.shape:
        raise ValueError("noise has no axis: the first one counts the images")
    check_array("seeds", seeds, noise.shape[:1], ("uint64",))
    _check_pair(counter, draws)
    if counter is not None and draws is not None:
        check_array("counter", counter, (1,), ("int32",))
        check_array("draws", draws, draws.shape[:1], ("int32",))
    if not 0 <= draw < 2**63:
        raise ValueError(f"draw is {draw}; it must be at least 0 and below 2**63")
    params = Params(
        noise=noise.address,
        seeds=seeds.address,
        counter=0 if counter is None else counter.address,
        draws=0 if draws is None else draws.address,
        draw=draw,
        elements=element_count(noise.shape),
        image_elements=math.prod(noise.shape[1:]),
        capacity=0 if draws is None else draws.shape[0],
    )
    return Launch("philox_normal", "philox_normal_f32", blocks(params.elements), BLOCK, params)


def _check_pair(counter: object, draws: object) -> None:
    if (counter is None) != (draws is None):
        raise ValueError("counter and draws belong together: give both, or none")


def bytes_moved(noise: DeviceArray) -> int:
    """Bytes that a launch must at least write; nothing of size is read."""
    return math.prod(noise.shape) * 4
