"""What the loop's memory holds: which sections there are, in which order, and the views that a step binds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.guided_step import StepBuffers
from sdrt.kernels.sampler_row import COLUMNS, HISTORY
from sdrt.runtime.bundle.families.components import SAMPLE, TIMESTEP
from sdrt.runtime.bundle.families.record import ComponentSpec
from sdrt.runtime.devices.arena import ALIGNMENT, Arena, Sections
from sdrt.runtime.devices.device import Buffer, Device
from sdrt.runtime.errors import UsageError
from sdrt.runtime.request.sampling import MAX_ROWS

# Fields of StepBuffers that are sections of the same name. Of every step:
_STEP_BUFFERS: Final = (
    *("latents", "noise", "rows", "timesteps", "counter", "fault"),
    *("seeds", "draws", "ticket", "count"),
)
# … and of the kinds of steps that want them.
BLEND: Final = ("mask", "known", "known_noise")
RESCALE: Final = ("factors", "guidance_rescale")
DENOISED: Final = ("denoised",)


def loop_sections(
    spec: ComponentSpec, axes: Mapping[str, int], images: int, factor: int, encoders: int
) -> Sections:
    """What the loop's memory holds, in an order in which whatever is copied together lies together.

    What only some kinds of steps use is there in any case: a mask, two latents to keep and one to show come
    to some 0.2 MB for an image of 512², beside a U-Net's hundreds. So a change of kind allocates nothing.

    Args:
        spec: The U-Net's.
        axes: The size of each of its named axes.
        images: N.
        factor: Image pixels per latent and side.
        encoders: How many fault words each row has for what it is drawn from.
    """
    (output,) = spec.outputs
    channels, height, width = output.concrete(axes)[1:]
    state = (images, channels, height, width)
    inputs = {entry.name: (entry.concrete(axes), entry.dtype) for entry in spec.inputs}
    # Numbers of the request are uploaded together with the rest of a run's, but for what is of latents' size.
    small = {e.name for e in spec.inputs if e.name in spec.of_request and "latent_height" not in e.shape}
    return {
        # Uploaded when a run starts …
        "rows": ((MAX_ROWS, COLUMNS), "float32"),
        "timesteps": ((MAX_ROWS,), "float32"),
        "guidance_rescale": ((1,), "float32"),
        "counter": ((1,), "int32"),
        "count": ((1,), "int32"),
        "ticket": ((1,), "uint32"),
        "seeds": ((images,), "uint64"),
        "draws": ((MAX_ROWS,), "int32"),
        "scales": ((2, COLUMNS), "float32"),
        "zero_timestep": ((1,), "float32"),
        "zero": ((1,), "int32"),
        "one": ((1,), "int32"),
        **{name: section for name, section in inputs.items() if name in small},
        # … and downloaded when it has ended, from here …
        "fault": ((1,), "int32"),
        "decoder_fault": ((1,), "int32"),
        "given_fault": ((1,), "int32"),
        # (uploaded up to here)
        "text_faults": ((axes["rows"], encoders), "int32"),
        "latents": (state, "float32"),
        "pixels": ((images, height * factor, width * factor, 3), "uint8"),
        # … up to here.
        "memory": ((HISTORY + 1, *state), "float32"),  # the ring, and the saved x
        "noise": (state, "float32"),
        "mask": ((images, 1, height, width), "float32"),
        "known": (state, "float32"),
        "known_noise": (state, "float32"),
        "factors": ((images,), "float32"),
        "denoised": (state, "float32"),
        output.name: (output.concrete(axes), output.dtype),
        **{name: section for name, section in inputs.items() if name not in small},
    }


def step_buffers(arena: Arena, spec: ComponentSpec) -> StepBuffers:
    """The buffers of a step that does nothing beyond what each does."""
    (output,) = spec.outputs
    state = tuple(arena["latents"].shape)
    return StepBuffers(
        **{name: arena[name] for name in _STEP_BUFFERS},
        sample=arena[SAMPLE],
        timestep=arena[TIMESTEP],
        noise_pred=arena[output.name],
        history=arena.part("memory", 0, (HISTORY, *state)),
        saved=arena.part("memory", HISTORY * math.prod(state), state),
    )


class ConditionalHalf:
    """The U-Net's buffers for the conditional rows alone, the last N, in the memory of a loop that has all.

    They are called a half, which they are but where guidance has three parts. The half is a view where it
    starts at an address that the backends take (`ALIGNMENT`). Where it does not, as that of a few numbers a
    row, it has memory of its own, and its numbers are copied there. Of the timesteps, which are new at every
    step, it takes the first rows: a picture's are the same in all of its rows.

    Attributes:
        inputs: A buffer for every input of the U-Net.
        output: Its output.
        copies_at_start: (from, to) of inputs that stay the same during a run.
        copies_each_step: (from, to) of those that change from step to step.
    """

    def __init__(self, device: Device, arena: Arena, spec: ComponentSpec, images: int) -> None:
        """Allocate what is not a view; ``images`` is N.

        Raises:
            DeviceMemoryError: It does not fit.
        """
        (output,) = spec.outputs
        entries = {entry.name: entry for entry in (*spec.inputs, output)}
        halves = {
            name: _half(arena, name, images, first=name == TIMESTEP)
            for name, entry in entries.items()
            if entry.shape[0] == "rows"
        }
        apart = {
            name: (tuple(half.shape), entries[name].dtype)
            for name, half in halves.items()
            if name != TIMESTEP and math.prod(half.shape) * np.dtype(half.dtype).itemsize % ALIGNMENT
        }
        own = _allocated(device, apart)
        buffers = {name: own[name] if name in apart else halves.get(name, arena[name]) for name in entries}
        self.output = buffers.pop(output.name)
        self.inputs: dict[str, Buffer] = buffers
        copied = [name for name in apart if name != output.name]
        self.copies_each_step = [(halves[name], own[name]) for name in copied if name == SAMPLE]
        self.copies_at_start = [(halves[name], own[name]) for name in copied if name != SAMPLE]


def _allocated(device: Device, sections: Sections) -> dict[str, Buffer]:
    if not sections:
        return {}
    arena = Arena(device, sections)
    return {name: arena[name] for name in sections}


def _half(arena: Arena, name: str, images: int, *, first: bool) -> Buffer:
    rows, *rest = arena[name].shape
    return arena.part(name, 0 if first else (rows - images) * math.prod(rest), (images, *rest))


def check_array(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Refuse what NumPy would broadcast, or a device would refuse in the middle of a run.

    Raises:
        UsageError: The array has another shape.
    """
    if np.shape(array) != shape:
        raise UsageError(f"{name} has shape {list(np.shape(array))}: {list(shape)} is wanted")


def check_request_inputs(spec: ComponentSpec, inputs: Mapping[str, NDArray[Any]]) -> None:
    """Refuse a run that leaves an input of the U-Net as it was, or names one that it does not have.

    Raises:
        UsageError: It is so.
    """
    wanted = [entry.name for entry in spec.inputs if entry.name in spec.of_request]
    if missing := [name for name in wanted if name not in inputs]:
        raise UsageError(f"the {spec.name} reads {', '.join(missing)}, which inputs do not hold: give them")
    if unknown := [name for name in inputs if name not in wanted]:
        has = f"only {', '.join(wanted)}" if wanted else "none of the kind"
        raise UsageError(f"inputs hold {', '.join(unknown)}, which the {spec.name} does not read: {has}")
