"""Alpha where a file's tensors do not say it: what PEFT writes beside them.

diffusers keeps PEFT's configuration in the header (``lora_adapter_metadata``), PEFT itself in
``adapter_config.json`` in the same folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sdrt.runtime.bundle.limits import MAX_LORA_CONFIG_BYTES
from sdrt.runtime.errors import UsageError
from sdrt.runtime.lora.names import NETWORKS
from sdrt.runtime.system.untrusted import parse_json, read_json

_IN_HEADER: Final = "lora_adapter_metadata"
_CONFIG: Final = "adapter_config.json"
PEFT_PREFIX: Final = "base_model.model."
_ALPHA: Final = ("lora_alpha", "alpha")  # of LoRA; of LoHa and LoKr


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What a configuration says of alpha.

    Attributes:
        alpha: Of every layer that `patterns` does not name; None where it is not said.
        patterns: Layer's name, or the end of it → its alpha.
        root: Whether alpha is divided by the rank's square root (rsLoRA, Kalajdzievski 2023).
    """

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    root: bool = False

    def scale(self, layer: str, rank: int) -> float | None:
        """Alpha over the rank; None where no alpha is said.

        Args:
            layer: Its name in its network.
            rank: That its tensors have.
        """
        named = (alpha for end, alpha in self.patterns.items() if f".{layer}".endswith(f".{end}"))
        alpha = next(named, self.alpha)
        return None if alpha is None else alpha / (math.sqrt(rank) if self.root else rank)


def peft_configs(file: Path, metadata: Mapping[str, str], *, saved_by_peft: bool) -> dict[str, PeftConfig]:
    """What stands before a layer's name → the configuration that holds for it.

    Args:
        file: The LoRA.
        metadata: Of its header.
        saved_by_peft: Whether its keys are as PEFT itself writes them.

    Raises:
        UsageError: A configuration is damaged.
    """
    try:
        if saved_by_peft and (file.parent / _CONFIG).is_file():
            return {
                PEFT_PREFIX: _config(read_json(file.parent / _CONFIG, limit=MAX_LORA_CONFIG_BYTES), ""),
            }
        document = parse_json(metadata[_IN_HEADER]) if _IN_HEADER in metadata else {}
        named = [f"{name}." for name in NETWORKS if any(key.startswith(f"{name}.") for key in document)]
        return {prefix: _config(document, prefix) for prefix in named}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UsageError(f"the PEFT configuration of {file} is damaged ({error})") from None


def _config(document: Mapping[str, Any], prefix: str) -> PeftConfig:
    said = {key.removeprefix(prefix): value for key, value in document.items()}
    alpha = next((_number(said[key]) for key in _ALPHA if said.get(key) is not None), None)
    patterns = {
        key.removeprefix("^"): _number(value) for key, value in (said.get("alpha_pattern") or {}).items()
    }
    return PeftConfig(alpha, patterns, root=bool(said.get("use_rslora", False)))


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"an alpha is {str(value)[:40]!r}, a number is wanted")
    return float(value)
