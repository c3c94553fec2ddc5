"""The parity gate's look at our own reading: diffusers' pipeline, as diffusers loads the same folder.

The other comparisons hand PyTorch the networks and the schedule that our reader made: what it leaves out is
left out on both sides. Here diffusers reads the folder by itself (its classes, its scheduler, its tokenizers,
its VAE's fields) and draws a small picture in a few steps. Beside it our runtime draws the same picture: from
the manifest, with the tokenizers of the bundle and with its default sampler, on the networks that the graphs
were traced from, in PyTorch. Both sides are float32, whatever the bundle's precision is, so that what is
found is of the reader alone; that the graphs are these networks is compared elsewhere. The U-Net is in memory
once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.weights import error_words, offline
from sdrt.export.graphs.networks import wrapped
from sdrt.export.parity.components import ParityFigure, ParityReport, compare, is_large, large_side
from sdrt.export.parity.frugal_executor import give_memory_back
from sdrt.export.parity.reference import reference_kind
from sdrt.export.parity.rounding import UNIT_ROUNDOFF, CountSums, Sums, rounding_tolerance
from sdrt.export.parity.sampling import SAMPLING_FACTOR, SAMPLING_GUIDANCE, SAMPLING_STEPS
from sdrt.runtime.backends.executor import FixedWeights, check_buffers
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.families.components import DEPTH, LOW_RES
from sdrt.runtime.bundle.families.record import ComponentSpec
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.devices.host import HostDevice
from sdrt.runtime.errors import ParityError, SdrtError
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.samplers.registry import make_table

Array = NDArray[Any]

COMPONENT: Final = "pipeline"  # in the report, where the others have the name of a component
# Capitals, a digit, an apostrophe and an accent: what tokenizers differ in.
PROMPT: Final = "A café's red 2CV"
SEED: Final = 20240304
STRENGTH: Final = 0.75  # of a kind that draws on a picture
# diffusers computes the coefficients of a step, and most of its schedulers x itself, in float32: some eight
# independent roundings a step, of numbers up to the first sigma (or its like where x stays small, 15) times
# the result's size. With zero terminal SNR that is 4,096.
SCHEDULER_ROUNDINGS: Final = math.sqrt(8 * SAMPLING_STEPS) * UNIT_ROUNDOFF["fp32"]
LARGEST_SIGMA: Final = 15.0
# Schedulers whose picture the default sampler does not draw, with ours that does.
OWN_SAMPLER: Final = {"PNDMScheduler": "pndm"}
# And those that none of ours draws exactly: the nearest stands for them. The noise of the second is a
# Brownian motion of torchsde's.
NONE_EQUAL: Final = ("DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler")


class TorchExecutor(FixedWeights):
    """An executor (`sdrt.runtime.backends.executor.Executor`) of a wrapped PyTorch module on host buffers.

    ``module`` is called at the first evaluation; ``sums`` are those of the last one.
    """

    capturable: bool = False

    def __init__(self, spec: ComponentSpec, module: Callable[[], torch.nn.Module]) -> None:
        self.spec, self._module = spec, module
        self.sums = Sums()

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Callable[[], None]:
        """See `sdrt.runtime.backends.executor.Executor.bind`; inputs and results are copied."""
        check_buffers(self.spec, inputs, outputs)

        def evaluate() -> None:
            given = {name: torch.from_numpy(np.array(buffer)) for name, buffer in inputs.items()}
            with torch.no_grad(), CountSums() as count:
                results = self._module()(**given)
            self.sums = count.sums
            tensors = results if isinstance(results, tuple) else (results,)
            for entry, tensor in zip(self.spec.outputs, tensors, strict=True):
                if entry.name in outputs:
                    np.copyto(outputs[entry.name], tensor.numpy(), casting="no")

        return evaluate

    def close(self) -> None:
        """There is nothing to keep."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a side drew: float32 latents [1, C, h, w], and the picture [H, W, 3] from 0 to 1."""

    latents: Array
    image: Array


@dataclass(frozen=True, slots=True)
class Task:
    """What both sides are asked: a size in pixels, our sampler, and what else the kind takes.

    ``strength`` is the share of the schedule that is run on it, for a kind that has such a thing.
    """

    side: int
    sampler: str
    picture: Array | None = None
    mask: Array | None = None
    strength: float | None = None
    depth: Array | None = None


def check_reading(
    checkpoint: Checkpoint, folder: Path, manifest: Manifest, unet: torch.nn.Module, report: ParityReport
) -> None:
    """Compare a picture of diffusers' own pipeline with ours.

    Where diffusers cannot load the folder or draw with it, the report says so.

    Args:
        checkpoint: A checked checkpoint.
        folder: Holds the tokenizers that the manifest names.
        manifest: Of a float32 bundle that draws the size of `compared_side`; its graphs need not be there.
        unet: The float32 reference, as `sdrt.export.graphs.networks.wrapped` gives it.
        report: Gets the figures, or why there are none.

    Raises:
        ParityError: The two are over their tolerance, or draw another size by default.
    """
    if checkpoint.random_seed is not None:
        report.left_out.append("diffusers' own pipeline: the weights are random, no folder has them")
        return
    try:
        pipeline = load_as_diffusers(checkpoint, unet.get_submodule("model"))
        task = _task(checkpoint, pipeline, report)
        with offline(), _silent():
            expected = _drawn_by_diffusers(checkpoint, pipeline, task)
    except SdrtError:
        raise
    except Exception as error:  # diffusers and transformers raise whatever they meet
        report.left_out.append(f"diffusers' own pipeline, which fails on this folder: {error_words(error)}")
        return
    kind = type(pipeline).__name__
    _check_default_size(checkpoint, pipeline)
    del pipeline  # its text encoders and VAE, before ours are loaded
    give_memory_back()
    drawn, latents, image = _drawn_by_runtime(checkpoint, folder, manifest, unet, task)
    label = f"{SAMPLING_STEPS} {task.sampler} steps of {'x'.join(map(str, expected.latents.shape))}"
    for name, tolerance in (("latents", latents), ("image", image)):
        l2, largest = compare(getattr(drawn, name), getattr(expected, name))
        report.figures.append(ParityFigure(COMPONENT, name, label, l2, largest, tolerance, "fp32"))
        if not report.figures[-1].passed:
            raise ParityError(
                f"diffusers' {kind}, as it loads {checkpoint.path}, draws another picture: the {name} differ "
                f"by {l2:.2e} (allowed {tolerance:.0e}) after {label}. Something that the checkpoint says is "
                "not done as diffusers does it: nothing was written; please report it"
            )


def compared_side(checkpoint: Checkpoint) -> int:
    """The side in pixels that both draw: the model's or a small one, of whole eights as diffusers wants."""
    multiple = math.lcm(8, checkpoint.size_multiple)
    side = large_side(checkpoint) if is_large(checkpoint) else checkpoint.native_size
    return -(-min(side, large_side(checkpoint)) // multiple) * multiple


def load_as_diffusers(checkpoint: Checkpoint, unet: torch.nn.Module) -> Any:
    """diffusers' pipeline of the checkpoint, from its folder; only the U-Net is the one given.

    A checkpoint of another task is loaded as text to image, which its networks draw as well. What checks
    pictures for their contents is left out. Nothing is fetched, and no code of the folder is run.
    """
    kind = _kind(checkpoint)
    unused = {"safety_checker", "feature_extractor", "image_encoder", "depth_estimator"} - set(
        checkpoint.configs
    )
    if checkpoint.image_processor is not None:
        unused.remove("feature_extractor")
    modules, settings = kind._get_signature_keys(kind)
    parts: dict[str, Any] = dict.fromkeys(unused & {*modules})
    parts |= dict.fromkeys({"add_watermarker", "requires_safety_checker"} & {*settings}, False)
    with offline(), _silent():
        pipeline = kind.from_pretrained(
            checkpoint.path,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            unet=unet,
            **parts,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _kind(checkpoint: Checkpoint) -> Any:
    from diffusers import LatentConsistencyModelPipeline

    own = checkpoint.pipeline.startswith("LatentConsistency")
    return LatentConsistencyModelPipeline if own else reference_kind(checkpoint)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Inside, diffusers neither shows progress nor warns of fields that it corrects by itself."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            if shown:
                logging.enable_progress_bar()


def _task(checkpoint: Checkpoint, pipeline: Any, report: ParityReport) -> Task:
    """What to draw; diffusers' scheduler is exchanged where none of our samplers draws its picture."""
    name = type(pipeline.scheduler).__name__
    sampler = OWN_SAMPLER.get(name, checkpoint.sampler)
    inpainting = "inpainting_channels" in checkpoint.sizes()
    unlike = name in NONE_EQUAL or (checkpoint.distilled_guidance and not name.startswith(("LCM", "TCD")))
    runge_kutta = name == "PNDMScheduler" and not pipeline.scheduler.config.skip_prk_steps
    if unlike or runge_kutta:
        import diffusers

        # A latent consistency model's own pipeline takes no other.
        distilled = checkpoint.distilled_guidance and not inpainting
        sampler, stand_in = ("lcm", "LCMScheduler") if distilled else ("ddim", "DDIMScheduler")
        report.left_out.append(f"{name} in diffusers' own pipeline: {stand_in} was in its place")
        kind = getattr(diffusers, stand_in)
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, clip_sample=False)
    side, draws = compared_side(checkpoint), np.random.default_rng(SEED)
    picture = draws.integers(0, 256, (side, side, 3), np.uint8)
    if checkpoint.record.picture_input or not checkpoint.record.reads_text:
        small = side // checkpoint.factor if checkpoint.record.picture_input == LOW_RES else side
        return Task(side, sampler, picture[:small, :small])
    if inpainting:
        mask = np.zeros((side, side), np.uint8)
        mask[side // 2 :] = 255
        return Task(side, sampler, picture, mask, 1.0)
    if not checkpoint.kind.from_picture:
        return Task(side, sampler)
    reads_depth = checkpoint.record.components["unet"].input(DEPTH) is not None
    depth = draws.random((side, side), np.float32) if reads_depth else None
    return Task(side, sampler, picture, strength=STRENGTH, depth=depth)


def _drawn_by_diffusers(checkpoint: Checkpoint, pipeline: Any, task: Task) -> Drawn:
    latents: list[torch.Tensor] = []

    def keep(_pipeline: Any, _step: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        latents.append(state["latents"])
        return state

    takes = inspect.signature(pipeline.__call__).parameters
    given: dict[str, Any] = {"prompt": PROMPT} if checkpoint.record.reads_text else {}
    if "callback_on_step_end" in takes:
        given["callback_on_step_end"] = keep
    else:
        given["callback"] = lambda _step, _timestep, x: latents.append(x)
    if "height" in takes:  # of the others the picture decides
        given |= {"height": task.side, "width": task.side}
    if task.picture is not None:
        given["image"] = Image.fromarray(task.picture)
    if task.mask is not None:
        given["mask_image"] = Image.fromarray(task.mask)
    if task.strength is not None:
        given["strength"] = task.strength
    if task.depth is not None:
        given["depth_map"] = torch.from_numpy(task.depth)[None]
    drawn = pipeline(
        **given,
        num_inference_steps=SAMPLING_STEPS,
        guidance_scale=SAMPLING_GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
    )
    return Drawn(latents[-1].numpy(), np.asarray(drawn.images[0]))


def _drawn_by_runtime(
    checkpoint: Checkpoint, folder: Path, manifest: Manifest, unet: torch.nn.Module, task: Task
) -> tuple[Drawn, float, float]:
    """Our picture, and the tolerances of its latents and of its image."""
    table, sizes = checkpoint.record.components, checkpoint.sizes()
    executors = {
        name: TorchExecutor(
            row.resolve(sizes, "fp32"), functools.cache(functools.partial(_module, checkpoint, name, unet))
        )
        for name, row in table.items()
    }
    given: dict[str, Any] = {"seed": SEED, "rng": "cpu", "sampler": task.sampler, "strength": task.strength}
    if task.picture is not None:
        given["image"] = task.picture
    if task.mask is not None:
        given["mask_image"] = task.mask
    if task.depth is not None:
        given["depth_map"] = task.depth
    with Pipeline(Bundle(folder, manifest), executors, HostDevice(), "torch") as pipeline:
        latents = pipeline(
            PROMPT if checkpoint.record.reads_text else None,
            height=task.side,
            width=task.side,
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=SAMPLING_GUIDANCE,
            output_type="latents",
            **given,
        ).latents
    with torch.no_grad(), CountSums() as count:
        image = wrapped(checkpoint, "vae_decoder")(torch.from_numpy(np.asarray(latents)))
    picture = (image[0].movedim(0, -1) / 2 + 0.5).clamp(0, 1).numpy()
    sigma = make_table(task.sampler, checkpoint.schedule, SAMPLING_STEPS).init_noise_sigma
    tolerance = SAMPLING_FACTOR * rounding_tolerance(executors["unet"].sums, "fp32")
    tolerance += SCHEDULER_ROUNDINGS * max(sigma, LARGEST_SIGMA)
    return Drawn(latents, picture), tolerance, tolerance + rounding_tolerance(count.sums, "fp32")


def _module(checkpoint: Checkpoint, name: str, unet: torch.nn.Module) -> torch.nn.Module:
    """The module of one component: the U-Net given, any other loaded."""
    if name == "unet":
        return unet
    return wrapped(checkpoint, name)


def _check_default_size(checkpoint: Checkpoint, pipeline: Any) -> None:
    size = getattr(pipeline, "default_sample_size", None) or pipeline.unet.config.sample_size
    theirs = size * pipeline.vae_scale_factor
    if theirs != checkpoint.native_size:
        raise ParityError(
            f"the bundle would draw {checkpoint.native_size} pixels by default, diffusers' "
            f"{type(pipeline).__name__} draws {theirs}: nothing was written"
        )
