"""Keys of LoRA files: which layer a tensor is for, and which part of that layer's change it is."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Final, NamedTuple

# A name that PEFT gave to an adapter may stand behind the part's.
_ADAPTER: Final = r"(?:\.[^.]+)?"
# The part → how its keys end. What is called `.weight` alone is (IA)³'s, and must come last.
_PARTS: Final = {
    "down": rf"\.lora_down\.weight|\.lora_A{_ADAPTER}\.weight|\.lora\.down\.weight"
    r"|\.lora_linear_layer\.down\.weight|_lora\.down\.weight",
    "up": rf"\.lora_up\.weight|\.lora_B{_ADAPTER}\.weight|\.lora\.up\.weight"
    r"|\.lora_linear_layer\.up\.weight|_lora\.up\.weight",
    "middle": r"\.lora_mid\.weight",
    "up_bias": rf"\.lora_B{_ADAPTER}\.bias",
    "alpha": r"\.alpha",
    "dora_scale": r"\.dora_scale",
    "magnitude": rf"\.lora_magnitude_vector(?:{_ADAPTER}\.weight)?{_ADAPTER}",
    **{
        part: rf"\.{part}{_ADAPTER}"
        for part in (
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        )
    },
    "ia3_factor": rf"\.ia3_l{_ADAPTER}",
    "on_input": r"\.on_input",
    **{part: rf"\.{part}" for part in ("diff", "diff_b", "w_norm", "b_norm")},
    "ia3": r"\.weight",
}
_KEY: Final = re.compile(
    "(?P<layer>.*?)(?:" + "|".join(f"(?P<{part}>{ending})" for part, ending in _PARTS.items()) + ")"
)


class Key(NamedTuple):
    """A key, taken apart.

    Attributes:
        layer: The layer's name with the network's before it, as the file has it.
        part: One of `_PARTS`.
    """

    layer: str
    part: str


def parse_key(key: str) -> Key | None:
    """A key's layer and part; None if no kind of file has such a key."""
    match = _KEY.fullmatch(key)
    return match and Key(match["layer"], str(match.lastgroup))


def by_layer(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The layers of a file, each with its parts, and the keys that are of none.

    Returns:
        Layer's name → part → key; and what is left.
    """
    layers: dict[str, dict[str, str]] = defaultdict(dict)
    left = []
    for key in keys:
        found = parse_key(key)
        if found is None or found.part in layers[found.layer]:
            left.append(key)
        else:
            layers[found.layer][found.part] = key
    plain = [parts for parts in layers.values() if "ia3" in parts and "on_input" not in parts]
    left.extend(parts.pop("ia3") for parts in plain)
    return {name: parts for name, parts in layers.items() if parts}, left
