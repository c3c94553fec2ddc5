"""The noise schedule a checkpoint was trained with, and the ways of choosing noise levels from it.

Words, as in k-diffusion: ``alphas_cumprod[t]`` is the share of variance that is still signal at
training timestep ``t``; ``sigma = sqrt((1 - alphas_cumprod) / alphas_cumprod)`` is the ratio of
noise to signal. A choice of timesteps or of sigmas is a small function that returns an array,
highest noise first; a sampler (:mod:`sdrt.runtime.samplers.registry`) takes one and makes its table.
Everything is float64 NumPy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.checks import choice, flag, is_number, whole_from
from sdrt.runtime.errors import BundleError, UsageError
from sdrt.runtime.samplers.edm import EDM_PREDICTION_TYPES, EdmScaling

FloatArray = NDArray[np.float64]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
MAX_TRAIN_TIMESTEPS = 100_000  # a damaged manifest must not make us allocate gigabytes
_BETAS = ("beta_start", "beta_end", "beta_schedule")  # an EDM model has none
# What a manifest leaves out where the checkpoint does not say it.
_OPTIONAL = ("timestep_spacing", "set_alpha_to_one", "trained_betas", "rescale_betas_zero_snr", "edm")


@dataclass(frozen=True)
class NoiseSchedule:
    """How a checkpoint was trained; the defaults are Stable Diffusion 1.x's.

    Fields have the names and meanings of a diffusers scheduler's config:

    * ``beta_start``, ``beta_end``: variances of the first and the last training step, in (0, 1);
    * ``beta_schedule``: ``linear``, ``scaled_linear`` or ``squaredcos_cap_v2`` (ignores both);
    * ``num_train_timesteps``: 2 to ``MAX_TRAIN_TIMESTEPS``;
    * ``prediction_type``: what the model's output is: ``epsilon``, the noise; ``v_prediction`` (Salimans
      & Ho 2022, appendix D); or ``sample``, the clean latents;
    * ``timestep_spacing``: ``leading``, ``trailing`` or ``linspace`` (Lin et al. 2023, table 2); None where
      the checkpoint does not say, so that each sampler has its own default;
    * ``steps_offset``: added to the timesteps of ``leading``;
    * ``set_alpha_to_one``: whether DDIM's last step ends at no noise or at the noise of timestep 0; None as
      above;
    * ``trained_betas``: all the betas, in place of the first three fields;
    * ``rescale_betas_zero_snr``: whether the betas are rescaled so that the last timestep has no signal;
    * ``edm``: of a model that has noise levels in place of betas and timesteps; the betas then mean nothing.

    Raises ``UsageError`` where a value is of the wrong type, not allowed or out of range.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    num_train_timesteps: int = 1000
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool | None = False
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    edm: EdmScaling | None = None

    def __post_init__(self) -> None:
        whole_from("num_train_timesteps", self.num_train_timesteps, 2, MAX_TRAIN_TIMESTEPS)
        whole_from("steps_offset", self.steps_offset, 0, self.num_train_timesteps - 1)
        choice("beta_schedule", self.beta_schedule, tuple(BETA_SCHEDULES))
        predictions = PREDICTION_TYPES if self.edm is None else EDM_PREDICTION_TYPES
        choice("prediction_type", self.prediction_type, predictions)
        if self.timestep_spacing is not None:
            choice("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if self.set_alpha_to_one is not None:
            flag("set_alpha_to_one", self.set_alpha_to_one, ": allowed are true and false")
        flag("rescale_betas_zero_snr", self.rescale_betas_zero_snr, ": allowed are true and false")
        _check_beta("beta_start", self.beta_start)
        _check_beta("beta_end", self.beta_end)
        if self.trained_betas is not None:
            _check_trained_betas(self.trained_betas, self.num_train_timesteps)
        self._check_sigmas()

    def _check_sigmas(self) -> None:
        if not (np.isfinite(self.sigmas[-1]) and np.all(np.diff(self.sigmas, prepend=0.0) > 0)):
            raise UsageError(
                "these betas do not give noise levels that are finite and rise at every timestep "
                f"(they go from {self.sigmas[0]:.3g} to {self.sigmas[-1]:.3g}): "
                "use the betas the checkpoint was trained with"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule in a bundle's manifest, every field by name; what is `_OPTIONAL` may be missing.

        Raises ``BundleError`` for a field that is missing, unknown or invalid.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - names):
            # repr: a name may hold anything, a line break too
            shown = ", ".join(repr(str(name)[:40]) for name in unknown)
            raise BundleError(f"noise schedule: unknown {shown}: allowed are {', '.join(sorted(names))}")
        optional = {*_OPTIONAL, *(_BETAS if "edm" in data else ())}
        if missing := sorted(names - optional - set(data)):
            raise BundleError(f"noise schedule: no {', '.join(missing)}: export it again")
        if nulls := sorted(name for name in data if data[name] is None and name != "trained_betas"):
            raise BundleError(f"noise schedule: {nulls[0]} is None: leave it out, or give a value")
        betas, edm = data.get("trained_betas"), data.get("edm")
        values = {"timestep_spacing": None, "set_alpha_to_one": None, **data}
        values["trained_betas"] = tuple(betas) if isinstance(betas, list) else betas
        try:
            return cls(**{**values, "edm": None if edm is None else _edm_from_dict(edm)})
        except UsageError as error:
            raise BundleError(f"noise schedule: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a manifest; ``from_dict`` gives an equal schedule back."""
        data = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if "trained_betas" in data:
            data["trained_betas"] = list(data["trained_betas"])
        if not data["rescale_betas_zero_snr"]:
            del data["rescale_betas_zero_snr"]
        return data if self.edm is None else {k: v for k, v in data.items() if k not in _BETAS}

    def with_defaults(self, *, timestep_spacing: str, set_alpha_to_one: bool) -> NoiseSchedule:
        """The schedule as it is, with these where the checkpoint does not say its own."""
        defaults = {"timestep_spacing": timestep_spacing, "set_alpha_to_one": set_alpha_to_one}
        missing: dict[str, Any] = {
            name: value for name, value in defaults.items() if getattr(self, name) is None
        }
        return dataclasses.replace(self, **missing) if missing else self

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The lowest and the highest sigma of training."""
        if self.edm is not None:
            return self.edm.sigma_min, self.edm.sigma_max
        return float(self.sigmas[0]), float(self.sigmas[-1])

    @cached_property
    def alphas_cumprod(self) -> FloatArray:
        """float64 [num_train_timesteps], falling: share of variance that is signal; read-only.

        With ``rescale_betas_zero_snr`` the last is exactly 0.
        """
        # Rounded as in training, because the rounding is part of the schedule: 1 - beta in float32
        # is off by up to 2^-25, 3.5e-5 of a noise variance of 0.00085, and sigma by half of that
        # (float64 betas give Stable Diffusion's lowest sigma 1.3e-5 off). So these are the float32
        # numbers that PyTorch has on a CPU (cumprod accumulates in double), sigmas are float32
        # numbers too, and only what is computed from them is float64.
        if self.trained_betas is None:
            make_betas = BETA_SCHEDULES[self.beta_schedule]
            betas = make_betas(self.beta_start, self.beta_end, self.num_train_timesteps)
        else:
            betas = np.array(self.trained_betas, dtype=np.float32)
        if self.rescale_betas_zero_snr:
            betas = zero_terminal_snr(betas)
        alphas = np.float32(1.0) - betas
        cumprod = np.cumprod(alphas, dtype=np.float64).astype(np.float32)
        return _read_only(cumprod.astype(np.float64))

    @cached_property
    def sigmas(self) -> FloatArray:
        """float64 [num_train_timesteps], rising: ratio of noise to signal; read-only.

        With ``rescale_betas_zero_snr`` the last, infinite, is sqrt(2^24 - 1), as in diffusers: x of a
        sampler in sigma must stay finite. Where that is not above the one before, it is as far above
        as half the signal makes it.
        """
        with np.errstate(divide="ignore", over="ignore"):  # alphas_cumprod that underflow are refused by name
            alphas_cumprod = self.alphas_cumprod.astype(np.float32)
            if self.rescale_betas_zero_snr:
                alphas_cumprod[-1] = min(2.0**-24, alphas_cumprod[-2] / 2)
            return _read_only(np.sqrt((1 - alphas_cumprod) / alphas_cumprod).astype(np.float64))


def linear_betas(beta_start: float, beta_end: float, num_train_timesteps: int) -> NDArray[np.float32]:
    """Betas evenly spaced (Ho et al. 2020, section 4); float32 [num_train_timesteps]."""
    return _torch_linspace(beta_start, beta_end, num_train_timesteps)


def scaled_linear_betas(beta_start: float, beta_end: float, num_train_timesteps: int) -> NDArray[np.float32]:
    """Square roots evenly spaced (latent diffusion's code); float32 [num_train_timesteps]."""
    return _torch_linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_train_timesteps) ** 2


def cosine_betas(num_train_timesteps: int) -> NDArray[np.float32]:
    """alphas_cumprod a squared cosine (Nichol & Dhariwal 2021, eq. 17).

    Returns float32 [num_train_timesteps].
    """
    alphas_cumprod = [
        math.cos((t / num_train_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
        for t in range(num_train_timesteps + 1)
    ]
    betas = [min(1.0 - after / before, 0.999) for before, after in pairwise(alphas_cumprod)]
    return np.array(betas, dtype=np.float32)


def zero_terminal_snr(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Betas shifted and scaled so that no signal is left at the end (Lin et al. 2023, algorithm 1).

    Args:
        betas: float32 [num_train_timesteps].

    Returns:
        float32 of the same shape; the last is 1.
    """
    cumprod = np.cumprod(np.float32(1.0) - betas, dtype=np.float64).astype(np.float32)
    signal = np.sqrt(cumprod)
    first, last = signal[0], signal[-1]
    cumprod = ((signal - last) * (first / (first - last))) ** 2
    alphas = np.append(cumprod[:1], cumprod[1:] / cumprod[:-1])
    return np.float32(1.0) - alphas


BETA_SCHEDULES: dict[str, Callable[[float, float, int], NDArray[np.float32]]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": lambda _start, _end, num_train_timesteps: cosine_betas(num_train_timesteps),
}


def spaced_timesteps(
    schedule: NoiseSchedule, num_inference_steps: int, *, drop_last: bool = False
) -> FloatArray:
    """Training timesteps spread by the schedule's ``timestep_spacing`` (Lin et al. 2023, table 2).

    Returns float64 [num_inference_steps], falling; whole numbers except for ``linspace``. With
    ``drop_last`` one more is spread and the lowest left out, as DPM-Solver does for ``leading`` and
    ``linspace``.

    Raises ``UsageError`` unless ``num_inference_steps`` is a whole number from 1 to
    ``num_train_timesteps``, or where ``leading`` has no room for so many.
    """
    num_train = schedule.num_train_timesteps
    whole_from("num_inference_steps", num_inference_steps, 1, num_train)
    if schedule.timestep_spacing == "trailing":
        return trailing_timesteps(num_train, num_inference_steps)
    spread = num_inference_steps + drop_last
    if schedule.timestep_spacing == "linspace":
        return linspace_timesteps(num_train, spread)[:num_inference_steps]
    timesteps = leading_timesteps(num_train, spread, schedule.steps_offset)[:num_inference_steps]
    if spread > num_train or timesteps[0] >= num_train:
        raise UsageError(
            f"{num_inference_steps} steps do not fit {num_train} training timesteps with leading "
            f"spacing and steps_offset {schedule.steps_offset}: ask for fewer"
        )
    return timesteps


def leading_timesteps(num_train_timesteps: int, num: int, steps_offset: int) -> FloatArray:
    """Multiples of ``num_train_timesteps // num`` plus ``steps_offset``; float64 [num], falling."""
    stride = num_train_timesteps // num
    return np.arange(num, dtype=np.float64)[::-1] * stride + steps_offset


def trailing_timesteps(num_train_timesteps: int, num: int) -> FloatArray:
    """Spread evenly from the last timestep down and rounded; float64 [num], falling."""
    # np.arange's own rounding decides where a half goes, so this is the call that diffusers makes.
    # For some counts (61, 103, ...) it gives one too many, -1: diffusers keeps that, we do not.
    stride = num_train_timesteps / num
    return np.round(np.arange(num_train_timesteps, 0, -stride))[:num] - 1.0


def linspace_timesteps(num_train_timesteps: int, num: int) -> FloatArray:
    """Spread evenly over all timesteps with both ends, not rounded; float64 [num], falling."""
    return np.linspace(0.0, num_train_timesteps - 1, num)[::-1]


def sigma_from_timestep(schedule: NoiseSchedule, timesteps: FloatArray) -> FloatArray:
    """Sigma at timesteps that may be fractional: linear between the training timesteps."""
    return np.interp(timesteps, np.arange(schedule.num_train_timesteps), schedule.sigmas)


def timestep_from_sigma(schedule: NoiseSchedule, sigmas: FloatArray) -> FloatArray:
    """The fractional timestep of each sigma: linear in log sigma, clamped to the training range.

    An EDM model has no such range, and is told a quarter of log sigma.
    """
    if schedule.edm is not None:
        return schedule.edm.timesteps(sigmas)
    # The table is float32 as in diffusers: what it rounds to whole timesteps must not fall on the
    # other side of a half here.
    log_sigmas = np.log(schedule.sigmas.astype(np.float32))
    timesteps = np.arange(schedule.num_train_timesteps, dtype=np.float64)
    return np.interp(np.log(sigmas), log_sigmas, timesteps)


def _edm_from_dict(data: object) -> EdmScaling:
    names = [field.name for field in dataclasses.fields(EdmScaling)]
    if not isinstance(data, dict) or sorted(data) != sorted(names):
        raise UsageError(f"edm is {str(data)[:100]!r}: it must have just {', '.join(names)}")
    return EdmScaling(**data)


def _check_beta(name: str, value: object) -> None:
    if not is_number(value) or not 0.0 < value < 1.0:
        raise UsageError(f"{name} is {value!r}: allowed are numbers between 0 and 1")


def _check_trained_betas(betas: object, num_train_timesteps: int) -> None:
    if not isinstance(betas, tuple) or len(betas) != num_train_timesteps:
        raise UsageError(f"trained_betas must be {num_train_timesteps} numbers, one per training timestep")
    for index, beta in enumerate(betas):
        _check_beta(f"trained_betas[{index}]", beta)


def _torch_linspace(start: float, end: float, num: int) -> NDArray[np.float32]:
    """``torch.linspace(start, end, num, dtype=torch.float32)`` on a CPU, to the last bit.

    PyTorch counts from both ends, each value one float32 fused multiply-add; in float64 the product
    is exact, so rounding the sum is the same. Its builds for CPUs without FMA round twice; a few
    betas differ there in the last bit, and Stable Diffusion's sigmas by up to 1.3e-7.
    """
    low, high = np.float32(start), np.float32(end)
    step = np.float64((high - low) / np.float32(num - 1))
    index = np.arange(num)
    from_low = np.float64(low) + step * index
    from_high = np.float64(high) - step * (num - 1 - index)
    return np.where(index < num // 2, from_low, from_high).astype(np.float32)


def _read_only(array: FloatArray) -> FloatArray:
    array.setflags(write=False)
    return array
