"""The graph passes: what they change, and that they change nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from support.runs.onnx_runs import text_inputs

import tolerances
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.checkpoint.weights import load_module
from sdrt.export.graphs.from_module import onnx_from_module, save_graph
from sdrt.export.graphs.networks import UNet, wrapped
from sdrt.export.options import AxisRange
from sdrt.export.parity.components import compare
from sdrt.export.passes.weight_storage import MIN_ELEMENTS, store_weights_in_fp16
from sdrt.export.passes.widen import widen_bfloat16
from sdrt.runtime.bundle.families.registry import FAMILIES

Array = NDArray[Any]

AXES = {"batch": AxisRange(1, 2), "rows": AxisRange(2, 2)}
BF16 = ir.DataType.BFLOAT16


def run(path: Path, **feeds: Array) -> list[Array]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [np.asarray(result) for result in session.run(None, feeds)]


def linear_model(weight: Array, bias: Array) -> ir.Model:
    """y = x · weight + bias as a graph."""
    tensors = [onnx.numpy_helper.from_array(weight, "weight"), onnx.numpy_helper.from_array(bias, "bias")]
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["x", "weight"], ["product"]),
            onnx.helper.make_node("Add", ["product", "bias"], ["y"]),
        ],
        "linear",
        [onnx.helper.make_tensor_value_info("x", floats, ["n", weight.shape[0]])],
        [onnx.helper.make_tensor_value_info("y", floats, ["n", weight.shape[1]])],
        tensors,
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    model: ir.Model = ir.from_proto(proto)
    return model


def half_precision_weight(seed: int = 0) -> NDArray[np.float32]:
    numbers = np.random.default_rng(seed).standard_normal((16, 16)).astype(np.float16)
    numbers[0, :4] = [-0.0, 6e-8, 65504.0, -65504.0]  # signed zero, the smallest and the largest of fp16
    return numbers.astype(np.float32)


def test_stored_weights_give_the_same_bits_from_half_the_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    spec = FAMILIES["sd"].components["text_encoder"].resolve(checkpoint.sizes(), "fp32")
    module = wrapped(checkpoint, "text_encoder")
    inputs = text_inputs(np.arange(2 * 77).reshape(2, 77), 16)
    model = onnx_from_module(module, tuple(map(torch.from_numpy, inputs.values())), spec, AXES, 23)
    large = sum(
        value.const_value.size >= MIN_ELEMENTS and value.const_value.dtype == ir.DataType.FLOAT
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    before = save_graph(model, tmp_path / "before.onnx")
    assert store_weights_in_fp16(model) == large > 10
    after = save_graph(model, tmp_path / "after.onnx")
    onnx.checker.check_model(str(after[0]))
    for old, new in zip(run(before[0], **inputs), run(after[0], **inputs), strict=True):
        assert old.tobytes() == new.tobytes()
    assert 0.45 < after[1].stat().st_size / before[1].stat().st_size < 0.55


def test_storing_keeps_values_at_the_ends_of_fp16(tmp_path: Path) -> None:
    weight, bias = half_precision_weight(), np.ones(16, np.float32)
    model = linear_model(weight, bias)
    x = np.eye(16, dtype=np.float32)
    path = save_graph(model, tmp_path / "before.onnx")[0]
    before = run(path, x=x)[0]
    assert store_weights_in_fp16(model) == 1  # the bias is too small to be worth a Cast
    after = run(save_graph(model, tmp_path / "after.onnx")[0], x=x)[0]
    assert before.tobytes() == after.tobytes()
    assert {value.const_value.dtype for value in model.graph.initializers.values() if value.const_value} == {
        ir.DataType.FLOAT16,
        ir.DataType.FLOAT,
    }


@pytest.mark.parametrize("value", [0.1, 1e-9, 70000.0, float("nan"), 1.0 + 2.0**-12])
def test_a_weight_that_fp16_cannot_hold_is_left_alone(value: float) -> None:
    weight = half_precision_weight()
    weight[3, 3] = value
    model = linear_model(weight, np.ones(16, np.float32))
    assert store_weights_in_fp16(model) == 0
    kept = model.graph.initializers["weight"].const_value
    assert kept is not None
    np.testing.assert_array_equal(kept.numpy(), weight)
    assert [node.op_type for node in model.graph] == ["MatMul", "Add"]


def values_of(model: ir.Model) -> list[ir.Value]:
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    return values + [output for node in model.graph.all_nodes() for output in node.outputs]


def test_a_widened_bfloat16_graph_computes_with_the_rounded_weights(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    spec = FAMILIES["sd"].components["unet"].resolve(checkpoint.sizes(), "bf16")
    module = load_module(checkpoint, "unet").bfloat16()
    generator = torch.Generator().manual_seed(5)
    sample, states = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 77, 16)))
    timestep = torch.tensor([321.5, 7.25])
    axes = {**AXES, "latent_height": AxisRange(8, 8), "latent_width": AxisRange(8, 8)}
    inputs = (sample.bfloat16(), timestep, states.bfloat16())
    model = onnx_from_module(UNet(module), inputs, spec, axes, 23)
    assert any(value.dtype == BF16 for value in values_of(model))
    assert {entry.name: str(entry.dtype) for entry in model.graph.inputs} == {
        "sample": "BFLOAT16",
        "timestep": "FLOAT",
        "encoder_hidden_states": "BFLOAT16",
    }

    widen_bfloat16(model)
    assert not any(value.dtype == BF16 for value in values_of(model))
    path = save_graph(model, tmp_path / "model.onnx")[0]
    onnx.checker.check_model(str(path))
    feeds = {"sample": sample.numpy(), "timestep": timestep.numpy(), "encoder_hidden_states": states.numpy()}
    (actual,) = run(path, **feeds)

    rounded: Any = module.float()
    with torch.no_grad():
        expected = rounded(sample, timestep, states).sample.numpy()
        exact = UNet(load_module(checkpoint, "unet"))(sample, timestep, states).numpy()
    assert compare(actual, expected)[0] <= tolerances.GRAPH_FP32
    # Else the test could not tell rounded weights from the checkpoint's own.
    assert compare(exact, expected)[0] > 10 * tolerances.GRAPH_FP32
