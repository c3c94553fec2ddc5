"""The data of a report: to JSON and back, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fakes.example_document import document

from sdrt.benchmarks.document.document import (
    FORMAT_VERSION,
    QUANTITIES,
    SCHEMA,
    from_json,
    read,
    to_json,
)
from sdrt.runtime.errors import UsageError

Change = Callable[[dict[str, Any]], object]


def test_a_document_survives_json(tmp_path: Path) -> None:
    example = document()
    (tmp_path / "report.json").write_text(to_json(example))
    assert read(tmp_path / "report.json") == example


def test_the_example_has_every_quantity_and_the_schema_knows_each() -> None:
    measured = {entry.quantity for entry in document().measurements}
    assert measured == set(QUANTITIES) - {"gpu_memory"}  # of a machine without a GPU
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    allowed = schema["properties"]["measurements"]["items"]["properties"]["quantity"]
    assert allowed["enum"] == list(QUANTITIES)
    for name, (unit, meaning) in QUANTITIES.items():
        assert f"{name}: {meaning} [{unit}]" in allowed["description"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda found: found.update(extra=1), "'extra' was unexpected"),
        (
            lambda found: found["machine"].update(cores="2"),
            r"\$\.machine\.cores: '2' is not of type 'integer'",
        ),
        (lambda found: found.pop("noise"), "'noise' is a required property"),
        (lambda found: found["measurements"][3].update(quantity="joy"), "'joy' is not one of"),
        (lambda found: found["measurements"][3].update(rounds=[0]), "7 values and 1 rounds"),
        (lambda found: found.update(format="other"), "no report of sd-bench"),
        (lambda found: found.update(format_version=FORMAT_VERSION + 1), "upgrade sdrt"),
    ],
)
def test_what_does_not_fit_is_refused(change: Change, told: str) -> None:
    example = document()
    found = json.loads(to_json(replace(example, measurements=example.measurements[:4])))
    change(found)
    with pytest.raises(UsageError, match=told):
        from_json(json.dumps(found))


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_report_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.json"):
        read(tmp_path / "a.json")
    with pytest.raises(UsageError, match="No such file"):
        read(tmp_path / "none.json")
