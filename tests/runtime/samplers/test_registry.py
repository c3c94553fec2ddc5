"""Samplers by name: what they are called elsewhere, and how one is added."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt.kernels.sampler_row import Column
from sdrt.runtime import Pipeline
from sdrt.runtime.cli.options import parser
from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers.registry import SAMPLERS, SCHEDULES, a1111_name, find_sampler, make_table
from sdrt.runtime.samplers.sampler import LEVELS, sampler
from sdrt.runtime.samplers.schedule import NoiseSchedule, timestep_from_sigma
from sdrt.runtime.samplers.sigma import sigma_levels
from sdrt.runtime.samplers.table import SamplerOptions, SamplerTable, model_rows

KARRAS = {"sigma_schedule": "karras"}


def test_every_sampler_has_its_names_and_no_name_is_two_samplers() -> None:
    for ours, one in SAMPLERS.items():
        assert one.name == ours == one.solver.__name__
        assert one.other_names
        for name in (ours, *one.other_names):
            for typed in (name, name.upper(), f" {name.lower()} ", name.replace(" ", "_")):
                assert find_sampler(typed) == (ours, {})


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


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_name_in_a_picture_is_understood(name: str) -> None:
    """With each schedule that the sampler has."""
    plain: dict[str, Any] = {"karras": False}
    assert find_sampler(a1111_name(name, plain)) == (name, {})
    assert a1111_name(name, {"karras": True}) == a1111_name(name, {"karras": False, **KARRAS})
    for word, implied in SCHEDULES.items():
        assert a1111_name(name, {**plain, **implied}) == f"{SAMPLERS[name].other_names[0]} {word}"
        assert find_sampler(a1111_name(name, {**plain, **implied})) == (name, implied)


def test_the_help_names_samplers_that_there_are() -> None:
    shown = re.sub(r"\s+", " ", parser().format_help())
    ours = re.search(r"such as ([^()]+) or as A1111 and diffusers call it \('(.+?)', (\w+)\)", shown)
    assert ours is not None
    assert set(re.findall(r"\w{3,}", ours[1])) <= set(SAMPLERS)
    assert find_sampler(ours[2]) == ("dpmpp_2m", KARRAS)
    assert find_sampler(ours[3]) == ("euler", {})
    distilled = {name for name, one in SAMPLERS.items() if one.distilled}
    assert f"a model for {' or '.join(sorted(distilled))} was distilled for" in shown


@sampler(other_names=("Slow Euler",), options=LEVELS, timestep_spacing="trailing")
def slow_euler(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions, start: int
) -> SamplerTable:
    """Euler's method, each step of which is two."""
    levels = sigma_levels(schedule, num_inference_steps, options, start)
    middle = (levels.sigmas[:-1] + levels.sigmas[1:]) / 2
    sigmas = np.stack([levels.sigmas[:-1], middle], axis=1).ravel()
    rows = model_rows(schedule, sigmas, predict="epsilon", variance_preserving=False)
    rows[:, Column.A] = 1.0
    rows[:, Column.B0] = np.diff(sigmas, append=levels.sigmas[-1])
    steps = np.arange(len(rows)) // 2
    return SamplerTable(timestep_from_sigma(schedule, sigmas), rows, levels.init_noise_sigma, steps)


def test_adding_a_sampler(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One function, one entry: then it has tables, names and options, and draws."""
    monkeypatch.setitem(SAMPLERS, slow_euler.name, slow_euler)
    table = make_table("slow_euler", NoiseSchedule(), 3, start=1)
    assert (table.name, len(table), table.start, table.num_inference_steps) == ("slow_euler", 4, 1, 3)
    assert find_sampler("Slow Euler Karras") == ("slow_euler", KARRAS)
    assert a1111_name("slow_euler", KARRAS) == "Slow Euler Karras"
    with pytest.raises(UsageError, match="the sampler slow_euler has no solver_order: use it with deis"):
        make_table("slow_euler", NoiseSchedule(), 3, SamplerOptions(solver_order=2))
    with pytest.raises(UsageError, match=r"allowed are .*pndm, slow_euler, tcd, unipc"):
        find_sampler("unknown")

    pipeline = Pipeline.load(tiny_bundle)
    call: dict[str, Any] = {"seed": 1, "output_type": "numpy"}
    drawn = pipeline("x", sampler="slow euler karras", num_inference_steps=20, **call)
    assert drawn.recipes[0]["sampler"] == "slow_euler"
    assert drawn.recipes[0]["sigma_schedule"] == "karras"
    alike = pipeline("x", sampler="euler", spacing="trailing", num_inference_steps=20, **call)
    other = pipeline("x", sampler="euler", spacing="trailing", num_inference_steps=20, **call | {"seed": 2})
    difference = np.abs(drawn.images[0].astype(float) - alike.images[0]).mean()
    assert difference < np.abs(other.images[0].astype(float) - alike.images[0]).mean() / 4
