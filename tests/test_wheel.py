"""The wheel, opened and used: what a person gets from ``pip install 'sdrt[cpu]'``, without torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ("document", "gallery", "harness", "peer_workers", "peers", "report", "studies")
PACKAGES = ("runtime", "kernels", "export", "benchmarks", *(f"benchmarks/{name}" for name in BENCHMARKS))
FORBIDDEN = ("torch", "diffusers", "transformers", "onnx", "onnxscript")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves build/ beside the sources."""
    source = tmp_path_factory.mktemp("source") / "sdrt"
    # Tracked and new files, not what is ignored: a wheel must not depend on leftovers.
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in filter(None, listing.stdout.decode().split("\0")):
        origin, target = ROOT / name, source / name
        if origin.is_symlink() or origin.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            if origin.is_symlink():
                target.symlink_to(origin.readlink())
            else:
                target.write_bytes(origin.read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", str(out), str(source)], check=True, timeout=300)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_has_every_module_and_the_embedded_bundle(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        for pattern in ("*.py", "*.cu", "*.cuh", "*.json"):
            for file in (ROOT / package).glob(pattern):
                assert f"sdrt/{package}/{file.name}" in names
    assert {"sdrt/__init__.py", "sdrt/py.typed"} <= names
    assert "sdrt/export/data/bpe_simple_vocab_16e6.txt.gz" in names
    for config in (ROOT / "export" / "data" / "architectures").rglob("*.json"):
        assert f"sdrt/{config.relative_to(ROOT)}" in names
    bundle = ROOT / "models" / "emoji" / "bundle"
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    assert "sdrt/models/emoji/bundle/manifest.json" in names
    for component in manifest["components"].values():
        for entry in component["files"]:
            assert f"sdrt/models/emoji/bundle/{entry['path']}" in names


def test_the_wheel_has_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert all(name.startswith(("sdrt/", "sdrt-")) for name in names)
    assert not [name for name in names if "test" in name or "checkpoint/" in name]
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
