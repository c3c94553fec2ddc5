"""The roofline of a report: what the networks reach below what the machine can do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sdrt.benchmarks.document.document import Ceilings, Document, Model
from sdrt.benchmarks.report.formatting import one, title
from sdrt.benchmarks.report.limits import Share, attainable, shares
from sdrt.benchmarks.report.plots import subject_order, tick
from sdrt.benchmarks.report.svg import (
    WIDTH,
    Axis,
    axis_around,
    colored,
    drawing,
    line,
    mark,
    polyline,
    text,
    width_of,
)

LEFT, RIGHT, TOP, BOTTOM = 46.0, WIDTH - 8.0, 68.0, 252.0


def roofline(document: Document, model: Model) -> str | None:
    """flop/s over flop/B, both logarithmic: the ceilings, and every subject's networks at the main size."""
    found = main_shares(document, model)
    if not found or document.ceilings is None:
        return None
    ceilings = document.ceilings
    ridge = ceilings.flop_per_s / ceilings.bytes_per_s
    across = axis_around((ridge, *(share.intensity for share in found)), LEFT, RIGHT, 2.2)
    up = axis_around((ceilings.flop_per_s, *(share.flop_per_s for share in found)), BOTTOM, TOP, 1.35)
    parts = [*_axes(across, up), *_roof(ceilings, ridge, across, up), *_guides(found, across, up)]
    for index, name, _ in subject_order(document, model)[::-1]:  # ours last, above the others
        mine = [share for share in found if share.subject == name]
        parts.append(
            colored(
                index, [mark(across.at(share.intensity), up.at(share.flop_per_s), index) for share in mine]
            )
        )
    what = f"{model.name}: roofline, speed of each network over its operations per byte, logarithmic axes"
    return drawing(what, BOTTOM + 36, parts)


def main_shares(document: Document, model: Model) -> list[Share]:
    """Of the main size, one picture at a time."""
    return [
        share
        for share in shares(document, model.name)
        if share.setting.batch == 1
        and (
            share.component == "text_encoder"
            or (share.setting.height, share.setting.width) in model.sizes[:1]
        )
    ]


def _axes(across: Axis, up: Axis) -> Iterator[str]:
    for value in up.ticks(5):
        yield line(LEFT, up.at(value), RIGHT, up.at(value))
        yield text(LEFT - 6, up.at(value) + 4, tick(value, "flop/s"), "soft small", anchor="end")
    for value in across.ticks(5):
        yield line(across.at(value), BOTTOM, across.at(value), BOTTOM + 4)
        yield text(across.at(value), BOTTOM + 17, f"{value:g}", "soft small", anchor="middle")
    yield line(LEFT, BOTTOM, RIGHT, BOTTOM, "base")
    yield text((LEFT + RIGHT) / 2, BOTTOM + 32, "operations per byte (flop/B)", "soft small", anchor="middle")


def _roof(ceilings: Ceilings, ridge: float, across: Axis, up: Axis) -> Iterator[str]:
    low = max(across.low, up.low / ceilings.bytes_per_s)
    corners = [low, ridge, across.high]
    yield polyline([(across.at(x), up.at(attainable(ceilings, x))) for x in corners], "roof")
    peak = one(ceilings.flop_per_s, "flop/s")
    yield text(across.at(ridge) + 2, up.at(ceilings.flop_per_s) - 6, peak, "soft small halo")
    middle = (low * ridge) ** 0.5
    x, y = across.at(middle), up.at(attainable(ceilings, middle))
    yield text(x + 8, y + 14, one(ceilings.bytes_per_s, "B/s"), "soft small halo")


def _guides(found: Sequence[Share], across: Axis, up: Axis) -> Iterator[str]:
    """A line at the intensity of each network, named above the frame with the first subject's share."""
    first: dict[str, Share] = {}
    for share in found:
        first.setdefault(share.component, share)
    ends = [-1.0] * 4
    for share in sorted(first.values(), key=lambda share: share.intensity):
        x = across.at(share.intensity)
        words = f"{title(share.component)} {share.share:.0%}"
        width = width_of(words, 11)
        left = min(max(x - width / 2, LEFT), RIGHT - width)
        row = next((row for row, end in enumerate(ends) if end < left), len(ends) - 1)
        ends[row] = left + width + 6
        base = 54.0 - 14 * row
        yield line(x, base + 4, x, up.at(share.attainable), "leader")
        yield line(x, up.at(share.attainable), x, BOTTOM, "guide")
        yield text(left, base, words, "small halo")
