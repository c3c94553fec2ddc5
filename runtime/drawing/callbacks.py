"""The caller's functions between steps and batches: what they are given, and what they may give back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.drawing.faults import Faults
from sdrt.runtime.drawing.finished_images import ImageCollector
from sdrt.runtime.drawing.loop import DenoiseLoop
from sdrt.runtime.errors import CancelledError, UsageError
from sdrt.runtime.request.output import FinishedBatch
from sdrt.runtime.request.request import Request
from sdrt.runtime.samplers.table import SamplerTable

RaiseFaults = Callable[[Faults], None]  # raises what fault words say


class Interruptible(Protocol):
    """The pipeline that callbacks are given, as this module knows it."""

    _interrupt: bool  # diffusers' name: a callback sets it, and no further step is done


class Hook:
    """What happens between two steps, and after a batch: the caller's functions are called.

    Only what they ask for is downloaded. Where that is nothing, nothing is copied and nothing waits (on a GPU
    they are then called when a step was queued, not when it has run).

    Attributes:
        interrupted: Whether a callback said that no further step be done.
    """

    def __init__(self, pipeline: Interruptible, request: Request, cancelled: threading.Event) -> None:
        """Keep what the methods need.

        Args:
            pipeline: What the functions are given.
            request: The call, which holds the functions.
            cancelled: Set when the call is to end.
        """
        self._pipeline, self._callbacks, self._cancelled = pipeline, request.callbacks, cancelled
        self._preview = request.manifest.preview
        self._rows_before = 0 if request.continues is None else request.continues.rows
        self.interrupted = False

    def check_cancelled(self) -> None:
        """Look whether the call was cancelled.

        Raises:
            CancelledError: It was.
        """
        if self._cancelled.is_set():
            raise CancelledError("cancelled: nothing was drawn")

    def after_step(self, loop: DenoiseLoop, table: SamplerTable, row: int, raise_faults: RaiseFaults) -> None:
        """Call the caller's function after a row.

        Raises:
            UsageError: It returned something else than it may.
        """
        if self._callbacks.on_step_end is None:
            return
        state = self._state(loop)
        given = dict(state)  # the callback may change its own
        step, timestep = self._rows_before + row, float(table.timesteps[row])
        changed = self._callbacks.on_step_end(self._pipeline, step, timestep, state)
        if changed is not None and not isinstance(changed, Mapping):
            raise UsageError(f"the callback returned {type(changed).__name__}: a dict or None is wanted")
        # Those of diffusers hand back what they were given, changed or not.
        returned = changed or {}
        same = {name for name in given if returned.get(name) is given[name]}
        if unknown := [str(name) for name in returned if name not in ("latents", *same)]:
            raise UsageError(f"the callback returned {', '.join(unknown)}: only 'latents' can be changed")
        self.interrupted = self.interrupted or self._pipeline._interrupt
        if changed and changed.get("latents") is not None:
            _replace_latents(loop, row, _array(changed["latents"]), raise_faults)

    def after_batch(
        self, numbers: tuple[int, ...], pictures: ImageCollector, recipes: Sequence[dict[str, Any]]
    ) -> None:
        """Call the caller's function with the pictures of a batch.

        Args:
            numbers: The pictures' places in the call.
            pictures: Those that are finished.
            recipes: The recipes of all pictures of the call.
        """
        if self._callbacks.on_batch_end is None:
            return
        own = tuple({**recipes[number]} for number in numbers)
        batch = FinishedBatch(numbers, len(recipes), pictures.pictures(numbers), own)
        self._callbacks.on_batch_end(self._pipeline, batch)

    def _state(self, loop: DenoiseLoop) -> dict[str, Any]:
        state: dict[str, Any] = {}
        denoised = loop.denoised() if self._callbacks.want_denoised else None
        for name in self._callbacks.step_tensors:
            if name == "latents":
                state[name] = loop.latents()
            elif name == "denoised":
                state[name] = denoised
            elif denoised is not None:
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
    loop: DenoiseLoop, row: int, latents: NDArray[np.float32], raise_faults: RaiseFaults
) -> None:
    want = tuple(loop.buffers.latents.shape)
    if latents.shape != want:
        raise UsageError(f"the callback gave latents of shape {list(latents.shape)}, {list(want)} is wanted")
    if not np.isfinite(latents).all():
        raise_faults(loop.faults())  # it may only have handed back what the unet gave
        raise UsageError(f"the callback gave latents with NaN or infinity after step {row + 1}")
    loop.set_latents(latents)
