"""fp32 islands: an fp16 graph that overflows is mended, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from support.runs.onnx_runs import load, run

import tolerances
from sdrt.export.graphs.from_module import save_graph
from sdrt.export.graphs.range_audit import FP16_LARGEST, audit_ranges
from sdrt.export.parity.components import compare
from sdrt.export.passes.attention import write_out_all
from sdrt.export.passes.fp32_islands import insert_islands
from sdrt.export.passes.widen import LOW_PRECISION, widen
from sdrt.runtime.errors import SdrtError

FP16 = TensorProto.FLOAT16
GAIN = 2.0**18  # on weights of about 1/6 and 36 products a sum: some 10⁵, over fp16's 65,504


def chain_model(gain: float = 1.0) -> ir.Model:
    """y = ((x·W·gain) + b)·V in fp16, with the sum read by a second node too."""
    generator = np.random.default_rng(3)
    weight = generator.uniform(-1, 1, (8, 8)).astype(np.float16) * np.float16(gain)
    small = generator.uniform(-1e-4, 1e-4, (8, 8)).astype(np.float16)
    tensors = [
        numpy_helper.from_array(array, name)
        for name, array in (("w", weight), ("b", np.ones(8, np.float16)), ("v", small))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["large"], "first"),
        helper.make_node("Add", ["large", "b"], ["sum"], "add"),
        helper.make_node("MatMul", ["sum", "v"], ["y"], "last"),
        helper.make_node("Sigmoid", ["sum"], ["z"], "side"),
    ]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", FP16, [4, 8])],
        [helper.make_tensor_value_info(name, FP16, [4, 8]) for name in "yz"],
        tensors,
        value_info=[helper.make_tensor_value_info(name, FP16, [4, 8]) for name in ("large", "sum")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    model: ir.Model = ir.from_proto(proto)
    return model


def chain_input() -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(4).standard_normal((4, 8)).astype(np.float16)}


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_an_island_is_cast_once_on_its_shores(tmp_path: Path) -> None:
    model = chain_model()
    before = run(model, chain_input(), tmp_path)
    report = insert_islands(model, ["large", "sum"])
    # x goes up once; y and z come down; between the four nodes nothing is cast, and the weights are fp32.
    assert operators(model).count("Cast") == report.casts == 3
    assert report.tensors == ("large", "sum")
    assert set(report.nodes) == {"first", "add", "last", "side"}
    assert {name: value.dtype for name, value in model.graph.initializers.items()} == {
        f"{name}.fp32": ir.DataType.FLOAT for name in "wbv"
    }
    assert [(output.name, output.dtype) for output in model.graph.outputs] == [
        ("y", ir.DataType.FLOAT16),
        ("z", ir.DataType.FLOAT16),
    ]
    after = run(model, chain_input(), tmp_path)
    for old, new in zip(before, after, strict=True):
        assert compare(new, old)[0] <= tolerances.ISLAND_FP16


def test_a_tensor_that_overflows_is_finite_in_an_island(tmp_path: Path) -> None:
    broken = chain_model(gain=6e4)
    # ONNX's own evaluator: ONNX Runtime keeps so short a chain in float32.
    with np.errstate(all="ignore"):
        outputs = ReferenceEvaluator(ir.to_proto(broken)).run(None, chain_input())
    assert isinstance(outputs, list)
    assert not np.isfinite(outputs[0]).all()
    insert_islands(broken, ["large", "sum"])
    mended = run(broken, chain_input(), tmp_path)[0]

    exact = chain_model(gain=6e4)
    widen(exact, LOW_PRECISION)
    wide = {name: array.astype(np.float32) for name, array in chain_input().items()}
    assert compare(mended, run(exact, wide, tmp_path)[0])[0] <= tolerances.ISLAND_FP16


@pytest.mark.parametrize("names", [["large"], ["sum", "y"], ["large", "sum", "y", "z"]])
def test_a_second_time_changes_nothing(names: list[str]) -> None:
    """The graph of a bundle has its islands when an engine's builder asks for them again."""
    model = chain_model()
    insert_islands(model, names)
    before = ir.to_proto(model).SerializeToString()
    report = insert_islands(model, names)
    assert ir.to_proto(model).SerializeToString() == before
    assert (report.tensors, report.casts) == ((), 0)


def test_a_named_tensor_that_a_cast_made_keeps_its_name() -> None:
    """By which an engine's builder asks for it again; a cast from fp32 to fp32 is what is left of it."""
    model = chain_model()
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    down = ir.node("Cast", [model.graph.inputs[0]], {"to": int(ir.DataType.FLOAT16)}, name="down")
    down.outputs[0].name, down.outputs[0].type = "big", ir.TensorType(ir.DataType.FLOAT16)
    first = model.graph[0]
    model.graph.insert_before(first, down)
    first.replace_input_with(0, down.outputs[0])
    for tensors in (("big",), ()):
        assert insert_islands(model, ["big"]).tensors == tensors
        assert model.graph.node("down").outputs[0].dtype == ir.DataType.FLOAT


def test_without_names_nothing_changes() -> None:
    model = chain_model()
    before = ir.to_proto(model).SerializeToString()
    report = insert_islands(model, [])
    assert ir.to_proto(model).SerializeToString() == before
    assert report.tensors == report.nodes == report.written_out == ()


def test_a_name_that_the_graph_lacks_is_an_error() -> None:
    with pytest.raises(SdrtError, match="no tensor absent"):
        insert_islands(chain_model(), ["large", "absent"])


def test_a_tensor_of_unknown_type_is_an_error() -> None:
    model = chain_model()
    model.graph[0].outputs[0].type = None
    with pytest.raises(SdrtError, match="type of large"):
        insert_islands(model, ["large"])


def overflowing_decoder(bundle: Path, folder: Path) -> Path:
    """The tiny VAE's decoder with a first convolution whose output fp16 cannot hold."""
    model: ir.Model = ir.load(bundle / "vae_decoder" / "model.onnx")
    ir.external_data.load_to_model(model)
    (name,) = [name for name in model.graph.initializers if name.endswith("decoder.conv_in.weight")]
    weight = model.graph.initializers[name]
    assert weight.const_value is not None
    scaled = weight.const_value.numpy().astype(np.float32) * GAIN
    assert np.abs(scaled).max() < FP16_LARGEST
    weight.const_value = ir.tensor(scaled.astype(np.float16), name=name)
    folder.mkdir()
    return save_graph(model, folder / "model.onnx")[0]


def test_the_audit_names_what_overflows_in_a_vae_and_islands_mend_it(
    fp16_bundle: Path, tmp_path: Path
) -> None:
    path = overflowing_decoder(fp16_bundle, tmp_path / "vae")
    latents = np.random.default_rng(5).standard_normal((1, 4, 9, 8)).astype(np.float16)
    feeds = {"latents": latents}

    audit = audit_ranges(path, [feeds])
    names = [entry.tensor for entry in audit.over]
    first = ir.load(path).graph.initializers["model.decoder.conv_in.weight"].consumers()[0]
    assert names[0] == first.outputs[0].name
    assert len(names) < len(audit.ranges) / 2
    assert audit.not_finite is None

    assert not np.isfinite(run(load(path), feeds, tmp_path)[0]).all()
    mended = load(path)
    report = insert_islands(mended, audit.islands)
    assert set(report.tensors) == set(audit.islands)
    exact = load(path)
    widen(exact, LOW_PRECISION)
    (expected,) = run(exact, {"latents": latents.astype(np.float32)}, tmp_path)
    (actual,) = run(mended, feeds, tmp_path)
    assert actual.dtype == np.float16
    assert compare(actual, expected)[0] <= tolerances.ISLAND_VAE_FP16


def test_an_attention_whose_values_overflow_is_written_out(fp16_bundle: Path, tmp_path: Path) -> None:
    model = load(fp16_bundle / "vae_decoder" / "model.onnx")
    (attention,) = [node for node in model.graph if node.op_type == "Attention"]
    value = attention.inputs[2]
    assert value is not None
    latents = {"latents": np.random.default_rng(5).standard_normal((1, 4, 9, 8)).astype(np.float16)}
    before = run(model, latents, tmp_path)[0]
    report = insert_islands(model, [str(value.name)])
    assert report.written_out == (attention.name,)
    assert "Attention" not in operators(model)
    (product,) = [node for node in model.graph if str(node.name).endswith(".product")]
    assert {entry.dtype for entry in product.inputs if entry is not None} == {ir.DataType.FLOAT}
    assert compare(run(model, latents, tmp_path)[0], before)[0] <= tolerances.ISLAND_VAE_FP16


@pytest.mark.parametrize("one_node", [False, True])
def test_logits_can_be_an_island(fp16_bundle: Path, tmp_path: Path, one_node: bool) -> None:
    model = load(fp16_bundle / "vae_decoder" / "model.onnx")
    (attention,) = [node for node in model.graph if node.op_type == "Attention"]
    name = f"{attention.outputs[0].name}.logits"
    if not one_node:
        write_out_all(model)
    latents = {"latents": np.random.default_rng(5).standard_normal((1, 4, 9, 8)).astype(np.float16)}
    before = run(model, latents, tmp_path)[0]
    report = insert_islands(model, [name])
    # Up from queries and keys, and down from the softmax, whose own cast up of the logits is not needed.
    assert report.casts == 2
    assert operators(model).count("Cast") == 3
    assert report.written_out == ((attention.name,) if one_node else ())
    assert compare(run(model, latents, tmp_path)[0], before)[0] <= tolerances.ISLAND_VAE_FP16
