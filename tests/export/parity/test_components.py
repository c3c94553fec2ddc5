"""The parity gate: its figures, its limit, and that what is over it is not shipped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from sdrt.export import writer as bundle_writer
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.cli import main as cli
from sdrt.export.graphs.from_module import save_graph
from sdrt.export.graphs.networks import wrapped
from sdrt.export.options import AxisRange
from sdrt.export.parity import components as parity
from sdrt.export.parity import sampling as parity_sampling
from sdrt.export.parity.components import (
    MAX_OVER_L2,
    ParityFigure,
    ParityReport,
    check_component,
    compare,
    reference_probes,
)
from sdrt.export.parity.sampling import (
    SAMPLING_FACTOR,
    check_sampling,
    reference_embeddings,
    sampling_probe,
)
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.errors import NumericsError, ParityError

AXES = {
    "batch": AxisRange(1, 2),
    "rows": AxisRange(1, 4),
    "height": AxisRange(16, 32, 4),
    "width": AxisRange(16, 32, 4),
    "context": AxisRange(77, 308, 77),
    "latent_height": AxisRange(8, 16, 2),
    "latent_width": AxisRange(8, 16, 2),
}


def figure(l2: float, largest: float = 0.0, tolerance: float = 1e-5, component: str = "unet") -> ParityFigure:
    return ParityFigure(component, "noise_pred", "1x4x8x8", l2, largest, tolerance, "fp32")


def test_compare_gives_both_relative_errors() -> None:
    expected = np.array([3.0, -4.0])
    assert compare(expected, expected) == (0.0, 0.0)
    l2, largest = compare(np.array([3.0, -4.5]), expected)
    assert l2 == pytest.approx(0.1)
    assert largest == pytest.approx(0.125)


def test_compare_works_in_float64() -> None:
    assert compare(np.full(10**4, 300, np.float16), np.full(10**4, 300, np.float16)) == (0.0, 0.0)
    l2, _ = compare(np.ones(1, np.float32), np.full(1, 1 + 1e-12))
    assert l2 == pytest.approx(1e-12, rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_never_pass(value: float) -> None:
    l2, largest = compare(np.array([1.0, value]), np.array([1.0, 2.0]))
    assert not figure(l2, largest, tolerance=1e30).passed


def test_another_shape_never_passes_even_where_it_would_broadcast() -> None:
    l2, largest = compare(np.ones((1, 3)), np.ones((2, 3)))
    assert math.isnan(l2)
    assert math.isnan(largest)
    assert not figure(l2, largest).passed


def test_a_reference_of_zeros_is_no_excuse() -> None:
    assert compare(np.zeros(3), np.zeros(3)) == (0.0, 0.0)
    assert not figure(*compare(np.full(3, 1e-9), np.zeros(3))).passed


def test_the_limit_itself_passes_and_the_next_number_does_not() -> None:
    limit = 1e-5
    assert figure(limit).passed
    assert not figure(math.nextafter(limit, 1)).passed
    peak = limit * MAX_OVER_L2
    assert figure(0.0, peak).passed
    assert not figure(0.0, math.nextafter(peak, 1)).passed


def test_a_report_names_the_worst_figure_and_counts_the_others() -> None:
    ParityReport([figure(1e-6), figure(9e-6)]).raise_if_over()
    over = [figure(1e-6), figure(2e-5, component="vae_decoder"), figure(5e-2, component="vae_encoder")]
    with pytest.raises(
        ParityError, match=r"^vae_encoder.noise_pred differs from PyTorch by 5\.00e-02"
    ) as caught:
        ParityReport(over).raise_if_over()
    assert "2 of 3 comparisons are over" in str(caught.value)
    assert "allowed 1e-05" in str(caught.value)
    nan = figure(math.nan, component="text_encoder")
    with pytest.raises(ParityError, match=r"^text_encoder.* by nan.*nothing was written$"):
        ParityReport([*over, nan]).raise_if_over()
    with pytest.raises(ParityError, match=r"^text_encoder.* by nan.*; NaN in fp16 is an overflow"):
        ParityReport([*over, replace(nan, arithmetic="fp16")]).raise_if_over()


class Faulty(torch.nn.Module):
    """A VAE decoder whose picture is NaN in one place."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        image = torch.zeros(latents.shape[0], 3, 2 * latents.shape[2], 2 * latents.shape[3])
        image[0, 1, 2, 3] = float("nan")
        return image


def test_a_reference_that_gives_nan_is_named(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    with pytest.raises(NumericsError, match=r"vae_decoder\.image: the PyTorch reference gives NaN"):
        reference_probes(checkpoint, "vae_decoder", Faulty(), AXES)


def test_a_large_model_is_compared_in_the_frugal_way_and_at_one_size(
    tiny_checkpoint: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "LARGE_PARAMETERS", 1000)
    monkeypatch.setattr(parity, "LARGE_SIDE", 24)
    for module in (parity, parity_sampling):
        monkeypatch.setattr(module, "OnnxRuntimeExecutor", lambda *_: pytest.fail("the default session"))
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    report = ParityReport()
    probes = reference_probes(checkpoint, "unet", wrapped(checkpoint, "unet"), AXES, small=True)
    check_component(checkpoint, "unet", probes, tiny_bundle / "unet" / "model.onnx", "fp32", report)
    assert [entry.inputs for entry in report.figures] == ["2x4x12x12"]
    probe = sampling_probe(
        checkpoint, (16, 16), reference_embeddings(checkpoint), wrapped(checkpoint, "unet")
    )
    check_sampling(checkpoint, tiny_bundle, probe, "fp32", report)
    assert report.figures[-1].component == "sampling"
    assert report.figures[-1].passed


def test_the_manifest_has_a_figure_of_every_output_at_two_sizes_and_of_a_sampling_run(
    tiny_bundle: Path,
) -> None:
    figures = json.loads((tiny_bundle / "manifest.json").read_text())["parity"]["figures"]
    by_output: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in figures:
        assert entry["relative_l2"] <= entry["tolerance"]
        assert entry["relative_max"] <= entry["tolerance"] * MAX_OVER_L2
        by_output.setdefault((entry["component"], entry["output"]), []).append(entry)
    (sampling,) = by_output.pop(("sampling", "latents"))
    for output in ("latents", "image"):
        assert len(by_output.pop(("pipeline", output))) == 1
    unet = max(entry["tolerance"] for entry in figures if entry["component"] == "unet")
    assert sampling["tolerance"] == unet * SAMPLING_FACTOR
    assert set(by_output) == {
        (spec.name, out.name) for spec in FAMILIES["sd"].components.values() for out in spec.outputs
    }
    for entries in by_output.values():
        assert len({entry["inputs"] for entry in entries}) == 2
        # Of a network of 16 and 32 channels: sums of at most 9 · 64 products, in less than 100 layers.
        assert {entry["tolerance"] < math.sqrt(2 * 100 * 576) * 2.0**-24 for entry in entries} == {True}


def test_no_comparison_is_made_twice_on_a_fixed_size(fp16_bundle: Path) -> None:
    figures = json.loads((fp16_bundle / "manifest.json").read_text())["parity"]["figures"]
    places = [(entry["component"], entry["output"], entry["inputs"]) for entry in figures]
    assert len(places) == len(set(places))
    own = [entry for entry in figures if entry["component"] != "pipeline"]
    assert {entry["arithmetic"] for entry in own} == {"fp16"}


def damage(name: str, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Callable[..., Any]:
    """A `save_graph` that changes the largest weight of one component."""
    save = save_graph

    def damaged(model: ir.Model, path: Path) -> tuple[Path, ...]:
        if path.parent.name == name:
            tensors = [value for value in model.graph.initializers.values() if value.const_value is not None]
            value = max(tensors, key=lambda value: value.const_value.size if value.const_value else 0)
            assert value.const_value is not None
            weight = value.const_value.numpy()
            value.const_value = ir.tensor(change(weight).astype(weight.dtype), name=value.name)
        return save(model, path)

    return damaged


@pytest.mark.parametrize(
    ("component", "change", "words"),
    [
        ("unet", lambda weight: weight * 1.01, "unet.noise_pred differs"),
        ("text_encoder", lambda weight: weight + 0.01, "text_encoder."),
        ("vae_decoder", lambda weight: weight * np.nan, "vae_decoder.image differs from PyTorch by nan"),
    ],
)
def test_a_damaged_graph_is_not_shipped(
    tiny_checkpoint: Path,
    tmp_path: Path,
    traced_before: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    component: str,
    change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]],
    words: str,
) -> None:
    monkeypatch.setattr(bundle_writer, "save_graph", damage(component, change))
    assert cli.main([str(tiny_checkpoint), str(tmp_path / "out"), "--quiet", *traced_before]) == 5
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert words in message
    assert "nothing was written" in message
    assert list(tmp_path.iterdir()) == []


def test_a_sampling_run_that_differs_is_not_shipped_and_an_old_bundle_stays(
    tiny_checkpoint: Path,
    bundle_copy: Path,
    traced_before: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference = parity_sampling.reference_latents

    def off(*given: Any) -> Any:
        return reference(*given) * np.float32(1.001)

    monkeypatch.setattr(parity_sampling, "reference_latents", off)
    before = {file: file.read_bytes() for file in bundle_copy.rglob("*") if file.is_file()}
    assert cli.main([str(tiny_checkpoint), str(bundle_copy), "--force", "--quiet", *traced_before]) == 5
    assert "sampling.latents differs from PyTorch by 9.99e-04" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in bundle_copy.rglob("*") if file.is_file()} == before
    assert [path.name for path in bundle_copy.parent.iterdir()] == [bundle_copy.name]
