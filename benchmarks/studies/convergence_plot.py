"""A small line plot as SVG: panels side by side, both axes logarithmic, the legend at the right of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

# Of Okabe & Ito's colours, which colour-blind people tell apart, and darker ones of the same.
COLORS: Final = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#000000",
    "#7a6a00",
    "#7f3c8d",
)
DASHES: Final = ("none", "6 3", "2 3")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 400, 340, 62, 58, 48, 150
CELL: Final = LEFT + WIDTH + LEGEND


@dataclass(frozen=True)
class Panel:
    """One plot: ``lines`` are points (x, y), both above 0, by name."""

    title: str
    label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def svg(panels: Sequence[Panel], x_label: str, title: str) -> str:
    """The whole picture as text."""
    width, height = CELL * len(panels), TOP + HEIGHT + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(width / 2, 20, title, size=15),
    ]
    for index, panel in enumerate(panels):
        parts.append(f'<g transform="translate({index * CELL + LEFT} {TOP})">')
        parts.extend(_panel(panel, x_label))
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


@dataclass(frozen=True)
class _Axis:
    """A logarithmic axis from ``low`` to ``high`` over ``length`` pixels."""

    low: float
    high: float
    length: float

    def at(self, value: float) -> float:
        return self.length * math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self, digits: Sequence[int]) -> Iterator[float]:
        for exponent in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1):
            for digit in digits:
                value = float(f"{digit}e{exponent}")
                if self.low <= value <= self.high:
                    yield value


def _panel(panel: Panel, x_label: str) -> Iterator[str]:
    points = [point for line in panel.lines.values() for point in line]
    x_axis = _Axis(min(x for x, _ in points), max(x for x, _ in points), WIDTH)
    exponents = [math.log10(y) for _, y in points]
    y_axis = _Axis(10.0 ** math.floor(min(exponents)), 10.0 ** math.ceil(max(exponents)), HEIGHT)
    yield _text(WIDTH / 2, -12, panel.title, size=13)
    yield _text(WIDTH / 2, HEIGHT + 38, x_label)
    yield f'<g transform="translate(-46 {HEIGHT / 2}) rotate(-90)">{_text(0, 0, panel.label)}</g>'
    for value in x_axis.ticks((1, 2, 5)):
        yield _line(x_axis.at(value), 0, x_axis.at(value), HEIGHT)
        yield _text(x_axis.at(value), HEIGHT + 18, f"{value:g}")
    for value in y_axis.ticks((1,)):
        y = HEIGHT - y_axis.at(value)
        yield _line(0, y, WIDTH, y)
        yield _text(-6, y + 4, f"{value:g}", anchor="end")
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#555"/>'
    for index, (name, line) in enumerate(panel.lines.items()):
        color, dash = COLORS[index % len(COLORS)], DASHES[index // len(COLORS)]
        style = f'stroke="{color}" stroke-width="1.8" stroke-dasharray="{dash}" fill="none"'
        path = " ".join(f"{x_axis.at(x):.1f},{HEIGHT - y_axis.at(y):.1f}" for x, y in line)
        yield f'<polyline points="{path}" {style}/>'
        y = 10 + 20 * index
        yield f'<polyline points="{WIDTH + 10},{y} {WIDTH + 32},{y}" {style}/>'
        yield _text(WIDTH + 38, y + 4, name, anchor="start")


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
