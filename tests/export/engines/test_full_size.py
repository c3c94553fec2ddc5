"""Engines of the published architectures at their full size, from random weights; no GPU is needed.

Times and memory are printed, and the memory is asserted: it is what decides whether a machine can do it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdrt.export.engines.options import EngineOptions, Extent
from sdrt.export.engines.writer import LAYERS_NAME, EngineReport, add_engines
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.engine_search import list_engines

pytestmark = pytest.mark.full_size
RTX = "tensorrt-rtx"
GIB = 1 << 30


@dataclass(frozen=True)
class Run:
    """A finished process: seconds on the clock and of all cores, and the most memory it held."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run(*command: str) -> Run:
    """Run a command to its end in a process of its own; fails the test with its output."""
    read, write = os.pipe()
    started = time.monotonic()
    child = os.posix_spawn(
        command[0],
        command,
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, write, 1), (os.POSIX_SPAWN_DUP2, write, 2)],
    )
    os.close(write)
    with os.fdopen(read, encoding="utf-8", errors="replace") as stream:
        output = stream.read()
    _, status, usage = os.wait4(child, 0)
    assert status == 0, output
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Run(time.monotonic() - started, cpu_seconds, usage.ru_maxrss << 10)


def export(architecture: str, out: Path, *flags: str) -> Run:
    arguments = ["--architecture", architecture, "--random-weights", str(out), "--fp16", *flags]
    return run(sys.executable, "-m", "sdrt.export.cli", *arguments)


@pytest.fixture(scope="session")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 1.5 in fp16 with random weights: 1 to 4 images of 512 pixels.

    While working on tests, ``SDRT_SD15_BUNDLE`` may name one that was made before, engines and all.
    """
    if made_before := os.environ.get("SDRT_SD15_BUNDLE"):
        return Path(made_before)
    out = tmp_path_factory.mktemp("sd15") / "bundle"
    figures = export("sd15", out)
    print(f"\nSD 1.5: exported in {figures.seconds:.0f} s with {figures.peak_bytes / GIB:.1f} GiB")
    assert figures.peak_bytes <= 6 * GIB
    # Four minutes of two cores. Not by the clock: whatever else runs meanwhile is no fault of the export.
    assert figures.cpu_seconds <= 2 * 240
    return out


def build(bundle: Path, components: Sequence[str]) -> dict[str, EngineReport]:
    """Build the engines of a bundle for one guided image of its own size, and print what they took."""
    reports = add_engines(bundle, EngineOptions(RTX, ({"batch": Extent(1, 1, 4)},)), components=components)
    for report in reports:
        facts = report.manifest.facts
        print(
            f"{report.component}: {facts['attention']['fused']} of {facts['attention']['nodes']} attentions "
            f"fused, {facts['layers']} layers, {report.manifest.files[0].size / 1e6:.0f} MB, "
            f"{facts['activation_bytes'] / 2**20:.0f} MiB of scratch memory; "
            f"built in {facts['build_seconds']:.0f} s with {facts['peak_memory_bytes'] / GIB:.1f} GiB"
        )
    return {report.component: report for report in reports}


def check_attention(report: EngineReport, attentions: int) -> None:
    """All of them are attention layers, by the count of nodes and by the names of the kernels."""
    expected = {"nodes": attentions, "fused": attentions, "decomposed": []}
    assert report.manifest.facts["attention"] == expected
    layers = json.loads((report.folder / LAYERS_NAME).read_text())["layers"]
    kernels = [layer for layer in layers if "_mha_" in layer["name"]]
    assert len(kernels) == attentions
    computed = [node for layer in kernels for node in layer["onnx_nodes"] if "attention" in node]
    assert len(set(computed)) == attentions


def test_all_of_sd15_builds_with_every_attention_fused(sd15: Path) -> None:
    components = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    reports = build(sd15, components)
    check_attention(reports["unet"], 32)
    check_attention(reports["text_encoder"], 12)
    for name in ("vae_decoder", "vae_encoder"):
        # One head of 512: written out, since there is no fused kernel for it.
        assert reports[name].manifest.facts["attention"]["nodes"] == 0
    for report in reports.values():
        # A build of TensorRT's own holds the weights some three times.
        assert report.manifest.facts["peak_memory_bytes"] <= 8 * GIB
        assert report.manifest.facts["build_seconds"] <= 240
    engines, damaged = list_engines(Bundle.open(sd15, verify=False))
    assert sorted(engine.manifest.key.component for engine in engines) == sorted(components)
    assert damaged == []


@pytest.mark.slow
def test_the_unet_of_sdxl_builds_with_every_attention_fused(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    figures = export("sdxl", bundle, "--batch", "1")
    print(f"\nSDXL: exported in {figures.seconds:.0f} s with {figures.peak_bytes / GIB:.1f} GiB")
    check_attention(build(bundle, ["unet"])["unet"], 140)
