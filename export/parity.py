"""The parity gate: what was written is compared with PyTorch before it ships.

Each component is read back from disk and run on ONNX Runtime against the float32 PyTorch reference, on
random inputs of several sizes; then a short sampling run goes through the whole bundle and through
diffusers' own pipeline. Over tolerance is a failed export.

Two figures per output: the relative L2 error ``‖a − b‖ / ‖b‖`` and the largest error relative to the
largest reference value, ``max|a − b| / max|b|``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from sdrt.export.checkpoint import Checkpoint
from sdrt.export.graph import AxisRange
from sdrt.export.modules import example_inputs
from sdrt.export.weights import load_module
from sdrt.runtime.components import COMPONENTS, Precision, TensorSpec
from sdrt.runtime.errors import NumericsError, ParityError
from sdrt.runtime.executors import OnnxRuntimeExecutor

# Unit round-offs, and how many roundings to the graph's own precision a full-size U-Net chains (its layers'
# outputs; sums, norm and softmax statistics are float32 there).
UNIT_ROUNDOFF: Final[dict[Precision, float]] = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
ROUNDINGS: Final = 300
# One outlier may be this much worse than the mean error: for ~10⁶ Gaussian errors the largest is 5 σ, and
# max|b| is about 5 σ of b as well; attention's tails need some room.
MAX_OVER_L2: Final = 10.0
# Guidance w multiplies the difference of two predictions, each with its own error: √(w² + (w − 1)²) ≤ √2·w.
# The steps' errors are not multiplied by their number: each evaluation sees the x of its own run, and a
# denoiser pulls a perturbed x back (measured: the run's error is below the U-Net's own).
SAMPLING_STEPS: Final = 4
SAMPLING_GUIDANCE: Final = 3.0
SAMPLING_FACTOR: Final = math.sqrt(2) * SAMPLING_GUIDANCE


def rounding_tolerance(sum_lengths: Sequence[int], precision: Precision) -> float:
    """The relative L2 error that rounding explains.

    A sum of K products in float32 errs by about √K·u relative to its own size (independent roundings,
    Higham 2002, section 2.6), and the layers' errors, independent again, add as squares: √(ΣK)·u over all
    convolutions and matrix products that ran. Both sides of the comparison err: √2. A narrower precision
    adds √ROUNDINGS · u of its own, on one side only.

    Args:
        sum_lengths: K of every layer that ran.
        precision: Of the graph.
    """
    tolerance = math.sqrt(2 * sum(sum_lengths)) * UNIT_ROUNDOFF["fp32"]
    if precision != "fp32":
        tolerance += math.sqrt(ROUNDINGS) * UNIT_ROUNDOFF[precision]
    return tolerance


@contextlib.contextmanager
def _sum_lengths(module: torch.nn.Module) -> Iterator[list[int]]:
    """Inside, collects the length of the sums of each convolution and linear layer that runs."""
    lengths: list[int] = []

    def note(layer: torch.nn.Module, _inputs: object, _output: object) -> None:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        lengths.append(weight[0].numel())  # [out, in/groups, kh, kw] and [out, in] alike

    layers = [part for part in module.modules() if isinstance(part, torch.nn.Conv2d | torch.nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield lengths
    finally:
        for hook in hooks:
            hook.remove()


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
    """All comparisons of one export."""

    figures: list[ParityFigure] = field(default_factory=list)

    def raise_if_over(self) -> None:
        """Raise ParityError if any figure is over its tolerance."""
        over = [figure for figure in self.figures if not figure.passed]
        if over:
            worst = max(over, key=lambda figure: _badness(figure))
            raise ParityError(
                f"{worst.component}.{worst.output} differs from PyTorch by {worst.relative_l2:.2e} "
                f"(largest {worst.relative_max:.2e}) on {worst.inputs}, allowed {worst.tolerance:.0e}; "
                f"{len(over)} of {len(self.figures)} comparisons are over: nothing was written"
            )

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"figures": [asdict(figure) for figure in self.figures]}


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


def check_component(
    checkpoint: Checkpoint,
    name: str,
    reference: torch.nn.Module,
    model: Path,
    precision: Precision,
    axes: Mapping[str, AxisRange],
    report: ParityReport,
) -> None:
    """Compare one saved graph with its module at the sizes that `probe_sizes` gives.

    Raises:
        ParityError: An output is over its tolerance.
        NumericsError: The reference itself gives NaN or infinity.
    """
    spec = COMPONENTS[name].resolve(checkpoint.sizes(), arithmetic(precision))
    executor = OnnxRuntimeExecutor(model, spec)
    own = {axis for entry in (*spec.inputs, *spec.outputs) for axis in entry.shape}
    probes = probe_sizes(checkpoint, {axis: extent for axis, extent in axes.items() if axis in own})
    for index, sizes in enumerate(probes):
        generator = torch.Generator().manual_seed(1000 + index)
        inputs = example_inputs(checkpoint, name, sizes, generator)
        with torch.no_grad(), _sum_lengths(reference) as lengths:
            outputs = reference(*inputs)
        tolerance = rounding_tolerance(lengths, precision)
        expected = [tensor.numpy() for tensor in (outputs if isinstance(outputs, tuple) else (outputs,))]
        actual = _run(executor, inputs, sizes)
        label = "x".join(str(size) for size in inputs[0].shape)
        for entry, want, got in zip(spec.outputs, expected, actual, strict=True):
            if not np.isfinite(want).all():
                raise NumericsError(f"{name}.{entry.name}: the PyTorch reference gives NaN or infinity")
            l2, largest = compare(got, want)
            report.figures.append(
                ParityFigure(name, entry.name, label, l2, largest, tolerance, arithmetic(precision))
            )
    report.raise_if_over()


def probe_sizes(checkpoint: Checkpoint, axes: Mapping[str, AxisRange]) -> list[dict[str, int]]:
    """Axis sizes to compare at, each once: all smallest, all one step up, one image of the native size."""
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


def _run(
    executor: OnnxRuntimeExecutor, inputs: tuple[torch.Tensor, ...], sizes: Mapping[str, int]
) -> list[NDArray[Any]]:
    spec = executor.spec
    feeds = {
        entry.name: np.ascontiguousarray(tensor.numpy().astype(entry.dtype))
        for entry, tensor in zip(spec.inputs, inputs, strict=True)
    }
    results = {entry.name: _buffer(entry, sizes) for entry in spec.outputs}
    executor.bind(feeds, results)()
    return list(results.values())


def _buffer(entry: TensorSpec, sizes: Mapping[str, int]) -> NDArray[Any]:
    return np.full(entry.concrete(sizes), np.nan, dtype=entry.dtype)


def check_sampling(checkpoint: Checkpoint, folder: Path, precision: Precision, report: ParityReport) -> None:
    """Draw the same picture through the bundle and through diffusers' own pipeline.

    DDIM, a few steps, guidance on, the same initial noise; the final latents are compared.
    """
    from sdrt.runtime.pipeline import Pipeline

    pipeline = Pipeline.load(folder)
    defaults = pipeline.bundle.manifest.defaults
    latents = pipeline.initial_latents([SAMPLING_STEPS], defaults.height, defaults.width, rng="philox")
    result = pipeline(
        "a parity check",
        num_inference_steps=SAMPLING_STEPS,
        guidance_scale=SAMPLING_GUIDANCE,
        sampler="ddim",
        latents=latents,
        output_type="latents",
    )
    expected = reference_latents(checkpoint, latents)
    l2, largest = compare(result.latents, expected)
    report.figures.append(
        ParityFigure(
            "sampling",
            "latents",
            f"{SAMPLING_STEPS} ddim steps",
            l2,
            largest,
            SAMPLING_FACTOR * max(f.tolerance for f in report.figures if f.component == "unet"),
            arithmetic(precision),
        )
    )


def reference_latents(checkpoint: Checkpoint, latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """The latents that diffusers' StableDiffusionPipeline ends with for the gate's sampling run."""
    pipeline = reference_pipeline(checkpoint)
    result = pipeline(
        "a parity check",
        num_inference_steps=SAMPLING_STEPS,
        guidance_scale=SAMPLING_GUIDANCE,
        latents=torch.from_numpy(latents.copy()),
        # The latents decide the size. These two are only checked, and refused unless they are multiples of 8.
        height=64,
        width=64,
        output_type="latent",
    )
    drawn: NDArray[np.float32] = result.images.numpy()
    return drawn


def reference_pipeline(checkpoint: Checkpoint) -> Any:
    """diffusers' pipeline on the checkpoint in float32 with DDIM: the reference of the whole project."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    pipeline = StableDiffusionPipeline(
        text_encoder=load_module(checkpoint, "text_encoder"),
        unet=load_module(checkpoint, "unet"),
        vae=load_module(checkpoint, "vae"),
        tokenizer=CLIPTokenizer.from_pretrained(
            checkpoint.path / "tokenizer",
            model_max_length=checkpoint.tokenizer.ids["max_length"],  # the file's may be huge, or missing
        ),
        scheduler=DDIMScheduler.from_pretrained(checkpoint.path / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
