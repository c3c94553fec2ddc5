"""From the parts of one layer's change to what is added to its tensors: one function for each kind of change.

Which parts belong together, how their axes stand and what alpha divides is as LyCORIS writes it; what PEFT
writes otherwise is said where it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sdrt.runtime.lora.changes import (
    Change,
    Decomposed,
    Difference,
    Floats,
    Hadamard,
    Kronecker,
    LowRank,
    Product,
    Rescaled,
    Scaled,
    Tucker,
)

WEIGHT, BIAS = "weight", "bias"
Shape = tuple[int, ...]
_LENGTHS: Final = ("dora_scale", "magnitude")


class Parts:
    """The parts of one layer's change; each is taken once, and none may be left."""

    def __init__(self, tensors: Mapping[str, Floats], scale: float | None = None) -> None:
        """Take them.

        Args:
            tensors: Part → tensor.
            scale: Alpha over rank where something else says it than the file's tensors.
        """
        self._left = dict(tensors)
        self._scale = scale
        self._taken = False

    def __contains__(self, part: str) -> bool:
        return part in self._left

    def take(self, part: str) -> Floats:
        """A part.

        Raises:
            ValueError: It is not there.
        """
        if part not in self._left:
            raise ValueError(f"its {part} is missing")
        self._taken = True
        return self._left.pop(part)

    def scale(self, rank: int | None) -> float:
        """Alpha over the rank; 1 where there is no alpha, or no rank.

        Raises:
            ValueError: Alpha is no single number.
        """
        alpha = self._left.pop("alpha", None)
        if self._scale is not None:
            return self._scale
        if alpha is None or rank is None:
            return 1.0
        if alpha.size != 1:
            raise ValueError(f"its alpha has the shape {list(alpha.shape)}, a single number is wanted")
        return float(alpha.reshape(())) / rank

    def end(self) -> None:
        """Raise ValueError if a part is left, or there was none but alpha."""
        left = sorted(part for part in self._left if part != "alpha" or not self._taken)
        if left:
            raise ValueError(f"its {left[0]} belongs to no kind of change that is known")


@dataclass(frozen=True, slots=True)
class Target:
    """Shapes of a layer's tensors, by their names; a layer may have no bias."""

    shapes: Mapping[str, Shape]

    def shape(self, tensor: str) -> Shape:
        """The shape of one of them.

        Raises:
            ValueError: The layer has none such.
        """
        if tensor not in self.shapes:
            raise ValueError(f"the model's layer has no {tensor}")
        return self.shapes[tensor]


def changes_of(parts: Parts, target: Target) -> Iterator[tuple[str, Change]]:
    """The changes of a layer's tensors.

    Args:
        parts: All that the file has for the layer.
        target: The layer.

    Yields:
        ``weight`` or ``bias``, and its change.

    Raises:
        ValueError: A part is missing, is one too many, or does not fit the layer; the message says which.
    """
    for kind in _KINDS:
        if kind.sign in parts:
            shape = target.shape(WEIGHT)
            if kind.read is not _full and len(shape) < 2:
                raise ValueError("the model's layer has no matrix")
            yield WEIGHT, _decomposed(parts, kind.read(parts, shape), shape)
            break
    if "ia3_factor" in parts:
        yield from _rescaled_by(parts, target)
    for part, tensor in (("w_norm", WEIGHT), ("b_norm", BIAS), ("diff_b", BIAS)):
        if part in parts:
            yield tensor, Scaled(_difference(parts.take(part), target.shape(tensor), part), 1.0)
    parts.end()


def _low_rank(parts: Parts, shape: Shape) -> Change:
    up, down = parts.take("up"), parts.take("down")
    if "middle" in parts:
        return _tucker(parts, up, down, shape)
    rank = _rank(up, 1, "up")
    _expect(up, (shape[0], rank), "up")
    _expect(down, (rank, *shape[1:]), "down")
    return Scaled(LowRank(up.reshape(-1, rank), down.reshape(rank, -1)), parts.scale(rank))


def _tucker(parts: Parts, up: Floats, down: Floats, shape: Shape) -> Change:
    middle = parts.take("middle")
    outer, inner = _rank(up, 1, "up"), _rank(down, 0, "down")
    _expect(up, (shape[0], outer), "up")
    _expect(middle, (outer, inner, *shape[2:]), "middle")
    _expect(down, (inner, *shape[1:2]), "down")
    kernel = middle.reshape(outer, inner, *_kernel(shape))
    return Scaled(Tucker(up.reshape(-1, outer), kernel, down.reshape(inner, -1)), parts.scale(inner))


def _hadamard(parts: Parts, shape: Shape) -> Change:
    products: list[Product] = []
    rank = 1
    for index in (1, 2):
        first, second = parts.take(f"hada_w{index}_a"), parts.take(f"hada_w{index}_b")
        rank = _rank(second, 0, f"hada_w{index}_b")
        if f"hada_t{index}" in parts:
            core = parts.take(f"hada_t{index}")
            products.append(_with_kernel(first, core, second, shape, f"hada_w{index}"))
            continue
        _rank(first, 1, f"hada_w{index}_a")
        _expect(first, (shape[0], rank), f"hada_w{index}_a")
        _expect(second, (rank, math.prod(shape[1:])), f"hada_w{index}_b")
        products.append(LowRank(first.reshape(-1, rank), second.reshape(rank, -1)))
    return Scaled(Hadamard(*products), parts.scale(rank))


def _kronecker(parts: Parts, shape: Shape) -> Change:
    first, rank = _kronecker_factor(parts, "lokr_w1", shape[:2])
    if first.ndim != 2 or not first.size or shape[0] % first.shape[0] or shape[1] % first.shape[1]:
        raise ValueError(
            f"its lokr_w1 has the shape {list(first.shape)}, which does not divide {list(shape)}"
        )
    block_shape = (shape[0] // first.shape[0], shape[1] // first.shape[1], *shape[2:])
    block, other = _kronecker_factor(parts, "lokr_w2", block_shape)
    _expect(block, block_shape, "lokr_w2")
    rank = other if other is not None else rank
    return Scaled(Kronecker(first, block.reshape(block_shape)), parts.scale(rank))


def _kronecker_factor(parts: Parts, name: str, shape: Shape) -> tuple[Floats, int | None]:
    """A factor as it is, or as the product of two (with a kernel between), and the rank of these."""
    if name in parts:
        return parts.take(name), None
    left, right = parts.take(f"{name}_a"), parts.take(f"{name}_b")
    rank = _rank(right, 0, f"{name}_b")
    if f"lokr_t{name[-1]}" in parts:
        product = _with_kernel(left, parts.take(f"lokr_t{name[-1]}"), right, shape, name)
        return product.numbers(np.empty(shape, np.float32)), rank
    columns = math.prod(shape[1:])
    if left.ndim != 2 or right.ndim != 2 or left.shape[0] > shape[0] or right.shape[1] > columns:
        raise ValueError(f"its {name} has the shape {list(left.shape)} x {list(right.shape)}: too large")
    _expect(left, (left.shape[0], rank), f"{name}_a")
    numbers = LowRank(left, right).numbers(np.empty((left.shape[0], right.shape[1]), np.float32))
    return numbers.reshape(shape) if numbers.size == math.prod(shape) else numbers, rank


def _with_kernel(left: Floats, core: Floats, right: Floats, shape: Shape, name: str) -> Product:
    """LyCORIS's form of Tucker's decomposition: [rank, out], [rank, rank, height, width] and [rank, in]."""
    rank = right.shape[0]
    _expect(left, (rank, shape[0]), f"{name}_a")
    _expect(core, (rank, rank, *shape[2:]), f"{name}'s kernel")
    _expect(right, (rank, shape[1]), f"{name}_b")
    return Tucker(
        left.reshape(rank, -1).T, core.reshape(rank, rank, *_kernel(shape)), right.reshape(rank, -1)
    )


def _full(parts: Parts, shape: Shape) -> Change:
    return Scaled(_difference(parts.take("diff"), shape, "diff"), 1.0)


def _difference(values: Floats, shape: Shape, part: str) -> Difference:
    _expect(values, shape, part)
    return Difference(values.reshape(shape))


def _rescaled(parts: Parts, shape: Shape) -> Change:
    """LyCORIS's (IA)³: the number is the share that is added."""
    shares, on_input = parts.take("ia3"), parts.take("on_input")
    if on_input.size != 1:
        raise ValueError("its on_input is not one truth value")
    return Scaled(Rescaled(_along(shares, shape, 1 if on_input.reshape(()) else 0, "weight")), 1.0)


def _rescaled_by(parts: Parts, target: Target) -> Iterator[tuple[str, Change]]:
    """PEFT's (IA)³: the number is the factor, [out, 1] or [1, in]; of outputs it is the bias's, too."""
    factors, shape = parts.take("ia3_factor"), target.shape(WEIGHT)
    if len(shape) < 2:
        raise ValueError("the model's layer has no matrix")
    axis = 1 if factors.ndim > 1 and factors.shape[0] == 1 else 0
    if factors.ndim > 2:  # of a convolution [1, out, 1, 1] or [1, in, 1, 1]
        if shape[0] == shape[1]:
            raise ValueError("its ia3_l may be of the convolution's inputs or outputs, which are as many")
        axis = 0 if factors.size == shape[0] else 1
    shares = _along(factors, shape, axis, "ia3_l") - np.float32(1)
    yield WEIGHT, Scaled(Rescaled(shares), 1.0)
    if axis == 0 and BIAS in target.shapes:
        yield BIAS, Scaled(Rescaled(shares.reshape(target.shape(BIAS))), 1.0)


@dataclass(frozen=True, slots=True)
class _Kind:
    sign: str  # a part that only this kind has
    read: Callable[[Parts, Shape], Change]


_KINDS: Final = (
    _Kind("up", _low_rank),
    _Kind("down", _low_rank),
    _Kind("hada_w1_a", _hadamard),
    _Kind("lokr_w1", _kronecker),
    _Kind("lokr_w1_a", _kronecker),
    _Kind("ia3", _rescaled),
    _Kind("diff", _full),
)


def _decomposed(parts: Parts, change: Change, shape: Shape) -> Change:
    """The change as DoRA has it, if there are lengths."""
    for part in _LENGTHS:
        if part in parts:
            lengths = parts.take(part)
            # LyCORIS: [out, 1, …], or [1, in, …] of files that were trained so. PEFT: always of the outputs.
            axis = 1 if part == "dora_scale" and lengths.ndim > 1 and lengths.shape[0] == 1 else 0
            return Decomposed(change, _along(lengths, shape, axis, part))
    return change


def _along(values: Floats, shape: Shape, axis: int, part: str) -> Floats:
    """Numbers for one axis of a tensor, in a shape that broadcasts against it."""
    if axis >= len(shape) or values.size != shape[axis]:
        raise ValueError(f"its {part} has the shape {list(values.shape)}, the model's tensor {list(shape)}")
    return values.reshape([size if index == axis else 1 for index, size in enumerate(shape)])


def _rank(factor: Floats, axis: int, part: str) -> int:
    if factor.ndim < 2 or not factor.size:
        raise ValueError(f"its {part} has the shape {list(factor.shape)}, a matrix is wanted")
    return int(factor.shape[axis])


def _expect(factor: Floats, shape: Sequence[int], part: str) -> None:
    """Raise ValueError unless a part has a shape, but for axes of 1: a Linear may be a 1 x 1 convolution."""
    if _without_ones(factor.shape) != _without_ones(shape):
        raise ValueError(f"its {part} has the shape {list(factor.shape)}, this model wants {list(shape)}")


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _kernel(shape: Shape) -> Shape:
    """Height and width of a convolution; of a Linear 1 and 1."""
    return (*shape[2:], 1, 1)[:2]
