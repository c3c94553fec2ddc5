"""A report as one HTML page that needs nothing beside it, no script either."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Final

from sdrt.benchmarks.document.document import QUANTITIES, Document, Model
from sdrt.benchmarks.report.derive import main_setting, typical
from sdrt.benchmarks.report.formatting import factor_text, held_words, one, setting_text, time_text, title
from sdrt.benchmarks.report.limits import warnings
from sdrt.benchmarks.report.plots import (
    bars,
    curves,
    distributions,
    fidelity,
    memory_bars,
    part_names,
    subject_order,
)
from sdrt.benchmarks.report.roofline import roofline
from sdrt.benchmarks.report.style import STYLE
from sdrt.benchmarks.report.svg import key
from sdrt.benchmarks.report.tables import (
    PER_MODEL,
    Row,
    Table,
    failures,
    main_ratios,
    overview,
    percentiles,
    subjects,
    subjects_of,
)

HEADLINES: Final = ("cold_total", "image", "step", "cold_peak_memory")
AXES: Final = (("steps", "steps"), ("pixels", "size"), ("batch", "batch"))


def page(document: Document) -> str:
    """The whole page."""
    body = "\n".join(
        [*_header(document), *(_model(document, model) for model in document.models), *_end(document)]
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sd-bench: {escape(", ".join(model.name for model in document.models) or "nothing measured")}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _header(document: Document) -> Iterator[str]:
    machine = document.machine
    links = [(_anchor(model.name), model.name) for model in document.models]
    links += [("failures", "Failures")] * bool(document.failures)
    links += [("subjects", "Subjects"), ("machine", "Machine and command")]
    nav = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name in links)
    peers = sum(subject.kind == "peer" for subject in document.subjects)
    heading = f"sdrt beside {peers} peer{'s' * (peers != 1)}" if peers else "sdrt, measured"
    same = "The same checkpoint, latents, sampler, steps and threads for all, measured in turns."
    when = time_text(document.created)
    yield (
        f'<header><p class="over">sd-bench · {escape(when)}</p>'
        f"<h1>{heading}</h1>"
        f'<p class="soft">sdrt {escape(document.sdrt)} on {escape(machine.cpu)}, {machine.cores} cores'
        f"{''.join(', ' + escape(gpu) for gpu in machine.gpus)}. {same * bool(peers)}</p>"
        f'<nav aria-label="Contents">{nav}</nav></header>'
    )
    found = warnings(document)
    if not document.measurements:
        found.append("Nothing was measured.")
    if found:
        items = "".join(f"<li>{escape(warning)}</li>" for warning in found)
        yield f'<ul class="warnings" aria-label="Warnings">{items}</ul>'


def _model(document: Document, model: Model) -> str:
    sizes = ", ".join(f"{width}×{height}" for height, width in model.sizes)
    threads = f"{model.threads} thread{'s' * (model.threads != 1)}"
    settings = (
        f"{model.source}: {one(model.weights_bytes, 'B')} of weights in fp32. {model.sampler}, "
        f"{model.steps} steps, guidance {model.guidance_scale:g}, {sizes}, {threads}, “{model.prompt}”."
        f"{held_words(model)}"
    )
    if not subjects_of(document, model):
        content = ['<p class="note">Nothing was measured of this model.</p>']
    else:
        tables = [table for make in PER_MODEL if (table := make(document, model)).rows]
        every = percentiles(document, model, every=True)
        content = [
            _headlines(document, model),
            _table(document, overview(document, model)),
            *_figures(document, model),
            "<h3>In numbers</h3>",
            *(_table(document, table) for table in tables),
            f"<details><summary>{escape(every.caption)}</summary>{_table(document, every)}</details>",
        ]
    return (
        f'<section id="{_anchor(model.name)}"><h2>{escape(model.name)}</h2>'
        f'<p class="soft note">{escape(settings)}</p>{"".join(content)}</section>'
    )


def _headlines(document: Document, model: Model) -> str:
    """The first subject's figures, large, and what they are of the fastest peer's."""
    if not document.subjects:
        return ""
    first = document.subjects[0]
    tiles = []
    for quantity in HEADLINES:
        setting = main_setting(document, model, quantity)
        value = typical(document, model.name, first.name, quantity, setting)
        if value is not None and setting is not None:
            shown = one(value, QUANTITIES[quantity][0])
            tiles.append(
                f'<div><dt>{escape(title(quantity))}</dt><dd class="big">{escape(shown)}</dd>'
                f'<dd class="beside soft">{escape(_beside(document, model, quantity))}</dd></div>'
            )
    return f'<dl class="headlines">{"".join(tiles)}</dl>' if tiles else ""


def _beside(document: Document, model: Model, quantity: str) -> str:
    peers = {subject.name: subject.label for subject in document.subjects[1:] if subject.kind == "peer"}
    setting = main_setting(document, model, quantity)
    known = {name: typical(document, model.name, name, quantity, setting) for name in peers}
    found = {name: value for name, value in known.items() if value is not None}
    ratios = main_ratios(document, model, quantity)
    if not found or setting is None:
        return setting_text(setting) if setting else ""
    best = min(found, key=lambda name: found[name])
    shown = one(found[best], QUANTITIES[quantity][0])
    least = "least of the peers" if QUANTITIES[quantity][0] == "B" else "fastest peer"
    if best not in ratios:
        return f"{least}: {peers[best]}, {shown}"
    return f"{factor_text(ratios[best].spread.p50)} × the {least}, {peers[best]} ({shown})"


Made = tuple[str | None, str, str, str]  # drawing, heading, how to read it, what follows


def _figures(document: Document, model: Model) -> Iterator[str]:
    groups: tuple[tuple[str, Callable[[Document, Model], Iterator[Made]]], ...] = (
        ("Where time and memory go", _bars),
        ("How steady it is", _distributions),
        ("How it grows", _curves),
        ("Against the machine and the reference", _limits),
    )
    for heading, make in groups:
        found = [made for made in make(document, model) if made[0]]
        if found:
            yield f'<h3>{heading}</h3><div class="figures">{"".join(map(_figure, found))}</div>'


def _figure(made: Made) -> str:
    drawing, heading, reading, after = made
    words = f"<h4>{escape(heading)}</h4><p>{escape(reading)}</p>"
    return f"<figure><figcaption>{words}</figcaption>{drawing}{after}</figure>"


def _bars(document: Document, model: Model) -> Iterator[Made]:
    for cold, heading, reading in (
        (True, title("cold_total"), "From a fresh process to the first picture on disk: shorter is better."),
        (
            False,
            "Warm image",
            "A whole call in a process that has drawn before: shorter is better. Stages are timed "
            "apart; where they add up to more than the call, they are drawn narrower.",
        ),
    ):
        names = part_names(document, model, cold=cold)
        legend = _swatches("Parts, from the left", names)
        yield bars(document, model, cold=cold), heading, reading, legend
    legend = _swatches("Parts, from the left", [(1, "its own"), (3, "files and shared")])
    yield (
        memory_bars(document, model),
        title("cold_peak_memory"),
        "The most that the process of a cold start held, mapped files included: shorter is better.",
        legend,
    )


def _swatches(what: str, names: Sequence[tuple[int, str]]) -> str:
    items = "".join(f'<li><span class="swatch p{shade}"></span>{escape(name)}</li>' for shade, name in names)
    return f'<ul class="legend" aria-label="{what}">{items}</ul>'


def _distributions(document: Document, model: Model) -> Iterator[Made]:
    reading = (
        "Every dot is one run; the box holds the middle half, its line is the median. Equal "
        "distances are equal ratios."
    )
    for quantity in ("cold_total", "image", "step"):
        yield distributions(document, model, quantity), title(quantity), reading, ""


def _curves(document: Document, model: Model) -> Iterator[Made]:
    for axis, words in AXES:
        reading = (
            f"Both axes are logarithmic: a slope of 1 is time in proportion to {axis}; the exponent is "
            "the fitted slope."
        )
        yield curves(document, model, axis), f"Warm image by {words}", reading, ""


def _limits(document: Document, model: Model) -> Iterator[Made]:
    items = "".join(
        f"<li>{key(index)} {escape(label)}</li>" for index, _, label in subject_order(document, model)
    )
    legend = f'<ul class="legend" aria-label="Subjects">{items}</ul>'
    first = document.subjects[0].label if document.subjects else "the first"
    yield (
        roofline(document, model),
        "Roofline",
        "The line is the most this machine can do, in flop/s; a mark on it would be perfect. "
        f"Shares are of {first}.",
        legend,
    )
    reading = "Up is closer to PyTorch in fp32, left is faster: no speed is bought silently."
    yield fidelity(document, model), "Fidelity beside speed", reading, ""


def _end(document: Document) -> Iterator[str]:
    if document.failures:
        yield f'<section id="failures"><h2>Failures</h2>{_table(document, failures(document))}</section>'
    yield f'<section id="subjects"><h2>Subjects</h2>{_table(document, subjects(document))}</section>'
    yield f'<section id="machine"><h2>Machine and command</h2>{_table(document, _machine(document))}'
    yield (
        f"<pre><code>{escape(shlex.join(document.command))}</code></pre></section>"
        '<footer class="note">Every figure is derived from the raw measurements in <code>report.json</code>; '
        "<code>sd-bench compare</code> sets two of those side by side.</footer>"
    )


def _machine(document: Document) -> Table:
    machine, noise = document.machine, document.noise
    rows = [
        Row("Processor", (f"{machine.cpu}, {machine.cores} cores",)),
        Row("GPU", (", ".join(machine.gpus) or "none",)),
        Row("Memory", (one(machine.memory_bytes, "B"),)),
        Row("System", (machine.system,)),
        Row("Python", (machine.python,)),
        Row("sdrt", (document.sdrt,)),
    ]
    if document.ceilings:
        ceilings = document.ceilings
        most = f"{one(ceilings.flop_per_s, 'flop/s')}, {one(ceilings.bytes_per_s, 'B/s')}: {ceilings.how}"
        rows.append(Row("Ceilings", (most,)))
    if noise.probe_seconds:
        low, high = min(noise.probe_seconds), max(noise.probe_seconds)
        rows.append(
            Row("Noise probe", (f"{one(low, 's')} to {one(high, 's')}, {len(noise.probe_seconds)} times",))
        )
    if noise.load_average:
        low, high = min(noise.load_average), max(noise.load_average)
        rows.append(Row("Load average", (f"{low:.1f} to {high:.1f}",)))
    return Table("Machine", "", ("What", "Value"), tuple(rows), 2)


def _table(document: Document, table: Table) -> str:
    """In a box of its own, which scrolls where the table is wider than the screen."""
    joined = [heading.startswith("ours ÷") for heading in table.columns]
    head = "".join(
        f'<th scope="col"{_kind(index, table, joined)}>{escape(column)}</th>'
        for index, column in enumerate(table.columns)
    )
    body = "\n".join(_row(document, table, row, joined) for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}"><table>'
        f"<caption><span>{escape(table.caption)}</span></caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}"
    )


def _row(document: Document, table: Table, row: Row, joined: Sequence[bool]) -> str:
    index = next((i for i, subject in enumerate(document.subjects) if subject.label == row.head), None)
    mark = "" if index is None else key(index)
    ours = ' class="ours"' if index == 0 and len(table.rows) > 1 and table.text_columns == 1 else ""
    start = f'<tr{ours}><th scope="row" class="words{" marked" * bool(mark)}">{mark}{escape(row.head)}</th>'
    if row.error:
        span = len(table.columns) - 1
        return f'{start}<td class="error" colspan="{max(span, 1)}"><span>{escape(row.error)}</span></td></tr>'
    cells = "".join(
        f"<td{_kind(number, table, joined, cell)}>{_cell(cell)}</td>"
        for number, cell in enumerate(row.cells, 1)
    )
    return f"{start}{cells}</tr>"


def _kind(column: int, table: Table, joined: Sequence[bool], cell: str = "") -> str:
    kinds = ["words"] * (column < table.text_columns) + ["joined"] * joined[column]
    kinds += ["long"] * (len(cell) > 40)
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _cell(text: str) -> str:
    """Escaped; the spread behind a number in brackets is set smaller."""
    found = re.fullmatch(r"([\d.,%∞]+) (\(.*\))", text)
    return f"{escape(found[1])} <small>{escape(found[2])}</small>" if found else escape(text)


def _anchor(name: str) -> str:
    """An identifier within the page."""
    return "model-" + "".join(c if c.isalnum() and c.isascii() else f"-{ord(c):x}-" for c in name)
