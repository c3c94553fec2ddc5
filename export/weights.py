"""Weights → PyTorch modules: whole, of the right shapes and finite, or refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import torch

from sdrt.export.checkpoint import SUBFOLDERS, Checkpoint
from sdrt.runtime.errors import CheckpointError

# Tensors beside a text encoder's that leave the picture as it is: the positions 0, 1, … that older
# transformers saved (Stable Diffusion 1.x and 2.x have them), and the rest of a whole CLIP model.
SPARE: Final = re.compile(
    r"(.*\.)?position_ids|text_projection\.weight|logit_scale|(vision_model|visual_projection)\..*"
)
# Errors whose text alone says what is wrong; of the others ('foo', "division by zero") the type is told.
_SPEAKING: Final = (OSError, ValueError, RuntimeError)


def check_architectures(checkpoint: Checkpoint) -> None:
    """Build every network without memory for its weights: what its configuration forbids is found at once.

    Raises:
        CheckpointError: A configuration describes no network.
    """
    for name in SUBFOLDERS:
        folder = checkpoint.path / name
        try:
            with torch.device("meta"):
                _build(name, folder)
        except Exception as error:  # whatever a wrong value leads to, deep inside of the libraries
            raise CheckpointError(
                f"{folder / 'config.json'} describes no network: {_words(error)}"
            ) from error


def load_module(checkpoint: Checkpoint, name: str) -> torch.nn.Module:
    """Load one network in float32 on the CPU, in evaluation mode.

    Args:
        checkpoint: The checked folder.
        name: ``text_encoder``, ``unet`` or ``vae``.

    Raises:
        CheckpointError: A tensor is missing, not known to the network, of a wrong shape, or holds NaN or
            infinity; or the configuration describes no network.
    """
    folder = checkpoint.path / name
    try:
        module, report = _loader(name).from_pretrained(
            folder,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            ignore_mismatched_sizes=True,  # reported, and refused by name below
            output_loading_info=True,
        )
    except Exception as error:  # as in `check_architectures`
        raise CheckpointError(f"{folder} cannot be loaded: {_words(error)}") from error
    _check_report(folder, report)
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder}: the tensor {key} holds NaN or infinity")
    loaded: torch.nn.Module = module.eval().requires_grad_(False)
    return loaded


def _loader(name: str) -> Any:
    """The class that reads one subfolder; the imports take seconds, so only what is asked for."""
    if name == "text_encoder":
        from transformers import CLIPTextModel

        return CLIPTextModel
    from diffusers import AutoencoderKL, UNet2DConditionModel

    return UNet2DConditionModel if name == "unet" else AutoencoderKL


def _build(name: str, folder: Path) -> None:
    kind = _loader(name)
    if name == "text_encoder":
        kind(kind.config_class.from_pretrained(folder, local_files_only=True))
    else:
        kind.from_config(kind.load_config(folder, local_files_only=True))


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
    spare = SPARE if folder.name == "text_encoder" else None
    extra = sorted(key for key in report.get("unexpected_keys") or () if not (spare and spare.fullmatch(key)))
    if extra:
        raise CheckpointError(
            f"{folder}: the tensor {extra[0]} has no place in the network that config.json describes "
            f"({len(extra)} such in all): the two are not of one model"
        )
