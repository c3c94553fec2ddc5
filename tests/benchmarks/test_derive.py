"""Figures derived from measurements, against NumPy and by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fakes.example_document import document, small_document

from sdrt.benchmarks.document.document import (
    Ceilings,
    Document,
    Failure,
    Machine,
    Measurement,
    Noise,
    Setting,
    Work,
)
from sdrt.benchmarks.report.derive import (
    REST,
    cold_parts,
    distribution,
    host_time_per_step,
    main_setting,
    percentile,
    ratios,
    throughput,
    typical,
    warm_parts,
)
from sdrt.benchmarks.report.growth import growth
from sdrt.benchmarks.report.limits import attainable, shares, warnings

finite = st.floats(1e-6, 1e6)
MAIN = Setting(64, 64, 1, 10)


def measured(quantity: str, values: list[float], subject: str = "a", **settings: int) -> Measurement:
    """At the main setting of the small document, one value a round."""
    where = {**MAIN._asdict(), **settings}
    return Measurement(
        "m", subject, quantity, **where, values=tuple(values), rounds=tuple(range(len(values)))
    )


def a_document(*entries: Measurement, **others: object) -> Document:
    return replace(small_document(), measurements=entries, **others)  # type: ignore[arg-type]


@settings(max_examples=40)
@given(st.lists(finite, min_size=1, max_size=30), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9)


def test_infinite_values_have_percentiles() -> None:
    assert percentile([math.inf, math.inf], 50) == math.inf
    assert percentile([1.0, math.inf, 3.0], 50) == 3.0
    assert percentile([1.0, math.inf], 50) == math.inf
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_p99_needs_a_hundred_values() -> None:
    assert distribution([1.0] * 99).p99 is None
    values = [float(value) for value in range(1, 101)]
    found = distribution(values)
    assert found.p99 == pytest.approx(np.percentile(values, 99))
    assert (found.count, found.mean, found.p50, found.p90) == pytest.approx((100, 50.5, 50.5, 90.1))


def test_ratios_pair_the_medians_of_the_same_round() -> None:
    ours = replace(measured("step", [1, 3, 2, 8, 5]), rounds=(0, 0, 0, 1, 2))  # rounds: 2, 8, 5
    theirs = replace(measured("step", [4, 10, 7], "b"), rounds=(0, 2, 3))
    (found,) = ratios(a_document(ours, theirs))
    assert found.values == (0.5, 0.5)
    assert (found.subject, found.setting, found.pairs) == ("b", MAIN, 2)
    spread = replace(found, values=(1.0, 2.0, 3.0, 4.0, 10.0)).spread
    assert (spread.lowest, spread.p25, spread.p50, spread.p75, spread.highest) == (1, 2, 3, 4, 10)


def test_other_settings_and_infinite_values_give_no_ratio() -> None:
    apart = a_document(measured("image", [1]), measured("image", [1], "b", steps=20))
    assert ratios(apart) == []
    equal = replace(measured("psnr", [1], "b"), values=(None,))
    assert ratios(a_document(measured("psnr", [40]), equal)) == []


@settings(max_examples=40)
@given(st.floats(0.5, 2), st.floats(1e-3, 10), st.sets(st.integers(1, 64), min_size=2, max_size=6))
def test_a_power_law_gives_its_exponent(exponent: float, factor: float, batches: set[int]) -> None:
    entries = [measured("unet", [factor * batch**exponent], batch=batch) for batch in batches]
    (found,) = growth(a_document(*entries), "batch")
    assert found.exponent == pytest.approx(exponent, abs=1e-6)
    assert found.r_squared == pytest.approx(1, abs=1e-6)


def test_steps_have_a_fixed_cost_and_one_each() -> None:
    entries = [measured("image", [0.3 + 0.02 * steps], steps=steps) for steps in (5, 10, 40)]
    (found,) = growth(a_document(*entries, measured("image", [9], steps=80, batch=2)), "steps")
    assert found.line == pytest.approx((0.02, 0.3))
    assert found.points == ((5, 0.4), (10, 0.5), (40, 1.1))
    pixels = [measured("unet", [side**2 * 1e-6], height=side, width=side) for side in (64, 128)]
    assert [fit.exponent for fit in growth(a_document(*pixels), "pixels")] == [pytest.approx(1)]


def test_parts_throughput_and_host_time() -> None:
    example = a_document(
        measured("cold_total", [2.0, 2.0]),
        measured("cold_load", [0.5, 0.5]),
        measured("cold_image", [1.0, 1.0]),
        measured("image", [1.0]),
        measured("image", [1.6], batch=2),
        measured("image", [9.0], batch=4, steps=3),
        measured("step", [0.08]),
        measured("unet", [0.07], steps=1),
        measured("vae_decoder", [0.15]),
        measured("image", [3.0], "b"),
        measured("step", [0.2], "b"),
    )
    (model,) = example.models
    assert cold_parts(example, model, "a") == [("cold_load", 0.5), ("cold_image", 1.0), (REST, 0.5)]
    assert cold_parts(example, model, "b") == []
    assert host_time_per_step(example, "m", "a", MAIN) == pytest.approx(0.01)
    assert dict(warm_parts(example, model, "a")) == pytest.approx(
        {"unet": 0.7, "host": 0.1, "vae_decoder": 0.15, REST: 0.05}
    )
    assert warm_parts(example, model, "b") == [("step", 2.0), (REST, 1.0)]
    assert throughput(example, model, "a") == {1: 1.0, 2: 1.25}
    assert typical(example, "m", "a", "psnr", MAIN) is None
    assert main_setting(example, model, "psnr") is None


def test_shares_of_the_roofline_by_hand() -> None:
    work = (Work("unet", 64, 64, 1, 400, 100), Work("text_encoder", 8, 8, 1, 100, 100))
    (model,) = small_document().models
    example = a_document(
        measured("unet", [2.0]),
        measured("text_encoder", [4.0]),
        measured("vae_decoder", [1.0]),
        models=(replace(model, work=work),),
        ceilings=(Ceilings(300.0, 100.0, ""),),
    )
    unet, text = shares(example)
    assert (unet.flop_per_s, unet.bytes_per_s, unet.intensity, unet.attainable) == (200, 50, 4, 300)
    assert unet.share == pytest.approx(2 / 3)
    assert (text.attainable, text.share) == (100, 0.25)
    assert attainable(Ceilings(300.0, 100.0, ""), 2.5) == 250
    assert shares(replace(example, ceilings=())) == []
    fast = replace(example, measurements=(measured("unet", [0.5]),))
    assert any("267%" in warning for warning in warnings(fast))


def test_each_doubt_is_told_and_a_good_run_has_none() -> None:
    rounds = [1.0, 1.1, 1.2, 1.1, 1.0]
    quiet = Noise((0.05,) * 19 + (0.09,), (2.4,))
    good = a_document(measured("image", rounds), measured("image", rounds, "b"), noise=quiet)
    assert warnings(good) == []
    doubts = {
        "interrupted": {"complete": False},
        "took 1.20 times": {"noise": Noise((0.05,) * 8 + (0.06,) * 2, ())},
        "not measured": {"noise": Noise()},
        "load average reached 3.0 on 2 cores": {"noise": replace(quiet, load_average=(1.0, 3.0))},
        "1 measurement failed (b)": {"failures": (Failure("m", "b", "load", "no"),)},
        "fewer than 5 rounds (the least on 2)": {
            "measurements": (measured("image", rounds[:2]), measured("image", rounds, "b"))
        },
    }
    for told, change in doubts.items():
        (found,) = warnings(replace(good, **change))  # type: ignore[arg-type]
        assert told in found
    one_core = Machine("", 1, 1, "", "")
    assert "on 1 core " in warnings(replace(good, machine=one_core))[0]


def test_beside_other_programs_not_even_ratios_are_recommended() -> None:
    """Thread pools that spin suffer in very different degrees: a ratio was seen to be off by 40 times."""
    noisy = a_document(measured("image", [1.0] * 5), noise=Noise((0.05,) * 8 + (0.06,) * 2, (1.0,)))
    busy = replace(noisy, noise=replace(noisy.noise, load_average=(4.7,)))
    assert "Trust the ratios" in " ".join(warnings(noisy))
    assert "Trust the ratios" not in " ".join(warnings(busy))
    assert "not even the ratios hold" in " ".join(warnings(busy))


def test_noise_that_was_seen_once_is_told_from_none() -> None:
    entry = measured("image", [1.0] * 5)
    assert warnings(a_document(entry, noise=Noise((0.05,)))) == [
        "The noise of the machine was measured only once."
    ]


def test_the_example_has_figures_of_every_kind() -> None:
    example = document()
    assert len({ratio.quantity for ratio in ratios(example)}) >= 18
    for axis in ("steps", "pixels", "batch"):
        assert growth(example, axis, "emoji")
    assert all(0 < share.share < 1 for share in shares(example))
