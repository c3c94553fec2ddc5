"""What LoRA files add to a tensor, one class for each kind, in NumPy.

A product of factors is added up as PyTorch's BLAS (MKL) does it: fused multiply-adds in float32, one after
the other along the rank. NumPy's own BLAS takes other orders in parts of a product. Of large layers, where
this would take seconds, the product is made in float64 and rounded once; the two differ in the last bit. What
follows is float32: the product times the scale, as PEFT has it, and the sum with the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
_FUSED_RANK: Final = 4  # up to which it is done for layers of any size: half a second for SD 1.5's
_FUSED_WORK: Final = 1 << 24  # multiplications of a layer up to which it is done for any rank: 15 ms
_FUSED_TILE: Final = 1 << 14  # numbers at once: in float64 they stay in the cache
# Of one tile in float64: multiplications that no build of OpenBLAS shares out among threads, which would wait
# for each other while several tensors are merged, and whose number could show in the last bit.
_TILE_WORK: Final = 1 << 18
_TILE_WIDTH: Final = 128  # columns; half of them of large ranks, whose tiles would be too flat


class Change(Protocol):
    """One file's change of one tensor."""

    def added(self, base: Floats, weight: float) -> Floats:
        """What is to be added to a tensor.

        Args:
            base: The tensor as the checkpoint has it, in float32, whatever its order in memory.
            weight: Of the file, such as 0.8.

        Returns:
            float32 of the same shape.
        """
        ...


class Product(Protocol):
    """A change that does not depend on the tensor, before its scale: what a `Scaled` holds."""

    def numbers(self, base: Floats) -> Floats:
        """As float32 of the shape of ``base``, best in its order in memory; the caller may write into it."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """A product times alpha over rank, and times the file's weight."""

    product: Product
    scale: float

    def added(self, base: Floats, weight: float) -> Floats:
        """See `Change`."""
        numbers = self.product.numbers(base)
        numbers *= np.float32(self.scale * weight)
        return numbers


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """LoRA (Hu et al. 2021): ``up @ down``; of a convolution LoCon's.

    Attributes:
        up: [out, rank].
        down: [rank, rest of the tensor's shape in one].
    """

    up: Floats
    down: Floats

    def numbers(self, base: Floats) -> Floats:
        """See `Product`."""
        return _matrix_product(self.up, self.down, base)


@dataclass(frozen=True, slots=True, eq=False)
class Tucker:
    """A convolution's LoRA with a factor in the middle (LyCORIS: Tucker's decomposition).

    Attributes:
        up: [out, rank].
        middle: [rank, rank, height, width].
        down: [rank, in].
    """

    up: Floats
    middle: Floats
    down: Floats

    def numbers(self, base: Floats) -> Floats:
        """See `Product`."""
        up, middle, down = (factor.astype(np.float64) for factor in (self.up, self.middle, self.down))
        outer, inner = middle.shape[:2]
        # First what leaves less in between: with very unequal ranks the other would fill the memory.
        if len(up) * inner <= outer * down.shape[1]:
            kernel = np.tensordot(np.tensordot(up, middle, axes=(1, 0)), down, axes=(1, 0))
        else:
            kernel = np.tensordot(up, np.tensordot(middle, down, axes=(1, 0)), axes=(1, 0))
        # [out, height, width, in]
        return np.moveaxis(kernel, -1, 1).astype(np.float32).reshape(base.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Hadamard:
    """LoHa (Hyeon-Woo et al. 2022, FedPara): two products, multiplied number by number."""

    first: Product
    second: Product

    def numbers(self, base: Floats) -> Floats:
        """See `Product`."""
        numbers = self.first.numbers(base)
        numbers *= self.second.numbers(base)
        return numbers


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """LoKr: Kronecker's product of a small matrix [a, b] and a block [out / a, in / b, …]."""

    first: Floats
    second: Floats

    def numbers(self, base: Floats) -> Floats:
        """See `Product`."""
        ends = self.second.shape[2:]
        small = self.first.reshape(*_spread(self.first), *(1 for _ in ends))
        block = self.second.reshape(1, self.second.shape[0], 1, *self.second.shape[1:])
        product: Floats = (small * block).reshape(base.shape)
        return product


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """All numbers of a tensor: ``diff``, ``diff_b``, and norms."""

    values: Floats

    def numbers(self, base: Floats) -> Floats:
        """See `Product`."""
        return self.values.reshape(base.shape).copy()


@dataclass(frozen=True, slots=True, eq=False)
class Rescaled:
    """(IA)³ (Liu et al. 2022): every output or input of a layer grows by a share of itself.

    Attributes:
        shares: They, in a shape that broadcasts against the tensor.
    """

    shares: Floats

    def numbers(self, base: Floats) -> Floats:
        """See `Product`."""
        return base * self.shares


@dataclass(frozen=True, slots=True, eq=False)
class Decomposed:
    """DoRA (Liu et al. 2024): the changed tensor is brought to lengths that were learned.

    As stable-diffusion-webui and ComfyUI have it, the weight goes the straight way from the tensor to the
    whole of the change; at 1 that is PEFT's and LyCORIS's.

    Attributes:
        inner: The change of direction.
        lengths: Of each output, or of each input, in a shape that broadcasts against the tensor.
    """

    inner: Change
    lengths: Floats

    def added(self, base: Floats, weight: float) -> Floats:
        """See `Change`."""
        changed = self.inner.added(base, 1.0)
        changed += base
        axes = tuple(axis for axis, size in enumerate(self.lengths.shape) if size == 1)
        given = np.sqrt(np.sum(np.square(changed, dtype=np.float64), axis=axes, keepdims=True))
        # What is all zeros has no direction.
        changed *= np.divide(self.lengths, given, out=np.zeros_like(given), where=given > 0).astype(
            np.float32
        )
        changed -= base
        changed *= np.float32(weight)
        return changed


def _spread(matrix: Floats) -> tuple[int, int, int, int]:
    return matrix.shape[0], 1, matrix.shape[1], 1


def _matrix_product(left: Floats, right: Floats, base: Floats) -> Floats:
    """``left @ right`` in the shape of ``base``, and for a matrix in its order in memory."""
    rank = left.shape[1]
    fused = rank <= _FUSED_RANK or left.size * right.shape[1] <= _FUSED_WORK
    multiply = _fused if fused else _tiles
    if base.ndim == 2 and base.flags.f_contiguous:
        return multiply(right.T, left.T).T
    return multiply(left, right).reshape(base.shape)


def _fused(left: NDArray[Any], right: NDArray[Any]) -> Floats:
    """A product of matrices by fused multiply-adds in float32.

    The product of two float32 numbers is exact in float64, and so is nearly every sum with a third.
    """
    (rows, rank), columns = left.shape, right.shape[1]
    wide_left, wide_right = left.T.astype(np.float64, order="C"), right.astype(np.float64, order="C")
    product = np.empty((rows, columns), np.float32)
    step = max(1, _FUSED_TILE // columns)
    for row in range(0, rows, step):
        tile = product[row : row + step]
        total = np.zeros(tile.shape)
        term = np.empty_like(total)
        for index in range(rank):
            np.multiply(wide_left[index, row : row + step, None], wide_right[index], out=term)
            term += total
            tile[...] = term  # rounded to float32
            total[...] = tile
    return product


def _tiles(left: NDArray[Any], right: NDArray[Any]) -> Floats:
    """A product of matrices, tile by tile."""
    (rows, rank), columns = left.shape, right.shape[1]
    wide_left, wide_right = left.astype(np.float64, order="C"), right.astype(np.float64, order="C")
    product = np.empty((rows, columns), np.float32)
    width = _TILE_WIDTH if rank * _TILE_WIDTH**2 <= 2 * _TILE_WORK else _TILE_WIDTH // 2
    height = max(1, _TILE_WORK // (rank * width))
    for column in range(0, columns, width):
        factor = np.ascontiguousarray(wide_right[:, column : column + width])
        for row in range(0, rows, height):
            tile = wide_left[row : row + height] @ factor
            product[row : row + height, column : column + width] = tile
    return product
