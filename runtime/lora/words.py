"""Words of textual inversion inside of LoRA files, as trainers that learn both write them.

cloneofsimo's says in the header which keys are words; kohya's and OneTrainer's have them as
``bundle_emb.<word>.<part>``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.bundle.families.record import Family
from sdrt.runtime.bundle.weight_map import WeightMap
from sdrt.runtime.lora.content import Content

_SAID: Final = "<embed>"  # what the header says of a key that is a word
_BUNDLED: Final = re.compile(r"bundle_emb\.(.+?)\.(string_to_param\.\*|emb_params|\w+)")
_ALONE: Final = ("", "string_to_param.*", "emb_params")  # the part where there is one text encoder
_TOKENS: Final = "token_embedding.weight"


class Word(NamedTuple):
    """A word that a file brings.

    Attributes:
        keys: That its vectors stand under.
        vectors: For each text encoder float32 [k, width].
    """

    keys: tuple[str, ...]
    vectors: tuple[NDArray[np.float32], ...]


def words_in(content: Content, weights: WeightMap, family: Family) -> dict[str, Word]:
    """The words of a file that fit a model's text encoders.

    Args:
        content: The file.
        weights: The model's weight map.
        family: The model's.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)  # word → part → key
    for key in content.tensors:
        if content.metadata.get(key) == _SAID:
            found[key][""] = key
        elif match := _BUNDLED.fullmatch(key):
            found[match[1]][match[2]] = key
    words = {}
    for name, parts in found.items():
        keys = _keys(parts, family)
        vectors = tuple(_matrix(content.tensors[key]) for key in keys)
        if [array.shape[1] for array in vectors] == _widths(weights, family) and len(keys) == len(parts):
            words[name] = Word(keys, vectors)
    return words


def _keys(parts: Mapping[str, str], family: Family) -> tuple[str, ...]:
    """The keys of a word in the order of the text encoders; none where they are not those of the family."""
    if len(family.encoders) == 1:
        named = [part for part in _ALONE if part in parts]
    else:
        named = [encoder.embedding for encoder in family.encoders if encoder.embedding in parts]
    return tuple(parts[part] for part in named)


def _matrix(tensor: NDArray[np.float32]) -> NDArray[np.float32]:
    """A word's vectors as [k, width]; one of width 0, which fits no model, if it is none."""
    if tensor.ndim not in (1, 2) or not tensor.size:
        return np.empty((0, 0), np.float32)
    return tensor.reshape(-1, tensor.shape[-1])


def _widths(weights: WeightMap, family: Family) -> list[int]:
    """Numbers of one token's embedding, for each text encoder."""
    return [
        entry.shape[1]
        for encoder in family.encoders
        for name, entry in weights.tensors.get(encoder.component, {}).items()
        if name.endswith(_TOKENS)
    ]
