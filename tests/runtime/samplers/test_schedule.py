"""The noise schedule against PyTorch and diffusers, its choices of noise levels, and bad data."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

import tolerances
from sdrt.runtime.errors import BundleError, UsageError
from sdrt.runtime.samplers.schedule import (
    NoiseSchedule,
    leading_timesteps,
    linspace_timesteps,
    sigma_from_timestep,
    spaced_timesteps,
    timestep_from_sigma,
    trailing_timesteps,
)

SCHEDULES = [
    NoiseSchedule(),
    NoiseSchedule(beta_start=0.0015, beta_end=0.0195, num_train_timesteps=999),
    NoiseSchedule(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    NoiseSchedule(beta_schedule="squaredcos_cap_v2"),
    NoiseSchedule(num_train_timesteps=3, trained_betas=(0.1, 0.2, 0.3)),
    NoiseSchedule(num_train_timesteps=2),
]
ZERO_SNR = NoiseSchedule(rescale_betas_zero_snr=True, prediction_type="v_prediction")


def diffusers_config(schedule: NoiseSchedule) -> dict[str, Any]:
    return {**schedule.to_dict(), "clip_sample": False}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alphas_cumprod_are_those_of_training(schedule: NoiseSchedule) -> None:
    theirs = DDIMScheduler(**diffusers_config(schedule)).alphas_cumprod.numpy()
    assert schedule.alphas_cumprod.dtype == np.float64
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":  # PyTorch without FMA
        np.testing.assert_allclose(schedule.alphas_cumprod, theirs, rtol=tolerances.ALPHAS_CUMPROD_NO_FMA)
    else:
        np.testing.assert_array_equal(schedule.alphas_cumprod, theirs)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sigmas_are_those_of_diffusers(schedule: NoiseSchedule) -> None:
    """By the formula that diffusers' schedulers share, on equal alphas_cumprod."""
    alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod.astype(np.float32))
    theirs = (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).numpy()
    np.testing.assert_allclose(schedule.sigmas, theirs, rtol=tolerances.SIGMAS)


def test_arrays_are_read_only() -> None:
    schedule = NoiseSchedule()
    for array in (schedule.alphas_cumprod, schedule.sigmas):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.0


def test_spacings_of_lin_et_al() -> None:
    """Table 2 of the paper, shifted to timesteps from 0."""
    assert leading_timesteps(1000, 10, 0).tolist() == list(range(900, -1, -100))
    assert leading_timesteps(1000, 10, 1).tolist() == list(range(901, 0, -100))
    assert trailing_timesteps(1000, 10).tolist() == list(range(999, 0, -100))
    assert np.round(linspace_timesteps(1000, 10)).tolist() == list(range(999, -1, -111))


def test_trailing_gives_as_many_as_asked() -> None:
    """np.arange gives 62 for 61, with a timestep of -1 at the end."""
    assert len(np.arange(1000, 0, -1000 / 61)) == 62
    for steps in range(1, 1001):
        timesteps = trailing_timesteps(1000, steps)
        assert len(timesteps) == steps
        assert timesteps[0] == 999
        assert timesteps[-1] >= 0
        assert np.all(np.diff(timesteps) < 0)


def test_drop_last_leaves_out_the_lowest() -> None:
    assert spaced_timesteps(NoiseSchedule(), 4, drop_last=True).tolist() == [801, 601, 401, 201]
    linspace = NoiseSchedule(timestep_spacing="linspace")
    np.testing.assert_allclose(spaced_timesteps(linspace, 3, drop_last=True), [999, 666, 333])
    trailing = NoiseSchedule(timestep_spacing="trailing")
    assert spaced_timesteps(trailing, 4, drop_last=True).tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize(
    ("schedule", "steps", "drop_last"),
    [
        (NoiseSchedule(), 1000, False),  # would ask for timestep 1000
        (NoiseSchedule(steps_offset=0), 1000, True),  # a stride of 0
        (NoiseSchedule(steps_offset=500), 4, False),
    ],
)
def test_leading_without_room_is_refused(schedule: NoiseSchedule, steps: int, drop_last: bool) -> None:
    with pytest.raises(UsageError, match=r"steps do not fit 1000 .* ask for fewer"):
        spaced_timesteps(schedule, steps, drop_last=drop_last)


@pytest.mark.parametrize("schedule", SCHEDULES[:4])
def test_zero_terminal_snr_is_that_of_diffusers(schedule: NoiseSchedule) -> None:
    """Lin et al. 2023, algorithm 1: the first signal as it was, the last none."""
    rescaled = replace(schedule, rescale_betas_zero_snr=True)
    theirs = DDIMScheduler(**diffusers_config(rescaled)).alphas_cumprod.numpy()
    ours = rescaled.alphas_cumprod
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerances.ALPHAS_CUMPROD_ZERO_SNR)
    assert ours[-1] == theirs[-1] == 0.0
    assert ours[0] == pytest.approx(schedule.alphas_cumprod[0], abs=tolerances.ALPHAS_CUMPROD_ZERO_SNR)
    config = rescaled.to_dict()
    del config["set_alpha_to_one"]
    theirs = EulerDiscreteScheduler(**config).sigmas.numpy()
    if theirs[0] > theirs[1]:
        assert rescaled.sigmas[-1] == pytest.approx(theirs[0], rel=tolerances.SIGMAS)
    else:  # where diffusers' table falls at its last timestep, ours rises
        assert rescaled.sigmas[-1] == pytest.approx(2**0.5 * rescaled.sigmas[-2], rel=1e-3)


def test_sigma_and_timestep_are_each_others_inverse() -> None:
    schedule = NoiseSchedule()
    timesteps = np.arange(1000.0)
    np.testing.assert_array_equal(sigma_from_timestep(schedule, timesteps), schedule.sigmas)
    back = timestep_from_sigma(schedule, schedule.sigmas)
    np.testing.assert_allclose(back, timesteps, atol=tolerances.SAMPLER_TIMESTEPS)
    between = sigma_from_timestep(schedule, np.array([9.5]))
    assert between == pytest.approx(schedule.sigmas[9:11].mean())
    middle = np.sqrt(schedule.sigmas[9:10] * schedule.sigmas[10:11])
    assert timestep_from_sigma(schedule, middle) == pytest.approx(9.5, abs=1e-4)
    assert timestep_from_sigma(schedule, np.array([1e-9, 1e9])).tolist() == [0.0, 999.0]


@pytest.mark.parametrize("schedule", [*SCHEDULES, ZERO_SNR])
def test_survives_the_manifest(schedule: NoiseSchedule) -> None:
    assert NoiseSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("beta_schedule", "sigmoid", "'sigmoid': allowed are linear, scaled_linear, squaredcos"),
        ("beta_schedule", ["linear"], "beta_schedule is"),
        ("prediction_type", "flow", "allowed are epsilon, v_prediction, sample"),
        ("rescale_betas_zero_snr", 1, "rescale_betas_zero_snr is 1: allowed are true and false"),
        ("timestep_spacing", None, "timestep_spacing is None"),
        ("num_train_timesteps", 1, "num_train_timesteps is 1"),
        ("num_train_timesteps", 10**12, "whole numbers from 2 to 100000"),
        ("num_train_timesteps", 1000.0, "num_train_timesteps is 1000.0"),
        ("num_train_timesteps", True, "num_train_timesteps is True"),
        ("steps_offset", -1, "steps_offset is -1"),
        ("steps_offset", 1000, "from 0 to 999"),
        ("set_alpha_to_one", 1, "set_alpha_to_one is 1: allowed are true and false"),
        ("beta_start", 0.0, "beta_start is 0.0"),
        ("beta_end", float("nan"), "beta_end is nan"),
        ("beta_end", 1.0, "numbers between 0 and 1"),
        ("beta_end", "0.012", "beta_end is '0.012'"),
        ("trained_betas", [0.1, 0.2], "must be 1000 numbers"),
        ("trained_betas", "betas", "must be 1000 numbers"),
        ("trained_betas", [0.1] * 999 + [2.0], r"trained_betas\[999\] is 2.0"),
        ("trained_betas", [0.9] * 1000, "noise levels that are finite"),
        ("trained_betas", [1e-9] * 1000, "noise levels that are finite and rise"),
    ],
)
def test_invalid_data_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(BundleError, match=f"noise schedule: .*{message}"):
        NoiseSchedule.from_dict({**NoiseSchedule().to_dict(), field: value})


def test_invalid_arguments_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="beta_schedule is 'cosine'"):
        NoiseSchedule(beta_schedule="cosine")


def test_missing_and_unknown_fields_are_refused() -> None:
    data = NoiseSchedule().to_dict()
    with pytest.raises(BundleError, match="unknown 'clip_sample', 'eta': allowed are beta_end"):
        NoiseSchedule.from_dict({**data, "clip_sample": True, "eta": 0})
    del data["prediction_type"]
    with pytest.raises(BundleError, match="no prediction_type: export it again"):
        NoiseSchedule.from_dict(data)
