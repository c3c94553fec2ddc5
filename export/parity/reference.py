"""diffusers' own pipelines on a checkpoint: the reference of the whole project."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.tokenizer_json import ClipTokenizer, write_tokenizer_folder
from sdrt.export.checkpoint.weights import load_module
from sdrt.runtime.system.files import temporary_folder


def reference_pipeline(
    checkpoint: Checkpoint, networks: Mapping[str, torch.nn.Module] | None = None, kind: str = ""
) -> Any:
    """diffusers' pipeline for the checkpoint's family and kind, in float32 with `reference_scheduler`.

    That of image variations has no feature extractor: it is given pictures as tensors.

    Args:
        checkpoint: A checked checkpoint.
        networks: Those that it shall have; the others are None. By default all are loaded.
        kind: Another class of diffusers over the same networks.
    """
    import diffusers

    if networks is None:
        networks = {name: load_module(checkpoint, name) for name in checkpoint.configs}
    parts: dict[str, Any] = {name: networks.get(name) for name in checkpoint.configs}
    parts["scheduler"] = reference_scheduler(checkpoint)
    folders = checkpoint.kind.tokenizers.values()
    parts |= {
        folder: _reference_tokenizer(checkpoint, folder, tokenizer)
        for folder, tokenizer in zip(folders, checkpoint.tokenizers, strict=True)
    }
    parts |= checkpoint.kind.settings
    if checkpoint.record.zeros_for_no_text:
        parts["force_zeros_for_empty_prompt"] = checkpoint.force_zeros_for_empty_prompt
    if kind:
        takes = getattr(diffusers, kind)
        parts = {name: parts.get(name) for name in signature(takes).parameters}
    else:
        takes = reference_kind(checkpoint)
        if checkpoint.kind.noising:
            folder = checkpoint.path / checkpoint.kind.noising
            parts[checkpoint.kind.noising] = diffusers.DDPMScheduler.from_pretrained(folder)
        if checkpoint.image_processor is not None and checkpoint.record.reads_text:
            parts["feature_extractor"] = _image_processor(checkpoint.path / "feature_extractor")
    pipeline = takes(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _image_processor(folder: Path) -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor.from_pretrained(folder)


def reference_scheduler(checkpoint: Checkpoint) -> Any:
    """diffusers' scheduler for the parity gate, as it reads the checkpoint's file: that of `gate_sampler`."""
    from diffusers import DDIMScheduler, EDMEulerScheduler

    schedule, folder = checkpoint.schedule, checkpoint.path / "scheduler"
    if schedule.edm is not None:
        return EDMEulerScheduler.from_pretrained(folder)
    # The betas are those of the file's own class where it does not give them. Only models that draw pixels
    # want their predictions clipped; StableDiffusionPipeline corrects it too.
    return DDIMScheduler.from_pretrained(
        folder,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule=schedule.beta_schedule,
        steps_offset=schedule.steps_offset,
        clip_sample=False,
        thresholding=False,
    )


def gate_sampler(checkpoint: Checkpoint) -> str:
    """Our sampler for the parity gate: ddim, or euler with an EDM model, which has no training timesteps."""
    return "ddim" if checkpoint.schedule.edm is None else "euler"


def reference_kind(checkpoint: Checkpoint) -> Any:
    """diffusers' class that draws with a checkpoint's networks, from text if they do not read a picture.

    A latent consistency model is drawn by Stable Diffusion's, which takes any scheduler.
    """
    import diffusers

    kind = checkpoint.kind
    return getattr(diffusers, kind.inpaints if "inpainting_channels" in checkpoint.sizes() else kind.draws)


def reference_prompt_embeddings(checkpoint: Checkpoint, prompt: str) -> dict[str, torch.Tensor]:
    """What diffusers' pipeline makes of a prompt, as arguments of another call of it."""
    encoders = checkpoint.kind.tokenizers
    networks = {name: load_module(checkpoint, name) for name in encoders}
    pipeline = reference_pipeline(checkpoint, networks, checkpoint.kind.encodes)
    arguments = checkpoint.kind.embeddings.values()
    names = [f"{half}{argument}" for argument in arguments for half in ("", "negative_")]
    with torch.no_grad():
        encoded = pipeline.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    return dict(zip(names, encoded, strict=True))


def _reference_tokenizer(checkpoint: Checkpoint, folder: str, tokenizer: ClipTokenizer) -> Any:
    """transformers' tokenizer of one text encoder; of an architecture, with CLIP's vocabulary."""
    from transformers import CLIPTokenizer

    length = tokenizer.ids["max_length"]  # the file's may be huge, or missing
    if checkpoint.random_seed is None:
        return CLIPTokenizer.from_pretrained(checkpoint.path / folder, model_max_length=length)
    pad = next(token for token, number in tokenizer.vocabulary.ids.items() if number == tokenizer.ids["pad"])
    with temporary_folder() as temporary:
        write_tokenizer_folder(temporary, pad=pad)
        return CLIPTokenizer.from_pretrained(temporary, model_max_length=length)
