"""What a call gives back, and whom it tells of it meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypedDict

from sdrt.runtime.checks import choice, function
from sdrt.runtime.errors import UsageError

OutputType = Literal["pil", "numpy", "latents", "device", "np", "latent"]
OUTPUT_TYPES: Final[tuple[OutputType, ...]] = ("pil", "numpy", "latents", "device", "np", "latent")
WITHOUT_PICTURES: Final = ("latents", "latent")
STEP_TENSORS: Final = ("latents", "denoised", "preview")  # what a callback can be given after a step


@dataclass(frozen=True, slots=True)
class PipelineOutput:
    """What a call of `Pipeline` returns.

    Attributes:
        images: Pillow images, or one uint8 array [N, H, W, 3] for ``output_type="numpy"``; empty for
            ``"latents"``. For ``"device"`` that array in the device's memory (on the CPU a NumPy array). As
            diffusers has them, for ``"np"`` float32 [N, H, W, 3] in [0, 1], for ``"latent"`` the latents.
        latents: float32 [N, C, h, w], the final latents; for ``"device"`` in the device's memory.
        recipes: Everything that drew each image, as plain data: ``prompt``, ``negative_prompt``,
            ``seed``, ``height``, ``width``, ``num_inference_steps``, ``guidance_scale``, ``sampler``,
            ``karras``, ``eta``, ``rng``, what else was asked for, SDXL's sizes, given pictures' file names
            and SHA-256, LoRAs with their weights and SHA-256, ``backend``, ``model``, ``model_sha256``,
            ``version``. As arguments of a call they draw the image again (see
            `sdrt.runtime.request.recipes`).
        timings: Seconds per stage: ``text_encoder``, ``denoise``, ``vae_decoder`` by the device's clock,
            ``vae_encoder`` and ``invert`` where a picture was given, ``lora`` where weights were changed, by
            wall clock, ``step``, the mean of one step, and ``total``, wall clock from call to return.
    """

    images: Any
    latents: Any
    recipes: tuple[dict[str, Any], ...]
    timings: dict[str, float]


@dataclass(frozen=True, slots=True)
class FinishedBatch:
    """Pictures of a call that are finished while others are not: what ``callback_on_batch_end`` is given.

    Attributes:
        numbers: The pictures' places in the call, from 0.
        total: How many the call draws.
        images: As `PipelineOutput.images`, of these alone; for ``"device"`` a list of arrays [1, H, W, 3].
        recipes: As `PipelineOutput.recipes`, of these alone.
    """

    numbers: tuple[int, ...]
    total: int
    images: Any
    recipes: tuple[dict[str, Any], ...]


# The first argument is the `Pipeline`, which stands above this module.
StepEndCallback = Callable[[Any, int, float, dict[str, Any]], "dict[str, Any] | None"]
BatchEndCallback = Callable[[Any, FinishedBatch], object]


class CallbackOptions(TypedDict, total=False):
    """Those of `sdrt.runtime.request.options.DrawOptions` that are functions, and what these are given."""

    callback_on_step_end: StepEndCallback | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    callback_on_batch_end: BatchEndCallback | None


@dataclass(frozen=True, slots=True)
class Callbacks:
    """The caller's functions.

    Attributes:
        on_step_end: Called after each step, or None.
        step_tensors: What it is given of `STEP_TENSORS`; empty without it.
        on_batch_end: Called with each finished batch, or None.
    """

    on_step_end: StepEndCallback | None = None
    step_tensors: tuple[str, ...] = ()
    on_batch_end: BatchEndCallback | None = None

    @property
    def want_denoised(self) -> bool:
        """Whether the steps must keep their guess of the clean latents."""
        return bool({"denoised", "preview"} & set(self.step_tensors))


def build_callbacks(options: Mapping[str, Any]) -> Callbacks:
    """Check what of a call's options is about callbacks.

    Raises:
        UsageError: One is no function, or asks for what cannot be given.
    """
    on_step_end = function("callback_on_step_end", options.get("callback_on_step_end"))
    tensors = options.get("callback_on_step_end_tensor_inputs", ("latents",))
    if (
        isinstance(tensors, str)
        or not isinstance(tensors, Collection)
        or not set(tensors) <= set(STEP_TENSORS)
    ):
        raise UsageError(
            f"callback_on_step_end_tensor_inputs is {tensors!r}: a list of {', '.join(STEP_TENSORS)}"
        )
    on_batch_end = function("callback_on_batch_end", options.get("callback_on_batch_end"))
    return Callbacks(on_step_end, () if on_step_end is None else tuple(tensors), on_batch_end)


def checked_output_type(given: object, *, masked: bool) -> OutputType:
    """What a call is to give back.

    Args:
        given: What the caller asks for.
        masked: Whether a part of a given picture is kept as it is.

    Raises:
        UsageError: There is no such thing, or not of such a call.
    """
    if given == "pt":
        raise UsageError(
            "output_type is 'pt': sdrt does without PyTorch; of output_type='np', "
            "torch.from_numpy(output.images).permute(0, 3, 1, 2) is that tensor"
        )
    output_type = choice("output_type", given, OUTPUT_TYPES, ": one of")
    if output_type == "device" and masked:
        raise UsageError("output_type is 'device': with a mask the picture is put together on the host")
    return output_type
