"""w of each row: per step, inside an interval, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers.guiders import ClassifierFreeGuidance

from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers.guidance import guidance_weights
from sdrt.runtime.samplers.registry import make_table
from sdrt.runtime.samplers.schedule import NoiseSchedule

TABLE = make_table("euler", NoiseSchedule(), 10)


def test_one_number_is_for_every_row() -> None:
    weights = guidance_weights(TABLE, 7)
    assert weights.dtype == np.float64
    assert weights.tolist() == [7.0] * 10


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.8), (0.0, 0.01), (0.29, 0.7), (0.55, 1.0), (0, 1)])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 25, 50, 100])
def test_interval_is_that_of_diffusers(steps: int, interval: tuple[float, float]) -> None:
    guider = ClassifierFreeGuidance(guidance_scale=5.0, start=interval[0], stop=interval[1])
    weights = guidance_weights(make_table("ddim", NoiseSchedule(), steps), 5.0, interval)
    guided = []
    for step in range(steps):
        guider.set_state(step=step, num_inference_steps=steps, timestep=None)
        guided.append(guider._is_cfg_enabled())
    assert weights.tolist() == [5.0 if inside else 1.0 for inside in guided]


@pytest.mark.parametrize("name", ["heun", "dpm2", "dpm2_a", "dpmpp_sde"])
def test_both_rows_of_a_step_have_one_w(name: str) -> None:
    table = make_table(name, NoiseSchedule(), 4)
    assert guidance_weights(table, [2, 3, 4, 5]).tolist() == [2, 2, 3, 3, 4, 4, 5]
    assert guidance_weights(table, [2, 3, 4, 5], (0.25, 0.75)).tolist() == [1, 1, 3, 3, 4, 4, 1]


def test_pndm_does_its_first_step_twice() -> None:
    table = make_table("pndm", NoiseSchedule(), 3)
    assert guidance_weights(table, (2.0, 3.0, 4.0)).tolist() == [2, 2, 3, 4]


@pytest.mark.parametrize("name", ["ddim", "heun", "pndm"])
def test_left_out_steps_leave_out_their_w(name: str) -> None:
    """The interval is of the steps that are left."""
    table = make_table(name, NoiseSchedule(), 6, start=2)
    scales = [1.5, 2, 3, 4, 5, 6]
    rows = {"ddim": [3, 4, 5, 6], "heun": [3, 3, 4, 4, 5, 5, 6], "pndm": [3, 3, 4, 5, 6]}[name]
    assert guidance_weights(table, scales).tolist() == rows
    halved = guidance_weights(table, scales, (0.5, 1.0))
    assert halved.tolist() == [w if w >= 5 else 1 for w in rows]
    with pytest.raises(UsageError, match="holds 4 numbers: give one, or one for each of the 6 steps"):
        guidance_weights(table, scales[2:])


@pytest.mark.parametrize(
    ("scale", "interval", "message"),
    [
        (float("nan"), (0, 1), "guidance_scale is nan: allowed are numbers from 0 to 1000"),
        (float("inf"), (0, 1), "guidance_scale is inf"),
        (-0.1, (0, 1), "guidance_scale is -0.1"),
        (1000.1, (0, 1), "guidance_scale is 1000.1"),
        ("7", (0, 1), "guidance_scale is '7'"),
        (None, (0, 1), "guidance_scale is None"),
        (True, (0, 1), "guidance_scale is True"),
        ([1.0] * 9, (0, 1), "guidance_scale holds 9 numbers: give one, or one for each of the 10 steps"),
        ([1.0] * 11, (0, 1), "holds 11 numbers"),
        ([], (0, 1), "holds 0 numbers"),
        ([1.0] * 9 + [float("nan")], (0, 1), r"guidance_scale\[9\] is nan"),
        ([1.0] * 3 + ["2"] * 7, (0, 1), r"guidance_scale\[3\] is '2'"),
        (7.0, (0.5, 0.5), r"guidance_interval is \(0.5, 0.5\): .* 0 <= start < stop <= 1"),
        (7.0, (0.8, 0.2), "guidance_interval is"),
        (7.0, (-0.1, 1), "guidance_interval is"),
        (7.0, (0, 1.1), "guidance_interval is"),
        (7.0, (0, float("nan")), "guidance_interval is"),
        (7.0, (0, 0.5, 1), "guidance_interval is"),
        (7.0, 0.5, "guidance_interval is 0.5"),
        (7.0, "01", "guidance_interval is '01'"),
        (7.0, (False, True), "guidance_interval is"),
    ],
)
def test_refuses(scale: Any, interval: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        guidance_weights(TABLE, scale, interval)
