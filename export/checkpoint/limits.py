"""How large what a checkpoint's files say may be: far above every model that draws pictures.

What is above is refused before anything is built from it: a million layers would take minutes and gigabytes
only to be found wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from sdrt.runtime.errors import CheckpointError

MAX_CONFIG_BYTES: Final = 1 << 20  # those of published models have 1 to 3 kB
MAX_HEADER_BYTES: Final = 16 << 20  # of a safetensors file; that of SDXL's U-Net has 0.2 MB
MAX_ENTRIES: Final = 16  # of a list: one for each level of a network, and no network has more than 6
# Key of a network's config.json → the largest whole number that it may hold, also inside of lists.
LARGEST: Final = {
    "attention_head_dim": 4096,
    "block_out_channels": 16384,
    "conv_in_kernel": 15,
    "conv_out_kernel": 15,
    "image_size": 4096,
    "in_channels": 256,
    "latent_channels": 256,
    "layers_per_block": 16,
    "max_position_embeddings": 16384,
    "num_attention_heads": 1024,
    "num_hidden_layers": 256,
    "out_channels": 256,
    "patch_size": 4096,
    "reverse_transformer_layers_per_block": 64,
    "sample_size": 8192,
    "transformer_layers_per_block": 64,
    "vocab_size": 1 << 20,
}
LARGEST_OF_OTHERS: Final = 65536  # widths, token ids, heads …
# Transformer blocks of a U-Net: layers of a level times transformers of a layer, over all levels, there and
# back again. SDXL has 70.
MAX_TRANSFORMERS: Final = 2048


def check_limits(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse a network's configuration with a list or a whole number above its limit.

    Raises:
        CheckpointError: One is; the message has the key, the value and the limit.
    """
    for key, value in config.items():
        if isinstance(value, list) and len(value) > MAX_ENTRIES:
            raise CheckpointError(f"{file}: {key} has {len(value)} entries, more than {MAX_ENTRIES}")
        limit = LARGEST.get(key, LARGEST_OF_OTHERS)
        largest = max(_whole_numbers(value), default=0)
        if largest > limit:
            raise CheckpointError(f"{file}: {key} has {largest}, more than the limit of {limit}")
    transformers = _transformers(config)
    if transformers > MAX_TRANSFORMERS:
        raise CheckpointError(
            f"{file}: layers_per_block and transformer_layers_per_block make {transformers} transformers, "
            f"more than the limit of {MAX_TRANSFORMERS}"
        )


def _whole_numbers(value: object) -> Iterator[int]:
    if isinstance(value, list):
        for entry in value:
            yield from _whole_numbers(entry)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _transformers(config: Mapping[str, Any]) -> int:
    """At most so many, of whatever the two keys hold."""
    layers, transformers = (
        max(_whole_numbers(config.get(key, 1)), default=1)
        for key in ("layers_per_block", "transformer_layers_per_block")
    )
    levels = len(list(_whole_numbers(config.get("block_out_channels", 1))))
    return (2 * layers + 1) * transformers * levels
