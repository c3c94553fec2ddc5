"""The passes together: whole components before and after, and through TensorRT's own builder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from support.references.contrib_definitions import written_out
from support.runs.onnx_runs import builds, load, run

import tolerances
from sdrt.export.parity.components import compare
from sdrt.export.passes.attention import attentions, write_out
from sdrt.export.passes.pipeline import prepare_for_onnxruntime_cuda, prepare_for_tensorrt
from sdrt.runtime.bundle.families.registry import FAMILIES

Array = NDArray[Any]


def inputs_of(model: ir.Model) -> dict[str, Array]:
    """Random inputs; every dynamic axis is 2, a latent side 8, a picture's side 16."""
    generator = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        sides = {"height": 16, "width": 16, "latent_height": 8, "latent_width": 8}
        shape = [size if isinstance(size, int) else sides.get(str(size.value), 2) for size in value.shape]
        if value.dtype == ir.DataType.INT64:
            highest = 2 if value.name == "clip_skip" else 700
            feeds[str(value.name)] = generator.integers(0, highest, shape)
        else:
            feeds[str(value.name)] = generator.standard_normal(shape).astype(value.dtype.numpy())
    return feeds


@pytest.mark.parametrize("component", FAMILIES["sd"].components)
@pytest.mark.parametrize("bundle", ["tiny_bundle", "fp16_bundle"])
def test_outputs_stay_the_same(
    component: str, bundle: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    half = bundle == "fp16_bundle"
    path = request.getfixturevalue(bundle) / component / "model.onnx"
    model = load(path)
    total = len(attentions(model))
    feeds = inputs_of(model)
    before = run(model, feeds, tmp_path)
    allowed = tolerances.PASSES_FP16 if half else tolerances.GRAPH_FP32

    report = prepare_for_tensorrt(model, component, "fp16" if half else "fp32")
    assert len(report.attentions) == len(attentions(model))
    assert len(report.attentions) + len(report.written_out) == total > 0
    assert (report.nodes_after, report.component) == (model.graph.num_nodes(), component)
    for old, new in zip(before, run(model, feeds, tmp_path), strict=True):
        assert compare(new, old)[0] <= allowed

    model = load(path)
    report = prepare_for_onnxruntime_cuda(model, component, "fp16" if half else "fp32")
    assert len(report.attentions) == total
    for old, new in zip(before, run(written_out(model), feeds, tmp_path), strict=True):
        assert compare(new, old)[0] <= allowed


def test_the_report_says_what_was_done(fp16_bundle: Path) -> None:
    model = load(fp16_bundle / "vae_decoder" / "model.onnx")
    (attention,) = attentions(model)
    first = next(node for node in model.graph if node.op_type == "Conv").outputs[0].name
    report = prepare_for_tensorrt(model, "vae_decoder", "fp16", islands=[str(first)])
    lines = report.lines()
    assert lines[0].startswith("vae_decoder (fp16): 0 of 1 attentions fused, 1 tensors kept in fp32 (")
    assert (
        lines[1]
        == f"  {attention.name} written out: it has one head, and one image of it has no fused kernel"
    )
    assert lines[2] == f"  {first} kept in fp32"

    causal = prepare_for_tensorrt(load(fp16_bundle / "text_encoder" / "model.onnx"), "text_encoder", "fp16")
    assert ", 2 causal masks recognised, 76 nodes, now " in causal.lines()[0]


def test_an_attention_that_an_island_touches_is_not_counted_as_fused(fp16_bundle: Path) -> None:
    model = load(fp16_bundle / "unet" / "model.onnx")
    for node in attentions(model):  # as if the heads were 16 wide: the tiny network's 8 have no kernel
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.shape is not None:
                value.shape = ir.Shape([*value.shape[:3], 16])
    name = attentions(model)[0].inputs[0]
    assert name is not None
    report = prepare_for_tensorrt(model, "unet", "fp16", islands=[str(name.name)])
    assert (len(report.attentions), len(report.written_out)) == (7, 1)
    assert [*report.written_out.values()] == ["a tensor at it is kept in fp32"]


def test_tensorrt_builds_what_was_prepared(fp16_bundle: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    text = load(fp16_bundle / "text_encoder" / "model.onnx")
    assert not builds(trt, logger, text)  # heads of a width of 8
    prepare_for_tensorrt(text, "text_encoder", "fp16")
    assert builds(trt, logger, text)

    decoder = load(fp16_bundle / "vae_decoder" / "model.onnx")
    conv = str(next(node for node in decoder.graph if node.op_type == "Conv").outputs[0].name)
    report = prepare_for_tensorrt(decoder, "vae_decoder", "fp16", [conv])
    assert report.islands == (conv,)
    assert builds(trt, logger, decoder)
    assert not builds(trt, logger, broken_island(decoder))


def broken_island(model: ir.Model) -> ir.Model:
    """The same with a cast down left out: a strongly typed network refuses fp32 beside fp16."""
    cast = next(node for node in model.graph if node.op_type == "Cast" and str(node.name).endswith(".low"))
    source = cast.inputs[0]
    assert source is not None
    cast.outputs[0].replace_all_uses_with(source)
    return model


def test_writing_out_is_the_only_change_to_a_float32_graph(tiny_bundle: Path) -> None:
    """fp32 has no fused attention at all, so the pipeline's graph is the written-out one."""
    model = load(tiny_bundle / "unet" / "model.onnx")
    report = prepare_for_tensorrt(model, "unet", "fp32")
    assert len(report.written_out) == 8
    other = load(tiny_bundle / "unet" / "model.onnx")
    for node in attentions(other):
        write_out(node)
    assert [node.op_type for node in model.graph] == [node.op_type for node in other.graph]
