"""Sequences of sigmas between two ends that do not follow the training timesteps.

Each is a function of a number of sigmas and of the two ends, and returns float64 [num], falling from
``sigma_max`` to ``sigma_min``, without the final 0; one sigma alone is ``sigma_max``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from sdrt.runtime.samplers.edm import EdmScaling
from sdrt.runtime.samplers.schedule import FloatArray

BETA_SHAPE = 0.6  # both parameters of the beta distribution, as Lee et al. recommend


def karras_sigmas(num: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> FloatArray:
    """Evenly spaced in ``sigma ** (1 / rho)`` (Karras et al. 2022, eq. 5)."""
    ramp = np.linspace(0.0, 1.0, num)
    low, high = float(sigma_min) ** (1.0 / rho), float(sigma_max) ** (1.0 / rho)
    sigmas: FloatArray = (high + ramp * (low - high)) ** rho
    return sigmas


def exponential_sigmas(num: int, sigma_min: float, sigma_max: float) -> FloatArray:
    """Evenly spaced in log sigma (k-diffusion ``get_sigmas_exponential``)."""
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), num))


def beta_sigmas(num: int, sigma_min: float, sigma_max: float) -> FloatArray:
    """At evenly spaced quantiles of a beta distribution (Lee et al. 2024, "Beta Sampling is All You Need").

    Both of its parameters are ``BETA_SHAPE``: the steps are dense at both ends.
    """
    share = symmetric_beta_quantile(1.0 - np.linspace(0.0, 1.0, num), BETA_SHAPE)
    return sigma_min + share * (sigma_max - sigma_min)


SIGMA_SCHEDULES: dict[str, Callable[[int, float, float], FloatArray]] = {
    "beta": beta_sigmas,
    "exponential": exponential_sigmas,
    "karras": karras_sigmas,
}


def edm_sigmas(edm: EdmScaling, num: int) -> FloatArray:
    """The levels of a run of an EDM model, as its own ``sigma_schedule`` spreads them."""
    if edm.sigma_schedule == "karras":
        return karras_sigmas(num, edm.sigma_min, edm.sigma_max, edm.rho)
    return exponential_sigmas(num, edm.sigma_min, edm.sigma_max)


def symmetric_beta_quantile(probability: FloatArray, shape: float) -> FloatArray:
    """Where the distribution function of Beta(shape, shape), 0 < shape < 1, has the given values.

    Args:
        probability: float64 of any shape, in [0, 1].
        shape: Both parameters.

    Returns:
        float64 of the same shape, in [0, 1].
    """
    # The function is I(x) = x^a / (a B) * sum_k (1 - a)_k / k! * a / (a + k) * x^k (NIST DLMF 8.17.7).
    # For probabilities up to 1/2, where x <= 1/2, the series is short; the rest follows by symmetry. In
    # y = x^a it is convex and at least y / (a B), so Newton's method falls from there to the root.
    a = shape
    log_beta = 2 * math.lgamma(a) - math.lgamma(2 * a)
    k = np.arange(1, 100)
    term = np.cumprod((k - a) / k) * a
    from numpy.polynomial.polynomial import polyval  # 4 ms that other sequences need not wait for

    series, slope = np.append(1.0, term / (a + k)), np.append(1.0, term / a)  # slope: of y * series
    low = np.minimum(probability, 1.0 - probability)
    target = low * a * math.exp(log_beta)
    y = target
    for _ in range(8):
        x = y ** (1 / a)
        y = y - (y * polyval(x, series) - target) / polyval(x, slope)
    x = y ** (1 / a)
    return np.where(probability <= 0.5, x, 1.0 - x)
