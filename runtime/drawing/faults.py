"""Fault words: what kernels note on the device and the host reads with the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdrt.kernels.guided_step import NO_FAULT
from sdrt.runtime.errors import NumericsError, UsageError
from sdrt.runtime.samplers.table import SamplerTable


@dataclass(frozen=True, slots=True)
class Faults:
    """Who gave NaN or infinity.

    Attributes:
        texts: bool [rows, encoders], per row of the U-Net's batch, in the order of the family's encoders.
        given: Whether the latents that the caller brought were not finite.
        unet: The first step whose output was not finite, or ``NO_FAULT``.
        decoder: Whether the decoder's output was not finite.
    """

    texts: NDArray[np.bool]
    given: bool
    unet: int
    decoder: bool

    def raise_if_any(self, table: SamplerTable, texts: Sequence[str | None], encoders: Sequence[str]) -> None:
        """Name the component that was the first to fail; what came after it had no chance.

        Args:
            table: The run's sampler.
            texts: The text of each row.
            encoders: Names of the text encoders.

        Raises:
            NumericsError: A component gave NaN or infinity.
            UsageError: The given latents hold them.
        """
        for row, encoder in np.argwhere(self.texts):
            raise NumericsError(f"the {encoders[encoder]} gave NaN or infinity for the prompt {texts[row]!r}")
        if self.given:
            raise UsageError("latents hold NaN or infinity")
        if self.unet != NO_FAULT:
            raise NumericsError(
                f"the unet gave NaN or infinity at step {self.unet + 1} of {len(table.timesteps)} "
                f"(timestep {table.timesteps[self.unet]:g}); an fp16 overflow is likely: "
                "export the checkpoint with --dtype fp32, or lower the guidance scale"
            )
        if self.decoder:
            raise NumericsError(
                "the vae_decoder gave NaN or infinity; if it is fp16, export with --fp16 --vae-dtype fp32"
            )
