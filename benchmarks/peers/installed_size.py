"""How much a package takes on the disk, with all that it needs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlparse

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sdrt.runtime.errors import BackendError
from sdrt.runtime.system.child_process import last_line


def installed_bytes(requirements: Sequence[str], site_packages: Path) -> int:
    """Bytes of the files of some distributions and of all that they need.

    Args:
        requirements: As for pip: ``sdrt[cpu]``, ``torch==2.13.0``.
        site_packages: Where they are installed.

    Raises:
        BackendError: One of them is not there.
    """
    return total_bytes(closure(requirements, site_packages))


def closure(requirements: Sequence[str], site_packages: Path) -> dict[str, Distribution]:
    """Distributions by name: those that are required, and what these require in turn.

    What an extra that was not asked for or another platform would need is left out.

    Raises:
        BackendError: One of them is not there.
    """
    there = {
        canonicalize_name(found.metadata["Name"]): found for found in distributions(path=[str(site_packages)])
    }
    found: dict[str, Distribution] = {}
    extras: dict[str, set[str]] = {}
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, asked_by = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in there:
            # What was removed on purpose is required still: only what was asked for must be there.
            if asked_by:
                continue
            raise BackendError(f"{requirement.name} is not installed in {site_packages}")
        if name in found and requirement.extras <= extras[name]:
            continue
        found[name] = there[name]
        extras[name] = extras.get(name, set()) | requirement.extras
        waiting += [(needed, name) for needed in _needs(there[name], extras[name])]
    return found


def _needs(distribution: Distribution, extras: Iterable[str]) -> list[Requirement]:
    needs = [Requirement(text) for text in distribution.requires or ()]
    environments = [{"extra": extra} for extra in ("", *extras)]
    return [
        need
        for need in needs
        if need.marker is None or any(need.marker.evaluate(environment) for environment in environments)
    ]


def total_bytes(found: Mapping[str, Distribution]) -> int:
    """Bytes of the files of distributions; one that belongs to several counts once."""
    total, seen = 0, set()
    for distribution in found.values():
        source = _editable_source(distribution)
        if source is not None:
            total += _wheel_bytes(source)
            continue
        for entry in distribution.files or ():
            file = Path(str(distribution.locate_file(entry))).resolve()
            if file not in seen and file.is_file():
                seen.add(file)
                total += file.stat().st_size
    return total


_NOT_SOURCE: Final = shutil.ignore_patterns(".*", "out", "build", "dist", "*.egg-info", "__pycache__")


def _editable_source(distribution: Distribution) -> Path | None:
    """The folder that a distribution is worked on in; None for one that is installed as users have it."""
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlparse(origin["url"]).path))


def _wheel_bytes(source: Path) -> int:
    """What its wheel would put on the disk; building it takes seconds.

    It is built from a copy: setuptools leaves a folder beside the sources that later wheels would hold, too.

    Raises:
        BackendError: It does not build.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(source, Path(folder) / "source", symlinks=True, ignore=_NOT_SOURCE)
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        done = subprocess.run([*build, "-w", folder, str(copy)], capture_output=True, text=True)
        if done.returncode != 0:
            last = last_line(done.stderr, "pip printed nothing")
            raise BackendError(f"{source} does not build, so its size is not known: {last}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return sum(entry.file_size for entry in archive.infolist())
