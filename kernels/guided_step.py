"""``guided_step``: everything between two evaluations of the U-Net, in one kernel.

The reference in NumPy. Every operation is on float32 in the order written here, so that a compiled kernel
without contraction gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.sampler_row import HISTORY, Column

NO_FAULT: Final = -1

FloatState = NDArray[np.float32]


@dataclass(slots=True)
class StepBuffers:
    """What the step kernel reads and writes. N images, R rows: R = 2·N under guidance, else N.

    Attributes:
        noise_pred: float16 or float32 [R, C, h, w], the U-Net's output; the unconditional half first.
        latents: float32 [N, C, h, w], the sampler's x.
        history: float32 [HISTORY, N, C, h, w], a ring of the last d; row k writes slot ``k % HISTORY``.
        saved: float32 [N, C, h, w], the x that a row with SAVE kept.
        noise: float32 [N, C, h, w], fresh normal numbers; read by rows with C ≠ 0.
        rows: float32 [n, COLUMNS], the sampler's table.
        timesteps: float32 [n].
        guidance_scale: float32 [1].
        counter: int32 [1], the row that comes next.
        fault: int32 [1], the first row whose noise_pred was not finite, or NO_FAULT.
        sample: the U-Net's dtype [R, C, h, w], its next input.
        timestep: float32 [1], its next timestep.
    """

    noise_pred: NDArray[Any]
    latents: FloatState
    history: FloatState
    saved: FloatState
    noise: FloatState
    rows: FloatState
    timesteps: FloatState
    guidance_scale: FloatState
    counter: NDArray[np.int32]
    fault: NDArray[np.int32]
    sample: NDArray[Any]
    timestep: FloatState


def guided_step(buffers: StepBuffers) -> None:
    """Combine the halves, apply the row at the counter, write the U-Net's next input, count up.

    Classifier-free guidance (Ho & Salimans 2022, eq. 6) in the form ``u + w·(c − u)``; then the
    recurrence of `sdrt.runtime.solvers`.
    """
    step = int(buffers.counter[0])
    row = buffers.rows[step]
    x = buffers.latents
    m = _guided(buffers)
    if buffers.fault[0] == NO_FAULT and not np.isfinite(m).all():
        buffers.fault[0] = step

    d = buffers.history[step % HISTORY]
    np.multiply(x, row[Column.P], out=d)
    d += row[Column.Q] * m
    result = row[Column.A] * x
    result += row[Column.B0] * d
    for back in range(1, HISTORY):
        if row[Column.B0 + back]:
            result += row[Column.B0 + back] * buffers.history[(step - back) % HISTORY]
    if row[Column.E]:
        result += row[Column.E] * buffers.saved
    if row[Column.C]:
        result += row[Column.C] * buffers.noise
    if row[Column.SAVE]:
        buffers.saved[...] = x
    x[...] = result
    buffers.counter[0] = step + 1
    prepare_input(buffers)


def prepare_input(buffers: StepBuffers) -> None:
    """Write the U-Net's input for the row at the counter: scaled latents for each half, and the timestep.

    After the last row there is nothing to prepare and nothing is written.
    """
    step = int(buffers.counter[0])
    if step >= len(buffers.timesteps):
        return
    images = len(buffers.latents)
    for start in range(0, len(buffers.sample), images):
        np.multiply(
            buffers.latents,
            buffers.rows[step, Column.INPUT_SCALE],
            out=buffers.sample[start : start + images],
            casting="same_kind",
        )
    buffers.timestep[0] = buffers.timesteps[step]


def _guided(buffers: StepBuffers) -> FloatState:
    images = len(buffers.latents)
    m = buffers.noise_pred.astype(np.float32, copy=False)
    if len(m) == images:
        return m
    unconditional, conditional = m[:images], m[images:]
    guided: FloatState = unconditional + buffers.guidance_scale[0] * (conditional - unconditional)
    return guided
