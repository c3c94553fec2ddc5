"""The sampling loop by itself, with a fake U-Net and a device that counts."""

from __future__ import annotations

import numpy as np
import pytest
from support.runs.loop_runs import (
    IMAGES,
    SCALE,
    STATE,
    CountingDevice,
    FakeUNet,
    new_loop,
    normal,
    predict,
    run,
    start,
    texts,
)

import tolerances
from sdrt.kernels.sampler_row import Column
from sdrt.runtime.drawing.loop import StepKind
from sdrt.runtime.errors import NumericsError, UsageError
from sdrt.runtime.samplers.noise import noise_source
from sdrt.runtime.samplers.registry import SAMPLERS, make_table
from sdrt.runtime.samplers.schedule import FloatArray, NoiseSchedule
from sdrt.runtime.samplers.table import SamplerTable, run_table

PLAIN, GUIDED = StepKind(guided=False), StepKind(guided=True)
NOISY = StepKind(guided=False, draws_noise=True)


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
    loop = new_loop(unet, guided=guided)
    result, expected = run(loop, table, guided=guided), exact(table, guided=guided)
    assert np.max(np.abs(result - expected)) <= tolerances.LOOP_RUN * np.max(np.abs(expected))
    assert unet.timesteps == [float(np.float32(timestep)) for timestep in table.timesteps]


def test_steps_allocate_nothing_and_wait_for_nothing() -> None:
    device = CountingDevice()
    loop = new_loop(device=device)
    table = make_table("dpmpp_2m", NoiseSchedule(), 10)
    start(loop, table, GUIDED)
    before = device.calls.copy()
    for _ in table.timesteps:
        loop.step(GUIDED)
    assert device.calls - before == {"guided_step": 10}
    start(loop, table, GUIDED)
    loop.result(pixels=True)
    assert (device.calls["zeros"], device.calls["download"]) == (1, 1)


@pytest.mark.parametrize("drawn", [1, 3])
@pytest.mark.parametrize("name", ["euler_a", "dpm2_a"])
def test_noise_on_the_device_is_that_of_the_seeds(name: str, drawn: int) -> None:
    """The initial noise is draw 0, and each row that adds noise takes the next, as `NoiseSource` has it."""
    table = make_table(name, NoiseSchedule(), 6)
    seeds = [2**64 - 1, 7]
    source = noise_source("philox", seeds)
    loop = new_loop(guided=False)
    given = new_loop(guided=False)
    for kind, one in ((NOISY, loop), (PLAIN, given)):
        one.prepare([kind])
    initial, number = source.draw(0, STATE[1:]), drawn
    loop.start(table, np.zeros(len(table)), seeds=seeds, drawn=drawn)
    given.start(table, np.zeros(len(table)), seeds=[0, 0], latents=initial)
    assert np.array_equal(loop.latents(), initial * np.float32(table.init_noise_sigma))
    for row in table.rows:
        if row[Column.C]:
            given.set_noise(source.draw(number, STATE[1:]))
            number += 1
        given.step(PLAIN)
        loop.step(NOISY)
        assert np.array_equal(loop.latents(), given.latents())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_buffers_of_the_device_to_start_from() -> None:
    """They are scaled like noise, and looked at: a NaN in them is told from one of the U-Net's."""
    table = make_table("euler", NoiseSchedule(), 4)
    loop = new_loop(guided=False)
    loop.prepare([PLAIN])
    latents = normal(*STATE, seed=1)
    loop.start(table, np.zeros(len(table)), seeds=[0, 0], latents=[latents[:1], latents[1:]])
    assert np.array_equal(loop.latents(), latents * np.float32(table.init_noise_sigma))
    assert not loop.faults().given
    latents[1, 0, 0, 0] = np.inf
    loop.start(table, np.zeros(len(table)), seeds=[0, 0], latents=[latents[:1], latents[1:]])
    loop.step(PLAIN)
    assert loop.faults().given
    with pytest.raises(UsageError, match="latents hold NaN or infinity"):
        loop.faults().raise_if_any(table, ["", ""], ["text_encoder"])


@pytest.mark.parametrize("name", SAMPLERS)
def test_second_run_on_the_same_buffers_is_like_the_first(name: str) -> None:
    """Whatever ran before, and wherever it stopped: shorter, longer, with NaN."""
    loop = new_loop()
    table = make_table(name, NoiseSchedule(), 6)
    first = run(loop, table, guided=True)
    run(loop, make_table("ddim", NoiseSchedule(), 40, eta=1.0), guided=True)
    start(loop, table, GUIDED, seed=5)
    loop.step(GUIDED)
    for buffer in (loop.buffers.history, loop.buffers.saved, loop.buffers.latents, loop.buffers.noise_pred):
        buffer[...] = np.nan
    assert np.array_equal(run(loop, table, guided=True), first)


def test_replaced_latents_reach_the_unets_input() -> None:
    loop = new_loop()
    table = make_table("euler", NoiseSchedule(), 4)
    start(loop, table, GUIDED)
    loop.step(GUIDED)
    fresh = normal(*STATE, seed=9)
    loop.set_latents(fresh)
    scale = np.float32(table.rows[1, 0])
    assert np.array_equal(loop.buffers.sample, np.concatenate([fresh * scale] * 2))
    assert np.array_equal(loop.latents(), fresh)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_fault_names_the_first_step() -> None:
    loop = new_loop(guided=False)
    table = make_table("ddim", NoiseSchedule(), 5)
    start(loop, table, PLAIN)
    loop.step(PLAIN)
    loop.step(PLAIN)
    loop.buffers.sample[0, 0, 0, 0] = np.inf
    for _ in range(3):
        loop.step(PLAIN)
    words = rf"unet gave NaN or infinity at step 3 of 5 \(timestep {table.timesteps[2]:g}\).*--dtype fp32"
    with pytest.raises(NumericsError, match=words):
        loop.faults().raise_if_any(table, [], [])
    run(loop, table, guided=False)  # the next run is well


def test_latents_are_a_copy() -> None:
    loop = new_loop(guided=False)
    table = make_table("ddim", NoiseSchedule(), 2)
    start(loop, table, PLAIN)
    before = loop.latents()
    loop.step(PLAIN)
    assert not np.array_equal(before, loop.latents())
