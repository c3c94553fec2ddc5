"""The golden numbers that the documentation publishes are those that this code gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from support.references.golden import FOLDER, golden
from support.references.golden_steps import replayed
from support.references.golden_text import text_of

import tolerances

NUMBERS = {name: json.loads(text_of(data)) for name, data in golden().items()}
PUBLISHED = {name: json.loads((FOLDER / name).read_text(encoding="utf-8")) for name in NUMBERS}
# File and field → how far a number may be from the published one; all others are equal to the last bit. Those
# of steps.json are float32 numbers made of what may differ in tables.json: they may round to the neighbour.
TOLERANCES: dict[tuple[str, str], Callable[[float], float]] = {
    ("tables.json", "timesteps"): lambda _: tolerances.SAMPLER_TIMESTEPS,
    ("tables.json", "init_noise_sigma"): lambda value: tolerances.GOLDEN_COEFFICIENT * abs(value),
    ("tables.json", "rows"): lambda value: tolerances.GOLDEN_COEFFICIENT * max(1.0, abs(value)),
    ("steps.json", "timesteps"): lambda _: tolerances.SAMPLER_TIMESTEPS,
    ("steps.json", "rows"): lambda value: 2 * tolerances.EPS32 * max(1.0, abs(value)),
    ("steps.json", "latents"): lambda value: 2 * tolerances.EPS32 * abs(value),
}


def differences(name: str, ours: Any, theirs: Any, path: str = "", field: str = "") -> list[str]:
    """Where what is in a file differs from what is published by more than it may."""
    if isinstance(theirs, dict) and isinstance(ours, dict) and list(ours) == list(theirs):
        pairs = [(ours[key], theirs[key], f"{path}/{key}", key) for key in theirs]
    elif isinstance(theirs, list) and isinstance(ours, list) and len(ours) == len(theirs):
        pairs = [(a, b, f"{path}/{n}", field) for n, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    elif isinstance(theirs, int | float) and isinstance(ours, int | float):
        allowed = TOLERANCES[name, field](theirs) if (name, field) in TOLERANCES else 0.0
        return [] if abs(ours - theirs) <= allowed else [f"{path}: {ours}, published is {theirs}"]
    else:
        return [] if ours == theirs else [f"{path}: {str(ours)[:60]}, published is {str(theirs)[:60]}"]
    return [line for a, b, place, key in pairs for line in differences(name, a, b, place, key)]


def test_each_file_is_described_and_all_are_small() -> None:
    assert {file.name for file in FOLDER.iterdir()} == {"README.md", *NUMBERS}
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name, data in PUBLISHED.items():
        assert f"`{name}`" in page
        for key, value in data.items():
            cases = value if isinstance(value, list) and isinstance(value[0], dict) else [{}]
            for field in {key}.union(*cases):
                assert f"`{field}`" in page, f"{name}: {field}"
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2**20


@pytest.mark.parametrize("name", ["tables.json", "noise.json", "tokens.json", "pictures.json"])
def test_numbers(name: str) -> None:
    assert not differences(name, NUMBERS[name], PUBLISHED[name])


def test_guidance() -> None:
    ours, theirs = NUMBERS["guidance.json"], PUBLISHED["guidance.json"]
    assert not differences("guidance.json", ours["weights"], theirs["weights"])
    for one, other in zip(ours["embedding"], theirs["embedding"], strict=True):
        bound = tolerances.GUIDANCE_EMBEDDING * 1000 * other["w"] + 2 * tolerances.EPS32
        assert one["embedding"] == pytest.approx(other["embedding"], rel=0, abs=bound)
        assert (one["w"], one["width"]) == (other["w"], other["width"])


@pytest.mark.parametrize("number", range(len(PUBLISHED["steps.json"]["cases"])))
def test_steps(number: int) -> None:
    """What goes in is the same, and what comes out of what is published is equal to the last bit."""
    ours, theirs = NUMBERS["steps.json"]["cases"][number], PUBLISHED["steps.json"]["cases"][number]
    outputs = json.loads(json.dumps(replayed(theirs)))
    assert outputs == {name: theirs[name] for name in outputs}
    inputs = {name: value for name, value in theirs.items() if name not in outputs}
    assert not differences("steps.json", {name: ours[name] for name in inputs}, inputs)
    assert list(ours) == list(theirs)


def test_a_changed_number_is_found() -> None:
    changed = json.loads(json.dumps(PUBLISHED["tables.json"]))
    changed["cases"][1]["rows"][2][4] += 1e-12
    assert differences("tables.json", changed, PUBLISHED["tables.json"])[0].startswith("/cases/1/rows/2/4: ")
