"""Single operators and their limits: what a kernel of CUDA takes is rewritten, what it does not stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.helper import make_node
from onnx.shape_inference import infer_shapes
from onnxruntime import InferenceSession
from support.references.contrib_definitions import written_out
from support.runs.onnx_runs import run

import tolerances
from sdrt.export.parity.components import compare
from sdrt.export.passes.diffusion_operators import group_norm_fits, to_diffusion_operators
from sdrt.export.passes.group_norm import restore_group_norms, write_out_group_norms
from sdrt.export.passes.nodes import drop_unused

Array = NDArray[Any]
FP32 = TensorProto.FLOAT
TYPES = {np.float32: FP32, np.float16: TensorProto.FLOAT16}


class Builder:
    """A graph with weights from one generator; ``x`` [N, C, h, w] is its first input, ``y`` its output."""

    def __init__(self, dtype: Any = np.float32) -> None:
        self.dtype, self.nodes, self.weights = dtype, list[NodeProto](), list[TensorProto]()
        self.generator = np.random.default_rng(7)

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        fan_in = int(np.prod(shape[1:])) or 1
        numbers = self.generator.standard_normal(shape) / np.sqrt(fan_in)
        self.weights.append(numpy_helper.from_array(numbers.astype(self.dtype), name))
        return name

    def ints(self, *numbers: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
        return name

    def op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(make_node(kind, inputs, [output], f"node_{output}", **attributes))
        return output

    def conv(self, data: str, output: str, before: int, after: int, kernel: int = 3, **more: Any) -> str:
        weights = self.weight(after, before // more.get("group", 1), kernel, kernel)
        pads = {"pads": [kernel // 2] * 4}
        return self.op("Conv", [data, weights, self.weight(after)], output, **pads, **more)

    def norm(self, data: str, output: str, channels: int, groups: int, *, silu: bool = False) -> str:
        operands = [data, self.weight(channels), self.weight(channels)]
        self.op("GroupNormalization", operands, output, num_groups=groups, epsilon=1e-5)
        if not silu:
            return output
        self.op("Sigmoid", [output], f"{output}_sigmoid")
        return self.op("Mul", [output, f"{output}_sigmoid"], f"{output}_silu")

    def model(self, inputs: dict[str, list[Any]], output: list[Any], opset: int = 23) -> ir.Model:
        kind = TYPES[self.dtype]
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "g",
            [info(name, kind, shape) for name, shape in inputs.items()],
            [info("y", kind, output)],
            self.weights,
        )
        proto = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)],
            ir_version=11,
        )
        model: ir.Model = ir.from_proto(with_shapes(proto))
        return model


def with_shapes(proto: ModelProto) -> ModelProto:
    """onnx finds no shape of a group norm's result, so it is told."""
    proto = infer_shapes(proto, data_prop=True)
    for node in [node for node in proto.graph.node if node.op_type == "GroupNormalization"]:
        shapes = {value.name: value for value in (*proto.graph.value_info, *proto.graph.input)}
        if node.output[0] not in shapes and node.input[0] in shapes:
            told = proto.graph.value_info.add()
            told.CopyFrom(shapes[node.input[0]])
            told.name = node.output[0]
            proto = infer_shapes(proto, data_prop=True)
    return proto


def feeds_of(model: ir.Model, sizes: dict[str, int] | None = None) -> dict[str, Array]:
    generator = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        shape = [size if isinstance(size, int) else (sizes or {})[str(size)] for size in value.shape]
        feeds[str(value.name)] = generator.standard_normal(shape).astype(value.dtype.numpy())
    return feeds


def kinds(model: ir.Model) -> dict[str, int]:
    names = [node.op_type for node in model.graph]
    return {name: names.count(name) for name in names}


def one_norm(channels: int, groups: int, dtype: Any = np.float32, rank: int = 4) -> ir.Model:
    build = Builder(dtype)
    build.norm("x", "y", channels, groups)
    shape = [2, channels, 6, 4][:rank]
    return build.model({"x": shape}, shape)


def block(dtype: Any, width: int, rows: Any = "rows") -> ir.Model:
    """What a U-Net's up block does: skip connection, residual block, gated GELU on pixels, upsampling."""
    build = Builder(dtype)
    first = build.conv("x", "first", 4, width)
    joined = build.op("Concat", [first, "skip"], "joined", axis=1)
    hidden = build.conv(build.norm(joined, "n1", 2 * width, 32, silu=True), "c1", 2 * width, width)
    time = build.op("Gemm", ["time", build.weight(8, width)], "time_projected")
    column = build.op("Unsqueeze", [time, build.ints(2, 3)], "column")
    moved = build.op("Add", [hidden, column], "moved")
    hidden = build.conv(build.norm(moved, "n2", width, 32, silu=True), "c2", width, width)
    short = build.conv(joined, "short", 2 * width, width, 1)
    total = build.op("Add", [short, hidden], "total")
    pixels = build.conv(build.norm(total, "n3", width, 32), "proj_in", width, width, 1)
    last = build.op("Transpose", [pixels], "last", perm=[0, 2, 3, 1])
    tokens = build.op("Reshape", [last, build.ints(2, 24, width)], "tokens")
    wide = build.op("MatMul", [tokens, build.weight(width, 8 * width)], "wide")
    wide = build.op("Add", [wide, build.weight(8 * width)], "wide_biased")
    build.nodes.append(make_node("Split", [wide], ["left", "right"], "node_split", axis=2, num_outputs=2))
    build.op("Gelu", ["right"], "gelu")
    gated = build.op("Mul", ["left", "gelu"], "gated")
    narrow = build.op("MatMul", [gated, build.weight(4 * width, width)], "narrow")
    back = build.op("Reshape", [narrow, build.ints(2, 6, 4, width)], "back")
    back = build.op("Transpose", [back], "back_first", perm=[0, 3, 1, 2])
    total = build.op("Add", [back, total], "total_2")
    build.weights.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"))
    larger = build.op(
        "Resize",
        [total, "", "scales"],
        "larger",
        mode="nearest",
        nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )
    build.conv(larger, "y", width, 4)
    inputs = {"x": [rows, 4, 6, 4], "skip": [rows, width, 6, 4], "time": [rows, 8]}
    return build.model(inputs, [rows, 4, 12, 8])


@pytest.mark.parametrize(("dtype", "allowed"), [(np.float32, "GRAPH_FP32"), (np.float16, "PASSES_FP16")])
def test_a_block_of_full_width(dtype: Any, allowed: str, tmp_path: Path) -> None:
    model = block(dtype, 320)
    feeds = feeds_of(model, {"rows": 2})
    before = run(model, feeds, tmp_path)[0]
    to_diffusion_operators(model)
    found = kinds(model)
    assert (found["NhwcConv"], found["GroupNorm"], found["SkipGroupNorm"]) == (6, 1, 2)
    assert found["BiasSplitGelu"] == 1
    assert not {"Conv", "GroupNormalization", "Sigmoid", "Split", "Gelu"} & set(found)
    turned = [node for node in model.graph if node.op_type == "Transpose" and "weights" not in str(node.name)]
    # Both of the convolutions' inputs in, the result out.
    assert [node.attributes["perm"].as_ints() for node in turned] == [(0, 2, 3, 1)] * 2 + [(0, 3, 1, 2)]
    # The biases of the convolutions in front of a sum that is normalised are added there.
    (embedded, summed) = [node for node in model.graph if node.op_type == "SkipGroupNorm"]
    assert len(embedded.inputs) == len(summed.inputs) == 5
    assert compare(run(written_out(model), feeds, tmp_path)[0], before)[0] <= getattr(tolerances, allowed)


@pytest.mark.parametrize(
    ("channels", "groups", "fits"),
    [
        (320, 32, True),
        (2560, 32, True),
        (8, 4, True),
        (1024, 2, True),
        (12, 4, False),  # three channels a group: a thread takes two
        (1028, 2, False),  # 514 channels a group: a block takes 512
        (10, 4, False),  # no whole groups
        (10, 0, False),
    ],
)
def test_the_limits_of_group_norm(channels: int, groups: int, fits: bool) -> None:
    assert group_norm_fits(channels, groups) == fits
    if groups and channels % groups == 0:
        model = one_norm(channels, groups)
        to_diffusion_operators(model)
        assert ("GroupNorm" in kinds(model)) == fits
        assert ("GroupNormalization" in kinds(model)) == (not fits)


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_group_norm_has_float32_factors(dtype: Any, rank: int, tmp_path: Path) -> None:
    model = one_norm(16, 4, dtype, rank)
    feeds = feeds_of(model)
    before = run(model, feeds, tmp_path)[0]
    to_diffusion_operators(model)
    (norm,) = [node for node in model.graph if node.op_type == "GroupNorm"]
    assert [value.dtype for value in norm.inputs[1:] if value] == [ir.DataType.FLOAT] * 2
    allowed = tolerances.ISLAND_FP16 if dtype == np.float16 else tolerances.GRAPH_FP32
    assert compare(run(written_out(model), feeds, tmp_path)[0], before)[0] <= allowed


def _grouped(build: Builder) -> None:
    build.conv("x", "y", 8, 8, group=2)


def _one_dimensional(build: Builder) -> None:
    build.op("Conv", ["x", build.weight(8, 8, 1), build.weight(8)], "y")


def _computed_weights(build: Builder) -> None:
    build.op("Sigmoid", [build.weight(8, 8, 1, 1)], "weights")
    build.op("Conv", ["x", "weights"], "y")


def _old_norm(build: Builder) -> None:
    build.op("GroupNormalization", ["x", build.weight(4), build.weight(4)], "y", num_groups=4)


def _gelu(width: int = 2560, **changes: Any) -> Callable[[Builder], None]:
    def make(build: Builder) -> None:
        bias = build.weight(1, 1, width) if changes.get("rank") else build.weight(width)
        whole = build.op("Add", ["x", bias], "whole") if not changes.get("bare") else "x"
        build.nodes.append(make_node("Split", [whole], ["a", "b"], "split", axis=2, num_outputs=2))
        build.op("Gelu", ["b"], "gelu", approximate=changes.get("approximate", "none"))
        build.op("Mul", ["gelu", "gelu" if changes.get("other") else "a"], "y")

    return make


@pytest.mark.parametrize(
    ("make", "shape", "result", "opset"),
    [
        pytest.param(_grouped, [1, 8, 4, 4], [1, 8, 4, 4], 23, id="grouped convolution"),
        pytest.param(_one_dimensional, [1, 8, 4], [1, 8, 4], 23, id="one-dimensional convolution"),
        pytest.param(_computed_weights, [1, 8, 4, 4], [1, 8, 4, 4], 23, id="computed weights"),
        pytest.param(_old_norm, [1, 8, 4, 4], [1, 8, 4, 4], 18, id="a scale for each group"),
        pytest.param(_gelu(1024), [1, 5, 1024], [1, 5, 512], 23, id="another width"),
        pytest.param(_gelu(bare=True), [1, 5, 2560], [1, 5, 1280], 23, id="no bias"),
        pytest.param(_gelu(rank=True), [1, 5, 2560], [1, 5, 1280], 23, id="bias of rank 3"),
        pytest.param(_gelu(other=True), [1, 5, 2560], [1, 5, 1280], 23, id="another product"),
        pytest.param(_gelu(approximate="tanh"), [1, 5, 2560], [1, 5, 1280], 23, id="GELU by tanh"),
    ],
)
def test_what_a_kernel_does_not_take_is_left_alone(
    make: Callable[[Builder], None], shape: list[int], result: list[int], opset: int
) -> None:
    build = Builder()
    make(build)
    model = build.model({"x": shape}, result, opset)
    before = kinds(model)
    to_diffusion_operators(model)
    assert kinds(model) == before


def test_the_same_gelu_that_fits_is_rewritten(tmp_path: Path) -> None:
    build = Builder()
    _gelu()(build)
    model = build.model({"x": [1, 5, 2560]}, [1, 5, 1280])
    feeds = feeds_of(model)
    before = run(model, feeds, tmp_path)[0]
    to_diffusion_operators(model)
    assert kinds(model) == {"BiasSplitGelu": 1}
    assert compare(run(written_out(model), feeds, tmp_path)[0], before)[0] <= tolerances.GRAPH_FP32


def test_bfloat16_is_left_alone() -> None:
    model = one_norm(16, 4)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.type = ir.TensorType(ir.DataType.BFLOAT16)
    to_diffusion_operators(model)
    assert kinds(model) == {"GroupNormalization": 1}


def test_a_sum_that_others_read_too_is_still_there(tmp_path: Path) -> None:
    build = Builder()
    hidden = build.conv("x", "c", 4, 8)
    total = build.op("Add", [hidden, build.conv("x", "d", 4, 8)], "total")
    normal = build.norm(total, "n", 8, 4, silu=True)
    build.op("Add", [total, normal], "twice")
    build.op("Mul", ["twice", hidden], "y")  # the first convolution's bias must stay with it
    model = build.model({"x": [2, 4, 6, 4]}, [2, 8, 6, 4])
    feeds = feeds_of(model)
    before = run(model, feeds, tmp_path)[0]
    to_diffusion_operators(model)
    (norm,) = [node for node in model.graph if node.op_type == "SkipGroupNorm"]
    assert len(norm.inputs) == 4
    assert compare(run(written_out(model), feeds, tmp_path)[0], before)[0] <= tolerances.GRAPH_FP32


@pytest.mark.parametrize("other", ["itself", "a transpose"])
def test_a_convolution_that_others_read_keeps_its_bias(other: str, tmp_path: Path) -> None:
    """Others may read its twin alone, without standing among the readers of the convolution."""
    build = Builder()
    hidden = build.conv("x", "c", 4, 8)
    if other == "itself":
        normal = build.norm(build.op("Add", [hidden, hidden], "total"), "n", 8, 4, silu=True)
        build.op("Mul", [normal, normal], "y")
        model = build.model({"x": [2, 4, 6, 4]}, [2, 8, 6, 4])
    else:
        last = build.op("Transpose", [hidden], "last", perm=[0, 2, 3, 1])
        total = build.op("Add", [hidden, build.conv("x", "d", 4, 8)], "total")
        normal = build.norm(total, "n", 8, 4, silu=True)
        build.op("Mul", [build.op("Transpose", [normal], "normals", perm=[0, 2, 3, 1]), last], "y")
        model = build.model({"x": [2, 4, 6, 4]}, [2, 6, 4, 8])
    feeds = feeds_of(model)
    before = run(model, feeds, tmp_path)[0]
    to_diffusion_operators(model)
    assert compare(run(written_out(model), feeds, tmp_path)[0], before)[0] <= tolerances.GRAPH_FP32


def test_without_shapes_nothing_is_moved() -> None:
    build = Builder()
    build.conv(build.norm(build.conv("x", "c", 4, 8), "n", 8, 4, silu=True), "y", 8, 4)
    model = build.model({"x": [2, 4, 6, 4]}, [2, 4, 6, 4])
    for node in model.graph:
        node.outputs[0].shape = None
    before = kinds(model)
    to_diffusion_operators(model)
    assert kinds(model) == before


def test_a_norm_that_stays_gets_its_activation_back(tmp_path: Path) -> None:
    """Twelve channels in four groups: out of NHWC before it, into it behind it."""
    build = Builder()
    normal = build.norm(build.conv("x", "c", 4, 12), "n", 12, 4, silu=True)
    build.conv(normal, "y", 12, 4)
    model = build.model({"x": [2, 4, 6, 4]}, [2, 4, 6, 4])
    feeds = feeds_of(model)
    before = run(model, feeds, tmp_path)[0]
    to_diffusion_operators(model)
    assert kinds(model)["GroupNormalization"] == 1
    assert kinds(model)["NhwcConv"] == 2
    assert compare(run(written_out(model), feeds, tmp_path)[0], before)[0] <= tolerances.GRAPH_FP32


def test_group_norms_that_were_written_out_are_one_node_again(tmp_path: Path) -> None:
    model = one_norm(16, 4)
    feeds = feeds_of(model)
    before = run(model, feeds, tmp_path)[0]
    assert write_out_group_norms(model) == 1
    assert "InstanceNormalization" in kinds(model)
    assert restore_group_norms(model) == 1
    drop_unused(model)
    assert kinds(model) == {"GroupNormalization": 1}
    assert compare(run(model, feeds, tmp_path)[0], before)[0] <= tolerances.GRAPH_FP32


@pytest.mark.parametrize("changed", ["factor", "rows", "axes"])
def test_another_instance_norm_is_not_taken_for_a_group_norm(changed: str) -> None:
    model = one_norm(16, 4)
    write_out_group_norms(model)
    name, tensor = {
        "factor": ("y.one", np.full(4, 2, np.float32)),
        "rows": ("y.rows", [0, 8, -1]),
        "axes": ("y.axes", [0, 1]),  # along the last axis, not the second
    }[changed]
    value = model.graph.initializers[name]
    assert value.dtype is not None
    value.const_value = ir.tensor(np.asarray(tensor, value.dtype.numpy()), name=name)
    assert restore_group_norms(model) == 0


def test_transposed_weights_are_folded_when_a_graph_is_loaded(tmp_path: Path) -> None:
    """The CUDA provider takes `NhwcConv` only with constant weights; folding comes before it is asked."""
    import onnx
    import onnxruntime as ort

    build = Builder(np.float16)
    build.op("Cast", [build.weight(8, 4, 3, 3)], "wide", to=FP32)
    build.op("Transpose", ["wide"], "turned", perm=[0, 2, 3, 1])
    build.op("Transpose", ["turned"], "first", perm=[0, 3, 1, 2])
    build.op("Cast", ["x"], "x_wide", to=FP32)
    build.op("Conv", ["x_wide", "first"], "conv")
    build.op("Cast", ["conv"], "y", to=TensorProto.FLOAT16)
    path = tmp_path / "model.onnx"
    ir.save(build.model({"x": [1, 4, 6, 4]}, [1, 8, 4, 2]), path, external_data="model.onnx.data")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # what precedes providers
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    InferenceSession(path, options, providers=["CPUExecutionProvider"])
    loaded = onnx.load(tmp_path / "loaded.onnx")
    assert [node.op_type for node in loaded.graph.node] == ["Cast", "Conv", "Cast"]
