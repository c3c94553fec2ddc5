"""How strongly a LoRA changes the model: a weight for its text encoders, and one for its U-Net."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from sdrt.runtime.checks import number
from sdrt.runtime.errors import UsageError

MAX_LORA_WEIGHT: Final = 100.0  # a mistyped one must not overflow float16; sliders go to 10 and more
SUFFIX: Final = ".safetensors"
_PARTS: Final = ("text_encoder", "unet")


class LoraWeights(NamedTuple):
    """The weights of a LoRA.

    Attributes:
        text_encoder: What its changes of the text encoders are multiplied with.
        unet: What its changes of the U-Net are multiplied with.
    """

    text_encoder: float = 1.0
    unet: float = 1.0

    @property
    def plain(self) -> float | dict[str, float]:
        """As a recipe has them: one number where they are equal."""
        return self.unet if self.text_encoder == self.unet else self._asdict()

    def plus(self, other: LoraWeights) -> LoraWeights:
        """The sum of the two, part by part."""
        return LoraWeights(self.text_encoder + other.text_encoder, self.unet + other.unet)

    def mixed(self, other: LoraWeights, share: float) -> LoraWeights:
        """``(1 - share) · self + share · other``, part by part; what is equal stays as it is."""
        pairs = zip(self, other, strict=True)
        return LoraWeights(*(a if a == b else (1 - share) * a + share * b for a, b in pairs))

    def __str__(self) -> str:
        """For people, as `<lora:…>` of stable-diffusion-webui has them."""
        return f"{self.unet:g}" if self.text_encoder == self.unet else f"{self.text_encoder:g}:{self.unet:g}"


def short_name(name: str) -> str:
    """What a prompt would call a LoRA: of a path the file's name without its ending."""
    return name.rpartition("/")[2].removesuffix(SUFFIX)


def checked_weights(name: str, given: Any) -> LoraWeights:
    """The weights of a LoRA as people give them.

    Args:
        name: The LoRA's, for messages.
        given: A number for both, or a table with ``text_encoder`` and ``unet``; one that it lacks is 1.

    Raises:
        UsageError: They are no such thing, or beyond `MAX_LORA_WEIGHT`.
    """
    what = f"the weight of the LoRA {name[:100]!r}"
    if not isinstance(given, Mapping):
        weight = _checked(what, given)
        return LoraWeights(weight, weight)
    if unknown := [str(part)[:100] for part in given if part not in _PARTS]:
        raise UsageError(f"{what} has {', '.join(unknown)}: one number, or a table of {' and '.join(_PARTS)}")
    return LoraWeights(**{part: _checked(f"{what}, {part},", value) for part, value in given.items()})


def _checked(what: str, given: Any) -> float:
    weight = number(what, given)
    if abs(weight) > MAX_LORA_WEIGHT:
        raise UsageError(f"{what} is {weight:g}: {-MAX_LORA_WEIGHT:g} to {MAX_LORA_WEIGHT:g} are allowed")
    return weight
