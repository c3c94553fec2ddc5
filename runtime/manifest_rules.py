"""What the numbers of a manifest must fulfil, as rules that one function walks."""

from __future__ import annotations

from sdrt.runtime.errors import BundleError
from sdrt.runtime.manifest import MANIFEST_NAME, Manifest
from sdrt.runtime.solvers import SAMPLERS


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
    return {
        "latents: channels and factor are at least 1": min(factor, manifest.latents.channels) >= 1,
        "limits: 1 ≤ min_batch ≤ max_batch": 1 <= limits.min_batch <= limits.max_batch,
        "limits: max_chunks is at least 1": limits.max_chunks >= 1,
        "limits: max_clip_skip is at least 0": limits.max_clip_skip >= 0,
        "limits: 1 ≤ minimum ≤ maximum, and multiple is at least 1": all(
            1 <= side.minimum <= side.maximum and side.multiple >= 1 for side in sides
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
    rules = _text_rules(manifest) if manifest.tokenizers else _image_rules(manifest)
    inpainting = parts["unet"].spec.input("inpainting")
    return rules | {
        "the unet and the vae_decoder have the latents' channels": all(
            spec.shape[1] == manifest.latents.channels for spec in latents
        ),
        "the unet's inpainting has the latents' channels and one for the mask": (
            inpainting is None or inpainting.shape[1] == manifest.latents.channels + 1
        ),
        "preview has a row for each channel of the latents": (
            manifest.preview is None
            or (
                len(manifest.preview.weights) == manifest.latents.channels
                and all(len(row) == 3 for row in manifest.preview.weights)
            )
        ),
    }


def _image_rules(manifest: Manifest) -> dict[str, bool]:
    """Rule → whether it holds: the image encoder and what it gives."""
    encoder, facts = manifest.components["image_encoder"].spec, manifest.image_processor
    embeddings = manifest.components["unet"].spec.inputs[2]
    return {
        "the image encoder's output fits the unet": encoder.outputs[0].shape[2] == embeddings.shape[2],
        "the image_processor's size is the image encoder's": (
            facts is not None and encoder.inputs[0].shape[2:] == (facts.size, facts.size)
        ),
        "the image_processor's std are above 0": facts is not None and min(facts.std) > 0,
        "limits: max_chunks is 1 and max_clip_skip 0 without text": (
            manifest.limits.max_chunks == 1 and manifest.limits.max_clip_skip == 0
        ),
    }


def _text_rules(manifest: Manifest) -> dict[str, bool]:
    """Rule → whether it holds: text encoders, tokenizers and what the U-Net reads of them."""
    parts = manifest.components
    texts = {spec.name: spec.shape[1:] for spec in parts["text_encoder"].spec.outputs}
    unet = parts["unet"].spec
    embeddings = unet.inputs[2]
    encoders = [parts[name] for name in ("text_encoder", "text_encoder_2") if name in parts]
    given = texts.get(manifest.text_output)
    rules = {"text_output is an output of the text encoder": given is not None}
    if manifest.tokenizer_2 is not None:
        hidden, pooled = parts["text_encoder_2"].spec.outputs
        given = None if given is None else (given[0], _sum(given[1], hidden.shape[2]))
        added = unet.input("text_embeds")
        rules["text_encoder_2's text_embeds fit the unet"] = (
            added is not None and pooled.shape[1:] == added.shape[1:]
        )
    context = embeddings.shape[1]
    return rules | {
        "the text encoder's output fits the unet": given is not None and given[1:] == embeddings.shape[2:],
        "the tokenizer's max_length fits the text encoder and the unet": all(
            part.spec.inputs[0].shape[1] == facts.max_length and context in ("context", facts.max_length)
            for part, facts in zip(encoders, manifest.tokenizers, strict=True)
        ),
        "custom_embeddings are as wide as the text encoder's hidden states": all(
            custom.shape[2] == hidden.shape[2]
            for custom, hidden in (
                (part.spec.input("custom_embeddings"), part.spec.outputs[0]) for part in encoders
            )
            if custom is not None
        ),
        "limits: max_chunks is 1 where the unet's context has one size": (
            context == "context" or manifest.limits.max_chunks == 1
        ),
        "limits: max_clip_skip is 0 where the text encoders do not read clip_skip": (
            manifest.limits.max_clip_skip == 0
            or all(part.spec.input("clip_skip") is not None for part in encoders)
        ),
    }


def _sum(left: int | str, right: int | str) -> int:
    """Of two widths, which are numbers in every manifest that passed `_tensors`."""
    assert isinstance(left, int)
    assert isinstance(right, int)
    return left + right
