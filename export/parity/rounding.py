"""How far two evaluations of one network may be apart: the analysis behind the parity gate's tolerances."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sdrt.runtime.bundle.families.record import Precision

# Unit round-offs, and how many roundings to the graph's own precision a full-size U-Net chains (its layers'
# outputs; sums, norm and softmax statistics are float32 there).
UNIT_ROUNDOFF: Final[dict[Precision, float]] = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
ROUNDINGS: Final = 300
# Partial sums that ONNX Runtime keeps side by side in a normalisation: the floats of an AVX2 register.
LANES: Final = 8
# See `norm_error`.
RANDOM_SHARE: Final = math.sqrt(2) / 3
BIAS_SHARE: Final = 0.029


@dataclass(slots=True)
class Sums:
    """The lengths of the sums that one evaluation of a network adds up.

    Attributes:
        products: K of every convolution, matrix product and attention that ran.
        statistics: K of every normalisation: the elements that share a mean and a variance.
    """

    products: list[int] = field(default_factory=list)
    statistics: list[int] = field(default_factory=list)


def rounding_tolerance(sums: Sums, precision: Precision) -> float:
    """The relative L2 error that rounding explains.

    A sum of K products of either sign in float32 errs by about √K·u relative to its own size (independent
    roundings, Higham 2002, section 2.6), and the layers' errors, independent again, add as squares:
    √(ΣK)·u over all that ran. Both sides of the comparison err: √2.

    Normalisations add one `norm_error` each, on one side only (ONNX Runtime; PyTorch adds in a cascade and
    errs by u whatever K is). In a VAE at 512 × 512 pixels they are larger than all products together.

    A narrower precision adds √ROUNDINGS · u of its own, on one side only.

    Args:
        sums: Of the layers that ran.
        precision: Of the graph.
    """
    products = 2 * sum(sums.products) * UNIT_ROUNDOFF["fp32"] ** 2
    tolerance = math.sqrt(products + sum(norm_error(count) ** 2 for count in sums.statistics))
    if precision != "fp32":
        tolerance += math.sqrt(ROUNDINGS) * UNIT_ROUNDOFF[precision]
    return tolerance


def norm_error(count: int) -> float:
    """The relative L2 error of a normalisation whose K = ``count`` elements are added one after the other.

    The sum of squares has one sign, and so have its partial sums: at the k-th addition they are k/K of the
    whole, and its rounding has the variance (u·k/K)²/3. In L lanes of K/L elements that is √K·u/(3·L) of the
    sum. Where the mean is as large as the deviation, the sum of squares is twice the variance, so that the
    deviation errs by all of that, and so does the mean: √2/3·√K·u/L together, one standard deviation.

    Besides, round-to-nearest has a bias where what is added is not spread smoothly over a unit δ in the last
    place of the partial sum. The density of squares of Gaussians is 1/√(2πt) near 0, which by the
    Euler-Maclaurin formula for such singularities gives ζ(−1/2, 1/2)·2/√(2π)·δ^1.5 = 0.0486·δ^1.5 an
    addition. With δ ≈ 1.4·u·k in a lane the sum over k is 0.032·(u·K/L)^1.5, half of it in the deviation, and
    1.8 times as much where the mean is as large as the deviation.

    Measured against float64 at a mean of one deviation, K = 1.0, 4.2, 8.4, 16.8 million: 2.0e-5, 1.44e-4,
    3.97e-4, 1.13e-3; this gives 2.0e-5, 1.6e-4, 4.5e-4, 1.3e-3.
    """
    unit = UNIT_ROUNDOFF["fp32"]
    random = RANDOM_SHARE * math.sqrt(count) * unit / LANES
    bias = BIAS_SHARE * (unit * count / LANES) ** 1.5
    return math.hypot(random, bias)


class CountSums(TorchFunctionMode):
    """Inside, collects the lengths of the sums of every layer that runs in ``self.sums``."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = Sums()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func in (torch.conv2d, F.linear):
            weight: Tensor = args[1] if len(args) > 1 else named["weight"]
            self.sums.products.append(weight[0].numel())  # [out, in/groups, kh, kw] and [out, in] alike
        elif func is F.scaled_dot_product_attention:
            query, key = args[:2]
            self.sums.products += [query.shape[-1], key.shape[-2]]  # q·k, and the weighted sum of values
        elif func is F.group_norm:
            sample, groups = args[:2]
            self.sums.statistics.append(sample[0].numel() // groups)
        elif func is F.layer_norm:
            self.sums.statistics.append(math.prod(args[1]))
        return func(*args, **named)
