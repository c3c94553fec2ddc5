"""Samplers that go from one training timestep to another: DDIM and its inversion, DDPM, PLMS, LCM and TCD.

x is variance preserving. In the formulas ``now`` is alphas_cumprod at a row's timestep, ``after`` where
the row goes.
"""

from __future__ import annotations

import numpy as np

from sdrt.kernels.sampler_row import Column
from sdrt.runtime.checks import whole_from
from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers.sampler import sampler
from sdrt.runtime.samplers.schedule import FloatArray, NoiseSchedule, spaced_timesteps
from sdrt.runtime.samplers.table import SamplerOptions, SamplerTable, given_timesteps, model_rows

SIGMA_DATA = 0.5  # of LCM's boundary condition, as the models were distilled
TIMESTEP_SCALING = 10.0  # the same


@sampler(
    other_names=("DDIM", "DDIMScheduler", "DDIMParallelScheduler"),
    options="spacing timesteps eta",
    timestep_spacing="leading",
    zero_snr=True,
)
def ddim(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions, start: int
) -> SamplerTable:
    """DDIM (Song et al. 2020, eq. 12), with noise of eq. 16 times eta.

    Equal to diffusers' ``DDIMScheduler`` without clipping. Between given timesteps, which diffusers does
    not have, each step goes to the next of them.
    """
    eta = 0.0 if options.eta is None else options.eta
    timesteps = whole_timesteps(schedule, num_inference_steps, options)
    if options.timesteps is None:
        previous = timesteps - _stride(schedule, num_inference_steps)
    else:
        previous = np.append(timesteps[1:], -1.0)
    timesteps, previous = timesteps[start:], previous[start:]
    now = signal_share(schedule, timesteps)
    after = signal_share(schedule, previous, final=final_share(schedule))
    noise = eta * np.sqrt((1 - after) / (1 - now) * (1 - now / after))
    direction = np.sqrt((1 - after - noise**2) / (1 - now))  # of what is not x0 in x
    rows = _one_step_rows(schedule, timesteps, direction, np.sqrt(after) - direction * np.sqrt(now))
    rows[:, Column.C] = noise
    return SamplerTable(timesteps, rows, 1.0)


def inversion_table(schedule: NoiseSchedule, num_inference_steps: int, start: int = 0) -> SamplerTable:
    """DDIM inversion: from clean latents to the noise that ``ddim`` would make them of.

    Song et al. 2020, section 4.3; Dhariwal & Nichol 2021, appendix F. Each row undoes a step of ``ddim``,
    the last first, with the noise that the model predicts where the step led to, told the timestep that it
    came from. x is the clean latents at first, and in the end what ``ddim`` with the same arguments begins
    with; no sampler to draw with, so it is not in ``SAMPLERS``. ``SIGNAL`` and ``NOISE`` are those of the
    level that x has in a row.

    Equal to diffusers' ``DDIMInverseScheduler`` without clipping. A predicted sample says nothing about the
    noise of an x without any (diffusers divides 0 by 0 for ``set_alpha_to_one``): x is then taken to
    have the noise of timestep 0.

    Args:
        schedule: The checkpoint's; its ``timestep_spacing`` counts, by default ``leading`` as in ``ddim``.
        num_inference_steps: 1 to ``num_train_timesteps``, those of ``ddim``.
        start: How many first steps ``ddim`` leaves out afterwards, 0 to ``num_inference_steps - 1``.

    Raises:
        UsageError: A number out of range, or the model is an EDM one.
    """
    if schedule.edm is not None:
        raise UsageError(
            "DDIM inversion goes from one training timestep to another, and this model has none (it is an "
            "EDM model): leave variation out"
        )
    schedule = schedule.with_defaults(timestep_spacing="leading", set_alpha_to_one=True)
    timesteps = np.round(spaced_timesteps(schedule, num_inference_steps))
    whole_from("start", start, 0, num_inference_steps - 1)
    timesteps = timesteps[start:][::-1].copy()
    begins = timesteps - _stride(schedule, num_inference_steps)
    sees_noise = schedule.prediction_type != "sample"
    final = final_share(schedule) if sees_noise else float(schedule.alphas_cumprod[0])
    now, after = signal_share(schedule, begins, final=final), signal_share(schedule, timesteps)
    rows = model_rows(schedule, _sigmas_of(now), predict="epsilon", variance_preserving=True)
    rows[:, Column.A] = np.sqrt(after / now)
    rows[:, Column.B0] = np.sqrt(1 - after) - np.sqrt(after / now * (1 - now))
    return SamplerTable(timesteps, rows, 1.0, start=start, name="ddim_inverse")


@sampler(
    other_names=("DDPM", "DDPMScheduler", "DDPMParallelScheduler"),
    options="spacing timesteps",
    timestep_spacing="leading",
    zero_snr=True,
)
def ddpm(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions, start: int
) -> SamplerTable:
    """Ancestral sampling of DDPM (Ho et al. 2020, eq. 6 and 7), the smaller variance.

    Equal to diffusers' ``DDPMScheduler`` (``fixed_small``) without clipping.
    """
    timesteps = whole_timesteps(schedule, num_inference_steps, options)[start:]
    now = signal_share(schedule, timesteps)
    after = np.append(now[1:], 1.0)
    kept = now / after  # the paper's alpha_t; beta_t is 1 - kept
    x0_part = np.sqrt(after) * (1 - kept) / (1 - now)
    rows = _one_step_rows(schedule, timesteps, np.sqrt(kept) * (1 - after) / (1 - now), x0_part)
    rows[:, Column.C] = np.sqrt((1 - after) / (1 - now) * (1 - kept))
    return SamplerTable(timesteps, rows, 1.0)


@sampler(
    other_names=("LCM", "LCMScheduler"),
    options="timesteps",
    inherits="original_inference_steps",
    timestep_spacing="leading",
    zero_snr=True,
)
def lcm(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions, start: int
) -> SamplerTable:
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3) of a latent consistency model.

    Each row guesses the clean latents and adds fresh noise of the next row's level. Equal to diffusers'
    ``LCMScheduler``.
    """
    timesteps = distilled_timesteps(schedule, num_inference_steps, options)[start:]
    scaled = timesteps * TIMESTEP_SCALING
    skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)  # eq. 9
    out = scaled / np.sqrt(scaled**2 + SIGMA_DATA**2)
    after = np.append(signal_share(schedule, timesteps)[1:], 1.0)
    rows = _one_step_rows(schedule, timesteps, np.sqrt(after) * skip, np.sqrt(after) * out)
    rows[:, Column.C] = np.sqrt(1 - after)
    return SamplerTable(timesteps, rows, 1.0)


@sampler(
    other_names=("TCD", "TCDScheduler"),
    options="timesteps eta",
    inherits="original_inference_steps",
    timestep_spacing="leading",
    zero_snr=True,
)
def tcd(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions, start: int
) -> SamplerTable:
    """Strategic stochastic sampling (Zheng et al. 2024, "Trajectory Consistency Distillation", algorithm 4).

    Each row goes below the next row's timestep, to ``(1 - eta)`` of it, and up again with fresh noise;
    the last goes to timestep 0. Equal to diffusers' ``TCDScheduler``, with the eta that diffusers' pipelines
    give it (0, where the scheduler alone has 0.3) unless another one is asked for.
    """
    eta = options.eta or 0.0
    timesteps = distilled_timesteps(schedule, num_inference_steps, options)[start:]
    previous = np.append(timesteps[1:], 0.0)
    # In float32 as diffusers does it, so that a whole number does not become the one below.
    below = np.floor(np.float32(1 - eta) * previous.astype(np.float32)).astype(np.float64)
    now, after, low = (signal_share(schedule, steps) for steps in (timesteps, previous, below))
    kept = np.sqrt(after / low)
    kept[-1] = 1.0
    direction = np.sqrt((1 - low) / (1 - now))
    x0_part = kept * (np.sqrt(low) - direction * np.sqrt(now))
    rows = _one_step_rows(schedule, timesteps, kept * direction, x0_part)
    rows[:, Column.C] = np.sqrt(1 - kept**2)
    return SamplerTable(timesteps, rows, 1.0)


@sampler(
    other_names=("PLMS", "PNDMScheduler"),
    options="spacing",
    timestep_spacing="leading",
    set_alpha_to_one=False,
)
def pndm(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions, start: int
) -> SamplerTable:
    """PLMS: PNDM without its Runge-Kutta steps (Liu et al. 2022, eq. 9 and 12; latent diffusion's code).

    The first step is done twice, so there is one row more than steps (but for a run of one). Equal to
    diffusers' ``PNDMScheduler`` with ``skip_prk_steps``, which for a v-prediction combines the v of
    several rows as they are. So does an image-to-image run (``start``): its timesteps are those of the whole
    run's rows without the first ``start``, and its second row does the first one's step again, told its own
    timestep, so that x is a step behind what the model is told from the third row on.
    """
    timesteps = whole_timesteps(schedule, num_inference_steps, options)
    stride = _stride(schedule, num_inference_steps)
    timesteps = np.insert(timesteps, 1, timesteps[1:2])[start:]  # the second one twice
    begin, previous = timesteps.copy(), timesteps - stride
    begin[1:2] += stride
    previous[1:2] += stride
    now = signal_share(schedule, begin)
    after = signal_share(schedule, previous, final=final_share(schedule))
    if np.any(now == 0):
        raise UsageError("pndm cannot start at a timestep without signal: use ddim, or leading spacing")
    x_part = np.sqrt(after / now)  # eq. 9
    output_part = (now - after) / (now * np.sqrt(1 - after) + np.sqrt(now * (1 - now) * after))
    predict = "epsilon"
    if schedule.prediction_type == "v_prediction":
        predict = "output"
        x_part, output_part = x_part + output_part * np.sqrt(1 - now), output_part * np.sqrt(now)
    sigmas = _sigmas_of(signal_share(schedule, timesteps))
    rows = model_rows(schedule, sigmas, predict=predict, variance_preserving=True)
    _add_plms(rows, x_part, output_part)
    steps = np.maximum(np.arange(len(rows)) - 1, 0)  # 0, 0, 1, 2, ...
    return SamplerTable(timesteps, rows, 1.0, steps)


def _add_plms(rows: FloatArray, x_part: FloatArray, output_part: FloatArray) -> None:
    """The rows' ``x' = x_part * x + output_part * (Adams-Bashforth mean of d)``; all arrays have n rows.

    Row 1 does row 0's step again, from the saved x, with the mean of both d; its own d is not used
    later. Row 4 needs the d of row 0, which is one too far back: it comes from the step of row 3, by
    which x changed from the saved one to what it is now.
    """
    ab4 = np.array([55.0, -59.0, 37.0, -9.0]) / 24
    weights = np.tile(ab4, (len(rows), 1))
    weights[:4] = np.array(
        [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [1.5, 0, -0.5, 0], [23 / 12, -16 / 12, 0, 5 / 12]]
    )[: len(rows)]
    rows[:, Column.A] = x_part
    rows[:, Column.B0 : Column.B3 + 1] = output_part[:, None] * weights
    if len(rows) > 1:
        rows[0, Column.SAVE] = 1.0
        rows[1, Column.A], rows[1, Column.E] = 0.0, x_part[1]
    if len(rows) > 4:
        rows[3, Column.SAVE] = 1.0
        share = output_part[4] * ab4[3] / (output_part[3] * weights[3, 3])
        rows[4, Column.A] += share
        rows[4, Column.E] = -share * x_part[3]
        d1, d2 = -share * output_part[3] * weights[3, :2]  # the other d of row 3
        rows[4, Column.B0 : Column.B3 + 1] = output_part[4] * np.array([*ab4[:3], 0.0]) + [0.0, d1, d2, 0.0]


def whole_timesteps(schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions) -> FloatArray:
    """The given timesteps or the spaced ones, rounded; float64 [num_inference_steps], falling."""
    if options.timesteps is None:
        return np.round(spaced_timesteps(schedule, num_inference_steps))
    return given_timesteps(schedule, options.timesteps, whole=True)


def distilled_timesteps(
    schedule: NoiseSchedule, num_inference_steps: int, options: SamplerOptions
) -> FloatArray:
    """The given timesteps, or some of those that the model was distilled at; float64 [num_inference_steps].

    Raises ``UsageError`` where more are asked for than there are.
    """
    if options.timesteps is not None:
        return given_timesteps(schedule, options.timesteps, whole=True)
    original, num_train = options.original_inference_steps, schedule.num_train_timesteps
    if original > num_train:
        raise UsageError(f"original_inference_steps is {original}: the model has {num_train} timesteps")
    if num_inference_steps > original:
        raise UsageError(
            f"{num_inference_steps} steps of a model that was distilled for {original}: ask for fewer "
            "(4 to 8 are usual), or say original_inference_steps"
        )
    timesteps: FloatArray = np.arange(original, 0, -1, dtype=np.float64) * (num_train // original) - 1.0
    return timesteps[np.floor(np.linspace(0, original, num_inference_steps, endpoint=False)).astype(np.intp)]


def signal_share(schedule: NoiseSchedule, timesteps: FloatArray, final: float = 1.0) -> FloatArray:
    """alphas_cumprod at whole timesteps, ``final`` below timestep 0; float64 of the same shape."""
    shares = schedule.alphas_cumprod[timesteps.clip(min=0).astype(np.intp)]
    return np.where(timesteps >= 0, shares, final)


def final_share(schedule: NoiseSchedule) -> float:
    """alphas_cumprod where DDIM and PLMS end."""
    return 1.0 if schedule.set_alpha_to_one else float(schedule.alphas_cumprod[0])


def _stride(schedule: NoiseSchedule, num_inference_steps: int) -> int:
    """How far a step of DDIM and PLMS goes down, as in diffusers: the stride of leading spacing.

    With the other spacings that does not always land on the next row's timestep.
    """
    return schedule.num_train_timesteps // num_inference_steps


def _sigmas_of(now: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore"):  # no signal is an infinite sigma
        return np.asarray(np.sqrt((1 - now) / now), dtype=np.float64)


def _one_step_rows(
    schedule: NoiseSchedule, timesteps: FloatArray, x_part: FloatArray, x0_part: FloatArray
) -> FloatArray:
    """Rows with ``x' = x_part * x + x0_part * x0``, x0 the model's guess of the clean latents.

    Where the model predicts the noise, that is d: x0 is then a small difference of large numbers at large
    sigmas, and float64 coefficients do it better than x0 in float32. For others d is x0.
    """
    sigmas = _sigmas_of(signal_share(schedule, timesteps))
    if schedule.prediction_type != "epsilon":
        rows = model_rows(schedule, sigmas, predict="x0", variance_preserving=True)
        rows[:, Column.A], rows[:, Column.B0] = x_part, x0_part
        return rows
    if not np.isfinite(sigmas).all():
        raise UsageError(
            "the first timestep has no signal, so that predicted noise says nothing: with "
            "rescale_betas_zero_snr the model must predict v or the sample, or be sampled by euler"
        )
    rows = model_rows(schedule, sigmas, predict="epsilon", variance_preserving=True)
    rows[:, Column.A] = x_part + x0_part * np.sqrt(1 + sigmas**2)
    rows[:, Column.B0] = -x0_part * sigmas
    return rows
