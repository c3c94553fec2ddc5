"""The analysis behind the parity gate's tolerances: which sums are counted, and what they may err by."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper

import tolerances
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.graphs.networks import wrapped
from sdrt.export.parity.components import compare
from sdrt.export.parity.rounding import CountSums, Sums, norm_error, rounding_tolerance


def test_the_tolerance_grows_with_the_sums_and_with_the_precision() -> None:
    """√(2 · ΣK) · u: four sums of 50 products err as one of 200 does, and by 20 roundings' worth."""
    one, four = Sums(products=[200]), Sums(products=[50] * 4)
    assert rounding_tolerance(one, "fp32") == rounding_tolerance(four, "fp32") == 20 * 2.0**-24
    fp16 = rounding_tolerance(one, "fp16") - rounding_tolerance(one, "fp32")
    assert fp16 == pytest.approx(math.sqrt(300) * 2.0**-11)
    assert rounding_tolerance(one, "bf16") > 7 * fp16
    norms = Sums(products=[200], statistics=[10**6, 10**6])
    expected = math.sqrt((20 * 2.0**-24) ** 2 + 2 * norm_error(10**6) ** 2)
    assert rounding_tolerance(norms, "fp32") == pytest.approx(expected)


def test_only_layers_that_run_count(tiny_checkpoint: Path) -> None:
    """The decoder's wrapper holds the whole VAE; its encoder must not widen the tolerance."""
    decoder = wrapped(open_checkpoint(str(tiny_checkpoint)), "vae_decoder")
    with torch.no_grad(), CountSums() as count:
        decoder(torch.zeros(1, 4, 4, 4))
    every = [part for part in decoder.modules() if isinstance(part, torch.nn.Conv2d | torch.nn.Linear)]
    assert 0 < len(count.sums.products) < len(every)
    assert max(count.sums.products) == 16 * 9
    before = len(count.sums.products)
    decoder(torch.zeros(1, 4, 4, 4))
    assert len(count.sums.products) == before  # counted inside of the block only


def test_each_kind_of_layer_has_its_own_length() -> None:
    sample = torch.zeros(2, 8, 3, 5)
    with CountSums() as count:
        F.conv2d(sample, torch.zeros(4, 2, 3, 3), groups=4)
        F.linear(torch.zeros(2, 7), torch.zeros(3, 7))
        keys = torch.zeros(1, 2, 11, 4)
        F.scaled_dot_product_attention(torch.zeros(1, 2, 6, 4), keys, keys)
        F.group_norm(sample, 4)
        F.layer_norm(torch.zeros(2, 9), (9,))
    assert count.sums == Sums(products=[2 * 9, 7, 4, 11], statistics=[2 * 15, 9])


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("side", [128, 256, 512, 1024])
def test_a_norm_errs_by_no_more_than_its_analysis_says(side: int, mean: float) -> None:
    """GroupNorm with 4 channels a group, as at the VAE's largest size."""
    channels, groups = 8, 2
    sample = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0)) + mean
    one, zero = torch.ones(channels), torch.zeros(channels)
    exact = F.group_norm(sample.double(), groups, one.double(), zero.double(), 1e-6).numpy()
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", sample.shape), ("w", [channels]), ("b", [channels]), ("y", sample.shape))
    ]
    node = helper.make_node("GroupNormalization", ["x", "w", "b"], ["y"], epsilon=1e-6, num_groups=groups)
    graph = helper.make_graph([node], "norm", values[:3], values[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"x": sample.numpy(), "w": one.numpy(), "b": zero.numpy()})
    error, _ = compare(np.asarray(actual), exact)
    # The analysis gives one standard deviation; with two groups the error is a draw of two.
    assert error <= tolerances.NORM_DRAW * norm_error(channels // groups * side * side)
    reference, _ = compare(F.group_norm(sample, groups, one, zero, 1e-6).numpy(), exact)
    assert reference <= 2 * 2.0**-24  # PyTorch's side of the comparison does not grow
