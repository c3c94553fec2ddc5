"""The plots of a report; each is None where there is nothing to show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

from sdrt.benchmarks.document.document import Document, Model
from sdrt.benchmarks.report.derive import (
    Parts,
    cold_parts,
    distribution,
    find,
    is_time,
    main_setting,
    numbers,
    percentile,
    typical,
    warm_parts,
)
from sdrt.benchmarks.report.formatting import one, scale, title
from sdrt.benchmarks.report.growth import Growth, growth
from sdrt.benchmarks.report.svg import (
    WIDTH,
    Axis,
    Place,
    axis_around,
    box,
    colored,
    dots,
    drawing,
    line,
    mark,
    polyline,
    shortened,
    spread_out,
    text,
    width_of,
)

# The shade of each part, so that the same is the same in every bar.
SHADES: Final = {
    "cold_start": 0,
    "cold_import": 1,
    "cold_load": 2,
    "cold_image": 3,
    "cold_save": 4,
    "text_encoder": 0,
    "unet": 1,
    "step": 1,
    "host": 2,
    "vae_decoder": 3,
    "rest": 5,
}
ROW: Final = 50.0  # from one bar to the next
MOST_DOTS: Final = 300  # of one distribution; beyond it every n-th value is drawn


def subject_order(document: Document, model: Model) -> list[tuple[int, str, str]]:
    """Index (which gives colour and mark), name and label of every subject that a model has values of."""
    with_values = {entry.subject for entry in document.measurements if entry.model == model.name}
    return [
        (index, subject.name, subject.label)
        for index, subject in enumerate(document.subjects)
        if subject.name in with_values
    ]


def bars(document: Document, model: Model, *, cold: bool) -> str | None:
    """Stacked bars: the parts of a cold start or of a warm image, a bar for each subject."""
    split = cold_parts if cold else warm_parts
    found = [(*entry, split(document, model, entry[1])) for entry in subject_order(document, model)]
    found = [entry for entry in found if entry[3]]
    if not found:
        return None
    quantity = "cold_total" if cold else "image"
    setting = main_setting(document, model, quantity)
    # Medians of parts that were measured apart may add up to more than the median of the whole.
    wholes = [
        typical(document, model.name, name, quantity, setting) or _sum(parts) for _, name, _, parts in found
    ]
    unit, longest = scale(wholes, "s"), max(wholes)
    rows: list[str] = []
    for number, ((index, _, label, parts), whole) in enumerate(zip(found, wholes, strict=True)):
        rows.extend(_row_head(index, label, unit.full(whole), ROW * number))
        rows.extend(_segments(parts, ROW * number + 20, WIDTH / longest * whole / max(whole, _sum(parts))))
    what = "parts of a cold start" if cold else "stages of a warm image"
    return drawing(f"{model.name}: {what}, stacked bars", ROW * len(found) - 8, rows)


def _sum(parts: Parts) -> float:
    return sum(seconds for _, seconds in parts)


def _segments(parts: Parts, y: float, per_second: float) -> Iterator[str]:
    x = 0.0
    for name, seconds in parts:
        width = seconds * per_second
        yield box(x, y, width - 1 if width > 2 else width, 18, f"part p{SHADES[name]}")
        shown = one(seconds, "s")
        if width_of(shown, 11) + 8 < width:
            yield text(x + width / 2, y + 13, shown, f"within q{SHADES[name]}", anchor="middle")
        x += width


def part_names(document: Document, model: Model, *, cold: bool) -> list[tuple[int, str]]:
    """Shade and name of each part in `bars`, in their order."""
    split = cold_parts if cold else warm_parts
    found = {
        name: None
        for _, subject, _ in subject_order(document, model)
        for name, _ in split(document, model, subject)
    }
    return sorted((SHADES[name], title(name)) for name in found)


def memory_bars(document: Document, model: Model) -> str | None:
    """Peak memory of a cold start, a bar for each subject; the dark part is its own."""
    setting = main_setting(document, model, "cold_peak_memory")
    found = []
    for index, name, label in subject_order(document, model):
        peak = typical(document, model.name, name, "cold_peak_memory", setting)
        if peak and peak < math.inf:
            found.append(
                (index, label, peak, typical(document, model.name, name, "cold_peak_anonymous", setting))
            )
    if not found:
        return None
    unit = scale((peak for _, _, peak, _ in found), "B")
    per_byte = WIDTH / max(peak for _, _, peak, _ in found)
    rows: list[str] = []
    for number, (index, label, peak, own) in enumerate(found):
        rows.extend(_row_head(index, label, unit.full(peak), ROW * number))
        rows.append(box(0, ROW * number + 20, peak * per_byte, 18, "part p3"))
        if own:
            rows.append(box(0, ROW * number + 20, min(own, peak) * per_byte, 18, "part p1"))
    return drawing(f"{model.name}: peak memory of a cold start, bars", ROW * len(found) - 8, rows)


def _row_head(index: int, label: str, value: str, y: float) -> Iterator[str]:
    """Mark, name and value above a bar or a strip."""
    yield colored(index, [mark(6, y + 9, index)])
    yield text(18, y + 13, shortened(label, 250), "halo")
    yield text(WIDTH, y + 13, value, "strong halo", anchor="end")


def distributions(document: Document, model: Model, quantity: str) -> str | None:
    """Every value of a quantity as a dot, over a box from quartile to quartile with the median's line."""
    setting = main_setting(document, model, quantity)
    rows = []
    for index, name, label in subject_order(document, model):
        entry = find(document, model.name, name, quantity, setting)
        values = [] if entry is None else [value for value in numbers(entry) if 0 < value < math.inf]
        if values:
            rows.append((index, label, values))
    if not rows:
        return None
    height = 46.0 * len(rows)
    axis = axis_around((value for *_, values in rows for value in values), 8, WIDTH - 8, 1.06)
    parts = list(_ticks_below(axis, 0, height, "s" if is_time(quantity) else ""))
    medians = scale((percentile(values, 50) for *_, values in rows), "s")
    for number, (index, label, values) in enumerate(rows):
        parts.extend(_strip(axis, 46.0 * number, index, label, values, medians.full(percentile(values, 50))))
    what = f"{model.name}: distribution of {title(quantity)}, a row for each subject"
    return drawing(what, height + 24, parts)


def _strip(
    axis: Axis, y: float, index: int, label: str, values: Sequence[float], median: str
) -> Iterator[str]:
    spread = distribution(values)
    middle = y + 30
    yield from _row_head(index, label, median, y)
    left, right = axis.at(spread.p25), axis.at(spread.p75)
    kept = values[:: math.ceil(len(values) / MOST_DOTS)]
    # Dots of the same time lie beside each other, in a fixed pattern: the same data gives the same page.
    places = [(axis.at(value), middle + (number * 5 % 9 - 4) * 1.3) for number, value in enumerate(kept)]
    yield colored(
        index,
        [
            box(left - 1, middle - 9, right - left + 2, 18, "quartiles"),
            dots(places),
            line(axis.at(spread.p50), middle - 10, axis.at(spread.p50), middle + 10, "median"),
        ],
    )


def _ticks_below(axis: Axis, top: float, bottom: float, unit: str, most: int = 5) -> Iterator[str]:
    for value in axis.ticks(most):
        yield line(axis.at(value), top, axis.at(value), bottom)
        anchor = "end" if axis.at(value) > WIDTH - 24 else "middle"
        yield text(axis.at(value), bottom + 17, tick(value, unit), "soft", anchor=anchor)


def tick(value: float, unit: str) -> str:
    """As short as it can be."""
    if unit not in ("s", "flop/s"):
        return f"{value:g}"
    prefixes = _prefixes(unit)
    factor, name = next(
        ((factor, name) for factor, name in prefixes if value >= factor * 0.9999), prefixes[-1]
    )
    return f"{value / factor:.4g} {name}"


def _prefixes(unit: str) -> list[tuple[float, str]]:
    if unit == "s":
        return [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs")]
    return [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1.0, "")]


LEFT, RIGHT, TOP, BOTTOM = 48.0, 226.0, 10.0, 212.0  # of the frame of curves; their labels are at its right


def curves(document: Document, model: Model, axis: str) -> str | None:
    """Time of a warm image along one axis, both logarithmic; the fitted line, and its exponent beside it."""
    order = {name: (index, label) for index, name, label in subject_order(document, model)}
    fits = [
        fit for fit in growth(document, axis, model.name) if fit.quantity == "image" and fit.subject in order
    ]
    fits = list({fit.subject: fit for fit in reversed(fits)}.values())[::-1]
    if not fits:
        return None
    points = [point for fit in fits for point in fit.points]
    across = axis_around((x for x, _ in points), LEFT, RIGHT - 6, 1.12)
    up = axis_around((y for _, y in points), BOTTOM, TOP, 1.2)
    parts = [*_frame(across, up, axis, sorted({x for x, _ in points}))]
    wanted = [up.at(fit.points[-1][1]) for fit in fits]
    places = spread_out(wanted, 27, TOP + 8, BOTTOM - 10)
    for fit, place in zip(fits, places, strict=True):
        parts.append(colored(order[fit.subject][0], _curve(fit, across, up, place, order[fit.subject])))
    return drawing(f"{model.name}: time of a warm image by {axis}, logarithmic axes", BOTTOM + 36, parts)


def _curve(fit: Growth, across: Axis, up: Axis, place: float, who: tuple[int, str]) -> Iterator[str]:
    index, label = who
    points = [(across.at(x), up.at(y)) for x, y in fit.points]
    yield polyline(points, "curve")
    yield from (mark(x, y, index) for x, y in points)
    yield line(points[-1][0] + 6, points[-1][1], RIGHT + 6, place, "leader")
    yield text(RIGHT + 9, place + 1, shortened(label, WIDTH - RIGHT - 9, 11), "name")
    yield text(RIGHT + 9, place + 13, f"{fit.axis}^{fit.exponent:.2f}", "soft small")


def _frame(across: Axis, up: Axis, label: str, at: Sequence[float]) -> Iterator[str]:
    """Grid, numbers and the name of the axis across, at values that were measured."""
    for value in up.ticks(5):
        yield line(LEFT, up.at(value), RIGHT, up.at(value))
        yield text(LEFT - 6, up.at(value) + 4, tick(value, "s"), "soft small", anchor="end")
    last = -math.inf
    for value in at:
        words = f"{math.isqrt(int(value))}²" if label == "pixels" and _square(int(value)) else f"{value:g}"
        x = across.at(value)
        yield line(x, BOTTOM, x, BOTTOM + 4, "grid")
        if x - width_of(words) / 2 > last:
            yield text(x, BOTTOM + 17, words, "soft small", anchor="middle")
            last = x + width_of(words) / 2 + 4
    yield line(LEFT, BOTTOM, RIGHT, BOTTOM, "base")
    yield text((LEFT + RIGHT) / 2, BOTTOM + 32, label, "soft small", anchor="middle")


def _square(value: int) -> bool:
    return math.isqrt(value) ** 2 == value


def fidelity(document: Document, model: Model) -> str | None:
    """PSNR over the time of a warm image; pictures that equal the reference lie in a band of their own."""
    setting, quality = main_setting(document, model, "image"), main_setting(document, model, "psnr")
    found = []
    for index, name, label in subject_order(document, model):
        seconds = typical(document, model.name, name, "image", setting)
        psnr = typical(document, model.name, name, "psnr", quality)
        if seconds and seconds < math.inf and psnr is not None:
            found.append((index, label, seconds, psnr))
    if not found:
        return None
    right, band = WIDTH - 6.0, 44.0
    across = axis_around((seconds for _, _, seconds, _ in found), LEFT + 6, right - 10, 1.12)
    finite = [psnr for *_, psnr in found if math.isfinite(psnr)]
    low, high = (
        10 * math.floor(min(finite, default=30) / 10),
        10 * math.ceil((max(finite, default=50) + 1) / 10),
    )
    parts = [
        box(LEFT, TOP - 4, right - LEFT, band - TOP, "band"),
        text(LEFT - 6, 29, "equal", "soft small", anchor="end"),
    ]
    parts.extend(_ticks_below(across, TOP - 4, BOTTOM, "s", 4))
    step = 10 if high - low <= 60 else 20

    def height(psnr: float) -> float:
        if not math.isfinite(psnr):
            return 25.0
        return BOTTOM - (psnr - low) / (high - low) * (BOTTOM - band - 8)

    for value in range(low, high + 1, step):
        parts.append(line(LEFT, height(value), right, height(value)))
        parts.append(text(LEFT - 6, height(value) + 4, f"{value} dB", "soft small", anchor="end"))
    places = [(index, label, across.at(seconds), height(psnr)) for index, label, seconds, psnr in found]
    parts.extend(_named(places, right))
    parts.append(text((LEFT + right) / 2, BOTTOM + 33, "time of a warm image", "soft small", anchor="middle"))
    return drawing(
        f"{model.name}: PSNR to the fp32 reference over the time of a warm image", BOTTOM + 38, parts
    )


def _named(places: Sequence[tuple[int, str, float, float]], right: float) -> Iterator[str]:
    """Marks, each with its name where that covers no other mark nor name."""
    taken = [Place(x - 6, y - 6, x + 6, y + 6) for _, _, x, y in places]
    for index, label, x, y in sorted(places, key=lambda place: place[3]):
        words = shortened(label, 180, 11)
        width = width_of(words, 11)
        spots = [(x + 9, y + 4), (x - 9 - width, y + 4)]
        for rise in (16, 28, 40, 52, 64, 76, 88):
            for shift in (-width / 2, -width, 0.0):
                spots += [(x + shift, y + rise), (x + shift, y - rise + 8)]
        inside = [
            (left, base) for left, base in spots if left >= LEFT and left + width <= right and base < BOTTOM
        ]
        free = [
            (left, base)
            for left, base in inside
            if not any(Place(left, base - 10, left + width, base + 3).meets(place) for place in taken)
        ]
        left, base = next(iter(free or inside), spots[0])
        taken.append(Place(left, base - 10, left + width, base + 3))
        away = abs(base - 4 - y) > 14
        near = [line(x, y, min(max(x, left), left + width), base + (3 if base < y else -10), "leader")] * away
        yield colored(index, [*near, mark(x, y, index), text(left, base, words, "name halo")])
