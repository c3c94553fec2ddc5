"""What a user says of a checkpoint where its files are silent or wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sdrt.export.checkpoint.scheduler_classes import CLASSES
from sdrt.runtime.errors import UsageError

_ZERO_SNR: Final = "rescale_betas_zero_snr"
# Takes the place of a scheduler that knows nothing of zero terminal SNR: as Lin et al. 2023 draw.
_WITH_ZERO_SNR: Final = {"PNDMScheduler": "DDIMScheduler"}


@dataclass(frozen=True, slots=True)
class Overrides:
    """What overrules the files.

    Attributes:
        family: The kind of a single file, a name in `sdrt.export.checkpoint.single_file.published.FAMILIES`.
        prediction_type: What the U-Net predicts, as a scheduler's configuration has it.
        zero_snr: Whether it was trained with a last timestep that is noise alone (Lin et al. 2023).
        config: A diffusers folder whose configurations and tokenizers a single file has.
    """

    family: str = ""
    prediction_type: str = ""
    zero_snr: bool = False
    config: Path | None = None


def with_overrides(scheduler: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """A scheduler's configuration with what the user says of the model.

    With zero terminal SNR the steps begin at the last timestep (``timestep_spacing`` is ``trailing``): any
    other would leave it out.

    Args:
        scheduler: The configuration, with its ``_class_name``.
        overrides: Of which the prediction type and the SNR are read.

    Raises:
        UsageError: The scheduler's class has no betas to rescale.
    """
    result = dict(scheduler)
    if overrides.prediction_type:
        result["prediction_type"] = overrides.prediction_type
    if overrides.zero_snr:
        name = _WITH_ZERO_SNR.get(str(result.get("_class_name")), result.get("_class_name"))
        known = CLASSES.get(str(name))
        if known is not None and _ZERO_SNR not in known.defaults:
            raise UsageError(
                f"--zero-snr: the checkpoint's scheduler, {name}, cannot have its betas rescaled; those that "
                f"can are {', '.join(key for key, kind in CLASSES.items() if _ZERO_SNR in kind.defaults)}"
            )
        result |= {"_class_name": name, _ZERO_SNR: True, "timestep_spacing": "trailing"}
    return result
