"""``sd-bench compare``: what counts as worse, what is told, and the exit status."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.fakes.example_document import document, small_document

from sdrt.benchmarks.document.document import Document, Failure, Measurement, to_json
from sdrt.benchmarks.report.compare import BETTER, SAME, UNCERTAIN, WORSE, add_arguments, compare, run, text

Values = Sequence[float | None]


def with_values(quantity: str, values: Values, **others: object) -> Document:
    entry = Measurement("m", "a", quantity, 64, 64, 1, 10, tuple(values), tuple(range(len(values))))
    return replace(small_document(), measurements=(entry,), **others)  # type: ignore[arg-type]


def command(tmp_path: Path, before: Document, after: Document, *words: str) -> int:
    (tmp_path / "a.json").write_text(to_json(before))
    (tmp_path / "b.json").write_text(to_json(after))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(tmp_path / "a.json"), str(tmp_path / "b.json"), *words]))


@pytest.mark.parametrize(
    ("quantity", "before", "after", "verdict"),
    [
        ("image", [1.0, 1.01, 1.02], [1.2, 1.21, 1.22], WORSE),
        ("image", [1.0, 1.01, 1.02], [1.05, 1.06, 1.07], SAME),
        ("image", [1.2, 1.21, 1.22], [1.0, 1.01, 1.02], BETTER),
        ("image", [0.9, 1.0, 1.6, 1.7, 1.0], [0.9, 1.3, 1.3, 1.4, 1.0], UNCERTAIN),  # the spreads meet
        ("image", [1.0, 1.0], [2.0, 2.0], UNCERTAIN),  # too few to know
        ("memory", [100.0], [120.0], WORSE),
        ("installed_size", [100.0], [105.0], SAME),
        ("psnr", [40.0], [39.0], WORSE),  # an error 1.12 times as large
        ("psnr", [40.0], [39.5], SAME),
        ("psnr", [None], [30.0], WORSE),
        ("psnr", [None], [80.0], SAME),  # less than rounding to 8 bits
        ("latent_error", [1e-2], [2e-2], WORSE),
        ("latent_error", [0.0], [1e-5], SAME),
    ],
)
def test_the_rule(quantity: str, before: Values, after: Values, verdict: str, tmp_path: Path) -> None:
    a, b = with_values(quantity, before), with_values(quantity, after)
    (change,) = compare(a, b).changes
    assert change.verdict == verdict
    assert command(tmp_path, a, b) == (1 if verdict == WORSE else 0)


def test_a_threshold_of_the_user_is_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = with_values("image", [1.0, 1.0, 1.0]), with_values("image", [1.4, 1.4, 1.4])
    assert command(tmp_path, a, b) == 1
    assert command(tmp_path, a, b, "--threshold", "1.5") == 0
    assert command(tmp_path, a, b, "--threshold", "0.9") == 2
    assert "a ratio above 1 is needed" in capsys.readouterr().err


def test_files_that_cannot_be_read_give_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = argparse.Namespace(before=tmp_path / "none.json", after=tmp_path / "none.json", threshold=1.1)
    assert run(arguments) == 2
    assert "none.json" in capsys.readouterr().err


def test_slower_ones_come_first_and_rows_align(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = document()
    before = replace(before, measurements=tuple(before.select("vae_encoder")))
    slow = tuple(
        replace(entry, values=tuple(value and 2 * value for value in entry.values))
        if (entry.model, entry.subject, entry.quantity) == ("sd15", "optimum-onnx", "vae_encoder")
        else entry
        for entry in before.measurements
    )
    assert command(tmp_path, before, before) == 0
    capsys.readouterr()
    assert command(tmp_path, before, replace(before, measurements=slow)) == 1
    lines = capsys.readouterr().out.splitlines()
    table = lines[[line.startswith("verdict") for line in lines].index(True) :]
    assert table[1].split()[:2] == ["worse", "2.00"]
    assert table[1].split()[6:8] == ["vae_encoder", "optimum-onnx"]
    assert len({line.index(name) for line, name in zip(table[:2], ("quantity", "vae_"), strict=True)}) == 1
    assert "5 worse by more than 1.10 times" in table[-1]


def test_what_is_in_one_alone_is_told_and_a_new_failure_counts(tmp_path: Path) -> None:
    a = with_values("image", [1.0, 1.0, 1.0])
    b = replace(with_values("step", [1.0]), failures=(Failure("m", "a", "warm", "out of memory"),))
    found = compare(a, b)
    assert found.only_before == ("m: a, image at 64×64, batch 1, 10 steps",)
    assert found.only_after == ("m: a, step at 64×64, batch 1, 10 steps",)
    assert found.broken == ("m: a fails now, warm: out of memory",)
    assert "nothing is in both reports" in text(found)
    assert command(tmp_path, a, b) == 1
    failed_before = replace(a, failures=b.failures)
    assert command(tmp_path, failed_before, replace(a, failures=b.failures)) == 0


def test_differences_of_machine_versions_and_settings_are_told() -> None:
    a = with_values("image", [1.0])
    (model,), (first, other) = a.models, a.subjects
    b = replace(
        a,
        complete=False,
        machine=replace(a.machine, cores=8),
        models=(replace(model, threads=4, prompt="another"),),
        subjects=(replace(first, versions={"onnxruntime": "2"}), other),
    )
    told = "\n".join(compare(a, b).cautions)
    for line in (
        "the machines differ in cores: 2 and 8",
        "m: threads 2 became 4",
        "m: prompt a prompt became another",
        "a: onnxruntime none became 2",
        "B: The run was interrupted",
    ):
        assert line in told
