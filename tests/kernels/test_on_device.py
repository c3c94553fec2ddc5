"""The kernels as the `cuda` device runs them, against the NumPy references: bit for bit.

On the recording driver, which runs their host build, and, marked ``gpu``, on a real one: there the launch
geometry counts too, and what nvcc's mathematics makes of the logarithm and the sine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.fakes.recording import recording_device
from support.runs.step_runs import (
    STEPS,
    TABLES,
    arrays,
    artificial_table,
    copied,
    drive,
    make_buffers,
    make_run,
    same_bits,
)

import tolerances
from sdrt.kernels.guidance_rescale import guidance_rescale
from sdrt.kernels.guided_step import NO_FAULT, StepBuffers, guided_step, prepare_input
from sdrt.kernels.image_to_uint8 import image_to_uint8
from sdrt.kernels.launch import BLOCK, MAX_GRID
from sdrt.kernels.philox_normal import NO_DRAW, fill_philox_normal
from sdrt.runtime.devices.device import Device
from sdrt.runtime.devices.gpu.device import CudaDevice
from sdrt.runtime.samplers.table import SamplerTable

ODD = (2, 3, 3, 5)
SD15 = (1, 4, 64, 64)
BEYOND_THE_GRID = (21, 4, 128, 128)  # threads take a second group each
assert np.prod(BEYOND_THE_GRID) > 4 * BLOCK * MAX_GRID


@pytest.fixture(params=["recorded", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    with CudaDevice() if request.param == "gpu" else recording_device() as opened:
        yield opened


def placed(device: Device, array: NDArray[Any]) -> Any:
    """A device buffer with the array's numbers."""
    buffer = device.zeros(array.shape, array.dtype)
    device.upload(array, buffer)
    return buffer


def step_on(device: Device, buffers: StepBuffers) -> StepBuffers:
    """The buffers' numbers in device memory."""
    changes: dict[str, Any] = {name: placed(device, array) for name, array in arrays(buffers).items()}
    return StepBuffers(**changes)


def assert_same(device: Device, buffers: StepBuffers, reference: StepBuffers) -> None:
    for name, wanted in arrays(reference).items():
        assert same_bits(device.download(getattr(buffers, name)), wanted), name


@pytest.mark.parametrize("inpainting", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(
    ("table", "shape"),
    [*((table, SD15) for table in TABLES), (artificial_table(), ODD)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_whole_run(
    device: Device,
    table: SamplerTable,
    shape: tuple[int, int, int, int],
    guided: bool,
    dtype: str,
    inpainting: bool,
) -> None:
    run = make_run(table, guided=guided, dtype=dtype, shape=shape)
    phi = 0.7 if guided and inpainting else None
    reference = make_buffers(run, inpainting=inpainting, phi=phi, denoised=inpainting)
    buffers = step_on(device, reference)
    device.prepare_input(buffers)
    for prediction, noise in zip(run.predictions, run.noise, strict=True):
        device.upload(prediction, buffers.noise_pred)
        device.upload(noise, buffers.noise)
        if phi is not None:
            device.guidance_rescale(buffers)
        device.guided_step(buffers)
    drive(run, reference)
    assert_same(device, buffers, reference)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_more_elements_than_threads(device: Device, dtype: str) -> None:
    run = make_run(artificial_table(3), guided=True, dtype=dtype, shape=BEYOND_THE_GRID)
    reference = make_buffers(run, inpainting=True)
    reference.noise_pred[...] = run.predictions[0]
    buffers = step_on(device, reference)
    prepare_input(reference)
    device.prepare_input(buffers)
    for _ in range(3):
        device.guided_step(buffers)
        guided_step(reference)
    assert_same(device, buffers, reference)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape", [ODD, SD15, BEYOND_THE_GRID], ids=str)
def test_factors_of_guidance(device: Device, shape: tuple[int, int, int, int], dtype: str) -> None:
    run = make_run(artificial_table(2), guided=True, dtype=dtype, shape=shape)
    reference = make_buffers(run, phi=0.7)
    reference.noise_pred[...] = run.predictions[0]
    reference.noise_pred[-1] = 0.25  # of one half alone
    buffers = step_on(device, reference)
    device.guidance_rescale(buffers)
    guidance_rescale(reference)
    assert_same(device, buffers, reference)
    device.upload(np.full_like(reference.noise_pred, 0.25), buffers.noise_pred)
    device.guidance_rescale(buffers)
    assert np.all(device.download(buffers.factors) == 1)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_replayed_graph_walks_the_table_and_stops_at_its_end(device: Device, dtype: str) -> None:
    """Nothing of a step depends on the host: noise, step and count come from the counter on the device."""
    run = make_run(artificial_table(), guided=True, dtype=dtype, shape=SD15)
    reference = make_buffers(run)
    reference.seeds = np.array([2**40 + 3], np.uint64)
    reference.draws = np.array([2, NO_DRAW, *range(3, STEPS + 1)], np.int32)
    reference.noise_pred[...] = run.predictions[0]
    buffers = step_on(device, reference)
    start = copied(reference)

    def step() -> None:
        device.philox_normal(buffers.noise, buffers.seeds, buffers.counter, buffers.draws)
        device.guided_step(buffers)

    step()
    for name in ("latents", "history", "saved", "noise", "counter", "sample", "timestep"):
        device.upload(getattr(start, name), getattr(buffers, name))
    replay = device.capture(step)
    for _ in range(STEPS + 2):
        replay()
    for _ in range(STEPS):
        # The device's own noise, whose last bits are its mathematics' (see below), goes into the reference.
        reference.noise[...] = noise_on(device, reference)
        guided_step(reference)
    assert_same(device, buffers, reference)
    assert device.download(buffers.counter)[0] == STEPS
    assert device.download(buffers.ticket)[0] == 0


def noise_on(device: Device, reference: StepBuffers) -> NDArray[np.float32]:
    given: list[Any] = [reference.noise, reference.seeds, reference.counter, reference.draws]
    noise, *others = (placed(device, array) for array in given)
    device.philox_normal(noise, *others)
    return np.asarray(device.download(noise), np.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_the_first_faulty_row_is_kept(device: Device, dtype: str, place: int, value: float) -> None:
    run = make_run(artificial_table(), guided=True, dtype=dtype, shape=SD15)
    reference = make_buffers(run)
    buffers = step_on(device, reference)
    faults = []
    for step in range(4):
        prediction = run.predictions[step].copy()
        if step in (1, 3):
            prediction.flat[place] = value
        device.upload(prediction, buffers.noise_pred)
        device.guided_step(buffers)
        faults.append(int(device.download(buffers.fault)[0]))
    assert faults == [NO_FAULT, 1, 1, 1]


@pytest.mark.parametrize("draw", [0, 1, 999])
def test_noise_of_each_seed(device: Device, draw: int) -> None:
    """Equal, but for the few numbers where two mathematical libraries round to neighbours."""
    wanted = np.zeros((16, 4, 128, 128), np.float32)
    seeds = np.array([0, 1, 2**32, 2**64 - 1] * 4, np.uint64) ^ np.arange(16, dtype=np.uint64)
    row = () if draw == 0 else (np.array([1], np.int32), np.array([NO_DRAW, draw], np.int32))
    noise = placed(device, wanted)
    device.philox_normal(noise, placed(device, seeds), *(placed(device, array) for array in row))
    fill_philox_normal(wanted, seeds, *row)
    got = device.download(noise)
    assert np.count_nonzero(got != wanted) <= tolerances.PHILOX_KERNEL_UNEQUAL
    np.testing.assert_allclose(got, wanted, rtol=tolerances.PHILOX_KERNEL, atol=0)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("size", [(512, 512), (7, 5), (1024, 1024)], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_bytes_of_images(device: Device, size: tuple[int, int], dtype: str) -> None:
    """Pictures, and numbers of any bits: NaN, infinities, subnormals."""
    random = np.random.default_rng(8)
    picture = random.uniform(-1.2, 1.2, (1, 3, *size)).astype(dtype)
    bits = np.dtype(dtype).str.replace("f", "u")
    limit = np.iinfo(bits).max
    noise = random.integers(0, limit, (1, 3, *size), dtype=bits, endpoint=True).view(dtype)
    image = np.concatenate([picture, noise])
    pixels = device.zeros((2, *size, 3), np.uint8)
    device.image_to_uint8(placed(device, image), pixels)
    assert np.array_equal(device.download(pixels), image_to_uint8(image))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_one_number_that_is_not_finite_is_found(device: Device, dtype: str) -> None:
    """In a buffer of more vectors than threads, at its ends and in the rest behind the last vector."""
    elements = 16 * BLOCK * MAX_GRID // np.dtype(dtype).itemsize + 5
    buffer, fault = device.zeros((elements,), dtype), device.zeros((1,), np.int32)
    device.check_finite(buffer, fault)
    assert device.download(fault)[0] == 0
    values = np.zeros(elements, dtype)
    for place, value in ((0, np.nan), (elements - 6, np.inf), (elements - 1, -np.inf)):
        device.upload(np.zeros(1, np.int32), fault)
        values[place] = value
        device.upload(values, buffer)
        values[place] = 0
        device.check_finite(buffer, fault)
        assert device.download(fault)[0] == 1, place
