"""Whether the parts of a checkpoint belong together, and whether its U-Net is of a kind that is supported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from sdrt.export.checkpoint.files import TOKENIZERS
from sdrt.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from sdrt.export.checkpoint.checkpoint import Checkpoint

# Channels that a U-Net takes beside the latents' → what such a checkpoint is for. Those for inpainting, with
# latents and a mask, are supported.
OTHER_KINDS: Final[dict[str, Callable[[int], int]]] = {
    "the latents of a picture to edit": lambda latents: latents,
    "a depth map": lambda _latents: 1,
    "a small picture to enlarge": lambda _latents: 3,
}
# What a U-Net's configuration says of inputs that no component has.
OTHER_INPUTS: Final = {
    "class_embed_type": "a class or an embedding beside the text (as of unCLIP)",
    "num_class_embeds": "a class or a noise level beside the text (as of upscalers)",
    "encoder_hid_dim_type": "embeddings that it projects itself (as of Kandinsky)",
}


LEAST_GUIDANCE_WIDTH: Final = 4


def check_fit(checkpoint: Checkpoint) -> None:
    """The parts must agree about the sizes that they hand to each other.

    Raises:
        CheckpointError: Two of them do not, or the U-Net is of a kind that is not supported.
    """
    sizes = checkpoint.sizes()
    _check_kind(checkpoint, sizes)
    if checkpoint.family == "image-variations":
        _check_image_fit(checkpoint, sizes)
    else:
        _check_text_fit(checkpoint, sizes)
    if checkpoint.family == "sdxl":
        _check_sdxl_fit(checkpoint, sizes)
    elif (added := checkpoint.configs["unet"].get("addition_embed_type")) is not None:
        raise CheckpointError(
            f"the U-Net's addition_embed_type is {added!r}, and a {checkpoint.pipeline} gives it nothing for "
            "that: model_index.json and unet are not of one model"
        )
    if checkpoint.pipeline.startswith("Latent") and not checkpoint.distilled_guidance:
        raise CheckpointError(
            f"the U-Net has no time_cond_proj_dim, through which a {checkpoint.pipeline} tells it the "
            "guidance scale: model_index.json and unet are not of one model (with a merged LCM-LoRA it is a "
            "StableDiffusionPipeline with an LCMScheduler)"
        )


def _check_kind(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> None:
    unet = checkpoint.configs["unet"]
    takes, gives, latents = int(unet["in_channels"]), int(unet["out_channels"]), sizes["latent_channels"]
    for what, channels in OTHER_KINDS.items():
        if takes == latents + channels(latents):
            raise CheckpointError(
                f"the U-Net takes {takes} channels, the VAE's {latents} and {channels(latents)} more for "
                f"{what}: not supported; checkpoints for text to image, inpainting and image variations are"
            )
    if not gives == latents == sizes["unet_channels"]:
        raise CheckpointError(
            f"the U-Net takes {takes} and gives {gives} channels, the VAE has {latents}: they are not of one "
            "model, or it is of a kind that is not supported"
        )
    if sizes.get("guidance_width", LEAST_GUIDANCE_WIDTH) < LEAST_GUIDANCE_WIDTH:
        raise CheckpointError(
            f"the U-Net's time_cond_proj_dim is {sizes['guidance_width']}; it must be at least "
            f"{LEAST_GUIDANCE_WIDTH}, two frequencies"
        )
    for key, what in OTHER_INPUTS.items():
        if unet.get(key) is not None:
            raise CheckpointError(
                f"the U-Net's {key} is {unet[key]!r}: it takes {what}, which is not supported"
            )


def _check_image_fit(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> None:
    encoder, facts = checkpoint.configs["image_encoder"], checkpoint.image_processor
    if encoder["projection_dim"] != sizes["cross_width"]:
        raise CheckpointError(
            f"the image encoder gives {encoder['projection_dim']} features, the U-Net's cross-attention "
            f"takes {sizes['cross_width']}: image_encoder and unet are not of one model"
        )
    if facts is None or facts.size != sizes["encoder_size"]:
        raise CheckpointError(
            f"the feature_extractor makes pictures of {facts and facts.size} pixels, the image encoder takes "
            f"{sizes['encoder_size']}: feature_extractor and image_encoder are not of one model"
        )


def _check_text_fit(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> None:
    encoders = [name for name in checkpoint.configs if name in TOKENIZERS]
    for name, tokenizer in zip(encoders, checkpoint.tokenizers, strict=True):
        largest, entries = max(tokenizer.vocabulary.ids.values()), checkpoint.configs[name]["vocab_size"]
        if largest >= entries:
            raise CheckpointError(
                f"the {TOKENIZERS[name]} has ids up to {largest}, {name} embeds "
                f"{entries}: {TOKENIZERS[name]} and {name} are not of one model"
            )
    given = sizes["text_width"] + sizes.get("text_width_2", 0)
    if given != sizes["cross_width"]:
        raise CheckpointError(
            f"the text encoder{'s give' if len(encoders) > 1 else ' gives'} {given} features, the U-Net's "
            f"cross-attention takes {sizes['cross_width']}: text_encoder and unet are not of one model"
        )


def _check_sdxl_fit(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> None:
    """SDXL's U-Net takes the pooled text and six numbers, each as a sinusoidal embedding."""
    unet = checkpoint.configs["unet"]
    if unet.get("addition_embed_type") != "text_time":
        raise CheckpointError(
            f"the U-Net's addition_embed_type is {unet.get('addition_embed_type')!r}; of the models with two "
            "text encoders only SDXL's, with text_time, is supported"
        )
    takes, width = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim")
    gives = sizes["projection_width"] + 6 * (width if isinstance(width, int) else 0)
    if takes != gives:
        raise CheckpointError(
            f"the U-Net's projection_class_embeddings_input_dim is {takes}, text_encoder_2 and six time ids "
            f"give {gives}: text_encoder_2 and unet are not of one model (or it is a refiner)"
        )
    lengths = [tokenizer.ids["max_length"] for tokenizer in checkpoint.tokenizers]
    if len(set(lengths)) > 1:
        raise CheckpointError(
            f"the tokenizers give {lengths[0]} and {lengths[1]} tokens; the U-Net reads them side by side"
        )
