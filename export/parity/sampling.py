"""The parity gate's sampling run: a few steps through the bundle and through diffusers.

Text-to-image checkpoints run whole pipelines, from the prompt to the latents. Those whose U-Net takes more
(a mask, a guidance embedding) or other things than text run the U-Net alone, on the same inputs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.weights import load_module
from sdrt.export.parity.components import ParityFigure, ParityReport, arithmetic, compare, is_large
from sdrt.export.parity.frugal_executor import FrugalExecutor, OneSession
from sdrt.export.parity.reference import (
    gate_sampler,
    reference_pipeline,
    reference_prompt_embeddings,
    reference_scheduler,
)
from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.backends.onnxruntime_cpu.executor import OnnxRuntimeExecutor
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.families.components import (
    DEPTH,
    ENCODER_HIDDEN_STATES,
    INPAINTING,
    NOISE_LEVEL,
    SAMPLE,
    TIMESTEP,
    TIMESTEP_COND,
)
from sdrt.runtime.bundle.families.image_variations import IMAGE_EMBEDS
from sdrt.runtime.bundle.families.record import Precision
from sdrt.runtime.bundle.families.told import usual_row
from sdrt.runtime.devices.host import HostDevice
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.request.sampling import DEFAULT_IMAGE_GUIDANCE
from sdrt.runtime.samplers.guidance import guidance_embedding
from sdrt.runtime.samplers.registry import make_table
from sdrt.runtime.samplers.table import run_table

# Guidance w multiplies the difference of two predictions, each with its own error: √(w² + (w − 1)²) ≤ √2·w.
# The steps' errors are not multiplied by their number: each evaluation sees the x of its own run, and a
# denoiser pulls a perturbed x back (measured: the run's error is below the U-Net's own). Guidance by picture,
# of v, too, multiplies three: √((1 − v)² + (v − w)² + w²) = 3.4 with diffusers' v of 1.5, less than √2·w.
SAMPLING_PROMPT: Final = "a parity check"
SAMPLING_STEPS: Final = 4
SAMPLING_GUIDANCE: Final = 3.0
SAMPLING_FACTOR: Final = math.sqrt(2) * SAMPLING_GUIDANCE

Array = NDArray[np.float32]
Embeddings = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class SamplingProbe:
    """The reference's sampling run: float32 [1, C, h, w] of initial noise, and what it ended with.

    ``inputs`` are what the U-Net alone was given beside the sample and the timestep, float32, two rows under
    guidance; none where whole pipelines are compared.
    """

    latents: Array
    expected: Array
    inputs: Mapping[str, Array] = field(default_factory=dict)


def runs_unet_alone(checkpoint: Checkpoint) -> bool:
    """Whether the sampling run is of the U-Net alone."""
    sizes = checkpoint.sizes()
    special = "inpainting_channels" in sizes or checkpoint.distilled_guidance
    special |= checkpoint.kind.from_picture or bool(checkpoint.record.picture_input)
    return special or not checkpoint.record.reads_text


def reference_embeddings(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """What the networks before the U-Net make of the gate's prompt, as arguments of diffusers' pipeline.

    Of a family without text what the encoder gives for a seeded picture, [1, 1, cross_width].
    """
    if checkpoint.record.reads_text:
        return reference_prompt_embeddings(checkpoint, SAMPLING_PROMPT)
    (encoder,), side = checkpoint.record.encoders, checkpoint.sizes()["encoder_size"]
    picture = np.random.default_rng(SAMPLING_STEPS).standard_normal((1, 3, side, side), dtype=np.float32)
    with torch.no_grad():
        embeds = load_module(checkpoint, encoder.component)(torch.from_numpy(picture)).image_embeds
    return {IMAGE_EMBEDS: embeds[:, None]}


def sampling_probe(
    checkpoint: Checkpoint, size: tuple[int, int], embeddings: Embeddings, unet: torch.nn.Module
) -> SamplingProbe:
    """Run the gate's sampling through diffusers.

    Args:
        checkpoint: A checked checkpoint.
        size: Height and width in pixels.
        embeddings: Of `reference_embeddings`.
        unet: The reference, as `sdrt.export.graphs.networks.wrapped` gives it.
    """
    latents = initial_latents(checkpoint, size)
    if not runs_unet_alone(checkpoint):
        network = unet.get_submodule("model")
        return SamplingProbe(latents, reference_latents(checkpoint, latents, embeddings, network))
    inputs = unet_inputs(checkpoint, size, embeddings)
    return SamplingProbe(latents, unet_latents(checkpoint, latents, inputs, unet), inputs)


def initial_latents(checkpoint: Checkpoint, size: tuple[int, int]) -> Array:
    """The seeded noise that the sampling run begins with, for a height and width in pixels."""
    shape = (1, checkpoint.sizes()["latent_channels"], *(side // checkpoint.factor for side in size))
    return np.random.default_rng(SAMPLING_STEPS).standard_normal(shape, dtype=np.float32)


def check_sampling(
    checkpoint: Checkpoint, folder: Path, probe: SamplingProbe, precision: Precision, report: ParityReport
) -> None:
    """Draw the picture of the reference through the bundle.

    A few steps, guidance on, the same initial noise; the final latents are compared. The size is the
    default one of the manifest in ``folder``.
    """
    drawn = (
        _drawn_by_unet(checkpoint, folder, probe)
        if probe.inputs
        else _drawn(checkpoint, folder, probe.latents)
    )
    l2, largest = compare(drawn, probe.expected)
    shape = "x".join(str(size) for size in probe.latents.shape)
    label = f"{SAMPLING_STEPS} {gate_sampler(checkpoint)} steps of {shape}"
    tolerance = SAMPLING_FACTOR * max(f.tolerance for f in report.figures if f.component == "unet")
    report.figures.append(
        ParityFigure("sampling", "latents", label, l2, largest, tolerance, arithmetic(precision))
    )


# --- whole pipelines ---


def _drawn(checkpoint: Checkpoint, folder: Path, latents: Array) -> NDArray[Any]:
    with contextlib.closing(_gate_pipeline(checkpoint, folder)) as pipeline:
        drawn: Array = pipeline(
            SAMPLING_PROMPT,
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=SAMPLING_GUIDANCE,
            sampler=gate_sampler(checkpoint),
            latents=latents,
            output_type="latents",
        ).latents
    return drawn


def _gate_pipeline(checkpoint: Checkpoint, folder: Path) -> Pipeline:
    """The bundle's pipeline on the CPU; of a large model with one network in memory at a time."""
    if not is_large(checkpoint):
        return Pipeline.load(folder, backend="onnxruntime-cpu")
    bundle, sessions = Bundle.open(folder, verify=False), OneSession()
    executors = {
        name: FrugalExecutor(folder / part.model, part.spec, sessions)
        for name, part in bundle.manifest.components.items()
    }
    return Pipeline(bundle, executors, HostDevice(), "onnxruntime-cpu")


def reference_latents(
    checkpoint: Checkpoint, latents: Array, embeddings: Embeddings, unet: torch.nn.Module
) -> Array:
    """The latents that diffusers' own text-to-image pipeline ends with for the gate's sampling run."""
    pipeline = reference_pipeline(checkpoint, {"unet": unet})
    height, width = (side * checkpoint.factor for side in latents.shape[2:])
    sizes = {
        name: tuple(pixels)  # which diffusers adds up
        for option in checkpoint.record.told_options
        for name, pixels in option.usual((height, width)).items()
        if isinstance(pixels, list)
    }
    result = pipeline(
        **embeddings,
        **sizes,
        num_inference_steps=SAMPLING_STEPS,
        guidance_scale=SAMPLING_GUIDANCE,
        latents=torch.from_numpy(latents.copy()),
        # The latents decide the size. These two are only checked, and refused unless they are multiples of 8.
        height=64,
        width=64,
        output_type="latent",
    )
    drawn: Array = result.images.numpy()
    return drawn


# --- the U-Net alone ---


def unet_inputs(
    checkpoint: Checkpoint,
    size: tuple[int, int],
    embeddings: Embeddings,
    guidance_scale: float = SAMPLING_GUIDANCE,
) -> dict[str, Array]:
    """What the U-Net takes beside sample and timestep, float32 by name.

    The unconditional row is the first; a U-Net that is told the guidance scale has the conditional row alone.
    The picture to inpaint or to edit is seeded noise, the mask its lower half.
    """
    sizes, inputs = checkpoint.sizes(), _texts(checkpoint, embeddings)
    if checkpoint.distilled_guidance:
        inputs = {name: rows[1:] for name, rows in inputs.items()}
        inputs[TIMESTEP_COND] = guidance_embedding(guidance_scale - 1, sizes["guidance_width"])[None]
    rows = len(inputs[ENCODER_HIDDEN_STATES])
    for name, options in checkpoint.record.told.items():
        halves = [usual_row(options, size, unconditional=half) for half in (True, False)]
        inputs[name] = np.array(halves[-rows:], np.float32)
    if checkpoint.record.components["unet"].input(DEPTH) is not None:
        shape = (rows, 1, *(side // checkpoint.factor for side in size))
        inputs[DEPTH] = np.broadcast_to(np.linspace(-1, 1, shape[3], dtype=np.float32), shape).copy()
    if channels := sizes.get("inpainting_channels"):
        shape = (channels, *(side // checkpoint.factor for side in size))
        inpainting = np.random.default_rng(channels).standard_normal(shape, dtype=np.float32)
        inpainting[0] = np.arange(shape[1])[:, None] >= shape[1] // 2
        inputs[INPAINTING] = np.tile(inpainting, (rows, 1, 1, 1))
    record = checkpoint.record
    if read := record.components["unet"].input(record.picture_input):
        latents = [side // checkpoint.factor for side in size]
        axes = {"rows": 1, "latent_height": latents[0], "latent_width": latents[1]}
        shape = read.resolve(sizes, "fp32").concrete(axes)
        picture = np.random.default_rng(rows).standard_normal(shape, dtype=np.float32)
        first = np.zeros_like(picture) if record.picture_blank else picture
        inputs[read.name] = np.concatenate([first, *[picture] * (rows - 1)])
    if record.components["unet"].input(NOISE_LEVEL):
        inputs[NOISE_LEVEL] = np.full(rows, record.noise_level)
    return inputs


def _texts(checkpoint: Checkpoint, embeddings: Embeddings) -> dict[str, Array]:
    """The embeddings as rows of the U-Net's inputs, the unconditional one first."""
    if IMAGE_EMBEDS in embeddings:
        picture = embeddings[IMAGE_EMBEDS].numpy()
        return {ENCODER_HIDDEN_STATES: np.concatenate([np.zeros_like(picture), picture])}
    unwanted = checkpoint.record.guided_rows - 1
    return {
        name: np.concatenate(
            [*[embeddings[f"negative_{given}"].numpy()] * unwanted, embeddings[given].numpy()]
        )
        for name, given in checkpoint.kind.embeddings.items()
    }


def unet_latents(
    checkpoint: Checkpoint,
    latents: Array,
    inputs: Mapping[str, Array],
    unet: torch.nn.Module,
    guidance_scale: float = SAMPLING_GUIDANCE,
) -> Array:
    """The latents that a loop with `reference_scheduler` and the reference U-Net ends with."""
    scheduler = reference_scheduler(checkpoint)
    scheduler.set_timesteps(SAMPLING_STEPS)
    given = {name: torch.from_numpy(rows) for name, rows in inputs.items()}

    def evaluate(x: Array, timestep: float) -> Array:
        with torch.no_grad():
            result: Array = unet(torch.from_numpy(x), torch.full([len(x)], timestep), **given).numpy()
        return result

    x = latents * np.float32(scheduler.init_noise_sigma)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(torch.from_numpy(x), timestep).numpy()
        noise_pred = _guided(evaluate, scaled, float(timestep), inputs, guidance_scale)
        x = scheduler.step(torch.from_numpy(noise_pred), timestep, torch.from_numpy(x)).prev_sample.numpy()
    return x


def _drawn_by_unet(checkpoint: Checkpoint, folder: Path, probe: SamplingProbe) -> NDArray[Any]:
    """The same through the bundle's U-Net and a sampler's table."""
    part = Bundle.open(folder, verify=False).manifest.components["unet"]
    model = folder / part.model
    executor: Executor = (
        FrugalExecutor(model, part.spec, OneSession())
        if is_large(checkpoint)
        else OnnxRuntimeExecutor(model, part.spec)
    )
    dtypes = {entry.name: entry.dtype for entry in part.spec.inputs}
    (output,) = part.spec.outputs

    def evaluate(x: Array, timestep: float) -> Array:
        feeds = {**probe.inputs, SAMPLE: x, TIMESTEP: np.full(len(x), timestep)}
        typed = {name: np.ascontiguousarray(feeds[name].astype(dtype)) for name, dtype in dtypes.items()}
        result = np.full(x.shape, np.nan, output.dtype)
        executor.bind(typed, {output.name: result})()
        return result.astype(np.float32)

    def model_of(x: NDArray[np.float64], timestep: float) -> NDArray[np.float64]:
        noise_pred = _guided(evaluate, x.astype(np.float32), timestep, probe.inputs, SAMPLING_GUIDANCE)
        return noise_pred.astype(np.float64)

    table = make_table(gate_sampler(checkpoint), checkpoint.schedule, SAMPLING_STEPS)
    return run_table(table, model_of, probe.latents.astype(np.float64) * table.init_noise_sigma)


def _guided(
    evaluate: Callable[[Array, float], Array],
    x: Array,
    timestep: float,
    inputs: Mapping[str, Array],
    guidance_scale: float,
) -> Array:
    """One evaluation for float32 [1, C, h, w], guided where the inputs have two rows, or three."""
    rows = len(inputs[ENCODER_HIDDEN_STATES])
    noise_pred = evaluate(np.repeat(x, rows, axis=0), timestep)
    if rows == 1:
        return noise_pred
    uncond, cond, w = noise_pred[:1], noise_pred[-1:], np.float32(guidance_scale)
    if rows == 2:
        return uncond + w * (cond - uncond)
    picture = noise_pred[1:2]
    guided: Array = uncond + w * (cond - picture) + np.float32(DEFAULT_IMAGE_GUIDANCE) * (picture - uncond)
    return guided
