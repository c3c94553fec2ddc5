"""How strongly each row of a sampler's table is guided, and how a latent consistency model is told so.

Classifier-free guidance is ``m = u + w (c - u)`` of the model's unconditional and conditional outputs (Ho &
Salimans 2022). w may differ from step to step, and be used in an interval of the steps only
(Kynkäänniemi et al. 2024): outside it the conditional output alone is used, which is a w of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.checks import is_number
from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers.schedule import FloatArray
from sdrt.runtime.samplers.table import SamplerTable

MAX_GUIDANCE_SCALE: Final = 1000.0  # float16 predictions times more than this cannot be meant
# Of the embedding of w that latent consistency models read:
_SCALE: Final = 1000.0  # of w, on the timesteps' scale
_LOWEST: Final = 1e-4  # frequency; the highest is 1


def guidance_weights(
    table: SamplerTable,
    scale: float | Sequence[float],
    interval: tuple[float, float] = (0.0, 1.0),
) -> FloatArray:
    """w of each row of a table; float64 [n].

    The rows of one step have one w.

    Args:
        table: The sampler's.
        scale: w, 0 to ``MAX_GUIDANCE_SCALE``; or one for each step of the whole run, of which a table that
            leaves out the first steps uses the last: the same w belongs to the same noise level, whatever the
            ``strength``.
        interval: (start, stop), fractions of the table's own steps, ``0 <= start < stop <= 1``. As diffusers'
            guiders do it, of n steps those from ``int(start * n)`` to before ``int(stop * n)`` are
            guided; the others have a w of 1.

    Raises:
        UsageError: A number out of range, or not as many of them as there are steps.
    """
    weights = _step_scales(table, scale)
    first, last = _interval(interval)
    count = len(weights)
    step = np.arange(count)
    inside = (step >= int(first * count)) & (step < int(last * count))
    return np.where(inside, weights, 1.0)[table.steps]


def _step_scales(table: SamplerTable, scale: object) -> FloatArray:
    """w of each step of the table."""
    whole = table.num_inference_steps
    if isinstance(scale, str) or not isinstance(scale, Sequence):
        return np.full(whole - table.start, _checked("guidance_scale", scale))
    if len(scale) != whole:
        raise UsageError(
            f"guidance_scale holds {len(scale)} numbers: give one, or one for each of the {whole} steps"
        )
    scales = [_checked(f"guidance_scale[{step}]", value) for step, value in enumerate(scale)]
    return np.array(scales[table.start :])


def _checked(name: str, value: object) -> float:
    if not is_number(value) or not 0.0 <= value <= MAX_GUIDANCE_SCALE:  # so written that NaN is refused
        raise UsageError(f"{name} is {value!r}: allowed are numbers from 0 to {MAX_GUIDANCE_SCALE:g}")
    return float(value)


def _interval(given: object) -> tuple[float, float]:
    if not isinstance(given, str) and isinstance(given, Sequence) and len(given) == 2:
        start, stop = given
        if is_number(start) and is_number(stop) and 0.0 <= start < stop <= 1.0:
            return float(start), float(stop)
    raise UsageError(
        f"guidance_interval is {given!r}: two fractions of the steps are wanted, (start, stop) with "
        "0 <= start < stop <= 1; (0, 1) guides every step"
    )


def guidance_embedding(w: float, width: int) -> NDArray[np.float32]:
    """The sinusoidal embedding of w, an input of the U-Net (Luo et al. 2023, section 4.3).

    Equal to ``get_guidance_scale_embedding`` of diffusers' pipelines.

    Args:
        w: ``guidance_scale - 1``, 0 for no guidance.
        width: Of the embedding, at least 4; an odd one ends with a zero.

    Returns:
        float32 [width].
    """
    half = width // 2
    # In float32 as diffusers has it: the angles are up to 14,000, where a float32 is 5e-4 from the next.
    step = np.log(np.float32(1 / _LOWEST)) / np.float32(half - 1)
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -step)
    angles = np.float32(w) * np.float32(_SCALE) * frequencies
    embedding = np.zeros(width, dtype=np.float32)
    embedding[:half], embedding[half : 2 * half] = np.sin(angles), np.cos(angles)
    return embedding
