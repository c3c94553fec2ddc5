"""The wheel, opened and used: what a person gets from ``pip install 'sdrt[cpu]'``, without torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = (".py", ".cu", ".cuh", ".json", ".gz", ".typed")
NOT_SHIPPED = ("benchmarks/results", "models/emoji")
FORBIDDEN = ("torch", "diffusers", "transformers", "onnx", "onnxscript")


def files_of_the_tree() -> list[str]:
    """Tracked and new files, not what is ignored: a wheel must not depend on leftovers."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode()
    return [name for name in listing.split("\0") if name and os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves build/ beside the sources."""
    source = tmp_path_factory.mktemp("source") / "sdrt"
    for name in files_of_the_tree():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target, follow_symlinks=False)
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", str(out), str(source)], check=True, timeout=300)
    (built,) = out.glob("*.whl")
    return built


def expected() -> set[str]:
    """Whatever folders there are: one that ``pyproject.toml`` does not name is missed in the wheel."""
    packages = {entry.name for entry in (ROOT / "src" / "sdrt").iterdir() if entry.is_symlink()}
    assert {"runtime", "kernels", "export", "benchmarks", "models"} <= packages
    return {
        f"sdrt/{name.removeprefix('src/sdrt/')}"
        for name in files_of_the_tree()
        if name.endswith(SHIPPED)
        and (name.startswith("src/sdrt/") or name.partition("/")[0] in packages)
        and not name.startswith(NOT_SHIPPED)
    }


def test_the_wheel_has_every_module_and_the_embedded_bundle(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"sdrt/__init__.py", "sdrt/py.typed", "sdrt/export/data/bpe_simple_vocab_16e6.txt.gz"} <= names
    assert expected() - names == set()
    bundle = ROOT / "models" / "emoji" / "bundle"
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    assert "sdrt/models/emoji/bundle/manifest.json" in names
    for component in manifest["components"].values():
        for entry in component["files"]:
            assert f"sdrt/models/emoji/bundle/{entry['path']}" in names
    for adapter in (ROOT / "models" / "emoji" / "lora").glob("*.safetensors"):
        assert f"sdrt/models/emoji/lora/{adapter.name}" in names


def test_the_wheel_has_nothing_else(wheel: Path) -> None:
    others = set(zipfile.ZipFile(wheel).namelist()) - expected()
    embedded = ("sdrt/models/emoji/bundle/", "sdrt/models/emoji/lora/")
    assert [name for name in others if not name.startswith(("sdrt-", *embedded))] == []
    assert wheel.stat().st_size < 25e6


def _requirements(dist: Distribution, extras: set[str]) -> list[Requirement]:
    wanted = []
    for text in dist.requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            wanted.append(requirement)
    return wanted


def _closure(metadata: str) -> set[str]:
    """The distributions that ``pip install 'sdrt[cpu]'`` brings, read from the wheel's metadata."""
    first = [
        Requirement(line.removeprefix("Requires-Dist: "))
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ")
    ]
    pending = [r for r in first if r.marker is None or r.marker.evaluate({"extra": "cpu"})]
    found: set[str] = set()
    while pending:
        requirement = pending.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name not in found:
            found.add(name)
            pending += _requirements(distribution(name), set(requirement.extras))
    return found


@pytest.fixture(scope="module")
def bare_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel and exactly what its metadata asks for: no torch anywhere."""
    environment = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (site,) = (environment / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        needed = _closure(archive.read(metadata).decode())
    assert "onnxruntime" in needed
    for name in needed:
        for file in distribution(name).files or ():
            top = file.parts[0]
            target = site / top
            if top not in ("..", "__pycache__") and not target.exists():
                target.symlink_to(Path(str(distribution(name).locate_file(top))))
    return environment / "bin" / "python"


def test_it_draws_without_torch(bare_python: Path, tmp_path: Path) -> None:
    code = f"import importlib.util as u; print([n for n in {FORBIDDEN!r} if u.find_spec(n)])"
    present = subprocess.run([str(bare_python), "-c", code], capture_output=True, text=True, check=True)
    assert present.stdout.strip() == "[]"
    command = [str(bare_python), "-m", "sdrt.runtime.cli", "a red apple", "--seed", "0", "--json"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    (image,) = json.loads(run.stdout)["images"]
    assert image["seed"] == 0
    assert (tmp_path / image["path"]).read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == [image["path"]]


def test_sd_export_without_torch_says_what_to_install(bare_python: Path, tmp_path: Path) -> None:
    model, out = ROOT / "models" / "emoji", tmp_path / "out"
    command = [str(bare_python), "-m", "sdrt.export.cli", str(model), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "pip install 'sdrt[export]'" in run.stderr
    assert len(run.stderr.splitlines()) == 1
