"""Error against cost of every sampler on data whose exact model is known.

``python -m sdrt.benchmarks.sampler_convergence`` takes 15 s on a CPU.

The data are a mixture of Gaussians in one dimension, with Stable Diffusion's noise schedule. The model is the
exact noise prediction at a row's own noise level, so that only the samplers err. Two panels:

* samplers without fresh noise: root mean square distance to the exact solution of the probability-flow
  ODE from the same noise, where sampling ends;
* samplers with fresh noise: distance between the distributions drawn and the data's (Wasserstein-1),
  down to what the number of samples resolves. ``lcm`` is for models that were distilled: its model is the
  exact consistency function, which leads to where the ODE ends, so that it errs by the samples alone.

Both over calls of the model, not over steps. Writes ``sampler_convergence.svg`` and ``.json``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np

from sdrt.benchmarks.convergence_plot import Panel, svg
from sdrt.kernels.sampler_row import Column
from sdrt.runtime.samplers.registry import SAMPLERS, make_table
from sdrt.runtime.samplers.schedule import FloatArray, NoiseSchedule
from sdrt.runtime.samplers.table import SamplerOptions, SamplerTable, run_table

RESULTS: Final = Path(__file__).parent / "results"
STEPS: Final = (4, 6, 8, 10, 14, 20, 28, 40, 50)
SAMPLES: Final = 2048
RUNS: Final = 16  # of a sampler with fresh noise
# Weight, mean and standard deviation of each Gaussian; latents have about unit variance.
MIXTURE: Final = ((0.45, -0.9, 0.25), (0.35, 0.4, 0.15), (0.2, 1.5, 0.35))
SCHEDULE: Final = NoiseSchedule(steps_offset=0, set_alpha_to_one=True)
REFERENCE_STEPS: Final = 300


def posterior_mean(x: FloatArray, sigma: float) -> FloatArray:
    """The clean latents expected from ``x = x0 + sigma * noise``; float64 of x's shape."""
    weight, mean, std = np.array(MIXTURE).T
    variance = std**2 + sigma**2
    distance = x[:, None] - mean
    log_share = np.log(weight) - 0.5 * distance**2 / variance - 0.5 * np.log(variance)
    share = np.exp(log_share - log_share.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    expected: FloatArray = (share * (mean + std**2 / variance * distance)).sum(axis=1)
    return expected


def exact_model(table: SamplerTable) -> Callable[[FloatArray, float], FloatArray]:
    """The noise prediction for `run_table`, which calls it row by row."""
    rows = zip(table.rows, table.sigmas.tolist(), strict=True)

    def predict(z: FloatArray, _timestep: float) -> FloatArray:
        row, sigma = next(rows)
        exploding = z / (row[Column.INPUT_SCALE] * row[Column.SIGNAL])
        noise: FloatArray = (exploding - posterior_mean(exploding, sigma)) / sigma
        return noise

    return predict


def consistency_model(table: SamplerTable) -> Callable[[FloatArray, float], FloatArray]:
    """As `exact_model`, of a distilled model: its clean latents are where the ODE from x ends.

    In one dimension the ODE keeps the order of its solutions: a quantile of x becomes that of the data.
    """
    rows = zip(table.rows, table.sigmas.tolist(), strict=True)

    def predict(z: FloatArray, _timestep: float) -> FloatArray:
        row, sigma = next(rows)
        exploding = z / (row[Column.INPUT_SCALE] * row[Column.SIGNAL])
        x0 = np.interp(np.interp(exploding, *mixture_shares(sigma)), *mixture_shares(0.0)[::-1])
        noise: FloatArray = (exploding - x0) / sigma
        return noise

    return predict


def exact_solution(x: FloatArray, begin: float, end: float) -> FloatArray:
    """The probability-flow ODE from sigma ``begin`` to ``end`` by many steps of Runge-Kutta of order 4."""
    times = np.linspace(math.log(begin), math.log(end), REFERENCE_STEPS + 1)

    def slope(time: float, x: FloatArray) -> FloatArray:  # dx / d log sigma
        return x - posterior_mean(x, math.exp(time))

    for now, after in pairwise(times):
        h = after - now
        k1 = slope(now, x)
        k2 = slope(now + h / 2, x + h / 2 * k1)
        k3 = slope(now + h / 2, x + h / 2 * k2)
        k4 = slope(after, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@cache
def normal_quantiles(count: int) -> FloatArray:
    """The middle quantiles of the normal distribution, [count]: as even a sample as there is."""
    grid = np.linspace(-6.0, 6.0, 20001)
    share = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in grid])
    return np.interp((np.arange(count) + 0.5) / count, share, grid)


@cache
def mixture_quantiles(count: int) -> FloatArray:
    """The same of the data."""
    grid, share = mixture_shares(0.0)
    return np.interp((np.arange(count) + 0.5) / count, share, grid)


@cache
def mixture_shares(sigma: float) -> tuple[FloatArray, FloatArray]:
    """Points [8001], and the share of ``x0 + sigma * noise`` that lies below each."""
    grid = np.linspace(-4.0 - 6.0 * sigma, 5.0 + 6.0 * sigma, 8001)
    share = np.zeros_like(grid)
    for weight, mean, std in MIXTURE:
        share += weight * _normal_share((grid - mean) / math.hypot(std, sigma))
    return grid, share


def ode_error(table: SamplerTable, exact: Callable[[float, float], FloatArray]) -> float:
    """Root mean square error of the last row's guess of the clean latents against the exact guess."""
    sigmas = table.sigmas
    start = table.rows[0, Column.SIGNAL] * math.hypot(1.0, sigmas[0]) * normal_quantiles(SAMPLES)
    rows = len(table) - 1
    most = SamplerTable(table.timesteps[:rows], table.rows[:rows], table.init_noise_sigma)
    x = run_table(most, exact_model(table), start) / table.rows[-1, Column.SIGNAL]
    return float(np.sqrt(np.mean((x - exact(float(sigmas[0]), float(sigmas[-1]))) ** 2)))


def distribution_error(table: SamplerTable) -> float:
    """Wasserstein-1 distance of what is drawn to the data, the mean over ``RUNS`` runs."""
    random = np.random.default_rng(0)
    start = table.rows[0, Column.SIGNAL] * normal_quantiles(SAMPLES)
    start *= math.hypot(1.0, table.sigmas[0])
    distances = []
    for _ in range(RUNS):
        noise = random.standard_normal((len(table), SAMPLES))
        model = consistency_model(table) if table.name == "lcm" else exact_model(table)
        drawn = run_table(table, model, start, noise)
        distances.append(float(np.mean(np.abs(np.sort(drawn) - mixture_quantiles(SAMPLES)))))
    return float(np.mean(distances))


def measure(steps: Sequence[int]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """For each panel and each sampler [calls of the model, error] at every number of steps."""
    known: dict[tuple[float, float], FloatArray] = {}

    def exact(begin: float, end: float) -> FloatArray:
        if (begin, end) not in known:
            start = math.hypot(1.0, begin) * normal_quantiles(SAMPLES)
            known[begin, end] = exact_solution(start, begin, end)
        return known[begin, end]

    result: dict[str, dict[str, list[tuple[int, float]]]] = {"ode": {}, "sde": {}}
    for name, sampler in SAMPLERS.items():
        karras = SamplerOptions(sigma_schedule="karras")
        options = karras if "sigma_schedule" in sampler.options else SamplerOptions()
        tables = [make_table(name, SCHEDULE, count, options) for count in steps]
        noisy = tables[0].uses_noise
        error = distribution_error if noisy else lambda table: ode_error(table, exact)
        result["sde" if noisy else "ode"][name] = [(len(table), error(table)) for table in tables]
    return result


def _normal_share(z: FloatArray) -> FloatArray:
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in z])


def plotted(result: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> str:
    """The two panels as SVG."""
    panels = [
        Panel("Without fresh noise", "RMS error to the exact ODE solution", result["ode"]),
        Panel(
            "With fresh noise (lcm: exact consistency model)",
            "Wasserstein-1 distance to the data",
            result["sde"],
        ),
    ]
    return svg(panels, "calls of the model", "Samplers on a mixture of Gaussians, exact model")


def main() -> None:
    parser = argparse.ArgumentParser(description="Error against cost of every sampler, as a plot.")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder (default: the repository's results)"
    )
    folder = parser.parse_args().out
    result = measure(STEPS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sampler_convergence.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "sampler_convergence.svg").write_text(plotted(result))
    print(f"wrote {folder}/sampler_convergence.svg and .json")


if __name__ == "__main__":
    main()
