"""``sd-bench compare A.json B.json``: what became slower, larger or less faithful from one report to another.

A quantity became worse where both hold: the ratio B/A of its medians is beyond the threshold, and the spreads
do not touch: the better quarter of B is worse than the worse quarter of A (the 25th percentile of B is above
the 75th of A). A time of which either report holds fewer than `FEWEST_VALUES` values has no spread worth the
name and is told as uncertain. Fidelity counts as the relative error behind it, so that one threshold serves
all: a PSNR of p dB is an error of 10^(−p/20) of the picture's range, and errors below what rounding to 8 bits
alone makes are taken for that.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from sdrt.benchmarks.document.document import QUANTITIES, Document, Measurement, Setting, read
from sdrt.benchmarks.report.derive import is_time, median_of, numbers, percentile
from sdrt.benchmarks.report.formatting import factor_text, latent_text, one, psnr_text, setting_text
from sdrt.benchmarks.report.limits import warnings as doubts
from sdrt.runtime.errors import UsageError

THRESHOLD: Final = 1.10
FEWEST_VALUES: Final = 3
ROUNDING: Final = 1 / (255 * math.sqrt(12))  # root mean square of rounding to 8 bits, of the picture's range
WORSE, UNCERTAIN, BETTER, SAME = "worse", "uncertain", "better", "same"
OF_MACHINE: Final = ("cpu", "cores", "memory_bytes", "system", "python", "gpus")
OF_MODEL: Final = ("source", "sampler", "guidance_scale", "prompt", "threads", "weights_bytes", "reference")


class Key(NamedTuple):
    """What must be the same for two measurements to be compared."""

    model: str
    subject: str
    quantity: str
    setting: Setting

    def __str__(self) -> str:
        return f"{self.model}: {self.subject}, {self.quantity} at {setting_text(self.setting)}"


@dataclass(frozen=True, slots=True)
class Change:
    """One quantity in two reports.

    Attributes:
        key: What it is of.
        before: Median in A, in the quantity's unit.
        after: Median in B.
        ratio: Cost of B over that of A: times and sizes themselves, for fidelity the relative errors.
        verdict: ``worse``, ``better``, ``uncertain`` (beyond the threshold, but not beyond the spread or
            from too few values), ``same``.
    """

    key: Key
    before: float
    after: float
    ratio: float
    verdict: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two reports side by side.

    Attributes:
        changes: Of all that is in both, the largest ratio first.
        only_before: In A alone.
        only_after: In B alone.
        broken: Subjects and models that A measured and B failed at.
        cautions: What makes the comparison doubtful.
    """

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    broken: tuple[str, ...]
    cautions: tuple[str, ...]

    @property
    def worse(self) -> list[Change]:
        """Those beyond the threshold and the spread."""
        return [change for change in self.changes if change.verdict == WORSE]


def compare(before: Document, after: Document, threshold: float = THRESHOLD) -> Comparison:
    """Compare two reports; the rule is at the top of this file.

    Raises:
        UsageError: The threshold is not above 1.
    """
    if not 1 < threshold < math.inf:
        raise UsageError(
            f"the threshold is {threshold:g}, and a ratio above 1 is needed: 1.10 allows 10 % more"
        )
    old, new = _measured(before), _measured(after)
    changes = (_change(key, old[key], new[key], threshold) for key in old if key in new)
    return Comparison(
        tuple(sorted(changes, key=lambda change: -change.ratio)),
        tuple(str(key) for key in old if key not in new),
        tuple(str(key) for key in new if key not in old),
        tuple(_broken(before, after)),
        tuple(_cautions(before, after)),
    )


def _measured(document: Document) -> dict[Key, Measurement]:
    entries = (entry for entry in document.measurements if entry.values)
    return {Key(entry.model, entry.subject, entry.quantity, entry.setting): entry for entry in entries}


def _change(key: Key, before: Measurement, after: Measurement, threshold: float) -> Change:
    old, new = _costs(before), _costs(after)
    a, b = percentile(old, 50), percentile(new, 50)
    ratio = b / a if a else (1.0 if b == 0 else math.inf)
    verdict = SAME
    if ratio > threshold:
        verdict = WORSE if _apart(key.quantity, old, new) else UNCERTAIN
    elif ratio < 1 / threshold:
        verdict = BETTER if _apart(key.quantity, new, old) else UNCERTAIN
    return Change(key, median_of(before), median_of(after), ratio, verdict)


def _costs(entry: Measurement) -> list[float]:
    """Numbers of which less is better, and whose ratios can be compared."""
    values = numbers(entry)
    if entry.quantity == "psnr":
        values = [10 ** (-value / 20) for value in values]
    faithful = entry.quantity in ("psnr", "latent_error")
    return [max(ROUNDING, value) for value in values] if faithful else values


def _apart(quantity: str, less: list[float], more: list[float]) -> bool:
    """Whether the middle halves do not touch; what is no time hardly varies, and one value will do."""
    if is_time(quantity) and min(len(less), len(more)) < FEWEST_VALUES:
        return False
    return percentile(more, 25) > percentile(less, 75)


def _broken(before: Document, after: Document) -> Iterator[str]:
    """Newly failing: B says it failed where A measured and did not fail."""
    measured = {(entry.model, entry.subject) for entry in before.measurements if entry.values}
    failed = {(entry.model, entry.subject, entry.stage) for entry in before.failures}
    for entry in after.failures:
        here = any(subject == entry.subject and entry.model in (model, "") for model, subject in measured)
        if here and (entry.model, entry.subject, entry.stage) not in failed:
            yield f"{entry.model or 'every model'}: {entry.subject} fails now, {entry.stage}: {entry.error}"


def _cautions(before: Document, after: Document) -> Iterator[str]:
    for what in OF_MACHINE:
        a, b = getattr(before.machine, what), getattr(after.machine, what)
        if a != b:
            yield f"the machines differ in {what}: {a} and {b}"
    models = {model.name: model for model in before.models}
    for model in after.models:
        for what in OF_MODEL:
            a, b = getattr(models.get(model.name, model), what), getattr(model, what)
            if a != b:
                yield f"{model.name}: {what} {a} became {b}"
    versions = {entry.name: entry.versions for entry in before.subjects}
    for entry in after.subjects:
        known = versions.get(entry.name, entry.versions)
        for package in sorted(known.keys() | entry.versions.keys()):
            a, b = known.get(package, "none"), entry.versions.get(package, "none")
            if a != b:
                yield f"{entry.name}: {package} {a} became {b}"
    for name, document in (("A", before), ("B", after)):
        yield from (f"{name}: {doubt}" for doubt in doubts(document))


def text(comparison: Comparison, threshold: float = THRESHOLD) -> str:
    """For a terminal: cautions, the table with the slower first, what is in one alone, the verdict."""
    lines = [f"caution: {caution}" for caution in comparison.cautions]
    lines += _aligned(comparison.changes) if comparison.changes else ["nothing is in both reports"]
    lines += [f"only in A: {name}" for name in comparison.only_before]
    lines += [f"only in B: {name}" for name in comparison.only_after]
    lines += [f"broken: {name}" for name in comparison.broken]
    worse, broken = len(comparison.worse), len(comparison.broken)
    uncertain = sum(change.verdict == UNCERTAIN for change in comparison.changes)
    lines.append(
        f"{len(comparison.changes)} compared: {worse} worse by more than {threshold:.2f} times, "
        f"{broken} broken, {uncertain} uncertain (within the spread, or fewer than {FEWEST_VALUES} values)"
    )
    return "\n".join(lines)


def _aligned(changes: tuple[Change, ...]) -> list[str]:
    rows: list[tuple[str, ...]] = [("verdict", "B/A", "A", "B", "quantity", "subject", "model", "setting")]
    for change in changes:
        model, subject, quantity, setting = change.key
        values = (_value(quantity, value) for value in (change.before, change.after))
        where = (quantity, subject, model, setting_text(setting))
        rows.append((change.verdict, factor_text(change.ratio), *values, *where))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    template = "  ".join(
        f"{{:{'>' if 1 <= index <= 3 else '<'}{width}}}" for index, width in enumerate(widths)
    )
    return [template.format(*row).rstrip() for row in rows]


def _value(quantity: str, value: float) -> str:
    if quantity == "psnr":
        return psnr_text(value) + (" dB" if math.isfinite(value) else "")
    return latent_text(value) if quantity == "latent_error" else one(value, QUANTITIES[quantity][0])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``sd-bench compare``."""
    parser.add_argument("before", metavar="A.json", type=Path, help="a report's JSON")
    parser.add_argument("after", metavar="B.json", type=Path, help="a later one")
    parser.add_argument(
        "--threshold",
        metavar="RATIO",
        type=float,
        default=THRESHOLD,
        help=f"what B may need, in multiples of A (default {THRESHOLD:.2f}); beyond it the exit status is 1",
    )


def run(arguments: argparse.Namespace) -> int:
    """Compare and print.

    Returns:
        0 where nothing became worse, 1 where something did or fails now, 2 where a file or the threshold is
        no good.
    """
    try:
        found = compare(read(arguments.before), read(arguments.after), arguments.threshold)
    except UsageError as error:
        print(f"sd-bench: {error}", file=sys.stderr)
        return 2
    print(text(found, arguments.threshold))
    return 1 if found.worse or found.broken else 0
