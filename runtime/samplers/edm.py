"""The noise levels and scalings of models that were trained as Karras et al. 2022 describe ("EDM")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.checks import is_number
from sdrt.runtime.errors import UsageError

EDM_SIGMA_SCHEDULES: Final = ("exponential", "karras")
EDM_PREDICTION_TYPES: Final = ("epsilon", "v_prediction")
MAX_EDM_NUMBER: Final = 1e6  # as of given sigmas: float32 holds its square


@dataclass(frozen=True)
class EdmScaling:
    """What an EDM model has in place of betas and training timesteps.

    Fields have the names and meanings of diffusers' EDMEulerScheduler:

    * ``sigma_min``, ``sigma_max``: the lowest and the highest noise level, above 0;
    * ``sigma_data``: the standard deviation of the latents it was trained on;
    * ``sigma_schedule``: ``karras`` or ``exponential``, how a run's levels lie between the two;
    * ``rho``: of ``karras`` (Karras et al. 2022, eq. 5).

    Raises ``UsageError`` where a value is of the wrong type, not allowed or out of range.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    sigma_schedule: str = "karras"
    rho: float = 7.0

    def __post_init__(self) -> None:
        for name in ("sigma_min", "sigma_max", "sigma_data", "rho"):
            value = getattr(self, name)
            if not (is_number(value) and 0.0 < value <= MAX_EDM_NUMBER):  # so written that NaN is refused
                raise UsageError(f"{name} is {value!r}: allowed are numbers above 0, to {MAX_EDM_NUMBER:g}")
        if not self.sigma_min < self.sigma_max:
            raise UsageError(
                f"sigma_min is {self.sigma_min:g}, sigma_max {self.sigma_max:g}: it must be above it"
            )
        if self.sigma_schedule not in EDM_SIGMA_SCHEDULES:
            raise UsageError(
                f"sigma_schedule is {self.sigma_schedule!r}: allowed are {', '.join(EDM_SIGMA_SCHEDULES)}"
            )

    def input_scale(self, sigmas: NDArray[np.float64]) -> NDArray[np.float64]:
        """c_in: what the model sees is x times it; float64 of the shape of ``sigmas``."""
        return 1 / np.hypot(sigmas, self.sigma_data)

    def denoised(
        self, sigmas: NDArray[np.float64], prediction_type: str
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """c_skip and c_out: the clean latents are ``c_skip * x + c_out * m`` (Karras et al. 2022, eq. 7).

        A model that predicts v has the other sign of c_out. float64 of the shape of ``sigmas``.
        """
        sign = 1.0 if prediction_type == "epsilon" else -1.0
        skip = self.sigma_data**2 / (sigmas**2 + self.sigma_data**2)
        return skip, sign * sigmas * self.sigma_data * self.input_scale(sigmas)

    def timesteps(self, sigmas: NDArray[np.float64]) -> NDArray[np.float64]:
        """c_noise: what the model is told, ``ln(sigma) / 4``, fractional and negative below 1."""
        return np.asarray(0.25 * np.log(sigmas), dtype=np.float64)
