"""The sampling loop by itself, with a fake U-Net and a device that counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tolerances
from sdrt.runtime.components import COMPONENTS
from sdrt.runtime.denoise import DenoiseLoop
from sdrt.runtime.devices import HostDevice
from sdrt.runtime.errors import NumericsError, UsageError
from sdrt.runtime.noise import noise_source
from sdrt.runtime.schedule import FloatArray, NoiseSchedule
from sdrt.runtime.solvers import SAMPLERS, SamplerTable, make_table, run_table

SIZES = {"tokens": 5, "text_width": 6, "cross_width": 6, "unet_channels": 4, "latent_channels": 4}
IMAGES, SIZE = 2, (3, 4)
STATE = (IMAGES, 4, *SIZE)
SCALE = 3.0
Array = NDArray[Any]


class FakeUNet:
    """Linear in its input and its text, so that the two halves can be told apart and errors stay small."""

    capturable = False

    def __init__(self) -> None:
        self.spec = COMPONENTS["unet"].resolve(SIZES, "fp32")
        self.timesteps: list[float] = []

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        sample, timestep, text = (inputs[spec.name] for spec in self.spec.inputs)

        def evaluate() -> None:
            self.timesteps.append(float(timestep[0]))
            outputs["noise_pred"][...] = predict(sample, float(timestep[0]), text)

        return evaluate

    def close(self) -> None:
        """There is nothing to give back."""


def predict(sample: Array, timestep: float, text: Array) -> Array:
    result: Array = 0.25 * sample + timestep / 4000 + text.mean(axis=(1, 2))[:, None, None, None]
    return result


class CountingDevice(HostDevice):
    """Counts every method that is called."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __getattribute__(self, name: str) -> Any:
        if name != "calls" and not name.startswith("__"):
            self.calls[name] += 1
        return super().__getattribute__(name)


def normal(*shape: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def texts(*, guided: bool) -> NDArray[np.float32]:
    return normal(2 * IMAGES if guided else IMAGES, 5, 6, seed=2)


def start(loop: DenoiseLoop, table: SamplerTable, *, guided: bool, seed: int = 1) -> None:
    """Begin a run from the noise of ``seed``."""
    loop.prepare(draws_noise=False)
    for row, text in zip(loop.conditioning["encoder_hidden_states"], texts(guided=guided), strict=True):
        row[...] = text
    loop.start(table, SCALE, seeds=[0] * IMAGES, latents=normal(*STATE, seed=seed))


def run(loop: DenoiseLoop, table: SamplerTable, *, guided: bool, seed: int = 1) -> NDArray[np.float32]:
    """A whole run; row k adds the noise of seed 100 + k."""
    start(loop, table, guided=guided, seed=seed)
    for step in range(len(table.timesteps)):
        if table.uses_noise:
            loop.set_noise(normal(*STATE, seed=100 + step))
        loop.step()
    result = loop.result(pixels=False)
    result.faults.raise_if_any(table, [""] * (2 * IMAGES), ["text_encoder"])
    return result.latents


def exact(table: SamplerTable, *, guided: bool, seed: int = 1) -> FloatArray:
    """The same in float64 by the definition."""
    text = texts(guided=guided).astype(np.float64)

    def model(x: FloatArray, timestep: float) -> FloatArray:
        if not guided:
            return predict(x, timestep, text)
        unconditional = predict(x, timestep, text[:IMAGES])
        return unconditional + SCALE * (predict(x, timestep, text[IMAGES:]) - unconditional)

    noise = np.stack([normal(*STATE, seed=100 + step) for step in range(len(table.timesteps))])
    initial = normal(*STATE, seed=seed).astype(np.float64) * table.init_noise_sigma
    return run_table(table, model, initial, noise.astype(np.float64))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_loop_is_the_recurrence(name: str, guided: bool) -> None:
    unet = FakeUNet()
    table = make_table(name, NoiseSchedule(), 10, eta=1.0 if name == "ddim" else 0.0)
    loop = DenoiseLoop(HostDevice(), unet, IMAGES, SIZE, guided=guided)
    result, expected = run(loop, table, guided=guided), exact(table, guided=guided)
    assert np.max(np.abs(result - expected)) <= tolerances.LOOP_RUN * np.max(np.abs(expected))
    assert unet.timesteps == [float(np.float32(timestep)) for timestep in table.timesteps]


def test_steps_allocate_nothing_and_wait_for_nothing() -> None:
    device = CountingDevice()
    loop = DenoiseLoop(device, FakeUNet(), IMAGES, SIZE, guided=True)
    table = make_table("dpmpp_2m", NoiseSchedule(), 10)
    start(loop, table, guided=True)
    before = device.calls.copy()
    for _ in table.timesteps:
        loop.step()
    assert device.calls - before == {"guided_step": 10}
    start(loop, table, guided=True)
    loop.result(pixels=True)
    assert (device.calls["zeros"], device.calls["download"]) == (1, 1)


def test_noise_on_the_device_is_that_of_the_seeds() -> None:
    """The initial noise is draw 0, and row k adds draw 1 + k: as `NoiseSource` has it."""
    table = make_table("ddim", NoiseSchedule(), 6, eta=1.0)
    seeds = [2**64 - 1, 7]
    source = noise_source("philox", seeds)
    loop = DenoiseLoop(HostDevice(), FakeUNet(), IMAGES, SIZE, guided=False)
    given = DenoiseLoop(HostDevice(), FakeUNet(), IMAGES, SIZE, guided=False)
    for draws_noise, one in ((True, loop), (False, given)):
        one.prepare(draws_noise=draws_noise)
    loop.start(table, SCALE, seeds=seeds)
    given.start(table, SCALE, seeds=[0, 0], latents=source.initial(STATE[1:]))
    assert np.array_equal(loop.latents(), source.initial(STATE[1:]))
    for step in range(len(table.timesteps)):
        given.set_noise(source.step(step, STATE[1:]))
        given.step()
        loop.step()
        assert np.array_equal(loop.latents(), given.latents())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_buffers_of_the_device_to_start_from() -> None:
    """They are scaled like noise, and looked at: a NaN in them is told from one of the U-Net's."""
    table = make_table("euler", NoiseSchedule(), 4)
    loop = DenoiseLoop(HostDevice(), FakeUNet(), IMAGES, SIZE, guided=False)
    loop.prepare(draws_noise=False)
    latents = normal(*STATE, seed=1)
    loop.start(table, SCALE, seeds=[0, 0], latents=[latents[:1], latents[1:]])
    assert np.array_equal(loop.latents(), latents * np.float32(table.init_noise_sigma))
    assert not loop.faults().given
    latents[1, 0, 0, 0] = np.inf
    loop.start(table, SCALE, seeds=[0, 0], latents=[latents[:1], latents[1:]])
    loop.step()
    assert loop.faults().given
    with pytest.raises(UsageError, match="latents hold NaN or infinity"):
        loop.faults().raise_if_any(table, ["", ""], ["text_encoder"])


@pytest.mark.parametrize("name", SAMPLERS)
def test_second_run_on_the_same_buffers_is_like_the_first(name: str) -> None:
    """Whatever ran before, and wherever it stopped: shorter, longer, with NaN."""
    loop = DenoiseLoop(HostDevice(), FakeUNet(), IMAGES, SIZE, guided=True)
    table = make_table(name, NoiseSchedule(), 6)
    first = run(loop, table, guided=True)
    run(loop, make_table("ddim", NoiseSchedule(), 40, eta=1.0), guided=True)
    start(loop, table, guided=True, seed=5)
    loop.step()
    for buffer in (loop.buffers.history, loop.buffers.saved, loop.buffers.latents, loop.buffers.noise_pred):
        buffer[...] = np.nan
    assert np.array_equal(run(loop, table, guided=True), first)


def test_replaced_latents_reach_the_unets_input() -> None:
    loop = DenoiseLoop(HostDevice(), FakeUNet(), IMAGES, SIZE, guided=True)
    table = make_table("euler", NoiseSchedule(), 4)
    start(loop, table, guided=True)
    loop.step()
    fresh = normal(*STATE, seed=9)
    loop.set_latents(fresh)
    scale = np.float32(table.rows[1, 0])
    assert np.array_equal(loop.buffers.sample, np.concatenate([fresh * scale] * 2))
    assert np.array_equal(loop.latents(), fresh)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_fault_names_the_first_step() -> None:
    loop = DenoiseLoop(HostDevice(), FakeUNet(), IMAGES, SIZE, guided=False)
    table = make_table("ddim", NoiseSchedule(), 5)
    start(loop, table, guided=False)
    loop.step()
    loop.step()
    loop.buffers.sample[0, 0, 0, 0] = np.inf
    for _ in range(3):
        loop.step()
    words = rf"unet gave NaN or infinity at step 3 of 5 \(timestep {table.timesteps[2]:g}\).*--dtype fp32"
    with pytest.raises(NumericsError, match=words):
        loop.faults().raise_if_any(table, [], [])
    run(loop, table, guided=False)  # the next run is well


def test_latents_are_a_copy() -> None:
    loop = DenoiseLoop(HostDevice(), FakeUNet(), IMAGES, SIZE, guided=False)
    table = make_table("ddim", NoiseSchedule(), 2)
    start(loop, table, guided=False)
    before = loop.latents()
    loop.step()
    assert not np.array_equal(before, loop.latents())
