"""What pictures of a bundle are drawn with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdrt.runtime.devices.device import Device
from sdrt.runtime.drawing.adapters import Adapters
from sdrt.runtime.drawing.condition_encoder import ConditionEncoder
from sdrt.runtime.drawing.shapes import ShapeCache
from sdrt.runtime.drawing.vae import VaeEncoder

if TYPE_CHECKING:
    from sdrt.runtime.drawing.picture_conditioning import LabelEncoder


@dataclass(frozen=True, slots=True)
class Parts:
    """A bundle's components, bound to buffers of one device.

    Attributes:
        device: The place of everything below.
        adapters: What changes the weights of the components.
        encoder: The text encoders, or CLIP's image encoder where pictures are varied.
        vae_encoder: The encoder of pictures that a run starts from.
        shapes: U-Net and VAE decoder, with their buffers and graphs.
        labels: CLIP's image encoder where a picture is read beside a text.
    """

    device: Device
    adapters: Adapters
    encoder: ConditionEncoder
    vae_encoder: VaeEncoder
    shapes: ShapeCache
    labels: LabelEncoder | None = None
