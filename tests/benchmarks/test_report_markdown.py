"""The Markdown summary."""

from __future__ import annotations

import re
from dataclasses import replace

from support.fakes.example_document import ERROR, document, document_without_measurements

from sdrt.benchmarks.report.summary import summary


def cells(line: str) -> list[str]:
    """Of a row, escaped bars left alone."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_every_row_of_a_table_has_its_cells() -> None:
    width, rows = 0, 0
    for line in summary(document()).splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        width = width or len(cells(line))
        assert len(cells(line)) == width, line
        rows += 1
    assert rows > 100


def test_the_summary_has_every_subject_its_ratio_and_the_failure() -> None:
    text = summary(document())
    head = text[text.index("## emoji") : text.index("### Parts of a cold start")]
    rows = [cells(line) for line in head.splitlines() if line.startswith("|")]
    assert rows[0][:3] == ["Subject", "Cold start, s", "ours ÷ it"]
    assert [row[0] for row in rows[2:]] == [subject.label for subject in document().subjects]
    assert rows[2][2] == "–"
    assert re.fullmatch(r"0\.1\d \(0\.1\d–0\.1\d\)", rows[3][2])
    assert "failed, cold start: RuntimeError: expected &lt;Float" in text
    assert "| 2 | " not in rows[0]
    assert "--report 'out/report & more'" in text
    assert "**Warning.** The machine was noisy" in text


def test_nothing_in_a_document_becomes_markup() -> None:
    (first, *rest) = document().subjects
    sly = replace(first, label="*a*|<b>`c`", notes=("[x](http://y)",))
    text = summary(replace(document(), subjects=(sly, *rest)))
    assert "\\*a\\*\\|&lt;b\\>\\`c\\`" in text
    assert "\\[x\\](http" in text
    assert ERROR not in text
    assert "<script" not in text


def test_a_run_that_measured_nothing_has_a_summary() -> None:
    text = summary(replace(document_without_measurements(), complete=False, subjects=()))
    assert "Nothing was measured." in text
    assert "interrupted" in text
    assert "Nothing was measured." not in summary(document())
