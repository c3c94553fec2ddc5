"""Weights → PyTorch modules: whole, of the right shapes and finite, or refused."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch

from sdrt.export.checkpoint import Checkpoint
from sdrt.export.half_precision import HalfOverflowError
from sdrt.export.random_weights import fill_with_random_weights, network_from_config
from sdrt.runtime.errors import CheckpointError

# Tensors beside a text encoder's that leave the picture as it is: the positions 0, 1, … that older
# transformers saved (Stable Diffusion 1.x and 2.x have them), and the rest of a whole CLIP model.
SPARE: Final = re.compile(
    r"(.*\.)?position_ids|text_projection\.weight|logit_scale|(vision_model|visual_projection)\..*"
)
SPARE_OF_IMAGES: Final = re.compile(r"(.*\.)?position_ids|text_projection\.weight|logit_scale|text_model\..*")
SPARE_POSITIONS: Final = re.compile(r"(.*\.)?position_ids")  # of the one with a projection of its own
# Errors whose text alone says what is wrong; of the others ('foo', "division by zero") the type is told.
_SPEAKING: Final = (OSError, ValueError, RuntimeError)


def check_architectures(checkpoint: Checkpoint) -> None:
    """Build every network without memory for its weights: what its configuration forbids is found at once.

    Raises:
        CheckpointError: A configuration describes no network.
    """
    for name in checkpoint.configs:
        try:
            meta_module(checkpoint, name)
        except Exception as error:  # whatever a wrong value leads to, deep inside of the libraries
            file = checkpoint.path / name / "config.json"
            raise CheckpointError(f"{file} describes no network: {_words(error)}") from error


def meta_module(checkpoint: Checkpoint, name: str) -> torch.nn.Module:
    """One network without memory for its weights."""
    with torch.device("meta"):
        return network_from_config(_loader(name), checkpoint.configs[name])


@lru_cache(maxsize=8)
def parameter_count(name: str, config: str) -> int:
    """The parameters of one network, from its ``config.json`` as text."""
    with torch.device("meta"):
        module = network_from_config(_loader(name), json.loads(config))
    return sum(parameter.numel() for parameter in module.parameters())


def load_module(checkpoint: Checkpoint, name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Load one network on the CPU, in evaluation mode.

    Args:
        checkpoint: The checked folder.
        name: A key of the checkpoint's configs.
        dtype: Of the weights, which are rounded to it.

    Raises:
        CheckpointError: A tensor is missing, not known to the network, of a wrong shape, or holds NaN or
            infinity; or the configuration describes no network.
        HalfOverflowError: fp16 is asked for and cannot hold a weight.
    """
    if checkpoint.random_seed is not None:
        module = meta_module(checkpoint, name)
        fill_with_random_weights(module, dtype, checkpoint.random_seed, name)
        return module.eval().requires_grad_(False)
    folder = checkpoint.path / name
    try:
        module, report = _loader(name).from_pretrained(
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            ignore_mismatched_sizes=True,  # reported, and refused by name below
            output_loading_info=True,
        )
    except Exception as error:  # as in `check_architectures`
        raise CheckpointError(f"{folder} cannot be loaded: {_words(error)}") from error
    _check_report(folder, report)
    module.to(dtype)  # diffusers leaves a tensor as it is that has another dtype than the file's others
    for key, tensor in module.state_dict().items():
        if not tensor.is_floating_point() or torch.isfinite(tensor).all():
            continue
        if dtype is torch.float16:  # as it stands in the file it may be finite; if not, this refuses it
            given = load_module(checkpoint, name).state_dict()[key]
            raise HalfOverflowError(f"the weights {key}", float(given.abs().max()))
        raise CheckpointError(f"{folder}: the tensor {key} holds NaN or infinity")
    loaded: torch.nn.Module = module.eval().requires_grad_(False)
    return loaded


def release_weights(module: torch.nn.Module) -> None:
    """Free a network's weights, whoever still holds the network: the tracer keeps what it has traced."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype)


def _loader(name: str) -> Any:
    """The class that reads one subfolder; the imports take seconds, so only what is asked for."""
    if name == "text_encoder":
        from transformers import CLIPTextModel

        return CLIPTextModel
    if name == "text_encoder_2":
        from transformers import CLIPTextModelWithProjection

        return CLIPTextModelWithProjection
    if name == "image_encoder":
        from transformers import CLIPVisionModelWithProjection

        return CLIPVisionModelWithProjection
    from diffusers import AutoencoderKL, UNet2DConditionModel

    return UNet2DConditionModel if name == "unet" else AutoencoderKL


def _words(error: Exception) -> str:
    """One line about a library's error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines else "no reason given"
    return text if lines and isinstance(error, _SPEAKING) else f"{type(error).__name__}: {text}"


def _check_report(folder: Path, report: dict[str, Any]) -> None:
    """Turn a loader's silent re-initialisations and omissions into errors."""
    if mismatched := sorted(report.get("mismatched_keys") or ()):
        key, given, wanted = mismatched[0]
        raise CheckpointError(
            f"{folder}: {key} has the shape {list(given)}, by config.json it is {list(wanted)} "
            f"({len(mismatched)} of wrong shape in all)"
        )
    missing = sorted(key for key in report.get("missing_keys") or () if not str(key).endswith("position_ids"))
    if missing:
        raise CheckpointError(f"{folder}: the tensor {missing[0]} is missing ({len(missing)} missing in all)")
    spare = {"text_encoder": SPARE, "text_encoder_2": SPARE_POSITIONS, "image_encoder": SPARE_OF_IMAGES}.get(
        folder.name
    )
    extra = sorted(key for key in report.get("unexpected_keys") or () if not (spare and spare.fullmatch(key)))
    if extra:
        raise CheckpointError(
            f"{folder}: the tensor {extra[0]} has no place in the network that config.json describes "
            f"({len(extra)} such in all): the two are not of one model"
        )
