"""How times grow with steps, pixels and batch: fits to the medians of a report's measurements."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from sdrt.benchmarks.document.document import Document, Measurement, Setting
from sdrt.benchmarks.report.derive import median_of

# Where a measurement lies along an axis.
AXES: Final[dict[str, Callable[[Setting], int]]] = {
    "steps": lambda setting: setting.steps,
    "pixels": lambda setting: setting.height * setting.width,
    "batch": lambda setting: setting.batch,
}
# What all points along it have in common.
_OTHERS: Final[dict[str, Callable[[Setting], Setting]]] = {
    "steps": lambda setting: setting._replace(steps=0),
    "pixels": lambda setting: setting._replace(height=0, width=0),
    "batch": lambda setting: setting._replace(batch=0),
}
# Which times can grow with what: a step does not know how many there are.
GROWING: Final = {
    "steps": ("image",),
    "pixels": ("image", "step", "unet", "vae_decoder", "vae_encoder"),
    "batch": ("image", "step", "text_encoder", "unet", "vae_decoder", "vae_encoder"),
}


@dataclass(frozen=True, slots=True)
class Growth:
    """The median time of one quantity of one subject where only one setting varies.

    Attributes:
        model: `Model.name`.
        subject: `Subject.name`.
        quantity: Its key.
        axis: One of `AXES`; pixels are height times width.
        points: Pairs (axis, median seconds), sorted.
    """

    model: str
    subject: str
    quantity: str
    axis: str
    points: tuple[tuple[int, float], ...]

    @property
    def exponent(self) -> float:
        """The e of seconds = c · axis ** e, a line fitted by least squares to the logarithms of both."""
        return statistics.linear_regression(*self._logarithms()).slope

    @property
    def r_squared(self) -> float:
        """The share of the variance that that line explains; 1 where all times are equal."""
        x, y = self._logarithms()
        return 1.0 if len(set(y)) == 1 else statistics.correlation(x, y) ** 2

    @property
    def line(self) -> tuple[float, float]:
        """Seconds for one more on the axis, and seconds at 0: what a call costs whatever the axis.

        Of the straight line that is fitted by least squares to the plain points.
        """
        slope, intercept = statistics.linear_regression(*zip(*self.points, strict=True))
        return slope, intercept

    def _logarithms(self) -> tuple[Sequence[float], Sequence[float]]:
        x, y = zip(*self.points, strict=True)
        return [math.log(value) for value in x], [math.log(value) for value in y]


def growth(document: Document, axis: str, model: str | None = None) -> list[Growth]:
    """Every fit along one axis of `AXES`: at least two different values of it, all else the same."""
    groups: dict[tuple[str, str, str, Setting], dict[int, float]] = defaultdict(dict)
    for entry in document.measurements:
        if entry.quantity in GROWING[axis] and entry.values and model in (None, entry.model):
            _add(
                groups[entry.model, entry.subject, entry.quantity, _OTHERS[axis](entry.setting)], entry, axis
            )
    return [
        Growth(*key[:3], axis, tuple(sorted(points.items())))
        for key, points in groups.items()
        if len(points) > 1
    ]


def _add(points: dict[int, float], entry: Measurement, axis: str) -> None:
    seconds = median_of(entry)
    if 0 < seconds < math.inf:
        points.setdefault(AXES[axis](entry.setting), seconds)
