"""What the numbers of a manifest must fulfil, as rules that one function walks."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from sdrt.runtime.bundle import limits as most
from sdrt.runtime.bundle.families.components import (
    ENCODER_HIDDEN_STATES,
    IMAGE_LATENTS,
    INPAINTING,
)
from sdrt.runtime.bundle.families.record import TensorSpec
from sdrt.runtime.bundle.manifest import MANIFEST_NAME, FileEntry, Manifest
from sdrt.runtime.errors import BundleError
from sdrt.runtime.samplers.registry import SAMPLERS


def check_file(entry: FileEntry, where: str, folder: str = "the bundle") -> None:
    """Refuse an entry of a list of files that no file can have.

    Args:
        entry: Of a bundle or of an engine.
        where: Names the list in messages.
        folder: Names what its path must not leave.

    Raises:
        BundleError: Its path leaves the folder, its size or SHA-256 is none.
    """
    path, pure = entry.path, PurePosixPath(entry.path)
    shown = repr(path[:100])
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or not path.isprintable():
        raise BundleError(f"{where} names {shown}, which lies outside {folder}: refused")
    if not 0 <= entry.size <= most.MAX_FILE_BYTES:
        raise BundleError(f"{where}: {shown} has {entry.size} bytes: 0 to {most.MAX_FILE_BYTES} are allowed")
    if not re.fullmatch("[0-9a-f]{64}", entry.sha256):
        raise BundleError(f"{where}: the sha256 of {shown} is {entry.sha256[:80]!r}, not 64 hex digits")


def check_rules(manifest: Manifest) -> None:
    """Refuse numbers that make no sense, alone or together.

    Raises:
        BundleError: A rule is broken; the message says which.
    """
    for rule, holds in {**_number_rules(manifest), **_fit_rules(manifest)}.items():
        if not holds:
            raise BundleError(f"{MANIFEST_NAME} breaks a rule: {rule}; export the bundle again")
    limits, defaults = manifest.limits, manifest.defaults
    sides = (limits.height, limits.width)
    for name, side, size in zip(("height", "width"), sides, (defaults.height, defaults.width), strict=True):
        if not side.admits(size):
            raise BundleError(f"{MANIFEST_NAME}: the default {name} is {size}, the limits are {side}")


def _number_rules(manifest: Manifest) -> dict[str, bool]:
    """Rule → whether it holds: limits, defaults and latents."""
    limits, defaults, factor = manifest.limits, manifest.defaults, manifest.latents.factor
    sides = (limits.height, limits.width)
    listed = [[entry.path for entry in part.files] for part in manifest.components.values()]
    return {
        "each file of a component is listed once": all(len(set(paths)) == len(paths) for paths in listed),
        f"latents: channels are 1 to {most.MAX_CHANNELS}, the factor is 1 to {most.MAX_FACTOR}": (
            1 <= manifest.latents.channels <= most.MAX_CHANNELS and 1 <= factor <= most.MAX_FACTOR
        ),
        f"limits: 1 ≤ min_batch ≤ max_batch ≤ {most.MAX_BATCH}": (
            1 <= limits.min_batch <= limits.max_batch <= most.MAX_BATCH
        ),
        f"limits: max_chunks is 1 to {most.MAX_CHUNKS}": 1 <= limits.max_chunks <= most.MAX_CHUNKS,
        f"limits: max_clip_skip is 0 to {most.MAX_CLIP_SKIP}": 0
        <= limits.max_clip_skip
        <= most.MAX_CLIP_SKIP,
        f"limits: 1 ≤ minimum ≤ maximum ≤ {most.MAX_SIDE}, and multiple is at least 1": all(
            1 <= side.minimum <= side.maximum <= most.MAX_SIDE and side.multiple >= 1 for side in sides
        ),
        f"limits: the smallest pictures of a batch have at most {most.MAX_PICTURE_PIXELS} pixels": (
            limits.min_batch * limits.height.minimum * limits.width.minimum <= most.MAX_PICTURE_PIXELS
        ),
        f"defaults: a picture has at most {most.MAX_PICTURE_PIXELS} pixels": (
            defaults.height * defaults.width <= most.MAX_PICTURE_PIXELS
        ),
        f"tokenizer: max_length is 2 to {most.MAX_TOKENS}": all(
            2 <= facts.max_length <= most.MAX_TOKENS for facts in manifest.tokenizers
        ),
        f"image_processor: size is 1 to {most.MAX_ENCODER_SIZE}": (
            manifest.image_processor is None or 1 <= manifest.image_processor.size <= most.MAX_ENCODER_SIZE
        ),
        "limits: all sizes are multiples of the factor": all(
            (side.minimum if side.minimum == side.maximum else side.multiple) % max(factor, 1) == 0
            for side in sides
        ),
        "defaults: 1 to num_train_timesteps steps": (
            1 <= defaults.num_inference_steps <= manifest.schedule.num_train_timesteps
        ),
        "defaults: guidance_scale is not negative": defaults.guidance_scale >= 0,
        "defaults: a known sampler, and for EDM models one that can draw with them": (
            defaults.sampler in SAMPLERS and (manifest.schedule.edm is None or SAMPLERS[defaults.sampler].edm)
        ),
    }


def _fit_rules(manifest: Manifest) -> dict[str, bool]:
    """Rule → whether it holds: what one component gives is what the next one takes."""
    parts = manifest.components
    latents = (
        parts["unet"].spec.inputs[0],
        *parts["unet"].spec.outputs,
        *parts["vae_decoder"].spec.inputs,
    )
    family = manifest.record
    if len(manifest.tokenizers) != len(family.tokenizers):
        return {"there is a tokenizer for each text encoder": False}
    rules = _text_rules(manifest) if family.reads_text else _image_rules(manifest)
    inpainting = parts["unet"].spec.input(INPAINTING)
    noising, wanted = manifest.noising, family.noise_level is not None
    return rules | {
        "noising is there where the family wants it, and its max_level is one of its schedule's": (
            wanted == (noising is not None)
            and (noising is None or 0 <= noising.max_level < noising.schedule.num_train_timesteps)
        ),
        "the unet and the vae_decoder have the latents' channels": all(
            spec.shape[1] == manifest.latents.channels for spec in latents
        ),
        "the unet's inpainting has the latents' channels and one for the mask": (
            inpainting is None or inpainting.shape[1] == manifest.latents.channels + 1
        ),
        "the unet's input of the given picture has the latents' channels": all(
            spec.shape[1] == manifest.latents.channels
            for spec in parts["unet"].spec.inputs
            if spec.name == IMAGE_LATENTS
        ),
        "preview has a row for each channel of the latents": (
            len(manifest.preview.weights) == manifest.latents.channels
        ),
    }


def _image_rules(manifest: Manifest) -> dict[str, bool]:
    """Rule → whether it holds: the image encoder and what it gives."""
    (encoder,) = manifest.record.encoders
    spec, facts = manifest.components[encoder.component].spec, manifest.image_processor
    return {
        "the image encoder's output fits the unet": all(
            _widths(manifest, name) == _width_of(manifest, name) for name in encoder.gives
        ),
        "the image_processor's size is the image encoder's": (
            facts is not None and spec.inputs[0].shape[2:] == (facts.size, facts.size)
        ),
        "the image_processor's std are above 0": facts is not None and min(facts.std) > 0,
        "limits: max_chunks is 1 and max_clip_skip 0 without text": (
            manifest.limits.max_chunks == 1 and manifest.limits.max_clip_skip == 0
        ),
    }


def _text_rules(manifest: Manifest) -> dict[str, bool]:
    """Rule → whether it holds: text encoders, tokenizers and what the U-Net reads of them."""
    family = manifest.record
    encoders = [manifest.components[encoder.component].spec for encoder in family.encoders]
    states = {encoder.gives[ENCODER_HIDDEN_STATES] for encoder in family.encoders}
    added = {name for encoder in family.encoders for name in encoder.gives} - {ENCODER_HIDDEN_STATES}
    return {
        "text_output is what the unet reads of the text encoders": {manifest.text_output} == states,
        "the text encoder's output fits the unet": (
            _widths(manifest, ENCODER_HIDDEN_STATES) == _width_of(manifest, ENCODER_HIDDEN_STATES)
        ),
        **{
            f"the text encoders' {name} fit the unet": _widths(manifest, name) == _width_of(manifest, name)
            for name in sorted(added)
        },
        "the tokenizer's max_length fits the text encoder": all(
            spec.inputs[0].shape[1] == facts.max_length
            for spec, facts in zip(encoders, manifest.tokenizers, strict=True)
        ),
        "custom_embeddings are as wide as the text encoder's hidden states": all(
            spec.inputs[1].shape[2] == spec.outputs[0].shape[2] for spec in encoders
        ),
    }


def _width_of(manifest: Manifest, name: str) -> int | None:
    """The numbers that an input of the U-Net has along its last axis."""
    entry = manifest.components["unet"].spec.input(name)
    return None if entry is None else _number(entry)


def _widths(manifest: Manifest, name: str) -> int:
    """Those that the encoders give for it, side by side."""
    total = 0
    for index, output in manifest.record.sources(name):
        entry = manifest.components[manifest.record.encoders[index].component].spec.output(output)
        assert entry is not None  # in every manifest that passed `_tensors`
        total += _number(entry)
    return total


def _number(entry: TensorSpec) -> int:
    """The size of a tensor's last axis, a number in every manifest that passed `_tensors`."""
    width = entry.shape[-1]
    assert isinstance(width, int)
    return width
