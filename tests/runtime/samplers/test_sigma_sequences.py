"""The sequences of sigmas against their formulas and SciPy's numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

import tolerances
from sdrt.runtime.samplers.sigma_sequences import (
    BETA_SHAPE,
    SIGMA_SCHEDULES,
    beta_sigmas,
    exponential_sigmas,
    karras_sigmas,
    symmetric_beta_quantile,
)

# scipy.stats.beta.ppf(probability, 0.6, 0.6) of SciPy 1.17.1.
QUANTILES = {
    0.0: 0.0,
    1e-06: 1.8558824624053043e-10,
    0.001: 1.855873851745199e-05,
    0.01: 0.0008612388215429059,
    1 / 49: 0.002826505325987209,
    0.1: 0.03958440558878085,
    0.25: 0.17568037865269498,
    0.4: 0.3627009907532143,
    0.5: 0.5000000000000001,
    0.6: 0.6372990092467856,
    0.75: 0.824319621347305,
    0.9: 0.9604155944112192,
    48 / 49: 0.9971734946740128,
    0.999: 0.9999814412614826,
    0.999999: 0.9999999998144118,
    1.0: 1.0,
}


def test_karras_sigmas_follow_equation_5() -> None:
    sigmas = karras_sigmas(18, 0.002, 80.0)
    i, n, rho = np.arange(18), 18, 7
    expected = (80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    np.testing.assert_allclose(sigmas, expected, rtol=1e-14)


def test_exponential_sigmas_fall_by_one_factor() -> None:
    sigmas = exponential_sigmas(10, 0.03, 14.6)
    np.testing.assert_allclose(sigmas[1:] / sigmas[:-1], math.exp(math.log(0.03 / 14.6) / 9), rtol=1e-13)


def test_beta_quantiles_are_those_of_scipy() -> None:
    quantiles = symmetric_beta_quantile(np.array(list(QUANTILES)), BETA_SHAPE)
    np.testing.assert_allclose(quantiles, list(QUANTILES.values()), rtol=tolerances.BETA_QUANTILE)


def test_arcsine_distribution_has_a_closed_form() -> None:
    """Beta(1/2, 1/2): the quantile of p is sin^2(pi p / 2)."""
    p = np.linspace(0, 1, 101)
    expected = np.sin(np.pi * p / 2) ** 2
    np.testing.assert_allclose(symmetric_beta_quantile(p, 0.5), expected, rtol=0, atol=1e-15)


def test_beta_sigmas_are_quantiles_between_the_ends() -> None:
    sigmas = beta_sigmas(50, 0.03, 14.6)
    assert (sigmas[1] - 0.03) / 14.57 == pytest.approx(QUANTILES[48 / 49], rel=1e-12)
    assert (sigmas[-2] - 0.03) / 14.57 == pytest.approx(QUANTILES[1 / 49], rel=1e-12)


@pytest.mark.parametrize("name", SIGMA_SCHEDULES)
@pytest.mark.parametrize("num", [2, 7, 1000])
def test_sigmas_fall_from_one_end_to_the_other(name: str, num: int) -> None:
    sigmas = SIGMA_SCHEDULES[name](num, 0.03, 14.6)
    assert len(sigmas) == num
    assert np.all(np.diff(sigmas) < 0)
    assert (sigmas[0], sigmas[-1]) == (pytest.approx(14.6), pytest.approx(0.03))
    assert SIGMA_SCHEDULES[name](1, 0.03, 14.6) == pytest.approx([14.6])
