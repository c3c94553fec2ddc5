"""What pictures of a bundle are drawn with, and what of it turns prompts or pictures into conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sdrt.runtime.devices.device import Device
from sdrt.runtime.drawing.faults import Faults
from sdrt.runtime.drawing.loop import DenoiseLoop
from sdrt.runtime.drawing.shapes import ShapeCache
from sdrt.runtime.drawing.vae import VaeEncoder
from sdrt.runtime.samplers.table import SamplerTable


class ConditionEncoder(Protocol):
    """Text encoders or an image encoder, with what they gave last."""

    def chunks(self, condition: Any) -> int:
        """How many times the tokens of one text a condition takes; nothing is computed."""
        ...

    def write(self, rows: Sequence[Any], loop: DenoiseLoop, chunks: int) -> None:
        """Put what each row of the U-Net's batch is drawn from into the loop's conditioning."""
        ...

    def raise_faults(self, faults: Faults, table: SamplerTable, rows: Sequence[Any]) -> None:
        """Raise what a run's fault words say."""
        ...


@dataclass(frozen=True, slots=True)
class Parts:
    """A bundle's components, bound to buffers of one device.

    Attributes:
        device: The place of everything below.
        encoder: The text encoders, or CLIP's image encoder where pictures are varied.
        vae_encoder: The encoder of pictures that a run starts from.
        shapes: U-Net and VAE decoder, with their buffers and graphs.
    """

    device: Device
    encoder: ConditionEncoder
    vae_encoder: VaeEncoder
    shapes: ShapeCache
