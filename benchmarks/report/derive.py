"""What a report shows, computed from its raw measurements; each figure is defined where it is computed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Final

from sdrt.benchmarks.document.document import QUANTITIES, Document, Measurement, Model, Setting

# From fewer values the 99th percentile is little more than the slowest one under another name.
VALUES_FOR_P99: Final = 100
COLD_PARTS: Final = ("cold_start", "cold_import", "cold_load", "cold_image", "cold_save")
NETWORKS: Final = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
REST: Final = "rest"


def numbers(entry: Measurement) -> list[float]:
    """The values in their order, None as infinity."""
    return [math.inf if value is None else value for value in entry.values]


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks (Hyndman & Fan 1996, definition 7; NumPy's default).

    Infinite values are allowed: between a finite and an infinite neighbour it is infinite.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("no values, so no percentile")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    share = position - below
    if share == 0 or ordered[below] == ordered[below + 1]:
        return ordered[below]
    return ordered[below] + share * (ordered[below + 1] - ordered[below])


def median_of(entry: Measurement) -> float:
    """The median of its values."""
    return percentile(numbers(entry), 50)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of the values of one measurement, in the unit of the quantity.

    Attributes:
        count: How many values.
        mean: Arithmetic.
        lowest: Of all.
        p25: A quarter of the values is at or below it; see `percentile`.
        p50: Median.
        p75: Three quarters are at or below it.
        p90: Nine tenths are at or below it.
        p99: None from fewer than `VALUES_FOR_P99` values.
        highest: Of all.
    """

    count: int
    mean: float
    lowest: float
    p25: float
    p50: float
    p75: float
    p90: float
    p99: float | None
    highest: float


def distribution(values: Sequence[float]) -> Distribution:
    """Describe values.

    Raises:
        ValueError: There are none.
    """
    p25, p50, p75, p90 = (percentile(values, percent) for percent in (25, 50, 75, 90))
    p99 = percentile(values, 99) if len(values) >= VALUES_FOR_P99 else None
    return Distribution(len(values), fmean(values), min(values), p25, p50, p75, p90, p99, max(values))


def typical(
    document: Document, model: str, subject: str, quantity: str, setting: Setting | None
) -> float | None:
    """The median of all values of a quantity at one setting, in its unit; None where it was not measured."""
    entry = find(document, model, subject, quantity, setting)
    return None if entry is None else median_of(entry)


def find(
    document: Document, model: str, subject: str, quantity: str, setting: Setting | None
) -> Measurement | None:
    """The measurement with values of a quantity at one setting."""
    if setting is None:
        return None
    found = document.select(quantity, model=model, subject=subject, **setting._asdict())
    return next((entry for entry in found if entry.values), None)


def main_setting(document: Document, model: Model, quantity: str) -> Setting | None:
    """Where subjects are compared in one number: the model's first size and its steps, one picture.

    Where nobody measured the quantity there, the setting of its first measurement; None without any.
    """
    found = [entry.setting for entry in document.select(quantity, model=model.name) if entry.values]
    if not found:
        return None
    wanted = [Setting(*size, 1, model.steps) for size in model.sizes[:1]]
    return next((setting for setting in wanted if setting in found), found[0])


@dataclass(frozen=True, slots=True)
class Ratio:
    """The first subject's values over another's, round by round.

    Attributes:
        model: `Model.name`.
        subject: The other's name.
        quantity: Its key.
        setting: The same for both.
        values: For each round that both took part in, the median of the first subject's values of that
            round over the median of the other's. Below 1 the first one needs less.
    """

    model: str
    subject: str
    quantity: str
    setting: Setting
    values: tuple[float, ...]

    @property
    def pairs(self) -> int:
        """How many rounds."""
        return len(self.values)

    @property
    def spread(self) -> Distribution:
        """Median, quartiles, lowest and highest of the rounds' ratios."""
        return distribution(self.values)


def ratios(document: Document, quantity: str | None = None, model: str | None = None) -> list[Ratio]:
    """The first subject to each other one, for every quantity and setting that both were measured under.

    Rounds in which a median is zero or infinite give no ratio; without any round there is no entry.
    """
    if not document.subjects:
        return []
    first = document.subjects[0].name
    found = []
    for entry in document.measurements:
        if (
            entry.subject == first
            or quantity not in (None, entry.quantity)
            or model not in (None, entry.model)
        ):
            continue
        ours = find(document, entry.model, first, entry.quantity, entry.setting)
        values = () if ours is None else _pairs(ours, entry)
        if values:
            found.append(Ratio(entry.model, entry.subject, entry.quantity, entry.setting, values))
    return found


def _pairs(first: Measurement, other: Measurement) -> tuple[float, ...]:
    mine, theirs = _by_round(first), _by_round(other)
    return tuple(
        mine[number] / theirs[number]
        for number in sorted(mine.keys() & theirs.keys())
        if 0 < mine[number] < math.inf and 0 < theirs[number] < math.inf
    )


def _by_round(entry: Measurement) -> dict[int, float]:
    rounds: dict[int, list[float]] = defaultdict(list)
    for value, number in zip(numbers(entry), entry.rounds, strict=True):
        rounds[number].append(value)
    return {number: median(values) for number, values in rounds.items()}


def throughput(document: Document, model: Model, subject: str) -> dict[int, float]:
    """Pictures per second by batch, at the model's main size and steps: batch over median time of a call."""
    setting = main_setting(document, model, "image")
    found = {}
    for entry in document.select("image", model=model.name, subject=subject):
        if setting and entry.setting._replace(batch=setting.batch) == setting and entry.values:
            seconds = median_of(entry)
            found[entry.batch] = entry.batch / seconds if seconds else math.inf
    return dict(sorted(found.items()))


def host_time_per_step(document: Document, model: str, subject: str, setting: Setting) -> float | None:
    """Seconds of a step that are not spent in the U-Net: median step minus median evaluation of the U-Net.

    One evaluation on both halves per step is what single-step samplers need. The evaluation does not depend
    on the number of steps: one measured under another number serves where none was under this one. Below 0
    it is noise: the two are measured apart.
    """
    step = typical(document, model, subject, "step", setting)
    network = unet_time(document, model, subject, setting)
    return None if step is None or network is None else step - network


def unet_time(document: Document, model: str, subject: str, setting: Setting) -> float | None:
    """Median seconds of one evaluation of the U-Net at this size and batch; see `host_time_per_step`."""
    same = typical(document, model, subject, "unet", setting)
    if same is not None:
        return same
    where = {"height": setting.height, "width": setting.width, "batch": setting.batch}
    found = [
        entry for entry in document.select("unet", model=model, subject=subject, **where) if entry.values
    ]
    return median_of(found[0]) if found else None


Parts = list[tuple[str, float]]


def cold_parts(document: Document, model: Model, subject: str) -> Parts:
    """Median seconds of each part of a cold start, in order; what is left of the median whole is `REST`.

    A subject of which only the whole is known is all rest; one that has no whole has no parts.
    """
    setting = main_setting(document, model, "cold_total")
    whole = typical(document, model.name, subject, "cold_total", setting)
    found = [(part, typical(document, model.name, subject, part, setting)) for part in COLD_PARTS]
    return _with_rest([(part, value) for part, value in found if value is not None], whole)


def warm_parts(document: Document, model: Model, subject: str) -> Parts:
    """Median seconds of each stage of a warm image; what is left of the median whole is `REST`.

    ``unet`` is the evaluations of all steps and ``host`` the `host_time_per_step` of all (from 0 on); where
    the U-Net was not timed alone, ``step`` stands for both.
    """
    setting = main_setting(document, model, "image")
    if setting is None:
        return []
    name = model.name
    whole = typical(document, name, subject, "image", setting)
    step = typical(document, name, subject, "step", setting)
    network = unet_time(document, name, subject, setting)
    found: list[tuple[str, float | None]] = [
        ("text_encoder", typical(document, name, subject, "text_encoder", setting))
    ]
    if network is None:
        found.append(("step", None if step is None else setting.steps * step))
    else:
        host = host_time_per_step(document, name, subject, setting)
        found.append(("unet", setting.steps * network))
        found.append(("host", None if host is None else setting.steps * max(0.0, host)))
    found.append(("vae_decoder", typical(document, name, subject, "vae_decoder", setting)))
    return _with_rest([(part, value) for part, value in found if value is not None], whole)


def _with_rest(parts: Parts, whole: float | None) -> Parts:
    if whole is None or not 0 < whole < math.inf:
        return []
    parts = [(part, seconds) for part, seconds in parts if seconds < math.inf]
    rest = whole - sum(value for _, value in parts)
    return [*parts, (REST, rest)] if rest > 0 else parts


def is_time(quantity: str) -> bool:
    """Whether it is measured in seconds."""
    return QUANTITIES[quantity][0] == "s"
