"""Whether the parts of a checkpoint belong together, and whether its U-Net is of a kind that is supported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.runtime.bundle.families.components import CLASS_LABELS, DEPTH, ENCODER_HIDDEN_STATES
from sdrt.runtime.bundle.manifest import ImageProcessorFacts
from sdrt.runtime.errors import CheckpointError

# What a U-Net takes beside the latents → the channels of that. Those for inpainting, with latents and a mask,
# are of the same families as those that take no more.
OTHER_KINDS: Final[dict[str, Callable[[int], int]]] = {
    "the latents of a picture to edit": lambda latents: latents,
    "a depth map": lambda _latents: 1,
    "a small picture to enlarge": lambda _latents: 3,
}
# Those that are supported → what model_index.json must name.
OF_PIPELINE: Final = {
    "the latents of a picture to edit": "StableDiffusionInstructPix2PixPipeline",
    "a small picture to enlarge": "StableDiffusionUpscalePipeline",
    "a depth map": "StableDiffusionDepth2ImgPipeline",
}
# What a U-Net's configuration says of inputs that no component has.
OTHER_INPUTS: Final = {
    "class_embed_type": "a class or an embedding beside the text (as of unCLIP)",
    "num_class_embeds": "a class or a noise level beside the text (as of upscalers)",
    "encoder_hid_dim_type": "embeddings that it projects itself (as of Kandinsky)",
}


LEAST_GUIDANCE_WIDTH: Final = 4


class MisfitError(CheckpointError):
    """The weights are not those of the network that ``config.json`` describes."""


def check_fit(checkpoint: Checkpoint) -> None:
    """The parts must agree about the sizes that they hand to each other.

    Raises:
        CheckpointError: Two of them do not, or the U-Net is of a kind that is not supported.
    """
    sizes = checkpoint.sizes()
    _check_kind(checkpoint, sizes)
    if checkpoint.record.reads_text:
        _check_text_fit(checkpoint, sizes)
    else:
        _check_image_fit(checkpoint, sizes)
    if checkpoint.record.picture_input == CLASS_LABELS:
        _check_label_fit(checkpoint, sizes)
    levels, noising = checkpoint.configs["unet"].get("num_class_embeds"), checkpoint.noising
    if levels is not None and noising is not None and levels <= noising.max_level:
        raise CheckpointError(
            f"the U-Net's num_class_embeds is {levels}, and noise levels go up to {noising.max_level}: "
            "model_index.json and unet are not of one model"
        )
    if checkpoint.kind.added:
        _check_added_fit(checkpoint)
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
    record = checkpoint.record
    read = record.picture_input or record.components["unet"].input(DEPTH)
    for what, channels in OTHER_KINDS.items():
        if not read and takes == latents + channels(latents):
            todo = "not supported; checkpoints for text to image, inpainting and image variations are"
            if pipeline := OF_PIPELINE.get(what):
                todo = f"that is no {checkpoint.pipeline}; set _class_name in model_index.json to {pipeline}"
            raise CheckpointError(
                f"the U-Net takes {takes} channels, the VAE's {latents} and {channels(latents)} more for "
                f"{what}: {todo}"
            )
    if read and sizes["unet_channels"] != latents:
        raise CheckpointError(
            f"the U-Net takes {takes} channels; of a {checkpoint.pipeline} it takes "
            f"{latents + takes - sizes['unet_channels']}, the VAE's {latents} and those of the picture: "
            "model_index.json and unet are not of one model"
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
    told = checkpoint.kind.class_embedding
    for key, what in OTHER_INPUTS.items():
        if key not in told and unet.get(key) is not None:
            raise CheckpointError(
                f"the U-Net's {key} is {unet[key]!r}: it takes {what}, which is not supported of a "
                f"{checkpoint.pipeline}"
            )
    for key, wanted in told.items():
        if unet.get(key) is None or wanted not in (None, unet[key]):
            raise CheckpointError(
                f"the U-Net's {key} is {unet.get(key)!r}; that of a {checkpoint.pipeline} takes "
                f"{OTHER_INPUTS[key]}: model_index.json and unet are not of one model"
            )


def _check_image_fit(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> None:
    (encoder,), facts = checkpoint.record.encoders, checkpoint.image_processor
    features = checkpoint.configs[encoder.component]["projection_dim"]
    if features != sizes["cross_width"]:
        raise CheckpointError(
            f"the image encoder gives {features} features, the U-Net's cross-attention "
            f"takes {sizes['cross_width']}: {encoder.component} and unet are not of one model"
        )
    _check_pixels(facts, sizes, encoder.component)


def _check_pixels(facts: ImageProcessorFacts | None, sizes: Mapping[str, int], folder: str) -> None:
    if facts is None or facts.size != sizes["encoder_size"]:
        raise CheckpointError(
            f"the feature_extractor makes pictures of {facts and facts.size} pixels, the image encoder takes "
            f"{sizes['encoder_size']}: feature_extractor and {folder} are not of one model"
        )


def _check_label_fit(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> None:
    """The U-Net takes the picture's embedding, and as many numbers of the noise level."""
    _check_pixels(checkpoint.image_processor, sizes, "image_encoder")
    configs = checkpoint.configs
    gives, normal = configs["image_encoder"]["projection_dim"], configs["image_normalizer"]["embedding_dim"]
    if not 2 * gives == 2 * normal == sizes["label_width"]:
        raise CheckpointError(
            f"the image encoder gives {gives} features, the image_normalizer has {normal}, and the U-Net's "
            f"projection_class_embeddings_input_dim is {sizes['label_width']}, which must be twice that: "
            "they are not of one model"
        )


def _check_text_fit(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> None:
    folders = checkpoint.kind.tokenizers
    for (name, folder), tokenizer in zip(folders.items(), checkpoint.tokenizers, strict=True):
        largest, entries = max(tokenizer.vocabulary.ids.values()), checkpoint.configs[name]["vocab_size"]
        if largest >= entries:
            raise CheckpointError(
                f"the {folder} has ids up to {largest}, {name} embeds "
                f"{entries}: {folder} and {name} are not of one model"
            )
    given = _given(checkpoint, ENCODER_HIDDEN_STATES)
    if given != sizes["cross_width"]:
        raise CheckpointError(
            f"the text encoder{'s give' if len(folders) > 1 else ' gives'} {given} features, the U-Net's "
            f"cross-attention takes {sizes['cross_width']}: text_encoder and unet are not of one model"
        )
    lengths = [tokenizer.ids["max_length"] for tokenizer in checkpoint.tokenizers]
    if len(set(lengths)) > 1:
        raise CheckpointError(
            f"the tokenizers give {' and '.join(map(str, lengths))} tokens; the U-Net reads them side by side"
        )


def _check_added_fit(checkpoint: Checkpoint) -> None:
    """The U-Net takes the pooled texts, and each of the numbers of pixels as a sinusoidal embedding."""
    unet, record = checkpoint.configs["unet"], checkpoint.record
    if unet.get("addition_embed_type") != checkpoint.kind.added:
        raise CheckpointError(
            f"the U-Net's addition_embed_type is {unet.get('addition_embed_type')!r}; SDXL's and its "
            "refiner's is text_time"
        )
    takes, width = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim")
    pooled = {name for one in record.encoders for name in one.gives} - {ENCODER_HIDDEN_STATES}
    gives = sum(_given(checkpoint, name) for name in pooled)
    told = sum(option.count for option in record.told_options)
    gives += told * (width if isinstance(width, int) else 0)
    if takes != gives:
        encoders = " and ".join(one.component for one in record.encoders if pooled & set(one.gives))
        raise CheckpointError(
            f"the U-Net's projection_class_embeddings_input_dim is {takes}, {encoders} and {told} time ids "
            f"give {gives}: {encoders} and unet are not of one model (model_index.json says "
            "requires_aesthetics_score of SDXL's refiner, and of no other)"
        )


def _given(checkpoint: Checkpoint, name: str) -> int:
    """The features that the encoders give for an input of the U-Net, side by side."""
    record, sizes = checkpoint.record, checkpoint.sizes()
    outputs = [
        record.components[record.encoders[index].component].output(output)
        for index, output in record.sources(name)
    ]
    return sum(sizes[str(output.shape[-1])] for output in outputs if output is not None)
