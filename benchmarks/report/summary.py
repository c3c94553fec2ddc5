"""A report as Markdown: the tables of the page, for results in a repository."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from sdrt.benchmarks.document.document import Document, Model
from sdrt.benchmarks.report.formatting import held_words, one, time_text
from sdrt.benchmarks.report.limits import warnings
from sdrt.benchmarks.report.tables import Table, failures, of_model, overview, subjects


def summary(document: Document) -> str:
    """The whole summary, ending in a newline."""
    parts = ["# sd-bench", *_head(document)]
    for model in document.models:
        parts += [f"## {_escape(model.name)}", _settings(model)]
        parts += [_table(overview(document, model), heading=False)]
        parts += map(_table, of_model(document, model))
    if document.failures:
        parts += [_table(failures(document), level=2)]
    parts += [_table(subjects(document), level=2), "## Machine", *machine(document)]
    return "\n\n".join(parts) + "\n"


def _head(document: Document) -> Iterator[str]:
    yield f"{time_text(document.created)}, sdrt {_escape(document.sdrt)}. The command:"
    command = shlex.join(document.command)
    fence = "`" * max(3, 1 + max((len(run) for run in _runs(command)), default=0))
    yield f"{fence}sh\n{command}\n{fence}"
    yield from map(_escape, document.notes)
    for warning in warnings(document):
        yield f"> **Warning.** {_escape(warning)}"
    if not document.measurements:
        yield "Nothing was measured."


def _runs(text: str) -> list[str]:
    """The runs of backticks in it."""
    return [run for run in "".join(c if c == "`" else " " for c in text).split() if run]


def _settings(model: Model) -> str:
    sizes = ", ".join(f"{width}×{height}" for height, width in model.sizes)
    return (
        f"{_escape(model.source)}; {one(model.weights_bytes, 'B')} of weights in fp32; "
        f"{_escape(model.sampler)}, {model.steps} steps, guidance scale {model.guidance_scale:g}, "
        f"{sizes}, threads: {model.threads}; prompt “{_escape(model.prompt)}”."
        f"{held_words(model)}"
    )


def machine(document: Document) -> Iterator[str]:
    """What it ran on, a paragraph each, escaped."""
    found = document.machine
    gpus = ", ".join(found.gpus) or "no GPU"
    yield _escape(
        f"{found.cpu}, {found.cores} cores, {one(found.memory_bytes, 'B')} of memory, {gpus}. "
        f"{found.system}. Python {found.python}."
    )
    for ceilings in document.ceilings:
        yield _escape(
            f"At most{' on the GPU' * (ceilings.device != 'cpu')} {one(ceilings.flop_per_s, 'flop/s')} and "
            f"{one(ceilings.bytes_per_s, 'B/s')}, measured in the same run: {ceilings.how}."
        )


def _table(table: Table, *, heading: bool = True, level: int = 3) -> str:
    lines = [f"{'#' * level} {table.caption}", ""] if heading else []
    lines += [_escape(table.note), ""]
    lines.append(_line(table.columns))
    numbers = len(table.columns) - table.text_columns
    lines.append("| " + " | ".join([":--"] * table.text_columns + ["--:"] * numbers) + " |")
    for row in table.rows:
        blank = ("",) * (len(table.columns) - 2)
        lines.append(_line((row.head, *((row.error, *blank) if row.error else row.cells))))
    return "\n".join(lines)


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(_escape(cell).replace("\n", " ") for cell in cells) + " |"


def _escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    plain = " ".join(text.split())
    for special in "\\`*_[]<>|#~":
        plain = plain.replace(special, "\\" + special) if special != "<" else plain.replace("<", "&lt;")
    return plain
