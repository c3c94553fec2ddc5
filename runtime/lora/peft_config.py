"""Alpha where a file's tensors do not say it: what PEFT writes beside them.

diffusers keeps PEFT's configuration in the header (``lora_adapter_metadata``), PEFT itself in
``adapter_config.json`` in the same folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sdrt.runtime.bundle.limits import MAX_LORA_CONFIG_BYTES
from sdrt.runtime.errors import UsageError
from sdrt.runtime.lora.names import NETWORKS
from sdrt.runtime.system.untrusted import parse_json, read_json

_IN_HEADER: Final = "lora_adapter_metadata"
PEFT_CONFIG: Final = "adapter_config.json"
PEFT_PREFIX: Final = "base_model.model."
_NAME: Final = re.compile(r"\^?[\w.-]+")
_ALPHA: Final = ("lora_alpha", "alpha")  # of LoRA; of LoHa and LoKr


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What a configuration says of alpha.

    Attributes:
        alpha: Of every layer that `alphas` does not name; None where it is not said.
        alphas: Layer's name, or the end of it → its alpha; with ``^`` before it only the whole name.
        rank: Of every layer that `ranks` does not name; None where it is not said.
        ranks: As `alphas`.
        root: Whether alpha is divided by the rank's square root (rsLoRA, Kalajdzievski 2023).
    """

    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    rank: float | None = None
    ranks: Mapping[str, float] = field(default_factory=dict)
    root: bool = False

    def rank_of(self, layer: str) -> float | None:
        """The rank that a layer was given, for those whose tensors do not have it; None if it is not said.

        Args:
            layer: Its name in its network.
        """
        return _of_layer(layer, self.ranks, self.rank)

    def scale(self, layer: str, rank: float | None) -> float | None:
        """Alpha over the rank; None where one of them is not said.

        Args:
            layer: Its name in its network.
            rank: That its tensors have.
        """
        alpha = _of_layer(layer, self.alphas, self.alpha)
        if alpha is None or not rank:
            return None
        return alpha / (math.sqrt(rank) if self.root else rank)


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
        if saved_by_peft and (file.parent / PEFT_CONFIG).is_file():
            return {
                PEFT_PREFIX: _config(read_json(file.parent / PEFT_CONFIG, limit=MAX_LORA_CONFIG_BYTES), ""),
            }
        document = parse_json(metadata[_IN_HEADER]) if _IN_HEADER in metadata else {}
        if not isinstance(document, dict):
            raise TypeError("it is no object")
        named = [f"{name}." for name in NETWORKS if any(key.startswith(f"{name}.") for key in document)]
        return {prefix: _config(document, prefix) for prefix in named}
    except (ValueError, TypeError, AttributeError, OverflowError, OSError) as error:
        raise UsageError(f"the PEFT configuration of {file} is damaged ({error})") from None


def _config(document: Mapping[str, Any], prefix: str) -> PeftConfig:
    said = {key.removeprefix(prefix): value for key, value in document.items()}
    alpha = next((_number(said[key]) for key in _ALPHA if said.get(key) is not None), None)
    rank = None if said.get("r") is None else _number(said["r"])
    alphas, ranks = _patterns(said.get("alpha_pattern")), _patterns(said.get("rank_pattern"))
    return PeftConfig(alpha, alphas, rank, ranks, root=bool(said.get("use_rslora", False)))


def _patterns(said: Any) -> Mapping[str, float]:
    """Layers with a number of their own; PEFT takes regular expressions, a stranger's are not run."""
    if odd := [key for key in said or {} if not _NAME.fullmatch(key)]:
        raise ValueError(f"it names layers by the pattern {odd[0][:100]!r}: names of layers are wanted")
    return {key: _number(value) for key, value in (said or {}).items()}


def _of_layer(layer: str, patterns: Mapping[str, float], default: float | None) -> float | None:
    """As PEFT looks for it: the first pattern that is the layer's name or its end."""
    named = (
        value for key, value in patterns.items() if key == f"^{layer}" or f".{layer}".endswith(f".{key}")
    )
    return next(named, default)


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"an alpha is {str(value)[:40]!r}, a number is wanted")
    return float(value)
