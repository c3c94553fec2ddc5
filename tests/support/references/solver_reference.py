"""diffusers' schedulers as the reference for our sampler tables: same options, same model, same noise."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import diffusers
import diffusers.schedulers  # before torchsde is put in its place: it looks for packages
import numpy as np
import torch

from sdrt.runtime.samplers.schedule import FloatArray, NoiseSchedule
from sdrt.runtime.samplers.table import SamplerOptions

Model = Callable[[FloatArray, float], FloatArray]

SHAPE = (2, 4, 8, 8)


@dataclass(frozen=True)
class Reference:
    """A scheduler of diffusers: its module, its class, and the options that make it our sampler.

    ``samples``: whether it knows the prediction type ``sample``.
    """

    module: str
    scheduler: str
    options: dict[str, Any]
    samples: bool = True


def _dpm(algorithm: str, order: int) -> Reference:
    options = {"algorithm_type": algorithm, "solver_order": order}
    return Reference("dpmsolver_multistep", "DPMSolverMultistepScheduler", options)


REFERENCES = {
    "ddim": Reference("ddim", "DDIMScheduler", {"clip_sample": False}),
    "ddpm": Reference("ddpm", "DDPMScheduler", {"clip_sample": False}),
    "deis": Reference("deis_multistep", "DEISMultistepScheduler", {}),
    "dpm2": Reference("k_dpm_2_discrete", "KDPM2DiscreteScheduler", {}, samples=False),
    "dpm2_a": Reference("k_dpm_2_ancestral_discrete", "KDPM2AncestralDiscreteScheduler", {}, samples=False),
    "dpmpp_2m": _dpm("dpmsolver++", 2),
    "dpmpp_2m_sde": _dpm("sde-dpmsolver++", 2),
    "dpmpp_3m_sde": _dpm("sde-dpmsolver++", 3),
    "dpmpp_sde": Reference("dpmsolver_sde", "DPMSolverSDEScheduler", {}, samples=False),
    "euler": Reference("euler_discrete", "EulerDiscreteScheduler", {}),
    "euler_a": Reference("euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", {}, samples=False),
    "heun": Reference("heun_discrete", "HeunDiscreteScheduler", {}),
    "lcm": Reference("lcm", "LCMScheduler", {}),
    "lms": Reference("lms_discrete", "LMSDiscreteScheduler", {}),
    "pndm": Reference("pndm", "PNDMScheduler", {"skip_prk_steps": True}, samples=False),
    "tcd": Reference("tcd", "TCDScheduler", {}),
    "unipc": Reference("unipc_multistep", "UniPCMultistepScheduler", {}),
}
# Those whose step makes itself a second use of the noise of the row before.
BROWNIAN = ("dpmpp_sde",)


def fake_model(x: FloatArray, timestep: float) -> FloatArray:
    """Smooth, nonlinear, bounded, different at every pixel and timestep."""
    t = timestep / 1000
    neighbour = np.roll(x, 1, axis=-1)
    m: FloatArray = np.tanh(0.9 * x + 0.4 * t) + 0.3 * np.sin(1.5 * neighbour - 2.0 * t) * np.cos(t)
    return m


def normal(*shape: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(shape)


def relative_error(value: FloatArray, expected: FloatArray) -> float:
    """Largest difference as a share of the largest expected value."""
    assert np.all(np.isfinite(expected))
    return float(np.max(np.abs(value - expected)) / np.max(np.abs(expected)))


def reference_module(name: str) -> ModuleType:
    """The module of diffusers that holds the sampler's scheduler.

    diffusers wants torchsde for one of them and SciPy for others. Neither is needed: Brownian motion comes
    from the test, and what SciPy computes is computed here another way.
    """
    return _with_what_it_wants(f"diffusers.schedulers.scheduling_{REFERENCES[name].module}")


def scheduler_class(name: str) -> Any:
    """A scheduler class of diffusers by its name, in a module of `reference_module`'s kind."""
    # Where a package is not installed, diffusers itself has a dummy of the name.
    modules = {reference.scheduler: reference.module for reference in REFERENCES.values()}
    known = f"diffusers.schedulers.scheduling_{modules[name]}" if name in modules else None
    return getattr(_with_what_it_wants(known or getattr(diffusers, name).__module__), name)


def _with_what_it_wants(path: str) -> ModuleType:
    if path not in sys.modules:
        with_torchsde = "torchsde" in sys.modules
        sys.modules.setdefault("torchsde", ModuleType("torchsde"))
        importlib.import_module(path)
        if not with_torchsde:
            del sys.modules["torchsde"]
    module = sys.modules[path]
    module.__dict__["is_scipy_available"] = lambda: True
    module.__dict__["scipy"] = SimpleNamespace(stats=SimpleNamespace(beta=SimpleNamespace(ppf=beta_quantile)))
    module.__dict__["integrate"] = SimpleNamespace(quad=simpson)
    return module


def diffusers_scheduler(
    name: str, schedule: NoiseSchedule, options: SamplerOptions | None = None, **more: Any
) -> Any:
    """diffusers' scheduler with what our schedule and options say; ``more`` goes to its constructor."""
    reference, options = REFERENCES[name], options or SamplerOptions()
    config = {**schedule.to_dict(), **reference.options, **more}
    if name not in ("ddim", "lcm", "tcd", "pndm"):
        config.pop("set_alpha_to_one", None)
    if options.spacing is not None:
        config["timestep_spacing"] = options.spacing
    if options.sigma_schedule is not None:
        config[f"use_{options.sigma_schedule}_sigmas"] = True
    if options.solver_order is not None and name != "lms":
        config["solver_order"] = options.solver_order
    if not options.lower_order_final:
        config["lower_order_final"] = False
    kind = getattr(reference_module(name), reference.scheduler)
    with quick_to_make(kind):
        return kind(**config)


@contextmanager
def quick_to_make(kind: Any) -> Iterator[None]:
    """Inside, a scheduler that is made does not set all training timesteps, which takes some seconds."""
    original = kind.set_timesteps
    with patch.object(kind, "set_timesteps", lambda self, _all, *more: original(self, 2, *more)):
        yield


def set_timesteps(scheduler: Any, steps: int, options: SamplerOptions | None = None) -> None:
    if options is not None and options.timesteps is not None:
        scheduler.set_timesteps(timesteps=list(options.timesteps))
    elif options is not None and options.sigmas is not None:
        scheduler.set_timesteps(sigmas=list(options.sigmas))
    else:
        scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):  # else it starts at the wrong row of equal timesteps
        scheduler.set_begin_index(0)


@dataclass
class Steps:
    """A run of diffusers' loop: x before the first row and after each, [rows + 1, *x.shape]."""

    xs: list[FloatArray]

    @property
    def last(self) -> FloatArray:
        return self.xs[-1]


def step_options(name: str, options: SamplerOptions) -> dict[str, Any]:
    """What diffusers takes with each step and not with the scheduler."""
    if name in ("ddim", "tcd"):
        return {"eta": options.eta or 0.0}  # which is what diffusers' pipelines give
    return {"order": options.solver_order} if name == "lms" and options.solver_order else {}


def diffusers_run(
    name: str,
    scheduler: Any,
    model: Model,
    start: FloatArray,
    step_noise: FloatArray | None = None,
    *,
    first: int = 0,
    told: FloatArray | None = None,
    **options: Any,
) -> Steps:
    """diffusers' own loop from x = ``start`` at row ``first``, on float64 tensors.

    Row i draws ``step_noise[i]``; the model is told ``told[i]``, by default the scheduler's timesteps;
    ``options`` go to the scheduler's ``step``.
    """
    x, row = torch.from_numpy(start), 0
    xs = [start]

    def noise(*_args: Any, **_options: Any) -> torch.Tensor:
        assert step_noise is not None
        return torch.from_numpy(step_noise[row])

    def brownian(begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """(W(end) - W(begin)) / sqrt(|end - begin|), W made of the rows' noise; see `dpmpp_sde`."""
        if scheduler.state_in_first_order:
            return noise()
        assert step_noise is not None
        middle = scheduler.mid_point_sigma
        before = torch.from_numpy(step_noise[row - 1])
        motion: torch.Tensor = (begin - middle).sqrt() * before + (middle - end).sqrt() * noise()
        return motion.div((begin - end).sqrt())

    if name in BROWNIAN:
        scheduler.noise_sampler = brownian
    module = sys.modules[type(scheduler).__module__]
    with patch.object(module, "randn_tensor", noise, create=True):
        for row, t in enumerate(scheduler.timesteps[first:]):
            z = scheduler.scale_model_input(x, t)
            m = torch.from_numpy(model(z.numpy(), float(t if told is None else told[row])))
            x = scheduler.step(m, t, x, **options).prev_sample
            xs.append(x.numpy())
    return Steps(xs)


class _Widened:
    """A module in which float32 is float64."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.float32 = module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextmanager
def widened(scheduler: Any, schedule: NoiseSchedule) -> Iterator[None]:
    """Inside, a scheduler's tables, its choice of sigmas and its steps round to float64, not to float32.

    So does our schedule's table of sigmas from then on; alphas_cumprod, the float32 numbers of training,
    are ours in both. What remains to be compared are the formulas alone.
    """
    module = sys.modules[type(scheduler).__module__]
    shares = schedule.alphas_cumprod.copy()
    shares[-1] = max(shares[-1], float(scheduler.alphas_cumprod[-1]))  # 0 or almost, for zero terminal SNR
    scheduler.alphas_cumprod = torch.from_numpy(shares)
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = torch.tensor(1.0 if schedule.set_alpha_to_one else shares[0]).double()
    if hasattr(scheduler, "one"):
        scheduler.one = scheduler.one.double()
    with np.errstate(divide="ignore"):
        schedule.__dict__["sigmas"] = np.sqrt((1 - shares) / shares)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with patch.multiple(module, torch=_Widened(torch), np=_Widened(np)):
            yield
    finally:
        torch.set_default_dtype(before)


def simpson(function: Callable[[Any], Any], low: Any, high: Any, **_options: Any) -> tuple[float, float]:
    """Integral of a polynomial up to the third degree (Simpson's rule is exact), in place of SciPy's."""
    low, high = float(low), float(high)
    middle = (low + high) / 2
    value = (function(low) + 4 * function(middle) + function(high)) * (high - low) / 6
    return float(value), 0.0


QUADRATURE = np.polynomial.legendre.leggauss(40)


@cache
def beta_quantile(probability: float, a: float, b: float) -> float:
    """scipy.stats.beta.ppf for both parameters 0.6, by bisection on a numerical integral.

    With t = w^5 the integrand t^(a-1) (1-t)^(b-1) dt is 5 w^2 (1-w^5)^(-0.4) dw, smooth up to t = 1/2.
    """
    assert a == b == 0.6
    points, weights = QUADRATURE

    def below(t: float) -> float:
        top = math.exp(0.2 * math.log(t))
        w = (points + 1) * top / 2
        return float(weights @ (5 * w**2 * (1 - w**5) ** -0.4)) * top / 2

    small = min(probability, 1 - probability)
    low, high, whole = 0.0, 0.5, 2 * below(0.5)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < whole * small else (low, middle)
    return low if probability <= 0.5 else 1 - low
