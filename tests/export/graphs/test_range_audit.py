"""The range audit: its figures are those of the tensors, and it names what fp16 cannot hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from support.runs.onnx_runs import run

import tolerances
from sdrt.export.graphs.from_module import save_graph
from sdrt.export.graphs.range_audit import FP16_LARGEST, MARGIN, WORST, RangeAudit, TensorRange, audit_ranges
from sdrt.export.passes.attention import write_out_all
from sdrt.export.passes.widen import LOW_PRECISION, widen
from sdrt.runtime.errors import SdrtError

FP16 = TensorProto.FLOAT16


def write_model(
    folder: Path, nodes: list[Any], outputs: list[str], types: dict[str, int], shape: Any
) -> Path:
    """A graph from x, every tensor of one shape; ``types`` are those that are not fp16."""
    names = [*{name: None for node in nodes for name in node.output}]
    info = {name: helper.make_tensor_value_info(name, types.get(name, FP16), shape) for name in ["x", *names]}
    graph = helper.make_graph(
        nodes,
        "g",
        [info["x"]],
        [info[name] for name in outputs],
        value_info=[info[name] for name in names if name not in outputs],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return save_graph(ir.from_proto(proto), folder / "model.onnx")[0]


def powers(folder: Path) -> Path:
    """x → x² → x⁴ → 1/x⁴, of one vector."""
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"]),
        helper.make_node("Mul", ["square", "square"], ["fourth"]),
        helper.make_node("Reciprocal", ["fourth"], ["y"]),
    ]
    return write_model(folder, nodes, ["y"], {}, [4])


def by_name(audit: RangeAudit) -> dict[str, float]:
    return {entry.tensor: entry.largest for entry in audit.ranges}


def vector(*numbers: float) -> dict[str, NDArray[Any]]:
    return {"x": np.array(numbers, np.float16)}


def test_the_largest_magnitude_over_all_runs(tmp_path: Path) -> None:
    audit = audit_ranges(powers(tmp_path), [vector(1, 2, -20, 4), vector(0.5, 3, 10, 0.25)])
    assert by_name(audit) == {"x": 20, "square": 400, "fourth": 160000, "y": 256}
    assert [entry.op for entry in audit.ranges] == ["input", "Mul", "Mul", "Reciprocal"]
    assert [entry.tensor for entry in audit.over] == ["fourth"]
    assert audit.islands == ("fourth",)
    assert (audit.precision, audit.runs, audit.not_finite) == ("fp16", 2, None)


@pytest.mark.parametrize(
    ("largest", "near"), [(FP16_LARGEST / MARGIN, False), (16400.0, True), (65504.0, True)]
)
def test_what_is_near_the_limit_is_an_island_too(largest: float, near: bool) -> None:
    audit = RangeAudit("fp16", 1, (TensorRange("t", "Add", largest, True),))
    assert audit.over == ()
    assert bool(audit.near) is near
    assert bool(audit.islands) is near


def test_nan_and_infinity_are_named_at_their_first_tensor(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Abs", ["x"], ["size"]),
        helper.make_node("Log", ["size"], ["log"]),  # −∞ at zero
        helper.make_node("Sub", ["log", "log"], ["nan"]),
        helper.make_node("Neg", ["nan"], ["y"]),
    ]
    audit = audit_ranges(write_model(tmp_path, nodes, ["y"], {}, [4]), [vector(1, 2, 0, 3)])
    assert audit.not_finite is not None
    assert audit.not_finite.tensor == "log"
    assert by_name(audit)["log"] == np.inf
    assert np.isnan(by_name(audit)["nan"])
    assert [entry.tensor for entry in audit.over] == ["log", "nan", "y"]
    assert audit.lines()[1] == "  NaN or infinity first in log (Log)"
    assert json.loads(json.dumps(audit.to_dict(), allow_nan=False))["not_finite"] == "log"


def test_every_tensor_of_a_unet_is_seen_at_its_true_size(fp16_bundle: Path, tmp_path: Path) -> None:
    path = fp16_bundle / "unet" / "model.onnx"
    generator = np.random.default_rng(1)
    feeds: dict[str, NDArray[Any]] = {
        "sample": generator.standard_normal((2, 4, 9, 8)).astype(np.float16),
        "timestep": np.array([500, 20], np.float32),
        "encoder_hidden_states": generator.standard_normal((2, 77, 16)).astype(np.float16),
    }
    audit = audit_ranges(path, [feeds], threads=1)

    model: ir.Model = ir.load(path)
    ir.external_data.load_to_model(model)
    write_out_all(model)
    outputs = (output for node in model.graph for output in node.outputs)
    halves = [value for value in outputs if value.dtype == ir.DataType.FLOAT16 and value.shape is not None]
    model.graph.outputs.extend(value for value in halves if value not in model.graph.outputs)
    widen(model, LOW_PRECISION)
    results = run(model, {name: array.astype(np.float32) for name, array in feeds.items()}, tmp_path)
    expected = {
        str(v.name): float(np.abs(a).max()) for v, a in zip(model.graph.outputs, results, strict=True)
    }
    found = by_name(audit)
    assert len(expected) > 250
    assert set(expected) <= set(found)
    for name, largest in expected.items():
        assert found[name] == pytest.approx(largest, rel=tolerances.RANGE), name
    logits = [entry for entry in audit.ranges if entry.tensor.endswith(".logits")]
    assert len(logits) == 8
    assert all(entry.largest > 0 for entry in logits)


def test_logits_of_a_fused_attention_are_an_island_only_where_fp16_cannot_hold_them(tmp_path: Path) -> None:
    shape = [2, 2, 4, 16]
    nodes = [helper.make_node("Attention", ["x", "x", "x"], ["y"], scale=1.0)]
    path = write_model(tmp_path, nodes, ["y"], {}, shape)
    audit = audit_ranges(path, [{"x": np.full(shape, 60, np.float16)}])  # 16 products of 60²: near
    (logits,) = [entry for entry in audit.ranges if entry.tensor == "y.logits"]
    assert logits == TensorRange("y.logits", "MatMul", 57600.0, stored=False)
    assert (audit.over, audit.near, audit.islands) == ((), (), ())
    assert "inside a fused attention" in audit.lines()[1]

    large = audit_ranges(path, [{"x": np.full(shape, 120, np.float16)}])  # 230,400: NaN on the CPU
    assert (large.over, large.islands) == ((), ("y.logits",))

    narrow = write_model(tmp_path, nodes, ["y"], {}, [2, 2, 4, 8])  # no kernel for a width of 8
    written = audit_ranges(narrow, [{"x": np.full([2, 2, 4, 8], 60, np.float16)}])
    assert written.islands == ("y.logits",)


def test_masked_logits_are_not_taken_for_an_overflow(tmp_path: Path) -> None:
    shape = [2, 2, 4, 8]
    nodes = [helper.make_node("Attention", ["x", "x", "x"], ["y"], is_causal=1)]
    path = write_model(tmp_path, nodes, ["y"], {}, shape)
    audit = audit_ranges(path, [{"x": np.ones(shape, np.float16)}])
    assert audit.not_finite is None
    assert audit.over == ()


def test_a_float32_graph_has_no_islands(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["x", "x"], ["y"])]
    path = write_model(tmp_path, nodes, ["y"], {"x": TensorProto.FLOAT, "y": TensorProto.FLOAT}, [4])
    audit = audit_ranges(path, [{"x": np.full(4, 1e3, np.float32)}])
    assert (audit.precision, len(audit.over), audit.islands) == ("fp32", 1, ())


def test_the_manifest_gets_a_summary_and_the_worst() -> None:
    entries = tuple(TensorRange(f"t{index}", "Add", 1000.0 * index, True) for index in range(100))
    document = RangeAudit("fp16", 3, entries).to_dict()
    assert document["tensors"] == 100
    assert document["over"] == 34  # 66,000 … 99,000
    assert len(document["worst"]) == WORST
    assert document["worst"][0] == {
        "tensor": "t99",
        "op": "Add",
        "layer": "",
        "largest": 99000.0,
        "stored": True,
    }
    assert document["islands"] == [f"t{index}" for index in range(17, 100)]
    assert len(json.dumps(document)) < 5000


def test_a_run_that_fails_is_an_error(tmp_path: Path) -> None:
    path = powers(tmp_path)
    with pytest.raises(SdrtError, match="at least one"):
        audit_ranges(path, [])
    with pytest.raises(SdrtError, match="run failed"):
        audit_ranges(path, [{"x": np.ones((2, 2), np.float16)}])
