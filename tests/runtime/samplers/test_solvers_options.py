"""make_table: what it takes, what it refuses and how, and how many rows come of it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionImg2ImgPipeline
from support.references.solver_reference import fake_model, normal

from sdrt.kernels.sampler_row import COLUMNS, Column
from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers.registry import SAMPLERS, first_step, make_table
from sdrt.runtime.samplers.schedule import TIMESTEP_SPACINGS, NoiseSchedule
from sdrt.runtime.samplers.table import SamplerOptions, SamplerTable, run_table

SCHEDULE = NoiseSchedule()
TWO_ROWS = ("heun", "dpm2", "dpm2_a", "dpmpp_sde")


def test_tables_say_what_they_need() -> None:
    tables = {name: make_table(name, SCHEDULE, 5) for name in SAMPLERS}
    rows = {name: len(table) for name, table in tables.items()}
    assert rows == {name: 9 if name in TWO_ROWS else 6 if name == "pndm" else 5 for name in SAMPLERS}
    history = {name: table.num_history for name, table in tables.items() if table.num_history}
    assert history == {
        "heun": 1,
        "dpmpp_2m": 1,
        "dpmpp_2m_sde": 1,
        "deis": 1,
        "dpmpp_sde": 1,
        "dpmpp_3m_sde": 2,
        "unipc": 2,
        "lms": 3,
        "pndm": 3,
    }
    noisy = {name for name, table in tables.items() if table.uses_noise}
    assert noisy == {"ddpm", "dpm2_a", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde", "euler_a", "lcm"}
    for table in tables.values():
        assert table.rows.shape == (len(table), COLUMNS)
        assert table.rows.dtype == table.timesteps.dtype == np.float64
        assert table.rows[-1, Column.C] == 0.0
        for array in (table.rows, table.timesteps):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0.0
    with pytest.raises(UsageError, match="adds noise"):
        run_table(make_table("ddim", SCHEDULE, 2, eta=1.0), fake_model, normal(3))


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step(name: str) -> None:
    table = make_table(name, SCHEDULE, 1)
    assert len(table) == 1
    assert not table.uses_noise
    assert table.num_history == 0


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_finite_for_every_count(name: str, spacing: str) -> None:
    schedule = NoiseSchedule(num_train_timesteps=100, timestep_spacing=spacing, steps_offset=0)
    drops_last = name in ("deis", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc")
    most = 50 if name in ("lcm", "tcd") else 99 if drops_last and spacing == "leading" else 100
    for steps in range(1, most + 1):
        table = make_table(name, schedule, steps)
        assert np.all(np.isfinite(table.rows))
        assert np.all((table.timesteps >= 0) & (table.timesteps <= 99))
        # The second timestep of dpm2_a is the next first, found by interpolation in float32.
        assert np.all(np.diff(table.timesteps) <= (1e-5 if name == "dpm2_a" else 0.0))


@pytest.mark.parametrize("name", [n for n, s in SAMPLERS.items() if s.max_order > 1])
def test_finite_where_timesteps_round_to_one(name: str) -> None:
    """Steps without length, at every order: nothing is divided by them."""
    schedule = NoiseSchedule(num_train_timesteps=100, timestep_spacing="linspace")
    for order in range(1, SAMPLERS[name].max_order + 1):
        for steps in (97, 98, 99, 100):
            table = make_table(name, schedule, steps, SamplerOptions(solver_order=order))
            assert np.all(np.isfinite(table.rows))
            result = run_table(table, fake_model, normal(4) * table.init_noise_sigma)
            assert np.all(np.abs(result) < 10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_start_leaves_out_steps(name: str) -> None:
    whole, part = make_table(name, SCHEDULE, 10), make_table(name, SCHEDULE, 10, start=4)
    assert len(part) == len(whole) - (8 if name in TWO_ROWS else 4)
    np.testing.assert_array_equal(part.timesteps, whole.timesteps[-len(part) :])
    assert part.init_noise_sigma == whole.init_noise_sigma


@pytest.mark.parametrize("start", [0, 3, 4])
@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_know_their_step(name: str, start: int) -> None:
    table = make_table(name, SCHEDULE, 5, start=start)
    last = 4 - start
    if name in TWO_ROWS:
        steps = [step for step in range(last) for _ in range(2)] + [last]
    else:
        steps = [0] * (name == "pndm") + list(range(last + 1))
    assert table.steps.tolist() == steps
    assert (table.start, table.num_inference_steps) == (start, 5)
    with pytest.raises(ValueError, match="read-only"):
        table.steps[0] = 1


@pytest.mark.parametrize("steps", [[1, 2], [0, 2], [0, -1], [0], [0, 0, 1]])
def test_steps_that_do_not_fit_the_rows_are_refused(steps: list[int]) -> None:
    with pytest.raises(UsageError, match="allowed are 2 that rise from 0"):
        SamplerTable(np.array([2.0, 1.0]), np.zeros((2, COLUMNS)), 1.0, np.array(steps))


@pytest.mark.parametrize("num_inference_steps", [1, 2, 7, 20, 50, 999])
def test_strength_leaves_out_as_many_steps_as_diffusers(num_inference_steps: int) -> None:
    """But that it always does one; `get_timesteps` of its image-to-image pipelines needs little of them."""
    pipeline = SimpleNamespace(scheduler=SimpleNamespace(timesteps=np.arange(num_inference_steps), order=1))
    for hundredths in range(1, 101):
        strength = hundredths / 100
        start = first_step(num_inference_steps, strength)
        get_timesteps = StableDiffusionImg2ImgPipeline.get_timesteps
        timesteps, count = get_timesteps(pipeline, num_inference_steps, strength, "cpu")
        assert num_inference_steps - start == max(count, 1)
        assert list(range(start, num_inference_steps))[-count:] == timesteps.tolist() or count == 0


@pytest.mark.parametrize("strength", [0, 0.0, -0.5, 1.01, float("nan"), float("inf"), "0.5", None, True])
def test_refuses_strength(strength: Any) -> None:
    with pytest.raises(UsageError, match=r"strength is .*: allowed are numbers above 0, .* to 1"):
        first_step(20, strength)


def test_old_keywords_stand_for_options() -> None:
    for name, old, new in (
        ("euler", {"karras": True}, SamplerOptions(sigma_schedule="karras")),
        ("ddim", {"eta": 0.5}, SamplerOptions(eta=0.5)),
        ("euler_a", {"eta": 0.0}, SamplerOptions()),
    ):
        ours = make_table(name, SCHEDULE, 5, **old)
        np.testing.assert_array_equal(ours.rows, make_table(name, SCHEDULE, 5, new).rows)


def test_options_know_what_is_given() -> None:
    assert SamplerOptions().given == ()
    assert SamplerOptions(eta=0.0, solver_order=2).given == ("eta", "solver_order")
    assert SamplerOptions(timesteps=(3, 2)).num_given_steps == 2
    assert SamplerOptions(sigmas=(3.0, 2.0, 0.0)).num_given_steps == 2
    assert SamplerOptions().num_given_steps is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0: allowed are .* 1 to 1000"),
        ({"num_inference_steps": 10**6}, "num_inference_steps is 1000000"),
        ({"num_inference_steps": -3}, "from 1 to 1000"),
        ({"num_inference_steps": 2.5}, "whole numbers"),
        ({"num_inference_steps": True}, "whole numbers"),
        ({"num_inference_steps": None}, "num_inference_steps is missing"),
        ({"num_inference_steps": 1000}, "steps do not fit .* ask for fewer"),
        ({"name": "eular"}, "did you mean euler.* allowed are ddim, ddpm, deis"),
        ({"name": "DPM++ 2M"}, "did you mean dpmpp_2m"),
        ({"name": "DPM++ 2M SDE Karras"}, "did you mean dpmpp_2m_sde"),
        ({"name": "dpmpp_2m_karras"}, "did you mean dpmpp_2m"),
        ({"name": "zzz"}, "unknown sampler 'zzz': allowed are"),
        ({"karras": True}, "ddim has no karras: use it with deis, dpm2"),
        ({"name": "euler", "eta": 0.5}, "euler has no eta: use it with ddim"),
        ({"eta": float("nan")}, "eta is nan: allowed are numbers from 0 to 1"),
        ({"eta": float("inf")}, "eta is inf"),
        ({"eta": -0.1}, "eta is -0.1"),
        ({"start": 20}, "start is 20: allowed are whole numbers from 0 to 19"),
        ({"start": -1}, "start is -1"),
        ({"name": "lcm", "num_inference_steps": 51}, "51 steps of a model that was distilled for 50"),
        ({"name": "tcd", "start": 0, "num_inference_steps": 60}, "distilled for 50: ask for fewer"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    given_arguments = {"name": "ddim", "num_inference_steps": 20, **arguments}
    with pytest.raises(UsageError, match=message):
        make_table(schedule=SCHEDULE, **given_arguments)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddim", {"sigma_schedule": "beta"}, "ddim has no sigma_schedule: use it with deis"),
        ("pndm", {"timesteps": (9, 3)}, "pndm has no timesteps"),
        ("euler", {"solver_order": 2}, "euler has no solver_order: use it with deis"),
        ("unipc", {"solver_order": 4}, "solver_order is 4: allowed are whole numbers from 1 to 3"),
        ("lms", {"solver_order": 0}, "solver_order is 0: allowed are whole numbers from 1 to 4"),
        ("lms", {"lower_order_final": False}, "lms has no lower_order_final"),
        ("unipc", {"lower_order_final": 0}, "lower_order_final is 0: allowed are True and False"),
        ("euler", {"spacing": "even"}, "spacing is 'even': allowed are leading, trailing, linspace, sgm_uni"),
        ("euler", {"sigma_schedule": "kerras"}, "sigma_schedule is 'kerras': allowed are beta, exponential"),
        ("euler", {"sigma_schedule": "beta", "timesteps": (9,)}, "sigma_schedule and timesteps are given"),
        ("euler", {"timesteps": ()}, r"timesteps are \(\): a tuple of at least 1"),
        ("euler", {"timesteps": [9, 3]}, "a tuple of at least 1"),
        ("euler", {"timesteps": (9, 9)}, "timesteps go from 9 to 9: each must be below"),
        ("euler", {"timesteps": (1000, 9)}, "timesteps hold 1000: .* numbers from 0 to 999"),
        ("euler", {"timesteps": (9, -1)}, r"timesteps hold -1: allowed are numbers from 0 to 1e\+06"),
        ("euler", {"timesteps": (9, "1")}, "timesteps hold '1'"),
        ("ddpm", {"timesteps": (900.5, 9)}, "timesteps hold 900.5: .* whole numbers from 0 to 999"),
        ("dpmpp_2m", {"timesteps": (900.5, 9)}, "timesteps hold 900.5: .* whole numbers from 0 to 999"),
        ("euler", {"sigmas": (3.0,)}, "sigmas are .*: a tuple of at least 2"),
        ("euler", {"sigmas": (3.0, 1.0)}, "sigmas end with 1.0: the last must be 0"),
        ("euler", {"sigmas": (float("nan"), 0.0)}, "sigmas hold nan"),
        ("euler", {"sigmas": (float("inf"), 0.0)}, "sigmas hold inf"),
        (
            "euler",
            {"sigmas": (3.0, 1.0, 0.0)},
            "is 20, but there are .* for 2: leave it out",
        ),
        ("lcm", {"original_inference_steps": 0}, "original_inference_steps is 0"),
        ("lcm", {"original_inference_steps": 2000}, "original_inference_steps is 2000: the model has 1000"),
        ("ddim", {"original_inference_steps": 4}, "use it with lcm, tcd"),
    ],
)
def test_refuses_options(name: str, options: dict[str, Any], message: str) -> None:
    steps = None if message.startswith("timesteps hold") else 20
    with pytest.raises(UsageError, match=message):
        make_table(name, SCHEDULE, steps, SamplerOptions(**options))


@pytest.mark.parametrize("name", ["ddim", "ddpm", "lcm", "tcd"])
def test_noise_cannot_be_predicted_without_signal(name: str) -> None:
    schedule = NoiseSchedule(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(UsageError, match="signal"):
        make_table(name, schedule, 20)


def test_imports_no_torch() -> None:
    code = (
        "import sys, sdrt.runtime.samplers.schedule, sdrt.runtime.samplers.registry\n"
        "sys.exit(','.join({'torch', 'diffusers', 'scipy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
