"""Fixtures of the export tests: exports without the tracing, and a whole one beside `tiny_bundle`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from support.checkpoints.tiny_sdxl import write_tiny_refiner_checkpoint, write_tiny_sdxl_checkpoint
from support.checkpoints.tiny_variants import write_model_index
from support.made_once import exported_once, made_once

from sdrt.export import writer as bundle_writer
from sdrt.export.cli import main as cli
from sdrt.export.graphs.from_module import onnx_from_module
from sdrt.runtime.bundle.families.record import ComponentSpec

# The ranges that `tiny_bundle` was exported with.
SIZES = ("--height", "16..32", "--width", "16..32", "--batch", "1..2")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch's threads wait for each other where others have the cores: seconds for tiny networks."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def traced_before(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Sequence[str]:
    """Let exports take the graphs of `tiny_bundle` in place of 30 s of tracing; all else is as it is.

    Returns the options that fit those graphs.
    """

    def load(_module: object, _args: object, spec: ComponentSpec, *_rest: object) -> ir.Model:
        return ir.load(tiny_bundle / spec.name / "model.onnx")

    monkeypatch.setattr(bundle_writer, "onnx_from_module", load)
    return SIZES


@pytest.fixture(scope="session")
def fp16_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in fp16, for one image of one size; 18 is no multiple of the U-Net's 4."""

    def export(out: Path) -> None:
        sizes = ["--height", "18", "--width", "16", "--batch", "1"]
        assert cli.main([str(tiny_checkpoint), str(out), "--fp16", "--quiet", *sizes]) == 0

    return exported_once("fp16-bundle", tmp_path_factory.mktemp("fp16") / "bundle", export, tiny_checkpoint)


@pytest.fixture(scope="session")
def sdxl_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of the family sdxl; read only."""
    folder = tmp_path_factory.mktemp("sdxl_checkpoint") / "tiny-xl"
    return made_once("sdxl-checkpoint", folder, write_tiny_sdxl_checkpoint, write_model_index)


@pytest.fixture(scope="session")
def sdxl_bundle(sdxl_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle: fp32, one size, batches of 1 to 2. Read only."""

    def export(out: Path) -> None:
        sizes = ["--height", "16", "--width", "16", "--batch", "1..2"]
        assert cli.main([str(sdxl_checkpoint), str(out), "--quiet", *sizes]) == 0

    return exported_once("sdxl-bundle", tmp_path_factory.mktemp("sdxl") / "bundle", export, sdxl_checkpoint)


@pytest.fixture(scope="session")
def refiner_checkpoint(sdxl_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of the family sdxl-refiner, with the VAE of `sdxl_checkpoint`; read only."""

    def make(folder: Path) -> None:
        write_tiny_refiner_checkpoint(folder, sdxl_checkpoint)

    folder = tmp_path_factory.mktemp("refiner_checkpoint") / "tiny-refiner"
    return made_once("refiner-checkpoint", folder, make, write_tiny_refiner_checkpoint, sdxl_checkpoint)


@pytest.fixture(scope="session")
def refiner_bundle(
    refiner_checkpoint: Path, sdxl_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Its bundle, as that of `sdxl_bundle`. Networks that are that one's have its graphs. Read only."""

    def export(out: Path) -> None:
        def graph(module: Any, args: Any, spec: Any, *rest: Any) -> ir.Model:
            if spec.name != "unet":
                return ir.load(sdxl_bundle / spec.name / "model.onnx")
            return onnx_from_module(module, args, spec, *rest)

        sizes = ["--height", "16", "--width", "16", "--batch", "1..2"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bundle_writer, "onnx_from_module", graph)
            assert cli.main([str(refiner_checkpoint), str(out), "--quiet", *sizes]) == 0

    folder = tmp_path_factory.mktemp("refiner") / "bundle"
    return exported_once("refiner-bundle", folder, export, refiner_checkpoint, sdxl_bundle)
