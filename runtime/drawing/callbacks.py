"""A caller's function between two steps: what it is given, and what it may give back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.drawing.loop import DenoiseLoop
from sdrt.runtime.errors import CancelledError, UsageError
from sdrt.runtime.samplers.table import SamplerTable

if TYPE_CHECKING:
    from sdrt.runtime.drawing.output import FinishedBatch
    from sdrt.runtime.pipeline import Pipeline

BatchEndCallback = Callable[["Pipeline", "FinishedBatch"], object]
StepEndCallback = Callable[["Pipeline", int, float, dict[str, Any]], "dict[str, Any] | None"]
CheckFaults = Callable[[], None]  # waits, and raises what the fault words say
TENSORS: Final = ("latents", "denoised", "preview")


def check_function(name: str, given: object) -> None:
    """Raise UsageError unless an option is a function, or None."""
    if given is not None and not callable(given):
        raise UsageError(f"{name} is {type(given).__name__}: a function is wanted")


class StepHook:
    """What happens between two steps: a look at whether the call was cancelled, then the caller's function.

    Attributes:
        wants_denoised: Whether the steps must keep their guess of the clean latents.
        interrupted_after: How many steps were done when the callback said that no more be done (by
            ``pipeline._interrupt = True``, as in diffusers); None while it has not.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        callback: StepEndCallback | None,
        tensors: Sequence[str],
        cancelled: threading.Event,
    ) -> None:
        """Wrap a user's callback so that the loop can call it.

        Only what it asks for is downloaded. With ``tensors`` empty nothing is copied and nothing waits (on a
        GPU it is then called when a step was queued, not when it has run).

        Raises:
            UsageError: It is no function, or asks for what cannot be given.
        """
        check_function("callback_on_step_end", callback)
        if (
            isinstance(tensors, str)
            or not isinstance(tensors, Collection)
            or not set(tensors) <= set(TENSORS)
        ):
            raise UsageError(
                f"callback_on_step_end_tensor_inputs is {tensors!r}: a list of {', '.join(TENSORS)}"
            )
        self._preview = pipeline.bundle.manifest.preview
        if callback is not None and "preview" in tensors and self._preview is None:
            raise UsageError("this bundle was written without a preview: export it again to have one")
        self._pipeline, self._callback, self._cancelled = pipeline, callback, cancelled
        self._tensors = tuple(tensors) if callback is not None else ()
        self.interrupted_after: int | None = None
        self.wants_denoised = bool({"denoised", "preview"} & set(self._tensors))

    def check(self) -> None:
        """Raise if the call was cancelled.

        Raises:
            CancelledError: It was.
        """
        if self._cancelled.is_set():
            raise CancelledError("cancelled: nothing was drawn")

    def __call__(self, loop: DenoiseLoop, table: SamplerTable, step: int, check_faults: CheckFaults) -> None:
        """Call the caller's function after row ``step``.

        Raises:
            UsageError: It returned something else than it may.
        """
        if self._callback is None:
            return
        state = self._state(loop)
        given = dict(state)  # the callback may change its own
        changed = self._callback(self._pipeline, step, float(table.timesteps[step]), state)
        if changed is not None and not isinstance(changed, Mapping):
            raise UsageError(f"the callback returned {type(changed).__name__}: a dict or None is wanted")
        # Those of diffusers hand back what they were given, changed or not.
        returned = changed or {}
        same = {name for name in given if returned.get(name) is given[name]}
        if unknown := [str(name) for name in returned if name not in ("latents", *same)]:
            raise UsageError(f"the callback returned {', '.join(unknown)}: only 'latents' can be changed")
        if self._pipeline._interrupt and self.interrupted_after is None:
            self.interrupted_after = step + 1
        if changed and changed.get("latents") is not None:
            _replace_latents(loop, step, _array(changed["latents"]), check_faults)

    def _state(self, loop: DenoiseLoop) -> dict[str, Any]:
        state: dict[str, Any] = {}
        denoised = loop.denoised() if self.wants_denoised else None
        for name in self._tensors:
            if name == "latents":
                state[name] = loop.latents()
            elif name == "denoised":
                state[name] = denoised
            elif denoised is not None and self._preview is not None:
                from sdrt.runtime.pictures.preview import rgb_from_latents

                state[name] = rgb_from_latents(denoised, self._preview)
        return state


def _array(latents: Any) -> NDArray[np.float32]:
    try:
        return np.asarray(latents, dtype=np.float32)
    except (TypeError, ValueError) as error:  # no numbers, or a tensor of PyTorch on a GPU
        raise UsageError(
            f"the callback gave latents that NumPy cannot read ({error}): a NumPy array is wanted"
        ) from error


def _replace_latents(
    loop: DenoiseLoop, step: int, latents: NDArray[np.float32], check_faults: CheckFaults
) -> None:
    want = tuple(loop.buffers.latents.shape)
    if latents.shape != want:
        raise UsageError(f"the callback gave latents of shape {list(latents.shape)}, {list(want)} is wanted")
    if not np.isfinite(latents).all():
        check_faults()  # it may only have handed back what the unet gave
        raise UsageError(f"the callback gave latents with NaN or infinity after step {step + 1}")
    loop.set_latents(latents)
