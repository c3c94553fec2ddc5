"""What the plots of a report are made of: axes, marks and labels as SVG within a page.

Drawings are `WIDTH` units wide, about as many as a phone has pixels, so that text keeps its size there.
Colours are those of the page's style sheet: of a subject by the class ``s0`` … ``s6``, of a part by ``p0`` …
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 360
COLORS: Final = 7  # subjects that have a colour of their own; more begin again, with the next mark
TEXT: Final = 12.0  # size of letters
ADVANCE: Final = 0.58  # mean width of a letter over its size, of the wider fonts
# Paths around the origin, some 8 units across: what is told by a colour is told by a shape, too.
MARKS: Final = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "M-3.6,-3.6h7.2v7.2h-7.2z",
    "M0,-4.6l4.4,8h-8.8z",
    "M0,-5l5,5l-5,5l-5,-5z",
    "M0,4.6l4.4,-8h-8.8z",
    "M-1.5,-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "M-4.2,-2.4l1.8,-1.8l2.4,2.4l2.4,-2.4l1.8,1.8l-2.4,2.4l2.4,2.4l-1.8,1.8l-2.4,-2.4l-2.4,2.4l-1.8,-1.8"
    "l2.4,-2.4z",
)


def drawing(title: str, height: float, parts: Iterable[str]) -> str:
    """A whole SVG element; ``title`` is what a screen reader says."""
    label = escape(title)
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}"><title>{label}</title>{"".join(parts)}</svg>'
    )


def text(x: float, y: float, words: str, kind: str = "", *, anchor: str = "start") -> str:
    """Words with their baseline at y; ``kind`` is a class: ``soft``, ``strong`` …"""
    where = f'<text x="{x:.1f}" y="{y:.1f}"'
    how = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor != "start" else "")
    return f"{where}{how}>{escape(words)}</text>"


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> str:
    """A straight one."""
    return f'<path class="{kind}" d="M{x1:.1f},{y1:.1f}L{x2:.1f},{y2:.1f}"/>'


def polyline(points: Sequence[tuple[float, float]], kind: str) -> str:
    """Through points."""
    return f'<path class="{kind}" d="M{"L".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def dots(points: Iterable[tuple[float, float]], kind: str = "dots") -> str:
    """Many small round ones, as one path."""
    return f'<path class="{kind}" d="{"".join(f"M{x:.1f},{y:.1f}h0" for x, y in points)}"/>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A rectangle."""
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}"/>'


def mark(x: float, y: float, subject: int) -> str:
    """The shape of the subject at this index, in the colour around it."""
    shape = MARKS[(subject + subject // COLORS) % len(MARKS)]
    return f'<path class="mark" transform="translate({x:.1f} {y:.1f})" d="{shape}"/>'


def colored(subject: int, parts: Iterable[str]) -> str:
    """Parts in a subject's colour."""
    return f'<g class="s{subject % COLORS}">{"".join(parts)}</g>'


def key(subject: int) -> str:
    """A mark to stand in a line of text."""
    return (
        f'<svg class="key s{subject % COLORS}" viewBox="-6 -6 12 12" width="12" height="12" '
        f'aria-hidden="true">{mark(0, 0, subject)}</svg>'
    )


def width_of(words: str, size: float = TEXT) -> float:
    """About how wide words are."""
    return len(words) * size * ADVANCE


def shortened(words: str, width: float, size: float = TEXT) -> str:
    """Words that fit, cut with an ellipsis if need be."""
    fitting = max(2, int(width / size / ADVANCE))
    return words if len(words) <= fitting else words[: fitting - 1].rstrip() + "…"


@dataclass(frozen=True, slots=True)
class Axis:
    """A logarithmic axis: ``low`` at ``start`` and ``high`` at ``end``, in units of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Where a value lies."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within it: decades, or 1-2-5, or evenly spaced ones where it spans less."""
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = list(self._digits(digits))
            if 3 <= len(found) <= most:
                return found
        decades = list(self._digits((1,)))
        return decades[:: math.ceil(len(decades) / most)] if len(decades) > most else self._even(most)

    def _digits(self, digits: Sequence[int]) -> Iterator[float]:
        for exponent in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1):
            for digit in digits:
                value = float(f"{digit}e{exponent}")
                if self.low <= value <= self.high:
                    yield value

    def _even(self, most: int) -> list[float]:
        least = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(least))
        step = next(step * power for step in (1, 2, 5, 10) if step * power >= least)
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step) + 1)]


def axis_around(values: Iterable[float], start: float, end: float, margin: float = 1.15) -> Axis:
    """One that holds positive values with some space at both ends."""
    found = list(values)
    return Axis(min(found) / margin, max(found) * margin, start, end)


def spread_out(places: Sequence[float], pitch: float, low: float, high: float) -> list[float]:
    """Places moved as little as it takes to be ``pitch`` apart, in their order, from ``low`` to ``high``."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = [0.0] * len(places)
    floor = low
    for index in order:
        moved[index] = max(places[index], floor)
        floor = moved[index] + pitch
    ceiling = high
    for index in reversed(order):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - pitch
    return moved


@dataclass(frozen=True, slots=True)
class Place:
    """A rectangle that is taken."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Place) -> bool:
        """Whether they overlap."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )
