"""Seeded random weights for a network of any size, with activations that stay near 1.

Speed and memory do not depend on the weights, and fp16 parity means something as long as no tensor grows
or dies. Each tensor comes from a generator of its own, seeded by its name, so that neither the order of
the modules nor the dtype changes it; its values are fp16 numbers, which every export can hold exactly.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch

# Part of a checkpoint's fingerprint: raise it when other weights come out of the same seed.
SCHEME: Final = 1

# A weight of n inputs is uniform with the standard deviation gain/√n: inputs of RMS r give outputs of RMS
# gain·r (He et al. 2015, eq. 7). The last layer of a residual branch is small, so that some hundred of
# branches (SDXL's U-Net has 230) do not pile up; what follows a normalisation and a SiLU (RMS 0.6) to an
# output of the network makes up for it. Queries and keys are large enough for logits of standard deviation
# 2: at 1, attention to thousands of positions would be a plain mean that hides errors.
_GAINS: Final = (
    (re.compile(r".*\b(conv2|to_out\.0|net\.2|proj_out|out_proj|fc2)\.weight"), 0.3),
    (re.compile(r".*\b(to_q|to_k|q_proj|k_proj)\.weight"), math.sqrt(2.0)),
    (re.compile(r"post_quant_conv\.weight"), 0.2),  # the division by scaling_factor comes before
    (re.compile(r"decoder\.conv_out\.weight"), 0.6),  # an image, most of it within [-1, 1]
    (re.compile(r"(encoder\.)?conv_out\.weight"), 1.7),
)
_EMBEDDING: Final = re.compile(r".*\b(token|position)_embedding\.weight")
_NORM_SPREAD: Final = 0.1  # of a normalisation's weights around 1
_BIAS: Final = 0.05


def fill_with_random_weights(module: torch.nn.Module, dtype: torch.dtype, seed: int, name: str) -> None:
    """Give a module that was built on the meta device its weights, one tensor at a time.

    Args:
        module: Built under ``torch.device("meta")``.
        dtype: Of all weights.
        seed: Any whole number.
        name: Of the network; another one has other weights.
    """
    state = {key: tensor.to(dtype) for key, tensor in random_tensors(module, seed, name)}
    module.load_state_dict(state, assign=True)
    for part in module.modules():
        for key, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:  # CLIP's positions 0, 1, …, the only buffer outside of the state
                part.register_buffer(key, torch.arange(buffer.shape[-1])[None], persistent=False)


def random_tensors(module: torch.nn.Module, seed: int, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of `fill_with_random_weights` in float16, one at a time, in the order of the state."""
    for key, tensor in module.state_dict().items():
        yield key, _values(key, tuple(tensor.shape), f"{seed}/{name}/{key}")


def _values(key: str, shape: tuple[int, ...], source: str) -> torch.Tensor:
    """One tensor in float16: uniform around its middle."""
    middle = 1.0 if len(shape) == 1 and key.endswith("weight") else 0.0
    digest = hashlib.sha256(source.encode()).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
    # Sixteen random bits a weight: half the time of random floats, and more than fp16 tells apart.
    bits = torch.frombuffer(bytearray(generator.bytes(2 * math.prod(shape))), dtype=torch.int16)
    values = bits.reshape(shape).float().mul_(_bound(key, shape) / 2**15)
    return values.add_(middle).half()


def _bound(key: str, shape: tuple[int, ...]) -> float:
    """Half of the width of a tensor's distribution."""
    if len(shape) == 1:
        return _NORM_SPREAD if key.endswith("weight") else _BIAS
    if match := _EMBEDDING.fullmatch(key):
        return math.sqrt(3.0) * (1.0 if match[1] == "token" else 0.3)
    gain = next((gain for pattern, gain in _GAINS if pattern.fullmatch(key)), 1.0)
    return math.sqrt(3.0) * gain / math.sqrt(math.prod(shape[1:]))


def network_from_config(kind: Any, config: dict[str, Any]) -> torch.nn.Module:
    """A diffusers or transformers network from the contents of its ``config.json``."""
    if hasattr(kind, "config_class"):
        module: torch.nn.Module = kind(kind.config_class.from_dict(config))
    else:
        module = kind.from_config(config)
    return module
