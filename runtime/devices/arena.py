"""Many buffers in one allocation: what travels together lies together and takes one copy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.devices.device import Buffer, Device

ALIGNMENT: Final = 256  # bytes; what CUDA's own allocations have, and TensorRT asks of a binding

Sections = Mapping[str, tuple[tuple[int, ...], str]]  # name → shape and dtype


class _Section(NamedTuple):
    offset: int  # bytes from the start of the allocation
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


class Arena:
    """Named buffers in one allocation, in the order of ``sections``; all zero at first."""

    def __init__(self, device: Device, sections: Sections) -> None:
        """Allocate.

        Args:
            device: The device that owns the memory.
            sections: The shape and dtype of each buffer, by name.

        Raises:
            DeviceMemoryError: It does not fit.
        """
        self._device = device
        self._sections: dict[str, _Section] = {}
        end = 0
        for name, (shape, dtype) in sections.items():
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            self._sections[name] = _Section(offset, shape, np.dtype(dtype))
            end = self._sections[name].end
        self._memory = device.zeros((max(end, 1),), "uint8")
        self._whole: dict[str, Buffer] = {}

    def __getitem__(self, name: str) -> Buffer:
        """One buffer; the same object each time."""
        if name not in self._whole:
            self._whole[name] = self.part(name, 0, self._sections[name].shape)
        return self._whole[name]

    def part(self, name: str, start: int, shape: tuple[int, ...]) -> Buffer:
        """A part of a buffer: ``shape`` from element ``start`` of its flat order on; the same memory."""
        section = self._sections[name]
        offset = section.offset + start * section.dtype.itemsize
        return self._device.view(self._memory, offset, shape, section.dtype)

    def rows(self, name: str) -> list[Buffer]:
        """A buffer's entries along its first axis, each with a first axis of 1; the same memory."""
        first, *rest = self._sections[name].shape
        each = math.prod(rest)
        return [self.part(name, row * each, (1, *rest)) for row in range(first)]

    def span(self, first: str, last: str) -> Span:
        """The sections from ``first`` to ``last`` as one stretch of bytes."""
        start, end = self._sections[first].offset, self._sections[last].end
        inside = {
            name: _Section(section.offset - start, section.shape, section.dtype)
            for name, section in self._sections.items()
            if start <= section.offset < end
        }
        return Span(self._device.view(self._memory, start, (end - start,), "uint8"), inside)


class Span:
    """Neighbouring sections of an arena, which one upload, download or copy moves.

    Attributes:
        buffer: uint8 [bytes], the stretch of the arena.
    """

    def __init__(self, buffer: Buffer, sections: Mapping[str, _Section]) -> None:
        """Made by `Arena.span`."""
        self.buffer = buffer
        self._sections = sections

    def new_host_bytes(self) -> NDArray[np.uint8]:
        """Zeros of the span's size in main memory."""
        return np.zeros(self.buffer.shape, np.uint8)

    def arrays(self, host_bytes: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Every section by name as a view of a host copy of the span (uint8 [bytes], C-contiguous)."""
        return {
            name: host_bytes[section.offset : section.end].view(section.dtype).reshape(section.shape)
            for name, section in self._sections.items()
        }
