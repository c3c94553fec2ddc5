"""PyTorch's CPU generator: MT19937 and the normal numbers that ``torch.randn`` makes of it (NumPy).

Source of the generator: Matsumoto, Nishimura, "Mersenne Twister", ACM TOMACS 8(1), 1998, seeded by
the ``init_genrand`` of 2002, which is NumPy's legacy seeding too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BLOCK = 16  # Box-Muller works on blocks: eight radii, eight angles


class TorchCPUGenerator:
    """A ``torch.Generator("cpu").manual_seed(seed)``, for normal float32 numbers.

    Successive draws continue the stream as torch's do. torch seeds with the low 32 bits alone:
    seeds that are equal modulo 2**32 give the same numbers.

    Only draws of ``dtype=torch.float32`` are matched; torch draws float16 and float64 differently.

    Args:
        seed: 0 ≤ seed < 2**64. torch also takes -2**63 ≤ seed < 0, as seed + 2**64.

    Raises:
        ValueError: seed is out of range.
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; it must be at least 0 and below 2**64")
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)  # its stream is frozen (NEP 19)
        self._second: float | None = None

    def normal(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """``torch.randn(shape, generator=self, dtype=torch.float32)``.

        Fewer than 16 elements are made one by one in double precision, and equal torch's. From 16
        on torch works in float32 with approximations that depend on its build: on x86 with AVX2,
        where the angle is the float32 product that we take too, the difference is a few ulps;
        elsewhere it is up to 3.8e-6.

        Args:
            shape: of the result; every axis ≥ 0.

        Returns:
            float32, C-contiguous.

        Raises:
            ValueError: an axis is negative.
        """
        out = np.empty(shape, np.float32)
        flat = out.reshape(-1)
        if out.size < _BLOCK:
            flat[:] = [self._next_double() for _ in range(out.size)]
            return out
        uniform = self._uniform_float32(out.size)
        whole = out.size - out.size % _BLOCK
        flat[:whole] = _box_muller_blocks(uniform[:whole])
        if whole < out.size:  # torch redraws the last 16, over the end of the last whole block
            flat[-_BLOCK:] = _box_muller_blocks(self._uniform_float32(_BLOCK))
        return out

    def _words(self, count: int) -> NDArray[np.uint32]:
        return self._twister.randint(0, 2**32, count, dtype=np.uint32)

    def _uniform_float32(self, count: int) -> NDArray[np.float32]:
        words = self._words(count) & np.uint32(0xFFFFFF)
        return words.astype(np.float32) * np.float32(2**-24)

    def _uniform_double(self) -> float:
        high, low = (int(word) for word in self._words(2))
        return float((high << 32 | low) & (2**53 - 1)) * 2.0**-53

    def _next_double(self) -> float:
        # The sine half waits for the next small draw, however many large draws lie between.
        if self._second is not None:
            value, self._second = self._second, None
            return value
        angle = 2 * math.pi * self._uniform_double()
        radius = math.sqrt(-2 * math.log1p(-self._uniform_double()))
        self._second = radius * math.sin(angle)
        return radius * math.cos(angle)


def torch_cpu_normal(shape: Sequence[int], seed: int) -> NDArray[np.float32]:
    """The first draw of a :class:`TorchCPUGenerator`; arguments, result and errors are its."""
    return TorchCPUGenerator(seed).normal(shape)


def _box_muller_blocks(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Float32 Box-Muller over blocks of 16, each 8 x (radius) then 8 x (angle); float32 ``[16 n]``.

    Every float32 operation is correctly rounded (through float64), so all hosts agree.
    """
    blocks = uniform.reshape(-1, 2, _BLOCK // 2)
    log_u = np.log(1.0 - blocks[:, 0].astype(np.float64)).astype(np.float32)
    angle = (np.float32(2 * np.pi) * blocks[:, 1]).astype(np.float64)
    radius = np.sqrt(np.float32(-2) * log_u)
    out = np.empty_like(blocks)
    out[:, 0] = radius * np.cos(angle).astype(np.float32)
    out[:, 1] = radius * np.sin(angle).astype(np.float32)
    return out.reshape(-1)
