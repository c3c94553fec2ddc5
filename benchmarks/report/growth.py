"""How times grow with steps, pixels and batch: fits to the medians of a report's measurements."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from sdrt.benchmarks.document.document import Document
from sdrt.benchmarks.report.derive import Setting, numbers, percentile, setting_of

AXES: Final = ("steps", "pixels", "batch")
# Which times can grow with what: a step does not know how many there are.
GROWING: Final = {
    "steps": ("image",),
    "pixels": ("image", "step", "unet", "vae_decoder", "vae_encoder"),
    "batch": ("image", "step", "text_encoder", "unet", "vae_decoder", "vae_encoder"),
}


class Line(NamedTuple):
    """``y = slope · x + intercept`` by least squares, and the share of y's variance that it explains."""

    slope: float
    intercept: float
    r_squared: float


def least_squares(points: Sequence[tuple[float, float]]) -> Line:
    """Fit a line to points (x, y). R² is 1 where every y is the same.

    Raises:
        ValueError: Fewer than two different x.
    """
    count = len(points)
    if len({x for x, _ in points}) < 2:
        raise ValueError(f"a line needs two different x, and these points have fewer: {points}")
    x_mean, y_mean = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / spread
    intercept = y_mean - slope * x_mean
    total = sum((y - y_mean) ** 2 for _, y in points)
    left = sum((y - slope * x - intercept) ** 2 for x, y in points)
    return Line(slope, intercept, 1.0 if total == 0 else 1 - left / total)


@dataclass(frozen=True, slots=True)
class Growth:
    """The median time of one quantity of one subject where only one setting varies.

    Attributes:
        model: `Model.name`.
        subject: `Subject.name`.
        quantity: Its key.
        axis: ``steps``, ``pixels`` (height times width) or ``batch``.
        setting: Of the first point: all but the axis is the same in the others.
        points: Pairs (axis, median seconds), sorted.
        exponent: e of seconds = c · axis ** e, a line fitted by least squares to the logarithms of both.
        r_squared: Of that line; 1 by construction of two points.
        fixed: Seconds at 0 of the straight line fitted by least squares to the plain points: what a call
            costs whatever the axis.
        each: Seconds for one more on the axis, of the same line.
    """

    model: str
    subject: str
    quantity: str
    axis: str
    setting: Setting
    points: tuple[tuple[int, float], ...]
    exponent: float
    r_squared: float
    fixed: float
    each: float


def growth(document: Document, axis: str, model: str | None = None) -> list[Growth]:
    """Every fit along one axis of `AXES`: at least two different values of it, all else the same."""
    groups: dict[tuple[str, str, str, Setting], dict[int, float]] = defaultdict(dict)
    settings: dict[tuple[str, str, str, Setting], Setting] = {}
    for entry in document.measurements:
        if entry.quantity not in GROWING[axis] or not entry.values or model not in (None, entry.model):
            continue
        setting = setting_of(entry)
        key = (entry.model, entry.subject, entry.quantity, _others(setting, axis))
        seconds = percentile(numbers(entry), 50)
        if 0 < seconds < math.inf:
            settings.setdefault(key, setting)
            groups[key].setdefault(_along(setting, axis), seconds)
    return [
        _fit(*key[:3], axis, settings[key], tuple(sorted(points.items())))
        for key, points in groups.items()
        if len(points) > 1
    ]


def _along(setting: Setting, axis: str) -> int:
    if axis == "pixels":
        return setting.height * setting.width
    return setting.steps if axis == "steps" else setting.batch


def _others(setting: Setting, axis: str) -> Setting:
    """The setting without what varies."""
    if axis == "pixels":
        return setting._replace(height=0, width=0)
    return setting._replace(steps=0) if axis == "steps" else setting._replace(batch=0)


def _fit(
    model: str,
    subject: str,
    quantity: str,
    axis: str,
    setting: Setting,
    points: tuple[tuple[int, float], ...],
) -> Growth:
    power = least_squares([(math.log(x), math.log(y)) for x, y in points])
    line = least_squares(points)
    return Growth(
        model,
        subject,
        quantity,
        axis,
        setting,
        points,
        power.slope,
        power.r_squared,
        line.intercept,
        line.slope,
    )
