"""What samplers are called elsewhere: each name is the sampler that it means there, or unknown."""

from __future__ import annotations

from typing import Any

import pytest

from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers.names import NAMES, SCHEDULES, a1111_name, find_sampler
from sdrt.runtime.samplers.registry import SAMPLERS

KARRAS = {"sigma_schedule": "karras"}


def test_every_sampler_has_its_names_and_no_name_is_two_samplers() -> None:
    assert list(NAMES) == list(SAMPLERS)
    for sampler, names in NAMES.items():
        for name in (sampler, *names):
            for typed in (name, name.upper(), f" {name.lower()} ", name.replace(" ", "_")):
                assert find_sampler(typed) == (sampler, {})


@pytest.mark.parametrize(
    ("typed", "sampler", "implied"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m", KARRAS),
        ("dpm++2m karras", "dpmpp_2m", KARRAS),
        ("DPM++ SDE", "dpmpp_sde", {}),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde", {"sigma_schedule": "exponential"}),
        ("DPM++ 3M SDE Karras", "dpmpp_3m_sde", KARRAS),
        ("DPM2 a Karras", "dpm2_a", KARRAS),
        ("LMS Karras", "lms", KARRAS),
        ("Euler SGM Uniform", "euler", {"spacing": "sgm_uniform"}),
        ("Euler a Beta", "euler_a", {"sigma_schedule": "beta"}),
        ("PLMS", "pndm", {}),
        ("uni_pc", "unipc", {}),
        ("euler_ancestral", "euler_a", {}),
        ("EulerAncestralDiscreteScheduler", "euler_a", {}),
        ("DPMSolverMultistepScheduler", "dpmpp_2m", {}),
    ],
)
def test_names_as_they_are_typed(typed: str, sampler: str, implied: dict[str, str]) -> None:
    assert find_sampler(typed) == (sampler, implied)


@pytest.mark.parametrize(
    "typed",
    [
        *("DPM++ 2S a Karras", "DPM++ 2M SDE Heun", "DPM fast", "DPM adaptive", "Restart", "DDIM CFG++"),
        *("DPMSolverSinglestepScheduler", "Euler a Automatic", "", "karras"),
    ],
)
def test_samplers_that_we_do_not_have_stay_unknown(typed: str) -> None:
    with pytest.raises(UsageError, match=r"unknown sampler .*allowed are ddim, ddpm, deis"):
        find_sampler(typed)


def test_a_near_miss_is_told() -> None:
    with pytest.raises(UsageError, match=r"did you mean dpmpp_2m\?"):
        find_sampler("DPM++ 2N")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_name_in_a_picture_is_understood(sampler: str) -> None:
    """With each schedule that the sampler has."""
    plain: dict[str, Any] = {"karras": False}
    assert find_sampler(a1111_name(sampler, plain)) == (sampler, {})
    assert a1111_name(sampler, {"karras": True}) == a1111_name(sampler, {"karras": False, **KARRAS})
    for word, implied in SCHEDULES.items():
        assert a1111_name(sampler, {**plain, **implied}) == f"{NAMES[sampler][0]} {word}"
        assert find_sampler(a1111_name(sampler, {**plain, **implied})) == (sampler, implied)
