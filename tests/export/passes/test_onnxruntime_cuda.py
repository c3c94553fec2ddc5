"""The CUDA provider's dialect on the CPU provider: attention has a kernel there, the rest is written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from support.references.contrib_definitions import written_out
from support.runs.onnx_runs import load, run, text_inputs

import tolerances
from sdrt.export.graphs.from_module import save_graph
from sdrt.export.parity.components import compare
from sdrt.export.passes.causal import recognise_causal_masks
from sdrt.export.passes.diffusion_operators import DOMAIN
from sdrt.export.passes.onnxruntime_cuda import to_onnxruntime_cuda
from sdrt.runtime.errors import SdrtError

Array = NDArray[Any]
FP32, BOOL = TensorProto.FLOAT, TensorProto.BOOL
B, H, S, D = 2, 3, 6, 8


def counts(model: ir.Model) -> dict[str, int]:
    operators = [node.op_type for node in model.graph]
    return {name: operators.count(name) for name in operators}


def attention_model(mask: tuple[int, list[int]] | None = None, **attributes: Any) -> ir.Model:
    """One 4-D attention of graph inputs, with no projections around it."""
    info = helper.make_tensor_value_info
    inputs = [info(name, FP32, [B, H, S, D]) for name in "qkv"]
    if mask:
        inputs.append(info("mask", *mask))
    node = helper.make_node("Attention", [value.name for value in inputs], ["y"], "attention", **attributes)
    graph = helper.make_graph([node], "g", inputs, [info("y", FP32, [B, H, S, D])])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    model: ir.Model = ir.from_proto(proto)
    return model


def feeds_of(model: ir.Model) -> dict[str, Array]:
    generator = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        shape = [size for size in value.shape if isinstance(size, int)]
        numbers = generator.standard_normal(shape)
        feeds[str(value.name)] = (
            numbers > -1 if value.dtype == ir.DataType.BOOL else numbers.astype(np.float32)
        )
    return feeds


@pytest.mark.parametrize(
    "mask", [None, (BOOL, [S, S]), (BOOL, [B, 1, S, S]), (FP32, [H, S, S]), (FP32, [B, H, S, S])]
)
@pytest.mark.parametrize("attributes", [{}, {"scale": 0.2}, {"is_causal": 1}])
def test_the_operator_is_the_same(mask: Any, attributes: dict[str, Any], tmp_path: Path) -> None:
    model = attention_model(mask, **attributes)
    feeds = feeds_of(model)
    before = run(model, feeds, tmp_path)[0]
    report = to_onnxruntime_cuda(model)
    assert report.attentions == ("attention",)
    assert counts(model)["MultiHeadAttention"] == 1
    assert "Attention" not in counts(model)
    assert compare(run(model, feeds, tmp_path)[0], before)[0] <= tolerances.ATTENTION_FP32


def activations_turned(model: ir.Model) -> list[str]:
    """Names of the Transposes that move an activation; those of weights are folded when a graph is loaded."""
    moved = [node for node in model.graph if node.op_type == "Transpose"]
    return [str(node.name) for node in moved if not str(node.name).endswith(".weights")]


def left_to_load(model: ir.Model, folder: Path) -> str:
    """What ONNX Runtime's CPU build says of a graph that it has the operators but not the kernels for."""
    path = save_graph(model, folder / "dialect.onnx")[0]
    onnx.checker.check_model(str(path))
    onnx.shape_inference.infer_shapes_path(str(path), strict_mode=False)
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.NotImplemented) as refused:
        ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return str(refused.value)


def unet_feeds(height: int, width: int, dtype: Any) -> dict[str, Array]:
    generator = np.random.default_rng(1)
    return {
        "sample": generator.standard_normal((2, 4, height, width)).astype(dtype),
        "timestep": np.array([500, 20], np.float32),
        "encoder_hidden_states": generator.standard_normal((2, 77, 16)).astype(dtype),
    }


@pytest.mark.parametrize("bundle", ["tiny_bundle", "fp16_bundle"])
def test_a_whole_unet(bundle: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = load(request.getfixturevalue(bundle) / "unet" / "model.onnx")
    half = bundle == "fp16_bundle"
    feeds = unet_feeds(9, 8, np.float16) if half else unet_feeds(8, 12, np.float32)
    before, operators = run(model, feeds, tmp_path)[0], counts(model)
    norms = operators["GroupNormalization" if half else "InstanceNormalization"]
    report = to_onnxruntime_cuda(model)
    assert len(report.attentions) == operators["Attention"] == 8
    assert model.graph.opset_imports[DOMAIN] == 1
    after = counts(model)
    assert report.operators == {name: after[name] for name in report.operators}
    assert after["NhwcConv"] == operators["Conv"]
    assert after["GroupNorm"] + after["SkipGroupNorm"] == norms
    assert not {"Conv", "GroupNormalization", "InstanceNormalization", "Attention"} & set(after)
    # Only the time embedding's two SiLUs are left of the activations.
    assert after["Sigmoid"] == 2
    # Into NHWC at the first convolution and back behind the last; attentions and blocks turn nothing.
    assert activations_turned(model) == ["conv2d.channels_last.data", "noise_pred.channels_first"]
    assert "GroupNorm" in left_to_load(model, tmp_path) or "NhwcConv" in left_to_load(model, tmp_path)
    result = run(written_out(model), feeds, tmp_path)[0]
    assert result.dtype == before.dtype
    allowed = tolerances.PASSES_FP16 if half else tolerances.GRAPH_FP32
    assert compare(result, before)[0] <= allowed


@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder"])
def test_a_whole_vae(component: str, tiny_bundle: Path, tmp_path: Path) -> None:
    model = load(tiny_bundle / component / "model.onnx")
    generator = np.random.default_rng(3)
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        sizes = {"batch": 2, "latent_height": 8, "latent_width": 12, "height": 16, "width": 24}
        shape = [size if isinstance(size, int) else sizes[str(size)] for size in value.shape]
        feeds[str(value.name)] = generator.standard_normal(shape).astype(np.float32)
    before = run(model, feeds, tmp_path)
    to_onnxruntime_cuda(model)
    assert not {"Conv", "InstanceNormalization", "GroupNormalization"} & set(counts(model))
    # The encoder halves its moments [N, 2C, h, w] along the channels.
    assert len(activations_turned(model)) == 2
    for old, new in zip(before, run(written_out(model), feeds, tmp_path), strict=True):
        assert compare(new, old)[0] <= tolerances.GRAPH_FP32


def test_a_text_encoder_loses_its_mask(tiny_bundle: Path, tmp_path: Path) -> None:
    model = load(tiny_bundle / "text_encoder" / "model.onnx")
    ids = text_inputs(np.arange(2 * 77).reshape(2, 77), 16)
    before = run(model, ids, tmp_path)
    report = to_onnxruntime_cuda(model)
    assert (len(report.attentions), report.causal) == (2, 2)
    assert not {"Expand", "Shape"} & set(counts(model))
    for old, new in zip(before, run(model, ids, tmp_path), strict=True):
        assert compare(new, old)[0] <= tolerances.GRAPH_FP32


def test_a_half_precision_vae(fp16_bundle: Path, tmp_path: Path) -> None:
    model = load(fp16_bundle / "vae_decoder" / "model.onnx")
    latents = {"latents": np.random.default_rng(2).standard_normal((1, 4, 9, 8)).astype(np.float16)}
    before = run(model, latents, tmp_path)[0]
    assert len(to_onnxruntime_cuda(model).attentions) == 1
    after = run(written_out(model), latents, tmp_path)[0]
    assert after.dtype == np.float16
    assert compare(after, before)[0] <= tolerances.ISLAND_VAE_FP16


@pytest.mark.parametrize("bundle", ["tiny_bundle", "fp16_bundle"])
def test_a_recognised_causal_mask_gives_the_same_bits(
    bundle: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = load(request.getfixturevalue(bundle) / "text_encoder" / "model.onnx")
    dtype = "float16" if bundle == "fp16_bundle" else "float32"
    ids = text_inputs(np.arange(77).reshape(1, 77), 16, dtype)
    before = run(model, ids, tmp_path)
    assert recognise_causal_masks(model) == 2
    assert recognise_causal_masks(model) == 0
    for old, new in zip(before, run(model, ids, tmp_path), strict=True):
        assert old.tobytes() == new.tobytes()


@pytest.mark.parametrize("changed", ["upper", "hole", "float", "input"])
def test_another_mask_is_not_taken_for_a_causal_one(changed: str) -> None:
    triangle = np.tril(np.ones((S, S), bool))
    if changed == "upper":
        triangle = triangle.T.copy()
    if changed == "hole":
        triangle[4, 2] = False
    kind = FP32 if changed == "float" else BOOL
    model = attention_model((kind, [S, S]))
    if changed != "input":
        mask = model.graph.inputs.pop()
        mask.const_value = ir.tensor(triangle.astype(np.float32 if changed == "float" else bool), name="mask")
        model.graph.register_initializer(mask)
    assert recognise_causal_masks(model) == 0


def test_what_the_operator_lacks_is_an_error() -> None:
    with pytest.raises(SdrtError, match="softcap"):
        to_onnxruntime_cuda(attention_model(softcap=2.0))
