"""What a driver needs to know to run one kernel: `Launch`, made by each kernel's ``launch`` function."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

BLOCK: Final = 128  # small blocks: a latent of 512² pixels then spreads over 32 multiprocessors
MAX_GRID: Final = 2048  # blocks; beyond it the threads take several groups of elements each

SUFFIX: Final = {np.dtype(np.float16): "f16", np.dtype(np.float32): "f32"}

_MAX_ELEMENTS: Final = 2**31 - 1  # the kernels' indices have 32 bits


class DeviceArray(Protocol):
    """C-contiguous memory that a kernel can reach. A NumPy array in the host build's place has no address
    attribute: `sdrt.kernels.host_build.HostArray` gives it one."""

    @property
    def address(self) -> int:
        """Of the first element, in bytes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each axis."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's name of the element type."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch: which function, on how many threads, with which parameters.

    Attributes:
        module: Name of the source, ``guided_step`` for ``guided_step.cu``.
        entry: Name of the ``extern "C"`` function.
        grid: Blocks, one dimension.
        block: Threads of a block.
        params: The only parameter, passed by value; mirrors the struct of that name in the ``.cuh``. It holds
            addresses, not arrays: whoever launches keeps the arrays alive.
    """

    module: str
    entry: str
    grid: int
    block: int
    params: ctypes.Structure


def blocks(groups: int) -> int:
    """The grid that gives each of ``groups`` pieces of work a thread, up to ``MAX_GRID`` blocks."""
    return min(max(math.ceil(groups / BLOCK), 1), MAX_GRID)


def element_count(shape: Sequence[int]) -> int:
    """Elements of an array of that shape.

    Raises:
        ValueError: More than the kernels can index.
    """
    count = math.prod(shape)
    if count > _MAX_ELEMENTS:
        raise ValueError(f"shape {tuple(shape)} has {count} elements: at most {_MAX_ELEMENTS}")
    return count


def check_array(name: str, array: DeviceArray, shape: Sequence[int], dtypes: Sequence[str]) -> None:
    """Refuse an array of another shape or dtype: a kernel would read other memory, or garbage.

    Raises:
        ValueError: Says what was given and what is allowed.
    """
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(array.shape)}: it must be {tuple(shape)}")
    if np.dtype(array.dtype).name not in dtypes:
        raise ValueError(f"{name} is {np.dtype(array.dtype).name}: it must be {' or '.join(dtypes)}")
