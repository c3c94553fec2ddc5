"""Operations and bytes: by hand on small graphs, and beside PyTorch's own counter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sdrt.benchmarks.gpu_ceilings import guided_step_flop
from sdrt.benchmarks.operations import Count, count_bundle, count_graph, weight_elements
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.errors import SdrtError

FP32, FP16 = TensorProto.FLOAT, TensorProto.FLOAT16


def graph(
    nodes: list[Any],
    inputs: dict[str, int],
    weights: dict[str, tuple[int, ...]] | None = None,
    kind: int = FP32,
) -> onnx.ModelProto:
    """A model of opset 23 with an output ``y``; inputs are name → rank."""
    weights = weights or {}
    made = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(name, FP32, [None] * rank) for name, rank in inputs.items()],
        [helper.make_tensor_value_info("y", FP32, None)],
        [_zeros(name, shape, kind) for name, shape in weights.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)])


def _zeros(name: str, shape: tuple[int, ...], kind: int) -> TensorProto:
    import numpy as np

    return numpy_helper.from_array(np.zeros(shape, helper.tensor_dtype_to_np_dtype(kind)), name)


CASES: dict[str, tuple[onnx.ModelProto, dict[str, tuple[int, ...]], Count]] = {
    # 4 x 8 by 8 x 16.
    "MatMul": (
        graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": 2}, {"w": (8, 16)}),
        {"x": (4, 8)},
        Count(2 * 4 * 8 * 16, 4 * (32 + 128 + 64)),
    ),
    # Transposed: x is 8 x 4.
    "Gemm": (
        graph([helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)], {"x": 2}, {"w": (8, 16)}),
        {"x": (8, 4)},
        Count(2 * 4 * 8 * 16, 4 * (32 + 128 + 64)),
    ),
    # Two groups, stride 2: 6 channels of 4 x 4, each from 2 channels of 3 x 3.
    "Conv": (
        graph(
            [helper.make_node("Conv", ["x", "w"], ["y"], group=2, pads=[1] * 4, strides=[2, 2])],
            {"x": 4},
            {"w": (6, 2, 3, 3)},
        ),
        {"x": (1, 4, 8, 8)},
        Count(2 * (6 * 4 * 4) * (2 * 9), 4 * (256 + 108 + 96)),
    ),
    "ConvTranspose": (
        graph(
            [helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])],
            {"x": 4},
            {"w": (4, 3, 2, 2)},
        ),
        {"x": (1, 4, 8, 8)},
        Count(2 * 256 * (3 * 4), 4 * (256 + 48 + 3 * 16 * 16)),
    ),
    # 2 images, 4 heads of width 16; 10 queries, 7 keys.
    "Attention of 4 axes": (
        graph([helper.make_node("Attention", ["q", "k", "v"], ["y"])], {"q": 4, "k": 4, "v": 4}),
        {"q": (2, 4, 10, 16), "k": (2, 4, 7, 16), "v": (2, 4, 7, 16)},
        Count(2 * 2 * 4 * 10 * 7 * (16 + 16), 4 * 2 * 4 * 16 * (10 + 7 + 7 + 10)),
    ),
    "Attention of 3 axes": (
        graph(
            [helper.make_node("Attention", ["q", "k", "v"], ["y"], q_num_heads=4, kv_num_heads=4)],
            {"q": 3, "k": 3, "v": 3},
        ),
        {"q": (2, 10, 64), "k": (2, 7, 64), "v": (2, 7, 64)},
        Count(2 * 2 * 4 * 10 * 7 * (16 + 16), 4 * 2 * 64 * (10 + 7 + 7 + 10)),
    ),
    "Einsum": (
        graph([helper.make_node("Einsum", ["q", "k"], ["y"], equation="bqd, bkd -> bqk")], {"q": 3, "k": 3}),
        {"q": (2, 5, 8), "k": (2, 3, 8)},
        Count(2 * 2 * 5 * 3 * 8, 4 * (80 + 48 + 30)),
    ),
    # Stored in half the bytes, read in fp32; what is between is written and read; a view moves nothing.
    "cast weights, a view": (
        graph(
            [
                helper.make_node("Cast", ["h"], ["w"], to=FP32),
                helper.make_node("Unsqueeze", ["x", "axes"], ["row"]),
                helper.make_node("MatMul", ["row", "w"], ["m"]),
                helper.make_node("Relu", ["m"], ["y"]),
            ],
            {"x": 1},
            {"h": (8, 16)},
            FP16,
        ),
        {"x": (8,)},
        Count(2 * 8 * 16, 4 * (8 + 128 + 2 * 16 + 16)),
    ),
}
CASES["cast weights, a view"][0].graph.initializer.append(
    helper.make_tensor("axes", TensorProto.INT64, [1], [0])
)


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name: str) -> None:
    model, inputs, expected = CASES[name]
    assert count_graph(model, inputs) == expected


def test_a_shape_that_is_computed_in_the_graph() -> None:
    model = graph(
        [
            helper.make_node("Shape", ["x"], ["s"], start=0, end=1),
            helper.make_node("Mul", ["s", "two"], ["t"]),
            helper.make_node("Concat", ["t", "rest"], ["u"], axis=0),
            helper.make_node("Reshape", ["x", "u"], ["r"]),
            helper.make_node("MatMul", ["r", "w"], ["y"]),
        ],
        {"x": 2},
        {"w": (4, 3)},
    )
    model.graph.initializer.extend(
        helper.make_tensor(name, TensorProto.INT64, [1], [value])
        for name, value in {"two": 2, "rest": -1}.items()
    )
    assert count_graph(model, {"x": (5, 8)}).flop == 2 * 10 * 4 * 3


def test_a_shape_that_depends_on_values_is_an_error() -> None:
    model = graph(
        [helper.make_node("NonZero", ["x"], ["i"]), helper.make_node("Cast", ["i"], ["y"], to=1)], {"x": 1}
    )
    with pytest.raises(SdrtError, match="the shape of i cannot be inferred"):
        count_graph(model, {"x": (4,)})


@pytest.mark.parametrize("size", [16, 32])
def test_the_unet_has_the_operations_that_pytorch_counts(
    tiny_checkpoint: Path, tiny_bundle: Path, size: int
) -> None:
    work = {entry.component: entry for entry in count_bundle(Bundle.open(tiny_bundle), size, size, 1)}
    assert set(work) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert work["unet"].flop == guided_step_flop(open_checkpoint(str(tiny_checkpoint)), size)


def test_two_pictures_are_twice_the_operations_and_not_twice_the_bytes() -> None:
    bundle = Bundle.open()
    one, two = (count_bundle(bundle, 64, 64, batch) for batch in (1, 2))
    for single, double in zip(one, two, strict=True):
        # The steps' embedding is computed once, whatever the number of pictures.
        assert 1.95 * single.flop < double.flop <= 2 * single.flop
        assert single.bytes_moved < double.bytes_moved < 2 * single.bytes_moved


def test_weights_are_counted_by_element() -> None:
    # The embedded model's parameters, as its README says: 5.65 million.
    assert 5.6e6 < weight_elements(Bundle.open()) < 5.7e6
