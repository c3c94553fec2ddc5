"""The parity gate: what was written is compared with PyTorch before it ships.

Each component is read back from disk and run on ONNX Runtime against the float32 PyTorch reference, on
random inputs of several sizes; then a short sampling run (`sdrt.export.parity.sampling`) goes through the
whole bundle and through diffusers' own pipeline. Over tolerance is a failed export. A network is never held
by PyTorch and ONNX Runtime at once: the reference's outputs are kept, not the reference. Networks that take
minutes at their own size are compared at a small one only, and the report says so.

Two figures per output: the relative L2 error ``‖a − b‖ / ‖b‖`` and the largest error relative to the
largest reference value, ``max|a − b| / max|b|``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.weights import parameter_count
from sdrt.export.graphs.networks import example_inputs
from sdrt.export.options import AxisRange
from sdrt.export.parity.frugal_executor import FrugalExecutor, OneSession
from sdrt.export.parity.rounding import CountSums, Sums, rounding_tolerance
from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.backends.onnxruntime_cpu.executor import OnnxRuntimeExecutor
from sdrt.runtime.bundle.families.record import ComponentSpec, Precision
from sdrt.runtime.errors import NumericsError, ParityError

# One outlier may be this much worse than the mean error: for ~10⁶ Gaussian errors the largest is 5 σ, and
# max|b| is about 5 σ of b as well; attention's tails need some room.
MAX_OVER_L2: Final = 10.0
# A model whose U-Net has more parameters is compared at one small size unless more is asked for. (Stable
# Diffusion 1.5: 8.6e8, and 12 s an evaluation of 512 x 512 pixels on two cores.)
LARGE_PARAMETERS: Final = 10**8
LARGE_SIDE: Final = 128  # pixels: at 8 latents every level of the networks still has more than one element


@dataclass(frozen=True, slots=True)
class ParityFigure:
    """One comparison. ``inputs`` says on what it was made, ``arithmetic`` in what precision it ran."""

    component: str
    output: str
    inputs: str
    relative_l2: float
    relative_max: float
    tolerance: float
    arithmetic: str

    @property
    def passed(self) -> bool:
        """False also when a figure is NaN."""
        return self.relative_l2 <= self.tolerance and self.relative_max <= self.tolerance * MAX_OVER_L2


@dataclass(slots=True)
class ParityReport:
    """All comparisons of one export. ``left_out`` says which were not made, and why."""

    figures: list[ParityFigure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def raise_if_over(self) -> None:
        """Raise ParityError if any figure is over its tolerance."""
        over = [figure for figure in self.figures if not figure.passed]
        if over:
            worst = max(over, key=lambda figure: _badness(figure))
            nan = math.isnan(worst.relative_l2) and worst.arithmetic == "fp16"
            hint = "; NaN in fp16 is an overflow, export with --dtype fp32" if nan else ""
            raise ParityError(
                f"{worst.component}.{worst.output} differs from PyTorch by {worst.relative_l2:.2e} "
                f"(largest {worst.relative_max:.2e}) on {worst.inputs}, allowed {worst.tolerance:.0e}; "
                f"{len(over)} of {len(self.figures)} comparisons are over: nothing was written{hint}"
            )

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"figures": [asdict(figure) for figure in self.figures], "left_out": self.left_out}


def arithmetic(precision: Precision) -> Precision:
    """What ONNX Runtime computes in on the CPU: it has no bfloat16, so a widened copy of the graph runs."""
    return "fp32" if precision == "bf16" else precision


def _badness(figure: ParityFigure) -> float:
    return math.inf if math.isnan(figure.relative_l2) else figure.relative_l2 / figure.tolerance


def compare(actual: NDArray[Any], expected: NDArray[Any]) -> tuple[float, float]:
    """Relative L2 and relative maximum error of two arrays of one shape, computed in float64."""
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    if a.shape != b.shape:
        return math.nan, math.nan
    norm, peak = float(np.linalg.norm(b)), float(np.abs(b).max())
    difference = a - b
    return (
        float(np.linalg.norm(difference)) / max(norm, 1e-30),
        float(np.abs(difference).max()) / max(peak, 1e-30),
    )


@dataclass(frozen=True, slots=True)
class Probe:
    """What the reference gave at one size: ``inputs`` and ``expected`` in the order of the table, float32."""

    label: str
    sizes: Mapping[str, int]
    inputs: tuple[NDArray[Any], ...]
    expected: tuple[NDArray[Any], ...]
    sums: Sums


def probe_inputs(
    checkpoint: Checkpoint, name: str, axes: Mapping[str, AxisRange], *, small: bool = False
) -> Iterator[tuple[dict[str, int], tuple[torch.Tensor, ...]]]:
    """Each of the sizes that `probe_sizes` gives for a component, with seeded inputs of it in float32."""
    spec = checkpoint.record.components[name]
    own = {axis for entry in (*spec.inputs, *spec.outputs) for axis in entry.shape}
    of_component = {axis: extent for axis, extent in axes.items() if axis in own}
    for index, sizes in enumerate(probe_sizes(checkpoint, of_component, small=small)):
        generator = torch.Generator().manual_seed(1000 + index)
        yield sizes, example_inputs(checkpoint, name, sizes, generator)


def reference_probes(
    checkpoint: Checkpoint,
    name: str,
    reference: torch.nn.Module,
    axes: Mapping[str, AxisRange],
    *,
    small: bool = False,
) -> list[Probe]:
    """Evaluate the reference of one component at the sizes that `probe_sizes` gives.

    Raises:
        NumericsError: The reference itself gives NaN or infinity.
    """
    spec = checkpoint.record.components[name]
    resolved = spec.resolve(checkpoint.sizes(), "fp32")
    names = [entry.name for entry in resolved.inputs]
    probes = []
    for sizes, inputs in probe_inputs(checkpoint, name, axes, small=small):
        with torch.no_grad(), CountSums() as count:
            outputs = reference(**dict(zip(names, inputs, strict=True)))
        expected = [tensor.numpy() for tensor in (outputs if isinstance(outputs, tuple) else (outputs,))]
        for entry, want in zip(spec.outputs, expected, strict=True):
            if not np.isfinite(want).all():
                raise NumericsError(f"{name}.{entry.name}: the PyTorch reference gives NaN or infinity")
        label = "x".join(str(size) for size in inputs[0].shape)
        arrays = tuple(tensor.numpy() for tensor in inputs)
        probes.append(Probe(label, sizes, arrays, tuple(expected), count.sums))
    return probes


def check_component(
    checkpoint: Checkpoint,
    name: str,
    probes: Sequence[Probe],
    model: Path,
    precision: Precision,
    report: ParityReport,
) -> None:
    """Compare one saved graph with what the reference gave.

    Raises:
        ParityError: An output is over its tolerance.
    """
    runs_in = arithmetic(precision)
    spec = checkpoint.record.components[name].resolve(checkpoint.sizes(), runs_in)
    sessions = OneSession()
    executor: Executor = (
        FrugalExecutor(model, spec, sessions) if is_large(checkpoint) else OnnxRuntimeExecutor(model, spec)
    )
    for probe in probes:
        tolerance = rounding_tolerance(probe.sums, precision)
        results = _run(executor, probe)
        for entry, want, got in zip(spec.outputs, probe.expected, results, strict=True):
            l2, largest = compare(got, want)
            report.figures.append(
                ParityFigure(name, entry.name, probe.label, l2, largest, tolerance, runs_in)
            )
    report.raise_if_over()


def is_large(checkpoint: Checkpoint) -> bool:
    """Whether a comparison at the model's own size takes minutes and gigabytes."""
    return parameter_count(checkpoint, "unet") > LARGE_PARAMETERS


def large_side(checkpoint: Checkpoint) -> int:
    """The side in pixels that a large model is compared at."""
    return -(-LARGE_SIDE // checkpoint.size_multiple) * checkpoint.size_multiple


def probe_sizes(
    checkpoint: Checkpoint, axes: Mapping[str, AxisRange], *, small: bool = False
) -> list[dict[str, int]]:
    """Axis sizes to compare at, each once.

    All smallest, all one step up, one image of the native size; ``small`` asks for only one image of a small
    size, as many rows as guidance takes, and a prompt of two chunks where the graph takes one.
    """
    if small:
        return [_small_probe(checkpoint, axes)]
    latent = checkpoint.native_size // checkpoint.factor
    native = {
        "height": checkpoint.native_size,
        "width": checkpoint.native_size,
        "latent_height": latent,
        "latent_width": latent,
    }
    probes = (
        {name: extent.minimum for name, extent in axes.items()},
        {name: min(extent.minimum + extent.multiple, extent.maximum) for name, extent in axes.items()},
        {name: extent.nearest(native.get(name, extent.minimum)) for name, extent in axes.items()},
    )
    return [probe for index, probe in enumerate(probes) if probe not in probes[:index]]


def _small_probe(checkpoint: Checkpoint, axes: Mapping[str, AxisRange]) -> dict[str, int]:
    side = large_side(checkpoint)
    latent = side // checkpoint.factor
    wanted = {"height": side, "width": side, "latent_height": latent, "latent_width": latent}
    wanted["rows"] = checkpoint.record.guided_rows
    if context := axes.get("context"):
        wanted["context"] = 2 * context.minimum  # the sampling run has a prompt of one chunk
    return {name: extent.nearest(wanted.get(name, extent.minimum)) for name, extent in axes.items()}


def feeds(spec: ComponentSpec, inputs: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Inputs in the order of the table by name, in the dtypes of a graph."""
    return {
        entry.name: np.ascontiguousarray(array.astype(entry.dtype))
        for entry, array in zip(spec.inputs, inputs, strict=True)
    }


def _run(executor: Executor, probe: Probe) -> list[NDArray[Any]]:
    spec = executor.spec
    results = {
        entry.name: np.full(entry.concrete(probe.sizes), np.nan, dtype=entry.dtype) for entry in spec.outputs
    }
    executor.bind(feeds(spec, probe.inputs), results)()
    return list(results.values())
