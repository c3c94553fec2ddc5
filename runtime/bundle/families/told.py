"""Options of a request that a U-Net is told as plain numbers, beside texts and latents.

A row of the U-Net's input holds the numbers of several options, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sdrt.runtime.checks import number, whole
from sdrt.runtime.errors import UsageError

MAX_SIZE: Final = 16_384  # pixels that a model may be told of; no picture is larger
MAX_SCORE: Final = 100.0  # LAION's scores, which the models were trained with, end at 10

# Option → what it is in a request: two numbers of pixels, or a score.
Told = dict[str, list[int] | float]


@dataclass(frozen=True, slots=True)
class PixelOption:
    """Two numbers of pixels, those of the height first.

    Attributes:
        name: The option's.
        of_picture: Whether it is the picture's size where it is not given; otherwise it is (0, 0).
    """

    name: str
    of_picture: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The options of a request that say it."""
        return (self.name,)

    @property
    def count(self) -> int:
        """How many numbers the U-Net is told."""
        return 2

    def usual(self, size: tuple[int, int]) -> Told:
        """What it is for a picture of that size where it is not given."""
        return {self.name: list(size if self.of_picture else (0, 0))}

    def read(self, options: Mapping[str, Any], size: tuple[int, int]) -> Told:
        """What a request says, for a picture of that height and width.

        Raises:
            UsageError: It is no two whole numbers from 0 to `MAX_SIZE`.
        """
        given = options.get(self.name)
        if given is None:
            return self.usual(size)
        if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != 2:
            raise UsageError(f"{self.name} is {given!r}: two whole numbers are wanted, as (height, width)")
        pair = [whole(self.name, entry) for entry in given]
        if not all(0 <= entry <= MAX_SIZE for entry in pair):
            raise UsageError(f"{self.name} is {given!r}: from 0 to {MAX_SIZE} pixels")
        return {self.name: pair}

    def numbers(self, told: Mapping[str, Any], *, unconditional: bool) -> list[float]:  # noqa: ARG002
        """What the U-Net is told, in both halves the same."""
        return list(told[self.name])


@dataclass(frozen=True, slots=True)
class ScoreOption:
    """A score, another one in the unconditional half: that one's pictures are what is moved away from.

    Attributes:
        name: The option's.
        default: What it is where it is not given.
        negative: The option of the unconditional half.
        negative_default: What that is where it is not given.
    """

    name: str
    default: float
    negative: str
    negative_default: float

    @property
    def names(self) -> tuple[str, ...]:
        """The options of a request that say it."""
        return (self.name, self.negative)

    @property
    def count(self) -> int:
        """How many numbers the U-Net is told."""
        return 1

    def usual(self, size: tuple[int, int]) -> Told:  # noqa: ARG002 - as of pixels
        """What both are where they are not given."""
        return {self.name: self.default, self.negative: self.negative_default}

    def read(self, options: Mapping[str, Any], size: tuple[int, int]) -> Told:
        """What a request says.

        Raises:
            UsageError: One is no number from 0 to `MAX_SCORE`.
        """
        told = self.usual(size)
        for name in self.names:
            if (given := options.get(name)) is None:
                continue
            told[name] = score = number(name, given)
            if not 0.0 <= score <= MAX_SCORE:
                raise UsageError(f"{name} is {given!r}: a score from 0 to {MAX_SCORE:g} is wanted")
        return told

    def numbers(self, told: Mapping[str, Any], *, unconditional: bool) -> list[float]:
        """What the U-Net is told in one of the halves."""
        return [told[self.negative if unconditional else self.name]]


ToldOption = PixelOption | ScoreOption


def told_row(options: Sequence[ToldOption], told: Mapping[str, Any], *, unconditional: bool) -> list[float]:
    """The numbers of a row of the U-Net's input.

    Args:
        options: Those of the input, in their order.
        told: A request's, by option.
        unconditional: Whether the row is one of the unconditional half.
    """
    return [entry for option in options for entry in option.numbers(told, unconditional=unconditional)]


def usual_row(options: Sequence[ToldOption], size: tuple[int, int], *, unconditional: bool) -> list[float]:
    """The same for a picture of that height and width where nothing is given."""
    told = {name: value for option in options for name, value in option.usual(size).items()}
    return told_row(options, told, unconditional=unconditional)
