"""The plots of a report, drawn by matplotlib as SVG within the page; each is None where nothing is there.

Colours are the variables of the page's style sheet, which follow its light or dark scheme.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any, Final

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from sdrt.benchmarks.document.document import Document, Model
from sdrt.benchmarks.report.derive import (
    Parts,
    cold_parts,
    distribution,
    find,
    main_setting,
    numbers,
    typical,
    warm_parts,
)
from sdrt.benchmarks.report.formatting import one, scale, title
from sdrt.benchmarks.report.growth import Growth, growth
from sdrt.benchmarks.report.limits import attainable, ceilings_of, main_shares
from sdrt.benchmarks.report.style import SUBJECT_COLORS, VARIABLES

WIDTH: Final = 360  # points, about as many as a phone has pixels, so that text keeps its size there
SMALL: Final = 11.5  # size of the smallest letters
MARKERS: Final = "os^DvPX"  # of subjects: what is told by a colour is told by a shape, too
# The shade of each part, so that the same is the same in every bar, and the colour of words on each shade.
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
ON_SHADE: Final = ("q-dark", "q-dark", "q-middle", "q-light", "q-light", "ink")
ROW: Final = 50.0  # from one bar to the next
STRIP: Final = 46.0  # from one distribution to the next
MOST_DOTS: Final = 300  # of one distribution; beyond it every n-th value is drawn
_RC: Final = {"svg.fonttype": "none", "svg.hashsalt": "sd-bench", "path.simplify": False}


def color(variable: str) -> str:
    """What stands for a variable of the style sheet until `_svg` puts it there."""
    return f"#{VARIABLES.index(variable):06x}"


def look(subject: int) -> dict[str, Any]:
    """Colour and marker of the subject at this index."""
    marker = MARKERS[(subject + subject // SUBJECT_COLORS) % len(MARKERS)]
    return {"color": color(f"s{subject % SUBJECT_COLORS}"), "marker": marker, "markeredgewidth": 0}


def _svg(figure: Any, label: str) -> str:
    """The figure as an element of the page; ``label`` is what a screen reader says."""
    stream = io.StringIO()
    with rc_context(_RC):
        figure.savefig(stream, format="svg", transparent=True)
    text = stream.getvalue()
    body = text[text.index(">", text.index("<svg ")) + 1 : text.rindex("</svg>")]
    # A style sheet for the whole page, metadata with addresses, identifiers that other drawings have, too.
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    own = hashlib.sha256(label.encode()).hexdigest()[:8]
    body = re.sub(r' id="[\w.]+_\d+"| font-family: [^;"]*;', "", body)  # letters are the page's
    seen: set[str] = set()

    def once(found: re.Match[str]) -> str:
        """An identifier of this drawing; matplotlib defines some marks again, just the same."""
        known = found[1] in seen
        seen.add(found[1])
        return "" if known else f' id="{own}{found[1]}"'

    body = re.sub(r' id="(\w+)"', once, body)
    body = re.sub(r'xlink:href="#', f'href="#{own}', body).replace("url(#", f"url(#{own}")
    body = re.sub(r"#0000([0-9a-f]{2})\b", lambda found: f"var(--{VARIABLES[int(found[1], 16)]})", body)
    body = re.sub(r"\s*\n\s*", " ", body)
    width, height = (round(72 * side) for side in figure.get_size_inches())
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}"><title>{escape(label)}</title>{body}</svg>'
    )


def _canvas(height: float) -> tuple[Any, Any]:
    """A figure, and axes that cover it: points from its top left corner."""
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def _frame(
    height: float, *, left: float = 48, right: float = 8, top: float = 10, bottom: float = 44
) -> tuple[Any, Any]:
    """A figure, and axes with margins in points: a line below, and a grid."""
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    box = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (top + bottom) / height)
    axes = figure.add_axes(box)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(color("strong-line"))
    axes.tick_params(length=0, labelsize=SMALL, labelcolor=color("soft"))
    axes.grid(color=color("line"), linewidth=1)
    axes.set_axisbelow(True)
    return figure, axes


def _logarithmic(axis: Any, values: Iterable[float], margin: float, words: Callable[[float], str]) -> None:
    """Make an axis logarithmic around positive values, with a few round ticks."""
    found = list(values)
    axis._set_axes_scale("log")
    low, high = min(found) / margin, max(found) * margin
    set_limits = axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim
    set_limits(low, high)
    decades = math.log10(high / low)
    digits = (1.0, 2.0, 5.0) if decades < 2 else (1.0,)
    even = MaxNLocator(4, steps=(1, 2, 5, 10))
    axis.set_major_locator(LogLocator(subs=digits, numticks=6) if decades > 0.8 else even)
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))


def seconds(value: float) -> str:
    """A tick of time, as short as it can be."""
    return _prefixed(value, ((1.0, " s"), (1e-3, " ms"), (1e-6, " µs")))


def operations(value: float) -> str:
    """A tick of flop/s."""
    return _prefixed(value, ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1.0, "")))


def _prefixed(value: float, units: Sequence[tuple[float, str]]) -> str:
    factor, name = next(((factor, name) for factor, name in units if value >= factor * 0.9999), units[-1])
    return f"{value / factor:.4g}{name}"


def subject_order(document: Document, model: Model) -> list[tuple[int, str, str]]:
    """Index (which gives colour and mark), name and label of every subject that a model has values of."""
    with_values = {entry.subject for entry in document.measurements if entry.model == model.name}
    return [
        (index, subject.name, subject.label)
        for index, subject in enumerate(document.subjects)
        if subject.name in with_values
    ]


def _row_head(axes: Any, y: float, index: int, label: str, value: str) -> None:
    """Mark, name and value above a bar or a strip."""
    axes.plot([6], [y + 9], markersize=7, linestyle="none", clip_on=False, **look(index))
    shown = label if len(label) < 37 else label[:36].rstrip() + "…"
    axes.text(18, y + 13, shown, color=color("ink"), size=12, parse_math=False)
    axes.text(WIDTH, y + 13, value, color=color("ink"), size=12, weight="bold", ha="right")


def bars(document: Document, model: Model, *, cold: bool) -> str | None:
    """Stacked bars: the parts of a cold start or of a warm image, a bar for each subject."""
    split = cold_parts if cold else warm_parts
    found = [(*entry, split(document, model, entry[1])) for entry in subject_order(document, model)]
    found = [entry for entry in found if entry[3]]
    if not found:
        return None
    setting = main_setting(document, model, "cold_total" if cold else "image")
    # Medians of parts that were measured apart may add up to more than the median of the whole.
    wholes = [
        typical(document, model.name, name, "cold_total" if cold else "image", setting) or _sum(parts)
        for _, name, _, parts in found
    ]
    unit, longest = scale(wholes, "s"), max(wholes)
    figure, axes = _canvas(ROW * len(found) - 8)
    for number, ((index, _, label, parts), whole) in enumerate(zip(found, wholes, strict=True)):
        _row_head(axes, ROW * number, index, label, unit.full(whole))
        per_second = WIDTH / longest * whole / max(whole, _sum(parts))
        x = 0.0
        for name, spent in parts:
            _segment(axes, x, ROW * number + 29, spent * per_second, SHADES[name], one(spent, "s"))
            x += spent * per_second
    what = "parts of a cold start" if cold else "stages of a warm image"
    return _svg(figure, f"{model.name}: {what}, stacked bars")


def _sum(parts: Parts) -> float:
    return sum(seconds for _, seconds in parts)


def _segment(axes: Any, x: float, y: float, width: float, shade: int, words: str = "") -> None:
    """One part of a bar; its words where there is room for them."""
    axes.barh(y, max(width - 1, width / 2), 18, x, color=color(f"p{shade}"), linewidth=0)
    if 6.4 * len(words) + 8 < width:
        axes.text(x + width / 2, y + 4, words, color=color(ON_SHADE[shade]), size=SMALL, ha="center")


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
            own = typical(document, model.name, name, "cold_peak_anonymous", setting)
            found.append((index, label, peak, own or 0.0))
    if not found:
        return None
    unit = scale((peak for _, _, peak, _ in found), "B")
    per_byte = WIDTH / max(peak for _, _, peak, _ in found)
    figure, axes = _canvas(ROW * len(found) - 8)
    for number, (index, label, peak, own) in enumerate(found):
        _row_head(axes, ROW * number, index, label, unit.full(peak))
        _segment(axes, 0, ROW * number + 29, peak * per_byte, 3)
        _segment(axes, 0, ROW * number + 29, min(own, peak) * per_byte, 1)
    return _svg(figure, f"{model.name}: peak memory of a cold start, bars")


def distributions(document: Document, model: Model, quantity: str) -> str | None:
    """Every time of a quantity as a dot, over a box from quartile to quartile with the median's line."""
    setting = main_setting(document, model, quantity)
    rows = []
    for index, name, label in subject_order(document, model):
        entry = find(document, model.name, name, quantity, setting)
        values = [] if entry is None else [value for value in numbers(entry) if 0 < value < math.inf]
        if values:
            rows.append((index, label, values, distribution(values)))
    if not rows:
        return None
    height = STRIP * len(rows)
    figure, axes = _frame(height + 24, left=8, right=8, top=0, bottom=24)
    heads = figure.add_axes((0, 24 / (height + 24), 1, height / (height + 24)))
    heads.set(xlim=(0, WIDTH), ylim=(height, 0))
    heads.axis("off")
    axes.set(ylim=(height, 0), yticks=[])
    _logarithmic(axes.xaxis, (value for row in rows for value in row[2]), 1.06, seconds)
    unit = scale((spread.p50 for *_, spread in rows), "s")
    for number, (index, label, values, spread) in enumerate(rows):
        _row_head(heads, STRIP * number, index, label, unit.full(spread.p50))
        middle, shade = STRIP * number + 30, look(index)["color"]
        kept = values[:: math.ceil(len(values) / MOST_DOTS)]
        # Dots of the same time lie beside each other, in a fixed pattern: the same data gives the same page.
        places = [middle + (place * 5 % 9 - 4) * 1.3 for place in range(len(kept))]
        across = [x for value in kept for x in (value, value, math.nan)]
        up = [y for place in places for y in (place, place, math.nan)]
        axes.barh(middle, spread.p75 - spread.p25, 18, spread.p25, color=shade, alpha=0.18)
        with rc_context(_RC):  # one path, of which no dot is left out
            axes.plot(across, up, color=shade, linewidth=3, solid_capstyle="round", alpha=0.55)
        axes.vlines(spread.p50, middle - 10, middle + 10, color=shade, linewidth=2)
    return _svg(figure, f"{model.name}: distribution of {title(quantity)}, a row for each subject")


def fits(document: Document, model: Model, axis: str) -> list[tuple[int, str, Growth]]:
    """How the warm image of each subject grows along an axis: index, label, fit."""
    found = {
        fit.subject: fit for fit in reversed(growth(document, axis, model.name)) if fit.quantity == "image"
    }
    order = subject_order(document, model)
    return [(index, label, found[name]) for index, name, label in order if name in found]


def curves(document: Document, model: Model, axis: str) -> str | None:
    """Time of a warm image along one axis, both logarithmic."""
    found = fits(document, model, axis)
    if not found:
        return None
    points = [point for *_, fit in found for point in fit.points]
    figure, axes = _frame(248)
    _logarithmic(axes.xaxis, (x for x, _ in points), 1.12, str)
    _logarithmic(axes.yaxis, (y for _, y in points), 1.2, seconds)
    at = sorted({x for x, _ in points})
    axes.set_xticks(at, [_sides(x) if axis == "pixels" else str(x) for x in at])
    axes.grid(visible=False, axis="x")
    axes.set_xlabel(axis, color=color("soft"), size=SMALL)
    for index, _, fit in found[::-1]:  # ours last, above the others
        axes.plot(*zip(*fit.points, strict=True), linewidth=1.75, markersize=7, **look(index))
    return _svg(figure, f"{model.name}: time of a warm image by {axis}, logarithmic axes")


def _sides(pixels: int) -> str:
    side = math.isqrt(pixels)
    return f"{side}²" if side * side == pixels else str(pixels)


def fidelity(document: Document, model: Model) -> str | None:
    """PSNR over the time of a warm image; pictures that equal the reference lie in a band of their own."""
    setting, quality = main_setting(document, model, "image"), main_setting(document, model, "psnr")
    found = []
    for index, name, _ in subject_order(document, model):
        spent = typical(document, model.name, name, "image", setting)
        psnr = typical(document, model.name, name, "psnr", quality)
        if spent and spent < math.inf and psnr is not None:
            found.append((index, spent, psnr))
    if not found:
        return None
    finite = [psnr for *_, psnr in found if math.isfinite(psnr)]
    low = 10 * math.floor(min(finite, default=30) / 10)
    high = 10 * math.ceil(max(finite, default=50) / 10) + 10
    step = 10 if high - low <= 60 else 20
    figure, axes = _frame(248)
    _logarithmic(axes.xaxis, (spent for _, spent, _ in found), 1.12, seconds)
    levels = list(range(low, high, step))
    axes.set_yticks([*levels, high], [*(f"{level} dB" for level in levels), "equal"])
    axes.set_ylim(low - step / 3, high + step / 2)
    axes.axhspan(high - step / 2, high + step / 2, color=color("tint"), linewidth=0, zorder=0)
    axes.set_xlabel("time of a warm image", color=color("soft"), size=SMALL)
    for index, spent, psnr in found[::-1]:
        level = psnr if math.isfinite(psnr) else high
        axes.plot([spent], [level], markersize=9, linestyle="none", **look(index))
    return _svg(figure, f"{model.name}: PSNR to the reference over the time of a warm image")


def roofline(document: Document, model: Model) -> str | None:
    """flop/s over flop/B, both logarithmic: the ceilings, and every subject's networks at the main size."""
    device = next((subject.device for subject in document.subjects), "cpu")
    found, ceilings = main_shares(document, model, device), ceilings_of(document, device)
    if not found or ceilings is None:
        return None
    ridge = ceilings.flop_per_s / ceilings.bytes_per_s
    figure, axes = _frame(300, top=68)
    intensities = [ridge, *(share.intensity for share in found)]
    _logarithmic(axes.xaxis, intensities, 2.2, lambda value: f"{value:g}")
    speeds = [ceilings.flop_per_s, *(share.flop_per_s for share in found)]
    _logarithmic(axes.yaxis, speeds, 1.35, operations)
    axes.set_xlabel("operations per byte (flop/B)", color=color("soft"), size=SMALL)
    corners = [axes.get_xlim()[0], ridge, axes.get_xlim()[1]]
    axes.plot(corners, [attainable(ceilings, x) for x in corners], color=color("ink"), linewidth=1.75)
    small = {"color": color("soft"), "size": SMALL}
    peak = {"ha": "right", "va": "top", **small}
    axes.text(corners[2], ceilings.flop_per_s * 0.9, one(ceilings.flop_per_s, "flop/s"), **peak)
    middle = math.sqrt(corners[0] * ridge)
    axes.text(middle * 1.1, attainable(ceilings, middle) * 0.7, one(ceilings.bytes_per_s, "B/s"), **small)
    first = {share.component: share for share in reversed(found)}
    for row, share in enumerate(sorted(first.values(), key=lambda share: share.intensity)):
        axes.axvline(share.intensity, color=color("strong-line"), linestyle=":", linewidth=1)
        words = f"{title(share.component)} {share.share:.0%}"
        axes.annotate(
            words,
            (share.intensity, 1),
            (0, 6 + 14 * row),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            size=SMALL,
            color=color("ink"),
        )
    for index, name, _ in subject_order(document, model)[::-1]:
        points = [(share.intensity, share.flop_per_s) for share in found if share.subject == name]
        if points:
            axes.plot(*zip(*points, strict=True), linestyle="none", markersize=8, **look(index))
    return _svg(figure, f"{model.name}: roofline, speed of each network over its operations per byte")
