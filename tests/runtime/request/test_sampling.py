"""How a call samples: the bundle's defaults for its sampler, what undoes them, and recipes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.checkpoints.manifests import example

from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.request.sampling import Sampling, build_sampling
from sdrt.runtime.samplers.registry import make_table
from sdrt.runtime.samplers.schedule import NoiseSchedule
from sdrt.runtime.samplers.table import SamplerOptions

# What a checkpoint with DPM-Solver++ of third order, Karras sigmas and a last noise would say.
SAID = SamplerOptions(
    sigma_schedule="karras", solver_order=3, lower_order_final=False, final_sigmas_type="sigma_min"
)
SCHEDULE = NoiseSchedule(timestep_spacing=None, set_alpha_to_one=None)
STEPS = 8


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return example(schedule=SCHEDULE, defaults=replace(example().defaults, sampler_options=SAID))


def sampled(manifest: Manifest, **options: Any) -> Sampling:
    return build_sampling(manifest, {"num_inference_steps": STEPS, **options}, None)


def same(sampling: Sampling, name: str, schedule: NoiseSchedule, **options: Any) -> bool:
    steps = None if options.keys() & {"timesteps", "sigmas"} else STEPS
    table = make_table(name, schedule, steps, SamplerOptions(**options))
    return np.array_equal(sampling.table.rows, table.rows)


@pytest.mark.parametrize(
    ("asked", "name", "expected"),
    [
        ({}, "dpmpp_2m", SAID.to_dict()),
        ({"sampler": "euler"}, "euler", {"sigma_schedule": "karras", "final_sigmas_type": "sigma_min"}),
        ({"sampler": "heun"}, "heun", {"sigma_schedule": "karras"}),
        ({"sampler": "euler_a"}, "euler_a", {}),
        ({"sampler": "ddim"}, "ddim", {}),
        ({"sampler": "lms"}, "lms", {"sigma_schedule": "karras"}),
        ({"sigma_schedule": "normal"}, "dpmpp_2m", {**SAID.to_dict(), "sigma_schedule": None}),
        ({"sigma_schedule": "beta"}, "dpmpp_2m", {**SAID.to_dict(), "sigma_schedule": "beta"}),
        ({"karras": True, "sampler": "euler_a"}, "euler_a", {"sigma_schedule": "karras"}),
        ({"solver_order": 2}, "dpmpp_2m", {**SAID.to_dict(), "solver_order": 2}),
        ({"lower_order_final": True}, "dpmpp_2m", {**SAID.to_dict(), "lower_order_final": True}),
        (
            {"spacing": "trailing", "sampler": "heun"},
            "heun",
            {"spacing": "trailing", "sigma_schedule": "karras"},
        ),
    ],
    ids=str,
)
def test_a_sampler_takes_the_bundles_options_that_it_has(
    manifest: Manifest, asked: dict[str, Any], name: str, expected: dict[str, Any]
) -> None:
    """And a call's own come before them; a recipe gives the same again."""
    sampling = sampled(manifest, **asked)
    assert same(sampling, name, SCHEDULE, **expected)
    again = build_sampling(manifest, sampling.recipe, None)
    np.testing.assert_array_equal(again.table.rows, sampling.table.rows)
    assert again.recipe == sampling.recipe


@pytest.mark.parametrize(
    "levels", [{"timesteps": (900, 500, 100)}, {"sigmas": (9.0, 3.0, 1.0, 0.0)}], ids=str
)
def test_given_levels_come_before_a_sigma_schedule(manifest: Manifest, levels: dict[str, Any]) -> None:
    sampling = build_sampling(manifest, {"sampler": "euler", **levels}, None)
    assert same(sampling, "euler", SCHEDULE, **levels, final_sigmas_type="sigma_min")
    assert build_sampling(manifest, sampling.recipe, None).recipe == sampling.recipe


def test_recipes_hold_what_a_call_may_say() -> None:
    """And only what is not usual: a bundle without options has the recipes that it had before."""
    recipe = sampled(example()).recipe
    assert set(recipe) == {"num_inference_steps", "guidance_scale", "sampler", "karras", "eta"}


@pytest.mark.parametrize(
    ("name", "spacing"),
    [("ddim", "leading"), ("pndm", "leading"), ("euler", "linspace"), ("unipc", "linspace")],
)
def test_a_spacing_that_is_not_said_is_the_samplers_own(name: str, spacing: str) -> None:
    made = make_table(name, SCHEDULE, STEPS)
    said = replace(SCHEDULE, timestep_spacing=spacing, set_alpha_to_one=name == "ddim")
    np.testing.assert_array_equal(made.rows, make_table(name, said, STEPS).rows)
    assert same(
        sampled(example(schedule=SCHEDULE), sampler=name, spacing="trailing"),
        name,
        SCHEDULE,
        spacing="trailing",
    )
