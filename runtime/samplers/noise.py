"""Noise for the sampler: one stream per image, so that a seed gives its picture in any batch.

``philox`` gives the numbers of PyTorch's CUDA generator, ``cpu`` those of its CPU generator. Both
match a diffusers call that passes a list of generators, one per image, each with its own seed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.mt19937 import TorchCPUGenerator
from sdrt.kernels.philox import philox_normal
from sdrt.runtime.checks import choice
from sdrt.runtime.errors import UsageError

Rng = Literal["philox", "cpu"]
RNGS: tuple[Rng, ...] = get_args(Rng)
DEFAULT_RNG: Rng = "philox"


class _Stream(Protocol):
    """The draws of one image: all of one shape, each reachable by its number."""

    def draw(self, index: int, shape: tuple[int, ...]) -> NDArray[np.float32]: ...


class NoiseSource:
    """Normal noise for N images; image n's numbers depend on ``seeds[n]`` alone.

    A stream's draws are numbered from 0 on in the order in which diffusers' pipelines make them
    (`sdrt.runtime.request.picture.draws_at_start`, then the rows that add noise), whether or not the others
    are asked for: a caller who brings latents gets the step noise of a run that drew them. All draws of a
    stream count as having the shape that is asked for, but for draw 0 where its own was given.

    Make one with :func:`noise_source`.
    """

    def __init__(self, seeds: Sequence[int], streams: Sequence[_Stream]) -> None:
        self.seeds = tuple(seeds)
        self._streams = tuple(streams)

    def draw(self, number: int, shape_per_image: Sequence[int]) -> NDArray[np.float32]:
        """Draw ``number`` ≥ 0 of each stream: float32 ``[N, *shape_per_image]``, unit variance.

        Draws may be asked for in any order; in ascending order nothing is drawn twice.

        Raises:
            UsageError: The number is negative.
        """
        if number < 0:
            raise UsageError(f"draw {number} was asked for; draws count from 0")
        return np.stack([stream.draw(number, tuple(shape_per_image)) for stream in self._streams])


def noise_source(rng: str, seeds: Sequence[int], first: tuple[int, ...] | None = None) -> NoiseSource:
    """A :class:`NoiseSource` of kind ``rng`` with one stream per seed.

    For a batch from one base seed, image k takes ``seed + k`` (as in AUTOMATIC1111's web UI); the
    caller makes the list.

    Args:
        rng: ``philox`` (PyTorch's CUDA generator) or ``cpu`` (its CPU generator, which knows seeds
            modulo 2**32 only).
        seeds: one per image, at least one, each 0 ≤ seed < 2**64.
        first: the shape per image of draw 0, where it is not that of the others.

    Raises:
        UsageError: unknown rng, no seed, or a seed that :func:`validate_seed` refuses.
    """
    stream = _STREAMS[choice("rng", rng, RNGS, "; choose one of")]
    if not seeds:
        raise UsageError("no seed was given; noise needs one per image")
    valid = [validate_seed(seed) for seed in seeds]
    return NoiseSource(valid, [stream(seed, first) for seed in valid])


def validate_seed(seed: int) -> int:
    """``seed`` as an int, if it is an integer (not a bool) with 0 ≤ seed < 2**64.

    Raises:
        UsageError: it is not. PyTorch's negative seed s is seed s + 2**64 here.
    """
    if isinstance(seed, bool | np.bool):
        raise UsageError(f"seed is {seed!r}; it must be an integer")
    try:
        value = operator.index(seed)
    except TypeError:
        raise UsageError(f"seed is {seed!r}; it must be an integer") from None
    if not 0 <= value < 2**64:
        raise UsageError(f"seed is {value}; it must be at least 0 and below 2**64 (0 is a seed)")
    return value


def slerp(first: NDArray[np.float32], second: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """Spherical interpolation (Shoemake 1985) of two arrays taken as vectors, float32 of their shape.

    Noise stays noise: between two independent draws of unit variance every result has unit variance, which
    their weighted mean has not. Where the two point the same way, it is the weighted mean.
    """
    a, b = first.astype(np.float64).ravel(), second.astype(np.float64).ravel()
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = float(np.clip(a @ b / norms, -1.0, 1.0)) if norms > 0 else 1.0
    angle = np.arccos(cosine)
    if np.sin(angle) < 1e-6:
        mixed = (1 - share) * a + share * b
    else:
        mixed = (np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle)
    return mixed.astype(np.float32).reshape(first.shape)


class _PhiloxStream:
    def __init__(self, seed: int, _first: tuple[int, ...] | None) -> None:  # draws do not depend on others
        self._seed = seed

    def draw(self, index: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return philox_normal(shape, self._seed, offset=index)


class _TorchCPUStream:
    """Draws by number from a sequential generator: it skips ahead, and starts anew to go back."""

    def __init__(self, seed: int, first: tuple[int, ...] | None) -> None:
        self._seed, self._first = seed, first
        self._restart(())

    def draw(self, index: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if shape != self._shape or index < self._drawn:
            self._restart(shape)
        while self._drawn < index:
            self._next()
        return self._next()

    def _restart(self, shape: tuple[int, ...]) -> None:
        self._generator = TorchCPUGenerator(self._seed)
        self._shape = shape
        self._drawn = 0

    def _next(self) -> NDArray[np.float32]:
        shape = self._shape if self._drawn or self._first is None else self._first
        self._drawn += 1
        return self._generator.normal(shape)


_STREAMS: dict[str, Callable[[int, tuple[int, ...] | None], _Stream]] = {
    "philox": _PhiloxStream,
    "cpu": _TorchCPUStream,
}
