"""A caller's function between two steps: what it is given, and what it may give back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.denoise import DenoiseLoop
from sdrt.runtime.errors import UsageError
from sdrt.runtime.solvers import SamplerTable

if TYPE_CHECKING:
    from sdrt.runtime.pipeline import Pipeline

StepEndCallback = Callable[["Pipeline", int, float, dict[str, Any]], "dict[str, Any] | None"]
CheckFaults = Callable[[], None]  # waits, and raises what the fault words say
StepHook = Callable[[DenoiseLoop, SamplerTable, int, CheckFaults], None]


def step_hook(
    pipeline: Pipeline, callback: StepEndCallback | None, tensors: Sequence[str]
) -> StepHook | None:
    """Wrap a user's callback so that the loop can call it.

    Only what it asks for is downloaded. With ``tensors`` empty nothing is copied and nothing waits (on a GPU
    it is then called when a step was queued, not when it has run); the latents cost one download a step.

    Raises:
        UsageError: It is no function, or asks for what cannot be given.
    """
    if callback is None:
        return None
    if not callable(callback):
        raise UsageError(f"callback_on_step_end is {type(callback).__name__}: a function is wanted")
    if not isinstance(tensors, Collection) or any(name != "latents" for name in tensors):
        raise UsageError(f"callback_on_step_end_tensor_inputs is {tensors!r}: only 'latents' can be given")

    def on_step(loop: DenoiseLoop, table: SamplerTable, step: int, check_faults: CheckFaults) -> None:
        given = {name: loop.latents() for name in tensors}
        changed = callback(pipeline, step, float(table.timesteps[step]), given)
        if changed is not None and not isinstance(changed, Mapping):
            raise UsageError(f"the callback returned {type(changed).__name__}: a dict or None is wanted")
        if unknown := [str(name) for name in changed or () if name != "latents"]:
            raise UsageError(f"the callback returned {', '.join(unknown)}: only 'latents' can be changed")
        if changed and changed.get("latents") is not None:
            _replace_latents(loop, step, _array(changed["latents"]), check_faults)

    return on_step


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
