"""``guided_step``: everything between two evaluations of the U-Net, in one kernel.

The reference in NumPy. Every operation is on float32 in the order written here, so that a compiled kernel
without contraction gives the same bits.

A step is one launch; one more where the sampler adds noise (`sdrt.kernels.philox_normal`, before the U-Net)
and where guidance is rescaled (`sdrt.kernels.guidance_rescale`, after it). It is bound by memory: for SD 1.5
at 512², one guided image in half precision, a sampler that reads one earlier d moves 393,216 bytes
(`bytes_moved`), 0.12 µs at the 3.3 TB/s of an H100's memory, and all of it fits in the second-level cache.
That is less than any launch costs. So what counts is latency: the number of kernels, and loads that wait for
loads (counter, row, earlier d). Hence one kernel for all of it, that counts up too; what does not depend on
the counter is loaded beside it, the guidance scale comes with the row, and small blocks spread over many
multiprocessors.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.launch import BLOCK, SUFFIX, DeviceArray, Launch, blocks, check_array, element_count
from sdrt.kernels.sampler_row import COLUMNS, HISTORY, Column

NO_FAULT: Final = -1
WIDTH: Final = 4  # elements that a thread takes at once where the plane and the addresses allow it

FloatState = NDArray[np.float32]


@dataclass(slots=True)
class StepBuffers:
    """What the step kernel reads and writes. N images; R rows were evaluated, R' are to be: N, 2·N or 3·N.

    R is 2·N where guidance combines two halves, 3·N where it combines what the U-Net gives for nothing, for a
    picture, and for picture and text. R' is as large where the next evaluation may read all of these parts,
    whichever this one had. On a GPU the fields are device arrays of the same shapes and dtypes.

    Attributes:
        noise_pred: float16 or float32 [R, C, h, w], the U-Net's output; the unconditional part first, the
            conditional one last.
        latents: float32 [N, C, h, w], the sampler's x.
        history: float32 [HISTORY, N, C, h, w], a ring of the last d; row k writes slot ``k % HISTORY``.
        saved: float32 [N, C, h, w], the x that a row with SAVE kept.
        noise: float32 [N, C, h, w], fresh normal numbers; read by rows with C ≠ 0.
        rows: float32 [n, COLUMNS], the sampler's table.
        timesteps: float32 [n].
        counter: int32 [1], the row that comes next.
        fault: int32 [1], the first row whose noise_pred was not finite, or NO_FAULT.
        sample: the U-Net's dtype [R', C, h, w], its next input.
        timestep: float32 [R'], its next timestep, for each of its rows.
        mask: float32 [N, 1, h, w] in [0, 1], or None for no inpainting: 1 is drawn, 0 is kept.
        known: float32 [N, C, h, w], the clean latents to keep; with a mask.
        known_noise: float32 [N, C, h, w], what brings ``known`` to a row's noise level; with a mask.
        factors: float32 [N], what each image's prediction is multiplied with after guidance, or None;
            `sdrt.kernels.guidance_rescale` writes them.
        guidance_rescale: float32 [1], phi of that kernel, or None; the step does not read it.
        denoised: float32 [N, C, h, w], where each step writes the guess of the clean latents, or None.
        seeds: uint64 [N], of the noise; `sdrt.kernels.philox_normal` reads them, the step does not.
        draws: int32 [n], which draw of its stream each row takes; read by the same kernel.
        ticket: uint32 [1], zero between launches: how many blocks are done. The CUDA kernel needs it.
        count: int32 [1], rows in use, at most n; None for all n.
    """

    noise_pred: NDArray[Any]
    latents: FloatState
    history: FloatState
    saved: FloatState
    noise: FloatState
    rows: FloatState
    timesteps: FloatState
    counter: NDArray[np.int32]
    fault: NDArray[np.int32]
    sample: NDArray[Any]
    timestep: FloatState
    mask: FloatState | None = None
    known: FloatState | None = None
    known_noise: FloatState | None = None
    factors: FloatState | None = None
    guidance_rescale: FloatState | None = None
    denoised: FloatState | None = None
    seeds: NDArray[np.uint64] | None = None
    draws: NDArray[np.int32] | None = None
    ticket: NDArray[np.uint32] | None = None
    count: NDArray[np.int32] | None = None


def guided_step(buffers: StepBuffers) -> None:
    """Combine the parts, apply the row at the counter, write the U-Net's next input, count up.

    Classifier-free guidance (Ho & Salimans 2022, eq. 6) in the form ``u + w·(c − u)``, w of the row; of three
    parts ``u + w·(c − i) + v·(i − u)`` (Brooks et al. 2023, "InstructPix2Pix", eq. 3); times the image's
    factor if there are factors; then the recurrence of `sdrt.runtime.samplers.table`; then,
    with a mask, what is known at the noise level of the next row (Lugmayr et al. 2022, "RePaint", eq. 8,
    without resampling; diffusers' inpainting with a 4-channel U-Net). ``denoised`` is made of x before the
    step and of m as it goes into the recurrence. After the last row nothing happens.
    """
    step = int(buffers.counter[0])
    if step >= row_count(buffers):
        return
    row = buffers.rows[step]
    x = buffers.latents
    m = guided_prediction(buffers, row)
    if buffers.factors is not None:
        m = buffers.factors[:, None, None, None] * m
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
    if buffers.denoised is not None:
        np.multiply(x, row[Column.X0_X], out=buffers.denoised)
        buffers.denoised += row[Column.X0_M] * m
    if row[Column.SAVE]:
        buffers.saved[...] = x
    x[...] = _blended(buffers, result, step + 1)
    buffers.counter[0] = step + 1
    prepare_input(buffers)


def prepare_input(buffers: StepBuffers) -> None:
    """Write the U-Net's input for the row at the counter: scaled latents for each part, the rows' timestep.

    After the last row there is nothing to prepare and nothing is written.
    """
    step = int(buffers.counter[0])
    if step >= row_count(buffers):
        return
    images = len(buffers.latents)
    for start in range(0, len(buffers.sample), images):
        np.multiply(
            buffers.latents,
            buffers.rows[step, Column.INPUT_SCALE],
            out=buffers.sample[start : start + images],
            casting="same_kind",
        )
    buffers.timestep[...] = buffers.timesteps[step]


def row_count(buffers: StepBuffers) -> int:
    """How many rows are in use."""
    return len(buffers.timesteps) if buffers.count is None else int(buffers.count[0])


def guided_prediction(buffers: StepBuffers, row: FloatState) -> FloatState:
    """float32 [N, C, h, w]: the parts combined with the row's w and v, or the only part there is."""
    images = len(buffers.latents)
    m = buffers.noise_pred.astype(np.float32, copy=False)
    if len(m) == images:
        return m
    unconditional, conditional = m[:images], m[-images:]
    guided: FloatState
    if len(m) == 2 * images:
        guided = unconditional + row[Column.GUIDANCE] * (conditional - unconditional)
        return guided
    picture = m[images:-images]
    guided = unconditional + row[Column.GUIDANCE] * (conditional - picture)
    guided += row[Column.IMAGE_GUIDANCE] * (picture - unconditional)
    return guided


def _blended(buffers: StepBuffers, x: FloatState, after: int) -> FloatState:
    """``x`` where the mask says so, else the known latents at the noise level where row ``after`` begins."""
    if buffers.mask is None or buffers.known is None or buffers.known_noise is None:
        return x
    one = np.float32(1)
    signal, noise = one, np.float32(0)  # the result has no noise
    if after < row_count(buffers):
        signal, noise = buffers.rows[after, Column.SIGNAL], buffers.rows[after, Column.NOISE]
    kept = signal * buffers.known + noise * buffers.known_noise
    blend: FloatState = buffers.mask * x + (one - buffers.mask) * kept
    return blend


class Params(ctypes.Structure):
    """``GuidedStepParams`` of ``guided_step.cuh``: addresses (0 for None), then sizes."""

    _fields_ = (
        ("noise_pred", ctypes.c_uint64),
        ("latents", ctypes.c_uint64),
        ("history", ctypes.c_uint64),
        ("saved", ctypes.c_uint64),
        ("noise", ctypes.c_uint64),
        ("rows", ctypes.c_uint64),
        ("timesteps", ctypes.c_uint64),
        ("counter", ctypes.c_uint64),
        ("fault", ctypes.c_uint64),
        ("sample", ctypes.c_uint64),
        ("timestep", ctypes.c_uint64),
        ("mask", ctypes.c_uint64),
        ("known", ctypes.c_uint64),
        ("known_noise", ctypes.c_uint64),
        ("factors", ctypes.c_uint64),
        ("denoised", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("ticket", ctypes.c_uint64),
        ("elements", ctypes.c_uint32),  # N·C·h·w
        ("image_elements", ctypes.c_uint32),  # C·h·w
        ("plane", ctypes.c_uint32),  # h·w
        ("evaluated", ctypes.c_uint32),  # R / N, parts of noise_pred: 1, 2 or 3
        ("parts", ctypes.c_uint32),  # R' / N, of sample: 1, 2 or 3
        ("prepared", ctypes.c_uint32),  # R'
        ("capacity", ctypes.c_int32),  # n, the rows that count where count is None
    )


def launch(buffers: StepBuffers) -> Launch:
    """The launch that does what `guided_step` does. Its entry is made for the dtype and for the plane's size.

    Args:
        buffers: Device arrays (`sdrt.kernels.launch.DeviceArray`); ``ticket`` must be there and hold 0.

    Raises:
        ValueError: A shape or dtype is not what `StepBuffers` says, or a buffer is missing.
    """
    check_step_buffers(buffers)
    if buffers.ticket is None:
        raise ValueError("ticket is missing: the kernel needs it to know its last block")
    return _launch("guided_step", buffers)


def launch_prepare_input(buffers: StepBuffers) -> Launch:
    """The launch that does what `prepare_input` does; arguments and errors as for `launch`."""
    check_step_buffers(buffers)
    return _launch("prepare_input", buffers)


def bytes_moved(buffers: StepBuffers, table: NDArray[np.floating], step: int) -> int:
    """Bytes that one step must at least read and write, scalars and rows left out.

    noise_pred in, latents in and out, d out, sample out (not after the last row), and what the row asks for.

    Args:
        buffers: Of the run.
        table: [n, COLUMNS], its rows in use.
        step: Which row.
    """
    row = table[step]
    state = math.prod(buffers.latents.shape) * 4
    reads = 1 + np.count_nonzero(row[Column.B1 : Column.B0 + HISTORY])
    reads += bool(row[Column.E]) + bool(row[Column.C])
    writes = 2 + bool(row[Column.SAVE])
    total = int(reads + writes) * state + _nbytes(buffers.noise_pred)
    if step + 1 < len(table):
        total += _nbytes(buffers.sample)
    if buffers.mask is not None:
        total += 2 * state + _nbytes(buffers.mask)
    if buffers.denoised is not None:
        total += state
    return total


def _nbytes(array: NDArray[Any]) -> int:
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def _launch(kernel: str, buffers: StepBuffers) -> Launch:
    images, channels, height, width = buffers.latents.shape
    plane = height * width
    addresses = {
        name: getattr(buffers, name).address
        for name, kind in Params._fields_
        if kind is ctypes.c_uint64 and getattr(buffers, name) is not None
    }
    params = Params(
        **addresses,
        elements=images * channels * plane,
        image_elements=channels * plane,
        plane=plane,
        evaluated=_len(buffers.noise_pred) // images,
        parts=_len(buffers.sample) // images,
        prepared=_len(buffers.sample),
        capacity=_len(buffers.timesteps),
    )
    dtype = np.dtype(buffers.sample.dtype)
    wide = plane % WIDTH == 0 and _aligned(buffers, dtype.itemsize)
    entry = f"{kernel}_{SUFFIX[dtype]}" + (f"x{WIDTH}" if wide else "")
    return Launch("guided_step", entry, blocks(params.elements // (WIDTH if wide else 1)), BLOCK, params)


def _aligned(buffers: StepBuffers, itemsize: int) -> bool:
    """Whether every array starts where ``WIDTH`` of its elements can be moved at once."""
    state = ("latents", "history", "saved", "noise", "mask", "known", "known_noise", "denoised")
    sizes = dict.fromkeys(state, WIDTH * 4) | dict.fromkeys(("noise_pred", "sample"), WIDTH * itemsize)
    arrays = {name: cast(DeviceArray | None, getattr(buffers, name)) for name in sizes}
    return all(array.address % sizes[name] == 0 for name, array in arrays.items() if array is not None)


def _len(array: NDArray[Any]) -> int:
    """Length of the first axis; device arrays need not have ``__len__``."""
    return int(array.shape[0])


def check_step_buffers(buffers: StepBuffers) -> None:
    """Refuse buffers that are not what `StepBuffers` says.

    Raises:
        ValueError: A shape or dtype differs, or buffers that belong together are not all there.
    """
    state = tuple(buffers.latents.shape)
    if len(state) != 4:
        raise ValueError(f"latents have shape {state}: it must have the four axes N, C, h, w")
    element_count((HISTORY, *state))
    images, rest = state[0], state[1:]
    evaluated, prepared = _len(buffers.noise_pred), _len(buffers.sample)
    for name, rows in (("noise_pred", evaluated), ("sample", prepared)):
        if rows not in (images, 2 * images, 3 * images):
            guided = f"{2 * images} or {3 * images} guided"
            raise ValueError(f"{name} has {rows} rows: {images} images have {images}, or {guided}")
    n = _len(buffers.timesteps)
    floats = ("float16", "float32")
    dtype = (np.dtype(buffers.noise_pred.dtype).name,)
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        "noise_pred": ((evaluated, *rest), floats),
        "sample": ((prepared, *rest), dtype),
        "latents": (state, ("float32",)),
        "history": ((HISTORY, *state), ("float32",)),
        "saved": (state, ("float32",)),
        "noise": (state, ("float32",)),
        "rows": ((n, COLUMNS), ("float32",)),
        "timesteps": ((n,), ("float32",)),
        "counter": ((1,), ("int32",)),
        "fault": ((1,), ("int32",)),
        "timestep": ((prepared,), ("float32",)),
        "mask": ((images, 1, *rest[1:]), ("float32",)),
        "known": (state, ("float32",)),
        "known_noise": (state, ("float32",)),
        "factors": ((images,), ("float32",)),
        "guidance_rescale": ((1,), ("float32",)),
        "denoised": (state, ("float32",)),
        "ticket": ((1,), ("uint32",)),
        "count": ((1,), ("int32",)),
    }
    for name, (shape, dtypes) in expected.items():
        array = getattr(buffers, name)
        if array is not None:
            check_array(name, array, shape, dtypes)
    if len({array is None for array in (buffers.mask, buffers.known, buffers.known_noise)}) == 2:
        raise ValueError("mask, known and known_noise belong together: give all of them, or none")
