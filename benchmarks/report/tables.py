"""The tables of a report, as rows of text that the page and the Markdown summary both show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from sdrt.benchmarks.document.document import QUANTITIES, Document, Model, Profile
from sdrt.benchmarks.report.derive import (
    NETWORKS,
    Ratio,
    cold_parts,
    distribution,
    find,
    host_time_per_step,
    is_time,
    main_setting,
    median_of,
    numbers,
    ratios,
    throughput,
    typical,
    warm_parts,
)
from sdrt.benchmarks.report.formatting import (
    MISSING,
    factor_text,
    latent_text,
    psnr_text,
    quantity_scale,
    ratio_text,
    scale,
    setting_text,
    title,
)
from sdrt.benchmarks.report.growth import AXES, growth
from sdrt.benchmarks.report.limits import shares

GOOD_FIT: Final = 0.99
# What a reader wants first, and whether the first subject's ratio to each other one stands beside it.
OVERVIEW: Final = {
    "cold_total": True,
    "image": True,
    "step": True,
    "cold_peak_memory": False,
    "psnr": False,
    "latent_error": False,
    "installed_size": False,
}
MEMORY: Final = ("cold_peak_memory", "cold_peak_anonymous", "peak_memory", "memory", "gpu_memory")
Cells = Mapping[str, str]  # of one column, by subject
Columns = list[tuple[str, Cells]]


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        head: Its first cell.
        cells: The others.
        error: Where there is nothing to show, why; it stands in place of all cells.
    """

    head: str
    cells: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table: numbers as they are shown.

    Attributes:
        caption: What it is.
        note: How to read it, in a sentence or two.
        columns: Headings, that of the rows' heads first.
        rows: As many cells as columns, but for the head.
        text_columns: How many columns from the left hold text and not numbers.
    """

    caption: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    text_columns: int = 1


def label(document: Document, name: str) -> str:
    """A subject's label; its name where it is not among the subjects."""
    return next((subject.label for subject in document.subjects if subject.name == name), name)


def subjects_of(document: Document, model: Model) -> list[str]:
    """Names of those that have measurements or failures of a model, in the order of the subjects."""
    found = {entry.subject for entry in document.measurements if entry.model == model.name and entry.values}
    found |= {failure.subject for failure in document.failures if failure.model in (model.name, "")}
    order = [subject.name for subject in document.subjects]
    return [name for name in order if name in found] + sorted(found - set(order))


def main_ratios(document: Document, model: Model, quantity: str) -> dict[str, Ratio]:
    """By subject, the first one's ratio to it at the quantity's main setting."""
    setting = main_setting(document, model, quantity)
    found = ratios(document, quantity, model.name)
    return {entry.subject: entry for entry in found if entry.setting == setting}


def _medians(document: Document, model: Model, quantity: str) -> dict[str, float]:
    setting = main_setting(document, model, quantity)
    names = subjects_of(document, model)
    found = {name: typical(document, model.name, name, quantity, setting) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _column(document: Document, model: Model, quantity: str, *, compared: bool = False) -> Columns:
    """The medians of a quantity at its main setting, and the ratios to the first subject's; none without."""
    found = _medians(document, model, quantity)
    if not found:
        return []
    unit = quantity_scale(quantity, found.values())
    show: Callable[[float], str] = {"psnr": psnr_text, "latent_error": latent_text}.get(quantity, unit.show)
    heading = ", ".join(filter(None, (title(quantity), unit.unit)))
    columns: Columns = [(heading, {name: show(value) for name, value in found.items()})]
    if compared and (ours := main_ratios(document, model, quantity)):
        columns.append(("ours ÷ it", {name: ratio_text(ratio) for name, ratio in ours.items()}))
    return columns


def _by_subject(document: Document, model: Model, caption: str, note: str, columns: Columns) -> Table:
    """A row for each subject that has a cell; failures have their own table."""
    rows = tuple(
        Row(label(document, name), tuple(cells.get(name, MISSING) for _, cells in columns))
        for name in subjects_of(document, model)
        if any(name in cells for _, cells in columns)
    )
    return Table(caption, note, ("Subject", *(heading for heading, _ in columns)), rows)


def _values(values: Mapping[str, float | None], unit: str, heading: str) -> Columns:
    """A column of values in a unit of `scale`, without those that are None; none without any."""
    known = {name: value for name, value in values.items() if value is not None}
    shown = scale(known.values(), unit)
    named = ", ".join(filter(None, (heading, shown.unit)))
    return [(named, {name: shown.show(value) for name, value in known.items()})] if known else []


def overview(document: Document, model: Model) -> Table:
    """What a reader wants first: every subject in one row; of one without any cell its first error."""
    columns: Columns = []
    for quantity, compared in OVERVIEW.items():
        columns += _column(document, model, quantity, compared=compared)
    rows = []
    for name in subjects_of(document, model):
        row = Row(label(document, name), tuple(cells.get(name, MISSING) for _, cells in columns))
        if all(cell == MISSING for cell in row.cells):
            row = replace(row, cells=(), error=_error(document, model, name))
        rows.append(row)
    first = document.subjects[0].label if document.subjects else "ours"
    shown = " ".join(heading for heading, _ in columns)
    cold = "; a cold start is a fresh process to the first picture on disk" * ("Cold start" in shown)
    faithful = f" PSNR and latent error are against {model.reference}." * ("PSNR" in shown)
    note = (
        f"Medians{cold}. “ours ÷ it” is {first} over the row's subject, paired within each round: the median "
        f"and, in brackets, the middle half of the rounds; below 1, ours needs less.{faithful}"
    )
    headings = tuple(heading for heading, _ in columns) or ("Result",)
    return Table("Summary", note, ("Subject", *headings), tuple(rows))


def _error(document: Document, model: Model, name: str) -> str:
    found = (f for f in document.failures if f.subject == name and f.model in (model.name, ""))
    failure = next(found, None)
    return "none of this was measured" if failure is None else f"failed, {failure.stage}: {failure.error}"


def memory(document: Document, model: Model) -> Table:
    """Memory in all its measures, and beside the weights."""
    columns = [column for quantity in MEMORY for column in _column(document, model, quantity)]
    peak = _medians(document, model, "cold_peak_memory")
    if peak and model.weights_bytes:
        beside = {name: factor_text(value / model.weights_bytes) for name, value in peak.items()}
        columns.append(("Peak ÷ weights", beside))
    own = "; “its own” leaves out what the system can drop. The weights are counted in fp32" * bool(peak)
    on_gpu = " GPU memory is what nvidia-smi counts beside it, the CUDA context included."
    any_on_gpu = bool(_medians(document, model, "gpu_memory"))
    note = f"Peaks count mapped files, too{own}.{on_gpu * any_on_gpu}"
    return _by_subject(document, model, "Memory", note, columns)


def parts(document: Document, model: Model, *, cold: bool) -> Table:
    """The parts of a cold start, or the stages of a warm image."""
    split = cold_parts if cold else warm_parts
    found = {name: dict(split(document, model, name)) for name in subjects_of(document, model)}
    kinds = sorted({part: 0 for entry in found.values() for part in entry}, key=lambda part: part == "rest")
    unit = scale((sum(entry.values()) or None for entry in found.values()), "s").finer()
    columns: Columns = [
        (title(part), {name: unit.show(entry[part]) for name, entry in found.items() if part in entry})
        for part in kinds
    ]
    caption = "Parts of a cold start" if cold else "Stages of a warm image"
    note = f"Medians in {unit.unit}; the rest is what the whole takes beyond its parts."
    return _by_subject(document, model, caption, note, columns)


def percentiles(document: Document, model: Model, *, every: bool = False) -> Table:
    """p50, p90 and p99 of every time, under the main setting or under every one."""
    rows = []
    for quantity in filter(is_time, QUANTITIES):
        main = main_setting(document, model, quantity)
        found = [entry for entry in document.select(quantity, model=model.name) if entry.values]
        for entry in sorted(found, key=lambda entry: entry.setting):
            if not every and entry.setting != main:
                continue
            spread = distribution(numbers(entry))
            unit = scale((spread.p50,), "s")
            cells = (unit.full(value) for value in (spread.p50, spread.p90, spread.p99, spread.mean))
            others = ("batch",) if quantity in NETWORKS else ("batch", "steps")
            head = f"{title(quantity)}, {setting_text(entry.setting, others)}"
            rows.append(Row(head, (label(document, entry.subject), *cells, str(spread.count))))
    return Table(
        "Times under every setting" if every else "Times under the main setting",
        "p50 is the median; p99 only from 100 values on.",
        ("Quantity", "Subject", "p50", "p90", "p99", "mean", "values"),
        tuple(rows),
        2,
    )


def speed(document: Document, model: Model) -> Table:
    """Pictures per second by batch, and the host's time per step."""
    names = subjects_of(document, model)
    found = {name: throughput(document, model, name) for name in names}
    unit = scale((value for entry in found.values() for value in entry.values()), "1")
    columns: Columns = [
        (
            f"images/s, batch {batch}",
            {name: unit.show(entry[batch]) for name, entry in found.items() if batch in entry},
        )
        for batch in sorted({batch for entry in found.values() for batch in entry})
    ]
    if setting := main_setting(document, model, "step"):
        host = {name: host_time_per_step(document, model.name, name, setting) for name in names}
        columns += _values(host, "s", "host per step")
    note = "Host time is the median step less the median evaluation of the U-Net; below 0 it is noise."
    return _by_subject(document, model, "Throughput and host time", note, columns)


def growths(document: Document, model: Model) -> Table:
    """The fitted exponents, a column for each subject."""
    fits = [fit for axis in AXES for fit in growth(document, axis, model.name)]
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for fit in fits:
        r_squared = f" (R² {fit.r_squared:.2f})" if fit.r_squared < GOOD_FIT else ""
        row = cells.setdefault((f"{title(fit.quantity)} by {fit.axis}",), {})
        row.setdefault(fit.subject, f"{fit.exponent:.2f}{r_squared}")
    note = (
        "Exponent e of time = c · setting^e, fitted to the medians: 1 is proportional, 0 does not grow. R² "
        f"where it is below {GOOD_FIT}."
    )
    return _across_subjects(document, model, "How time grows", note, ("What by what",), cells)


def _across_subjects(
    document: Document,
    model: Model,
    caption: str,
    note: str,
    headings: tuple[str, ...],
    cells: Mapping[tuple[str, ...], Cells],
) -> Table:
    """A column for each subject; ``cells`` are by what stands before them in a row."""
    names = [name for name in subjects_of(document, model) if any(name in row for row in cells.values())]
    rows = (
        Row(head[0], (*head[1:], *(row.get(name, MISSING) for name in names))) for head, row in cells.items()
    )
    return Table(caption, note, (*headings, *(label(document, name) for name in names)), tuple(rows))


def step_costs(document: Document, model: Model) -> Table:
    """What an image costs whatever its steps, and each step: the straight line through the times by steps."""
    fits = {fit.subject: fit for fit in growth(document, "steps", model.name)}
    unit = scale((value for fit in fits.values() for value in fit.line), "s")
    columns: Columns = [
        (f"fixed, {unit.unit}", {name: unit.show(fit.line[1]) for name, fit in fits.items()}),
        (f"each step, {unit.unit}", {name: unit.show(fit.line[0]) for name, fit in fits.items()}),
        ("steps", {name: ", ".join(str(x) for x, _ in fit.points) for name, fit in fits.items()}),
    ]
    note = (
        "A straight line through the medians by least squares: what an image costs without steps, and each "
        "step."
    )
    return _by_subject(document, model, "Cost of an image by steps", note, columns)


def limits(document: Document, model: Model) -> Table:
    """What share of the attainable speed each network reaches, a column for each subject."""
    found = sorted(shares(document, model.name), key=lambda s: (NETWORKS.index(s.component), s.setting))
    unit = scale((share.attainable for share in found), "flop/s")
    bandwidth = scale((share.bytes_per_s for share in found), "B/s")
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for share in found:
        head = f"{title(share.component)}, {setting_text(share.setting, ('batch',))}"
        row = cells.setdefault((head, f"{share.intensity:.1f}", f"{share.attainable / unit.factor:.0f}"), {})
        speeds = f"{share.flop_per_s / unit.factor:.1f}, {share.bytes_per_s / bandwidth.factor:.2f}"
        row[share.subject] = f"{share.share:.0%} ({speeds})"
    note = (
        "Of the attainable speed: the lower of the measured peak and intensity times measured bandwidth. In "
        f"brackets {unit.unit} and {bandwidth.unit}: operations and bytes counted from the graph, over the "
        "median time."
    )
    headings = ("Network", "flop/B", f"attainable, {unit.unit}")
    return _across_subjects(document, model, "Share of the machine's limit", note, headings, cells)


def fidelity(document: Document, model: Model) -> Table:
    """Difference to the reference under every setting."""
    measures = {"psnr": psnr_text, "latent_error": latent_text}
    settings = {entry.setting for name in measures for entry in document.select(name, model=model.name)}
    rows = []
    for setting in sorted(settings):
        for name in subjects_of(document, model):
            found = [find(document, model.name, name, key, setting) for key in measures]
            if any(found):
                values = (None if entry is None else median_of(entry) for entry in found)
                cells = (show(value) for show, value in zip(measures.values(), values, strict=True))
                rows.append(Row(setting_text(setting), (label(document, name), *cells)))
    note = (
        f"Against {model.reference} from the same latents: “equal” is the same picture in every pixel; 40 dB "
        "and more no eye tells apart."
    )
    return Table("Fidelity", note, ("Setting", "Subject", "PSNR, dB", "latent error"), tuple(rows), 2)


def host_work(document: Document, model: Model) -> Table:
    """What a step does on a GPU and on the host for it."""
    found = [entry for entry in document.profiles if entry.model == model.name]
    kinds = list(dict.fromkeys(kind for entry in found for kind in entry.host))
    rows = (
        Row(
            f"{label(document, entry.subject)}, batch {entry.batch}",
            (
                *(f"{entry.seconds * 1e3:.2f}", f"{entry.launches:g}"),
                *(f"{entry.host[kind]:g}" if kind in entry.host else MISSING for kind in kinds),
            ),
        )
        for entry in found
    )
    note = (
        "Profiled by PyTorch, which does not list the launch of a graph by the driver's own function: 0 "
        "launches of the host are one that it does not see."
    )
    columns = ("Subject", "on the GPU, ms", "kernels and copies", *(f"host: {kind}" for kind in kinds))
    return Table("A step on the GPU", note, columns, tuple(rows))


def kernels(document: Document, profile: Profile) -> Table:
    """Which kernels a step spends its time in, the longest first."""
    rows = (
        Row(entry.name, (f"{entry.seconds * 1e3:.3f}", f"{entry.launches:g}")) for entry in profile.kernels
    )
    caption = f"Kernels of a step: {label(document, profile.subject)}, batch {profile.batch}"
    return Table(caption, "Those that take longest.", ("Kernel", "ms", "launches"), tuple(rows))


def of_model(document: Document, model: Model) -> list[Table]:
    """Every table of a model but the overview, without those that have no rows."""
    made: Iterable[Callable[[Document, Model], Table]] = (
        speed,
        memory,
        fidelity,
        host_work,
        step_costs,
        growths,
        limits,
        percentiles,
    )
    found = [parts(document, model, cold=cold) for cold in (True, False)]
    found += [make(document, model) for make in made]
    found += [kernels(document, entry) for entry in document.profiles if entry.model == model.name]
    return [table for table in found if table.rows]


def failures(document: Document) -> Table:
    """What could not be measured."""
    rows = tuple(
        Row(label(document, entry.subject), (entry.model or "all models", entry.stage, entry.error))
        for entry in document.failures
    )
    note = "What was to be measured and could not be, with its error."
    return Table("Failures", note, ("Subject", "Model", "While", "Error"), rows, 4)


def subjects(document: Document) -> Table:
    """Labels, versions and what differs."""
    rows = []
    for entry in document.subjects:
        versions = ", ".join(f"{name} {version}" for name, version in entry.versions.items())
        rows.append(Row(entry.label, (entry.name, versions or MISSING, " ".join(entry.notes) or MISSING)))
    note = "The first one is ours, which the ratios compare with each other one."
    return Table("Subjects", note, ("Subject", "Name", "Versions", "What differs"), tuple(rows), 4)
