"""Golden runs of the step: what goes into each row, and what comes out of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from support.references.golden_text import short

from sdrt.kernels.guidance_rescale import guidance_rescale
from sdrt.kernels.guided_step import NO_FAULT, StepBuffers, guided_step, prepare_input
from sdrt.kernels.sampler_row import HISTORY, Column
from sdrt.runtime.samplers.edm import EdmScaling
from sdrt.runtime.samplers.registry import SAMPLERS, make_table
from sdrt.runtime.samplers.schedule import NoiseSchedule
from sdrt.runtime.samplers.table import NO_OPTIONS, SamplerOptions

STEPS: Final = 6
SMALL: Final = (1, 1, 2, 3)
IMAGES: Final = (2, 1, 2, 2)

Case = dict[str, Any]

SCHEDULES: Final = {
    "sd15": NoiseSchedule(),
    "unsaid": NoiseSchedule(timestep_spacing=None, set_alpha_to_one=None, steps_offset=0),
    "v_prediction": NoiseSchedule(prediction_type="v_prediction", timestep_spacing="trailing"),
    "zero_snr": NoiseSchedule(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    ),
    "sample": NoiseSchedule(
        beta_schedule="linear", prediction_type="sample", timestep_spacing="linspace", set_alpha_to_one=True
    ),
    "cosine": NoiseSchedule(beta_schedule="squaredcos_cap_v2", num_train_timesteps=500),
    "edm": NoiseSchedule(edm=EdmScaling()),
    "edm_v": NoiseSchedule(
        prediction_type="v_prediction", edm=EdmScaling(sigma_data=1.0, sigma_schedule="exponential")
    ),
}


def runs() -> Iterator[Case]:
    """Each sampler, and what a step does beside its row: guidance, its rescaling, a mask, half precision."""
    for name in SAMPLERS:
        yield _run(name)
    yield _run("ddim", SamplerOptions(eta=1.0), guidance_scale=None)
    yield _run("euler", schedule="edm")
    yield _run("dpmpp_2m", SamplerOptions(sigma_schedule="karras"), IMAGES, phi=0.7)
    yield _run("dpmpp_2m", shape=IMAGES, inpainting=True)
    yield _run("heun", shape=IMAGES, inpainting=True)
    yield _run("euler_a", dtype="float16")
    yield _run("dpmpp_2m", image_guidance_scale=1.5)


def _run(
    sampler: str,
    options: SamplerOptions = NO_OPTIONS,
    shape: tuple[int, ...] = SMALL,
    *,
    schedule: str = "sd15",
    guidance_scale: float | None = 7.5,
    image_guidance_scale: float | None = None,
    phi: float | None = None,
    inpainting: bool = False,
    dtype: str = "float32",
) -> Case:
    """A run whose network gives random numbers."""
    table = make_table(sampler, SCHEDULES[schedule], STEPS, options)
    random = np.random.default_rng(len(sampler))

    def normal(rows: int = shape[0], dtype: str = "float32") -> list[Any]:
        return short(random.standard_normal((rows, *shape[1:])).astype(dtype))

    rows = table.rows.astype(np.float32)
    rows[:, Column.GUIDANCE] = guidance_scale or 0.0
    rows[:, Column.IMAGE_GUIDANCE] = image_guidance_scale or 0.0
    case: Case = {
        "sampler": sampler,
        "options": options.to_dict(),
        "schedule": SCHEDULES[schedule].to_dict(),
        "num_inference_steps": STEPS,
        "shape": list(shape),
        "guidance_scale": guidance_scale,
        "dtype": dtype,
        "timesteps": short(table.timesteps.astype(np.float32)),
        "rows": short(rows),
        "latents": short((random.standard_normal(shape) * table.init_noise_sigma).astype(np.float32)),
    }
    if image_guidance_scale is not None:
        case["image_guidance_scale"] = image_guidance_scale
    if phi is not None:
        case["guidance_rescale"] = phi
    if inpainting:
        mask = random.choice([0.0, 0.25, 1.0], (shape[0], *shape[2:]))
        case |= {"mask": short(mask), "known": normal(), "known_noise": normal()}
    evaluated = shape[0] * _parts(case)
    case["given"] = [
        {"noise_pred": normal(evaluated, dtype), **({"noise": normal()} if row[Column.C] else {})}
        for row in rows
    ]
    return case | replayed(case)


def replayed(case: Case) -> Case:
    """What comes out of a run, by what goes in."""
    buffers = _buffers(case)
    prepare_input(buffers)
    first, results = _part(buffers), []
    for given in case["given"]:
        buffers.noise_pred[...] = _array(given["noise_pred"], buffers.noise_pred)
        if "noise" in given:
            buffers.noise[...] = _array(given["noise"], buffers.noise)
        result = {}
        if buffers.factors is not None:
            guidance_rescale(buffers)
            result["factors"] = short(buffers.factors)
        guided_step(buffers)
        assert buffers.denoised is not None
        result |= {"latents": short(buffers.latents), "denoised": short(buffers.denoised)}
        if buffers.counter[0] < len(buffers.rows):
            result["sample"] = _part(buffers)
        results.append(result)
    assert buffers.fault[0] == NO_FAULT
    return {"sample": first, "results": results}


def _parts(case: Case) -> int:
    """How many rows of the network an image has."""
    return 1 if case["guidance_scale"] is None else 2 if "image_guidance_scale" not in case else 3


def _part(buffers: StepBuffers) -> list[Any]:
    """The network's next input; with guidance its other parts are the same."""
    images = len(buffers.latents)
    assert all(
        np.array_equal(part, buffers.sample[:images])
        for part in np.split(buffers.sample, len(buffers.sample) // images)
    )
    return short(buffers.sample[:images])


def _buffers(case: Case) -> StepBuffers:
    images, *rest = case["shape"]
    evaluated = (images * _parts(case), *rest)
    state = np.zeros(case["shape"], np.float32)
    buffers = StepBuffers(
        noise_pred=np.zeros(evaluated, case["dtype"]),
        latents=_array(case["latents"], state),
        history=np.zeros((HISTORY, *state.shape), np.float32),
        saved=np.zeros_like(state),
        noise=np.zeros_like(state),
        rows=np.array(case["rows"], np.float32),
        timesteps=np.array(case["timesteps"], np.float32),
        counter=np.zeros(1, np.int32),
        fault=np.full(1, NO_FAULT, np.int32),
        sample=np.zeros(evaluated, case["dtype"]),
        timestep=np.zeros(1, np.float32),
        denoised=np.zeros_like(state),
    )
    if "guidance_rescale" in case:
        buffers.guidance_rescale = np.array([case["guidance_rescale"]], np.float32)
        buffers.factors = np.ones(images, np.float32)
    if "mask" in case:
        buffers.mask = _array(case["mask"], state[:, :1])
        buffers.known, buffers.known_noise = _array(case["known"], state), _array(case["known_noise"], state)
    return buffers


def _array(numbers: list[Any], like: NDArray[Any]) -> NDArray[Any]:
    return np.array(numbers, like.dtype).reshape(like.shape)
