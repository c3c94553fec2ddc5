"""Attentions: which stay one node, and that those written out compute the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from support.runs.onnx_runs import builds, run

import tolerances
from sdrt.export.parity.components import compare
from sdrt.export.passes.attention import (
    attentions,
    legalize_attention,
    why_not_fused,
    write_out_all,
)
from sdrt.runtime.errors import SdrtError

Array = NDArray[Any]
FP16, FP32, BF16, BOOL = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.BOOL
BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 2, 6, 5, 16


def attention_model(
    dtype: int = FP32,
    *,
    batch: int | str = BATCH,
    heads: int = HEADS,
    width: int | str = WIDTH,
    value_width: int | None = None,
    key_heads: int | None = None,
    keys: int = KEYS,
    mask: tuple[int, list[int]] | None = None,
    flat: bool = False,
    outputs: int = 1,
    **attributes: Any,
) -> ir.Model:
    """A graph of one attention; ``mask`` is its type and shape, ``flat`` the 3-D form."""
    shared = heads if key_heads is None else key_heads
    sizes = [(heads, QUERIES, width), (shared, keys, width), (shared, keys, value_width or width)]
    if flat:
        attributes |= {"q_num_heads": heads, "kv_num_heads": shared}
        shapes = [[batch, tokens, count * wide] for count, tokens, wide in sizes if isinstance(wide, int)]
    else:
        shapes = [[batch, *size] for size in sizes]
    values = [helper.make_tensor_value_info(n, dtype, s) for n, s in zip("qkv", shapes, strict=True)]
    if mask:
        values.append(helper.make_tensor_value_info("mask", *mask))
    result = [*shapes[0][:-1], heads * (value_width or width)] if flat else [*shapes[0][:-1], shapes[2][-1]]
    made = [helper.make_tensor_value_info("y", dtype, result)]
    made += [
        helper.make_tensor_value_info("present", dtype, shapes[1]),
    ][: outputs - 1]
    node = helper.make_node(
        "Attention",
        [value.name for value in values],
        [value.name for value in made],
        "attention",
        **attributes,
    )
    graph = helper.make_graph([node], "attention", values, made)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    model: ir.Model = ir.from_proto(proto)
    return model


def inputs_of(model: ir.Model, seed: int = 0) -> dict[str, Array]:
    """Random inputs; a boolean mask lets every query see its first key, so that no row is empty."""
    generator = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        shape = [size if isinstance(size, int) else BATCH for size in value.shape]
        if value.dtype == ir.DataType.BOOL:
            seen = generator.random(shape) < 0.5
            seen[..., 0] = True
            feeds[str(value.name)] = seen
        else:
            feeds[str(value.name)] = generator.standard_normal(shape).astype(value.dtype.numpy())
    return feeds


def by_definition(feeds: dict[str, Array], *, scale: float, causal: bool = False) -> Array:
    """Attention in float64 from [B, H, S, D]."""
    query, key, value = (feeds[name].astype(np.float64) for name in "qkv")
    logits = scale * query @ key.swapaxes(-1, -2)
    if causal:
        logits = np.where(np.tril(np.ones(logits.shape[-2:], bool)), logits, -np.inf)
    mask = feeds.get("mask")
    if mask is not None:
        logits = np.where(mask, logits, -np.inf) if mask.dtype == bool else logits + mask
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    product: Array = weights / weights.sum(axis=-1, keepdims=True) @ value
    return product


MASKS = [
    None,
    (BOOL, [QUERIES, KEYS]),
    (BOOL, [BATCH, 1, QUERIES, KEYS]),
    (BOOL, [HEADS, QUERIES, KEYS]),
    (FP32, [BATCH, HEADS, QUERIES, KEYS]),
    (FP32, [1, 1, QUERIES, KEYS]),
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_written_out_attention_is_the_operator(
    mask: Any, causal: int, scale: float | None, tmp_path: Path
) -> None:
    attributes: dict[str, Any] = {"is_causal": causal} | ({} if scale is None else {"scale": scale})
    model = attention_model(mask=mask, **attributes)
    feeds = inputs_of(model)
    before = run(model, feeds, tmp_path)[0]
    assert write_out_all(model) == 1
    assert not attentions(model)
    after = run(model, feeds, tmp_path)[0]
    expected = by_definition(feeds, scale=scale or 1 / math.sqrt(WIDTH), causal=bool(causal))
    assert compare(after, expected)[0] <= tolerances.ATTENTION_FP32
    assert compare(before, after)[0] <= tolerances.ATTENTION_FP32


@pytest.mark.parametrize("causal", [0, 1])
def test_the_flat_form_is_written_out_too(causal: int, tmp_path: Path) -> None:
    model = attention_model(flat=True, is_causal=causal)
    feeds = inputs_of(model)
    before = run(model, feeds, tmp_path)[0]
    write_out_all(model)
    after = run(model, feeds, tmp_path)[0]
    assert before.shape == after.shape == (BATCH, QUERIES, HEADS * WIDTH)
    assert compare(after, before)[0] <= tolerances.ATTENTION_FP32


def test_the_softmax_of_a_half_precision_attention_is_float32(tmp_path: Path) -> None:
    model = attention_model(FP16, mask=(FP16, [QUERIES, KEYS]))
    feeds = inputs_of(model)
    write_out_all(model)
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    assert softmax.inputs[0] is not None
    assert softmax.inputs[0].dtype == ir.DataType.FLOAT
    after = run(model, feeds, tmp_path)[0]
    assert after.dtype == np.float16
    expected = by_definition(feeds, scale=1 / math.sqrt(WIDTH))
    assert compare(after, expected)[0] <= tolerances.ATTENTION_FP16


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("width", [9, 40, 64, 80, 160, 256])
def test_attentions_with_a_kernel_stay(dtype: int, width: int) -> None:
    model = attention_model(dtype, batch="rows", width=width, mask=(BOOL, [QUERIES, KEYS]))
    report = legalize_attention(model)
    assert report.kept == ("attention",)
    assert report.written_out == {}
    assert [node.op_type for node in model.graph] == ["Attention"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": FP32}, "FLOAT16"),
        ({"width": 8}, "8 wide"),
        ({"width": 257}, "257 wide"),
        ({"width": 512, "heads": 1}, "512 wide"),
        ({"value_width": 32}, "32 wide"),
        ({"heads": 1, "batch": "batch"}, "one head"),
        ({"heads": 1, "batch": 1}, "one head"),
    ],
)
def test_attentions_without_a_kernel_are_written_out(changes: dict[str, Any], reason: str) -> None:
    model = attention_model(**{"dtype": FP16, **changes})
    report = legalize_attention(model)
    assert report.kept == ()
    assert reason in report.written_out["attention"]
    assert "Softmax" in [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    "changes",
    [
        {"softcap": 5.0},
        {"softmax_precision": 1},
        {"outputs": 2},
        {"key_heads": 1, "dtype": FP32},
        {"width": "width"},
    ],
)
def test_what_cannot_be_written_out_is_an_error(changes: dict[str, Any]) -> None:
    model = attention_model(**{"dtype": FP16, **changes})
    with pytest.raises(SdrtError, match="attention attention cannot be written out"):
        legalize_attention(model)


def test_the_flat_form_that_stays_becomes_four_dimensional(tmp_path: Path) -> None:
    model = attention_model(FP16, flat=True, is_causal=1)
    feeds = inputs_of(model)
    before = run(model, feeds, tmp_path)[0]
    report = legalize_attention(model)
    assert len(report.kept) == 1
    (node,) = attentions(model)
    assert not [name for name in node.attributes if name.endswith("num_heads")]
    after = run(model, feeds, tmp_path)[0]
    assert before.tobytes() == after.tobytes()


def test_the_decision_is_that_of_tensorrt() -> None:
    """One-node networks through the real builder: what the rule keeps builds, what it refuses does not."""
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    cases: list[dict[str, Any]] = [
        *({"dtype": dtype, "width": width} for dtype in (FP16, BF16) for width in (8, 9, 40, 256, 257)),
        {"dtype": FP32},
        {"dtype": FP16, "heads": 1, "batch": 1},
        {"dtype": FP16, "heads": 1, "batch": 2},
        {"dtype": FP16, "value_width": 32},
        {"dtype": FP16, "mask": (BOOL, [BATCH, 1, QUERIES, KEYS])},
        {"dtype": FP16, "mask": (FP16, [QUERIES, KEYS])},
        {"dtype": FP16, "is_causal": 1, "keys": QUERIES},
    ]
    for case in cases:
        model = attention_model(**case)
        stays = not why_not_fused(attentions(model)[0])
        assert builds(trt, logger, model) == stays, case
        legalize_attention(model)
        assert builds(trt, logger, model), case
