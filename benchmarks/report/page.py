"""A report as one HTML page that needs nothing beside it, no script either."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Final

from sdrt.benchmarks.document.document import QUANTITIES, Document, Model
from sdrt.benchmarks.report.derive import main_setting, typical
from sdrt.benchmarks.report.formatting import factor_text, held_words, one, setting_text, time_text, title
from sdrt.benchmarks.report.limits import warnings
from sdrt.benchmarks.report.style import STYLE, SUBJECT_COLORS
from sdrt.benchmarks.report.tables import (
    Row,
    Table,
    failures,
    main_ratios,
    of_model,
    overview,
    percentiles,
    subjects,
    subjects_of,
)

HEADLINES: Final = ("cold_total", "image", "step", "cold_peak_memory")
STEADY: Final = (
    "Every dot is one run; the box holds the middle half, its line is the median. Equal distances are equal "
    "ratios."
)
AXES: Final = (("steps", "steps"), ("pixels", "size"), ("batch", "batch"))
# As matplotlib's markers of `plots.MARKERS`: paths around the origin, some 8 units across.
MARKS: Final = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "M-3.6,-3.6h7.2v7.2h-7.2z",
    "M0,-4.6l4.4,8h-8.8z",
    "M0,-5l5,5l-5,5l-5,-5z",
    "M0,4.6l4.4,-8h-8.8z",
    "M-1.5,-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "M-4.2,-2.4l1.8,-1.8l2.4,2.4l2.4,-2.4l1.8,1.8l-2.4,2.4l2.4,2.4l-1.8,1.8l-2.4,-2.4l-2.4,2.4l-1.8,-1.8z",
)


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
    yield from (f'<p class="note">{escape(note)}</p>' for note in document.notes)
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
        tables = of_model(document, model)
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
    try:
        from sdrt.benchmarks.report import plots
    except ImportError as error:  # a machine with a GPU may have little beside PyTorch
        yield (
            f'<p class="note">The plots are left out: {escape(str(error))}. <code>sd-bench render</code> '
            "draws them from report.json where matplotlib is.</p>"
        )
        return
    first = document.subjects[0].label if document.subjects else "the first"
    cold, warm = (_swatches(plots.part_names(document, model, cold=cold)) for cold in (True, False))
    own = _swatches([(1, "its own"), (3, "files and shared")])
    whole = "A whole call in a process that has drawn before: shorter is better. Stages are timed apart; "
    order = [(index, label) for index, _, label in plots.subject_order(document, model)]
    groups: dict[str, list[Made]] = {
        "Where time and memory go": [
            (
                plots.bars(document, model, cold=True),
                title("cold_total"),
                "From a fresh process to the first picture on disk: shorter is better.",
                cold,
            ),
            (
                plots.bars(document, model, cold=False),
                title("image"),
                f"{whole}where they add up to more than the call, they are drawn narrower.",
                warm,
            ),
            (
                plots.memory_bars(document, model),
                title("cold_peak_memory"),
                "The most that the process of a cold start held, mapped files included: shorter is better.",
                own,
            ),
        ],
        "How steady it is": [
            (
                plots.distributions(document, model, quantity),
                title(quantity),
                STEADY,
                "",
            )
            for quantity in ("cold_total", "image", "step")
        ],
        "How it grows": [
            (
                plots.curves(document, model, axis),
                f"Warm image by {words}",
                f"Both axes are logarithmic: a slope of 1 is time in proportion to {axis}; the fitted slope "
                "is beside each name.",
                _keys(
                    (index, f"{label}: {fit.exponent:.2f}")
                    for index, label, fit in plots.fits(document, model, axis)
                ),
            )
            for axis, words in AXES
        ],
        "Against the machine and the reference": [
            (
                plots.roofline(document, model),
                "Roofline",
                "The line is the most this machine can do, in flop/s; a mark on it would be perfect. "
                f"Shares are of {first}.",
                _keys(order),
            ),
            (
                plots.fidelity(document, model),
                "Fidelity beside speed",
                f"Up is closer to {model.reference}, left is faster: no speed is bought silently.",
                _keys(order),
            ),
        ],
    }
    for heading, made in groups.items():
        found = [figure for figure in made if figure[0]]
        if found:
            yield f'<h3>{heading}</h3><div class="figures">{"".join(map(_figure, found))}</div>'


def _figure(made: Made) -> str:
    drawing, heading, reading, after = made
    words = f"<h4>{escape(heading)}</h4><p>{escape(reading)}</p>"
    return f"<figure><figcaption>{words}</figcaption>{drawing}{after}</figure>"


def _swatches(names: Iterable[tuple[int, str]]) -> str:
    items = "".join(f'<li><span class="swatch p{shade}"></span>{escape(name)}</li>' for shade, name in names)
    return f'<ul class="legend" aria-label="Parts, from the left">{items}</ul>'


def _keys(names: Iterable[tuple[int, str]]) -> str:
    items = "".join(f"<li>{key(index)} {escape(label)}</li>" for index, label in names)
    return f'<ul class="legend" aria-label="Subjects">{items}</ul>'


def key(subject: int) -> str:
    """The mark of the subject at this index, to stand in a line of text."""
    shape = MARKS[(subject + subject // SUBJECT_COLORS) % len(MARKS)]
    return (
        f'<svg class="key s{subject % SUBJECT_COLORS}" viewBox="-6 -6 12 12" width="12" height="12" '
        f'aria-hidden="true"><path d="{shape}"/></svg>'
    )


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
    for ceilings in document.ceilings:
        most = f"{one(ceilings.flop_per_s, 'flop/s')}, {one(ceilings.bytes_per_s, 'B/s')}: {ceilings.how}"
        rows.append(Row("Ceilings" if ceilings.device == "cpu" else "Ceilings of the GPU", (most,)))
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
