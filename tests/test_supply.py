"""What an installation may take: upper bounds everywhere, exact versions inside them, hashes of files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")
# What needs an NVIDIA GPU or its compiler is not installed where these tests run.
FOR_GPUS = frozenset({"cuda", "tensorrt", "pycuda"})


def requirements(names: list[str]) -> list[Requirement]:
    """Those of other projects; the extras of this one name each other."""
    return [entry for entry in map(Requirement, names) if entry.name != PROJECT["project"]["name"]]


RUNTIME = requirements(PROJECT["project"]["dependencies"])
BUILD = requirements(PROJECT["build-system"]["requires"])
OF_EXTRAS = {extra: requirements(names) for extra, names in EXTRAS.items()}
EVERY = dict.fromkeys([*RUNTIME, *BUILD, *(wanted for names in OF_EXTRAS.values() for wanted in names)])


def pinned(lines: str) -> dict[str, Version]:
    """Name → version of every ``name==version`` line."""
    found = re.findall(r"^([\w.-]+)==([\w.]+)", lines, re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in found}


TESTED = pinned((ROOT / "constraints.txt").read_text(encoding="utf-8"))


@pytest.mark.parametrize("wanted", EVERY, ids=str)
def test_every_dependency_has_bounds(wanted: Requirement) -> None:
    assert {spec.operator for spec in wanted.specifier} == {">=", "<"}


@pytest.mark.parametrize("extra", ["", "build", *sorted(set(EXTRAS) - FOR_GPUS)])
def test_what_is_tested_is_inside_the_bounds(extra: str) -> None:
    for wanted in {"": RUNTIME, "build": BUILD, **OF_EXTRAS}[extra]:
        version = TESTED[canonicalize_name(wanted.name)]
        assert version in wanted.specifier, f"{wanted.name} {version}: {wanted.specifier}"


@pytest.mark.parametrize("extra", ["cpu", "openvino"])
def test_hashed_requirements_are_the_tested_versions(extra: str) -> None:
    text = (ROOT / "requirements" / f"{extra}.txt").read_text(encoding="utf-8")
    entries = [entry for entry in re.split(r"^(?=[^\s#])", text, flags=re.MULTILINE) if "==" in entry]
    assert all(HASH.search(entry) for entry in entries)
    assert len(entries) == len(pinned(text)) > len(RUNTIME)
    assert {name: TESTED.get(name) for name in pinned(text)} == pinned(text)
    assert {canonicalize_name(wanted.name) for wanted in (*RUNTIME, *OF_EXTRAS[extra])} <= set(pinned(text))
    assert "index-url" not in text
    assert "://" not in text
