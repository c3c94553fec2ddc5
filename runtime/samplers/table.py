"""Samplers as tables of coefficients: what a row means, and what a user may ask of who makes one.

A sampler is a function from a noise schedule and a number of steps to a :class:`SamplerTable`. Row
``i`` of the table is one call of the model and one update of the latents ``x``, the same for every
sampler::

    m  = model(INPUT_SCALE * x, timesteps[i])              after guidance
    d  = P * x + Q * m
    x' = A * x + B0 * d + B1 * d[-1] + B2 * d[-2] + B3 * d[-3] + E * saved + C * noise
    if SAVE: saved = x                                     the old x; x' has read the old saved

where ``d[-k]`` is the ``d`` of ``k`` rows before (zero before the first row), ``saved`` starts as
zero and ``noise`` is a fresh standard normal array per row. `sdrt.kernels.sampler_row.Column` is the
layout of a row, :func:`run_table` is this loop in NumPy.

``num_inference_steps`` means what it means in diffusers: how many noise levels a run visits. ``heun``,
``dpm2``, ``dpm2_a`` and ``dpmpp_sde`` call the model twice in every step but the last, so their tables
have ``2 * num_inference_steps - 1`` rows; ``pndm`` does its first step twice and has one row more than
steps. ``len(table)`` is the number of rows, which is what a run costs, and ``table.steps`` says which step
a row belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.sampler_row import COLUMNS, HISTORY, Column
from sdrt.runtime.checks import choice, is_number, whole_from
from sdrt.runtime.errors import BundleError, UsageError
from sdrt.runtime.samplers.edm import EdmScaling
from sdrt.runtime.samplers.schedule import TIMESTEP_SPACINGS, FloatArray, NoiseSchedule
from sdrt.runtime.samplers.sigma_sequences import SIGMA_SCHEDULES

IntArray = NDArray[np.int64]

MAX_LEVEL = 1e6  # of given sigmas and timesteps: no schedule's are near it, and float32 holds its square
SPACINGS = (*TIMESTEP_SPACINGS, "sgm_uniform")  # sgm_uniform is what others call trailing
FINAL_SIGMAS = ("zero", "sigma_min")
NORMAL = "normal"  # the sigma schedule that is none, to undo a bundle's
# What diffusers' scheduler configurations have of the options, so that a bundle may have defaults for it.
CHECKPOINT_OPTIONS: Final = (
    *("sigma_schedule", "solver_order", "lower_order_final", "original_inference_steps"),
    *("algorithm_type", "solver_type", "final_sigmas_type", "euler_at_final"),
)


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """What a whole sampling run does, as numbers.

    * ``timesteps``: float64 [n], what the model is told; fractional for some samplers;
    * ``rows``: float64 [n, COLUMNS], one row per model call, laid out by `Column`;
    * ``init_noise_sigma``: a run from noise alone starts at ``x = init_noise_sigma * noise``;
    * ``steps``: int64 [n], from 0 and rising, the step of this table that each row belongs to; by default
      each row is a step;
    * ``start``: how many first steps of the run were left out before this table's;
    * ``name``: of the sampler that it is a run of; what makes one need not say it.

    ``len(table)`` is n, which is not the number of steps for every sampler. The arrays are read-only.
    """

    timesteps: FloatArray
    rows: FloatArray
    init_noise_sigma: float
    steps: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    start: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        count = len(self.timesteps)
        if self.rows.shape != (count, COLUMNS):
            raise UsageError(f"rows are {self.rows.shape}: allowed is {(count, COLUMNS)}")
        if len(self.steps) == 0:
            object.__setattr__(self, "steps", np.arange(count))
        rises = np.diff(self.steps)
        if self.steps.shape != (count,) or self.steps[:1].any() or np.any((rises < 0) | (rises > 1)):
            raise UsageError(f"steps are {self.steps}: allowed are {count} that rise from 0 one by one")
        for array in (self.timesteps, self.rows, self.steps):
            array.setflags(write=False)

    def first(self, steps: int) -> SamplerTable:
        """The table of its first steps alone; what they end with has the noise of the step that follows."""
        count = int(np.searchsorted(self.steps, steps))
        return replace(
            self, timesteps=self.timesteps[:count], rows=self.rows[:count], steps=self.steps[:count]
        )

    def steps_above(self, timestep: float) -> int:
        """How many of its steps begin at that timestep or above it."""
        begins = self.timesteps[np.searchsorted(self.steps, np.arange(self.steps[-1] + 1))]
        return int(np.count_nonzero(begins >= timestep))

    def __len__(self) -> int:
        """How often the model is called, each time with both halves under guidance."""
        return len(self.timesteps)

    @property
    def num_inference_steps(self) -> int:
        """Steps of the whole run, those that were left out among them."""
        return self.start + int(self.steps[-1]) + 1

    @property
    def uses_noise(self) -> bool:
        """Whether any row adds noise."""
        return bool(np.any(self.rows[:, Column.C]))

    @property
    def sigmas(self) -> FloatArray:
        """The ratio of noise to signal in x when each row begins, float64 [n]; infinite for noise alone.

        Not of an EDM model, whose timesteps say it.
        """
        alphas = self.rows[:, Column.INPUT_SCALE] * self.rows[:, Column.SIGNAL]
        with np.errstate(divide="ignore"):
            return np.sqrt((1 - alphas) * (1 + alphas)) / alphas

    @property
    def draws(self) -> IntArray:
        """For each row that adds noise how many rows did before it, -1 for the others; int64 [n].

        That is its number among the draws of a seed's stream, from the first row's on: diffusers' schedulers
        draw in the rows that add noise, and beyond these at most in the last, whose draw nothing follows.
        """
        adds = self.rows[:, Column.C] != 0
        return np.where(adds, np.cumsum(adds) - 1, -1)

    @property
    def num_history(self) -> int:
        """How many earlier d must be kept: 0 (one-step samplers) to ``HISTORY - 1``."""
        earlier = np.any(self.rows[:, Column.B1 : Column.B0 + HISTORY], axis=0)
        return int(np.max(np.flatnonzero(earlier) + 1, initial=0))


@dataclass(frozen=True)
class SamplerOptions:
    """What a user may ask of a sampler; None leaves it to the sampler or the noise schedule.

    * ``spacing``: of the timesteps, in place of the schedule's; ``sgm_uniform`` is ``trailing``;
    * ``sigma_schedule``: ``karras``, ``exponential`` or ``beta`` in place of the timesteps' sigmas;
      ``normal`` for these;
    * ``timesteps``: the training timesteps themselves, falling;
    * ``sigmas``: the sigmas themselves, falling to a last one of 0: one more than there are steps;
    * ``eta``: share of fresh noise in [0, 1], 0 for none. By default 0 in ``ddim`` and ``tcd`` (where it is
      the paper's gamma, which recommends 0.3) and 1 in the others that have it;
    * ``solver_order``: of a multistep sampler, from 1;
    * ``lower_order_final``: lower the order towards the end, as diffusers does, which is steadier
      for few steps;
    * ``original_inference_steps``: of ``lcm`` and ``tcd``, how many steps the model was distilled for.

    And what only a checkpoint's scheduler asks for, with diffusers' names:

    * ``algorithm_type``: ``dpmsolver`` for the solver of ``dpmpp_2m`` that takes the model's noise, not its
      clean latents, as a polynomial;
    * ``solver_type``: ``heun`` for the other second-order weights of DPM-Solver, ``bh1`` for the other B(h)
      of UniPC;
    * ``final_sigmas_type``: ``zero``, or ``sigma_min`` to end with the lowest noise of training;
    * ``euler_at_final``: whether the last row is of first order however many there are.

    Of ``sigma_schedule``, ``timesteps`` and ``sigmas`` at most one. Raises ``UsageError`` for a value
    that is not allowed.
    """

    spacing: str | None = None
    sigma_schedule: str | None = None
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    eta: float | None = None
    solver_order: int | None = None
    lower_order_final: bool = True
    original_inference_steps: int = 50
    algorithm_type: str | None = None
    solver_type: str | None = None
    final_sigmas_type: str = "zero"
    euler_at_final: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("spacing", SPACINGS),
            ("sigma_schedule", (*SIGMA_SCHEDULES, NORMAL)),
            ("algorithm_type", ("dpmsolver",)),
            ("solver_type", ("heun", "bh1")),
        ):
            if (given := getattr(self, name)) is not None:
                choice(name, given, allowed)
        if self.final_sigmas_type not in FINAL_SIGMAS:
            raise UsageError(
                f"final_sigmas_type is {self.final_sigmas_type!r}: allowed are {', '.join(FINAL_SIGMAS)}"
            )
        _check_falling("timesteps", self.timesteps, least=1)
        _check_falling("sigmas", self.sigmas, least=2)
        if self.sigmas is not None and self.sigmas[-1] != 0:
            raise UsageError(f"sigmas end with {self.sigmas[-1]}: the last must be 0, where sampling ends")
        if self.eta is not None and not 0.0 <= self.eta <= 1.0:  # so written that NaN is refused
            raise UsageError(f"eta is {self.eta}: allowed are numbers from 0 to 1")
        for name in ("lower_order_final", "euler_at_final"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} is {getattr(self, name)!r}: allowed are True and False")
        whole_from("original_inference_steps", self.original_inference_steps, 1, 100_000)
        levels = [
            name for name in ("sigma_schedule", "timesteps", "sigmas") if getattr(self, name) is not None
        ]
        if len(levels) > 1:
            raise UsageError(
                f"{' and '.join(levels)} are given: they contradict each other, give one of them"
            )

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the fields that are not as they are by default."""
        return tuple(
            name for name, field in self.__dataclass_fields__.items() if getattr(self, name) != field.default
        )

    @classmethod
    def from_dict(cls, data: object) -> SamplerOptions:
        """A bundle's defaults, as its manifest has them: `CHECKPOINT_OPTIONS` that are not at theirs.

        Raises ``BundleError`` for an option that is unknown or invalid.
        """
        if not isinstance(data, dict) or set(data) - set(CHECKPOINT_OPTIONS):
            raise BundleError(
                f"sampler options are {str(data)[:100]!r}: allowed are {', '.join(CHECKPOINT_OPTIONS)}"
            )
        try:
            options = cls(**data)
            if options.solver_order is not None:
                whole_from("solver_order", options.solver_order, 1, HISTORY)
        except UsageError as error:
            raise BundleError(f"sampler options: {error}") from error
        return options

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a manifest; ``from_dict`` gives equal options back."""
        return {name: getattr(self, name) for name in self.given}

    @property
    def num_given_steps(self) -> int | None:
        """How many steps ``timesteps`` or ``sigmas`` ask for; None where neither is given."""
        if self.timesteps is not None:
            return len(self.timesteps)
        return None if self.sigmas is None else len(self.sigmas) - 1

    def applied_to(self, schedule: NoiseSchedule) -> NoiseSchedule:
        """The schedule with this spacing, or as it is."""
        if self.spacing is None:
            return schedule
        spacing = "trailing" if self.spacing == "sgm_uniform" else self.spacing
        return replace(schedule, timestep_spacing=spacing)


def model_rows(
    schedule: NoiseSchedule, sigmas: FloatArray, *, predict: str, variance_preserving: bool
) -> FloatArray:
    """Rows [n, COLUMNS] with all that does not depend on the solver; the rest is 0.

    x is ``alpha * (x0 + sigma * noise)`` with ``alpha = 1 / sqrt(1 + sigma^2)`` if
    ``variance_preserving``, else ``x0 + sigma * noise``; the model always sees the former. d is what
    ``predict`` says: the noise ("epsilon"), the clean latents ("x0") or the model's output ("output").
    ``sigmas`` are float64 [n]. An infinite one, which is noise alone, is for variance-preserving samplers and
    for models that do not predict the noise; 0, which is no noise, where the noise is not wanted of a
    predicted sample.

    An EDM model sees x in a scale of its own, and its x is always ``x0 + sigma * noise``.
    """
    if schedule.edm is not None:
        return _edm_rows(schedule.edm, sigmas, schedule.prediction_type, predict)
    alpha = 1 / np.sqrt(1 + sigmas**2)
    with np.errstate(divide="ignore"):
        sigma = 1 / np.sqrt(1 + 1 / sigmas**2)  # of the variance-preserving x, so alpha^2 + sigma^2 = 1
    scale = np.ones_like(alpha) if variance_preserving else alpha
    zero, one = np.zeros_like(alpha), np.ones_like(alpha)
    if schedule.prediction_type == "epsilon":
        x0, epsilon = (scale / alpha, -sigmas), (zero, one)
    elif schedule.prediction_type == "v_prediction":
        # v = alpha * noise - sigma * x0 (Salimans & Ho 2022, appendix D)
        x0, epsilon = (scale * alpha, -sigma), (scale * sigma, alpha)
    else:
        x0, epsilon = (zero, one), (scale / sigma, -alpha / sigma)
    rows = np.zeros((len(sigmas), COLUMNS))
    rows[:, Column.INPUT_SCALE] = scale
    rows[:, Column.SIGNAL] = alpha / scale
    rows[:, Column.NOISE] = sigma / scale
    rows[:, Column.X0_X], rows[:, Column.X0_M] = x0
    rows[:, Column.P], rows[:, Column.Q] = {"epsilon": epsilon, "x0": x0, "output": (zero, one)}[predict]
    return rows


def _edm_rows(edm: EdmScaling, sigmas: FloatArray, prediction_type: str, predict: str) -> FloatArray:
    """`model_rows` of an EDM model."""
    x0_x, x0_m = edm.denoised(sigmas, prediction_type)
    rows = np.zeros((len(sigmas), COLUMNS))
    rows[:, Column.INPUT_SCALE] = edm.input_scale(sigmas)
    rows[:, Column.SIGNAL] = 1.0
    rows[:, Column.NOISE] = sigmas
    rows[:, Column.X0_X], rows[:, Column.X0_M] = x0_x, x0_m
    x0, epsilon = (x0_x, x0_m), ((1 - x0_x) / sigmas, -x0_m / sigmas)
    rows[:, Column.P], rows[:, Column.Q] = {"epsilon": epsilon, "x0": x0}[predict]
    return rows


def given_timesteps(schedule: NoiseSchedule, timesteps: tuple[float, ...], *, whole: bool) -> FloatArray:
    """What a user gave, as float64 [n]; ``UsageError`` for one beyond the training range, or not whole."""
    last = schedule.num_train_timesteps - 1
    for timestep in timesteps:
        if timestep > last or (whole and timestep != int(timestep)):
            kind = "whole numbers" if whole else "numbers"
            raise UsageError(f"timesteps hold {timestep}: for this sampler they are {kind} from 0 to {last}")
    return np.array(timesteps, dtype=np.float64)


def _check_falling(name: str, values: tuple[float, ...] | None, *, least: int) -> None:
    if values is None:
        return
    if not isinstance(values, tuple) or len(values) < least:
        raise UsageError(f"{name} are {values!r}: a tuple of at least {least} numbers is wanted")
    for value in values:
        if not is_number(value) or not 0 <= value <= MAX_LEVEL:
            raise UsageError(f"{name} hold {value!r}: allowed are numbers from 0 to {MAX_LEVEL:g}")
    for before, after in pairwise(values):
        if not after < before:
            raise UsageError(f"{name} go from {before} to {after}: each must be below the one before it")


def run_table(
    table: SamplerTable,
    model: Callable[[FloatArray, float], FloatArray],
    x: FloatArray,
    noise: FloatArray | None = None,
) -> FloatArray:
    """The recurrence in plain NumPy: the definition that every faster loop is compared with.

    ``model(scaled_x, timestep)`` returns an array of x's shape, after guidance. ``x`` is the start,
    float64 of any shape; ``noise`` is [n, *x.shape], needed where ``table.uses_noise``. Returns the
    last x. Raises ``UsageError`` where noise is needed and not given.
    """
    history = [np.zeros_like(x)] * HISTORY
    saved = np.zeros_like(x)
    for i, row in enumerate(table.rows):
        m = model(row[Column.INPUT_SCALE] * x, float(table.timesteps[i]))
        d = row[Column.P] * x + row[Column.Q] * m
        history = [d, *history[:-1]]
        new_x = row[Column.A] * x + row[Column.E] * saved
        for k in range(HISTORY):
            new_x += row[Column.B0 + k] * history[k]
        if row[Column.C]:
            if noise is None:
                raise UsageError(f"the sampler {table.name} adds noise: give noise of shape [rows, *x.shape]")
            new_x += row[Column.C] * noise[i]
        if row[Column.SAVE]:
            saved = x
        x = new_x
    return x


NO_OPTIONS: Final = SamplerOptions()
