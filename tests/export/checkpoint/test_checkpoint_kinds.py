"""Checkpoints of other kinds than text to image: what they are read as, and which are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints.checkpoint_damage import (
    SCHEDULER,
    UNET_CONFIG,
    Break,
    change_tensors,
    configure,
    drop_one,
    message_of,
    null,
    open_and_load,
    remove,
    write,
)
from support.checkpoints.tiny_variants import CROSS_WIDTH, ENCODER_SIZE, GUIDANCE_WIDTH, MEAN, STD

from sdrt.export.checkpoint.files import IMAGE_PROCESSOR
from sdrt.export.checkpoint.fingerprint import fingerprint
from sdrt.export.checkpoint.image_processor import CLIP_MEAN, CLIP_SIZE, CLIP_STD, image_processor_from_config
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.manifest import default_guidance, default_steps
from sdrt.runtime.bundle.manifest import ImageProcessorFacts
from sdrt.runtime.errors import CheckpointError

UNET = {"cross_width": 16, "unet_channels": 4, "latent_channels": 4}
TEXT = {"tokens": 77, "text_width": 16, "skips": 1}


def test_an_inpainting_unet_takes_a_mask_and_latents_beside_the_sample(inpainting_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(inpainting_checkpoint))
    assert checkpoint.family == "sd"
    assert checkpoint.sizes() == UNET | TEXT | {"inpainting_channels": 5}
    assert (default_steps(checkpoint), default_guidance(checkpoint)) == (20, 7.5)


def test_a_depth_model_reads_a_map_and_leaves_its_estimator_out(depth_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(depth_checkpoint))
    assert checkpoint.family == "sd-depth"
    assert checkpoint.sizes() == UNET | TEXT
    (remark,) = checkpoint.remarks[:1]
    assert remark.startswith(
        "depth_estimator (DPTForDepthEstimation) of model_index.json is left out: depth maps"
    )


def test_a_latent_consistency_model_is_told_the_guidance_and_draws_in_few_steps(
    lcm_checkpoint: Path,
) -> None:
    checkpoint = open_checkpoint(str(lcm_checkpoint))
    assert checkpoint.sizes() == UNET | TEXT | {"guidance_width": GUIDANCE_WIDTH}
    assert checkpoint.sampler == "lcm"
    assert (default_steps(checkpoint), default_guidance(checkpoint)) == (4, 8.5)


def test_a_distilled_model_that_is_not_told_the_guidance_draws_without(checkpoint_copy: Path) -> None:
    """As with an LCM-LoRA merged into an ordinary U-Net."""
    configure(SCHEDULER, _class_name="LCMScheduler")(checkpoint_copy)
    checkpoint = open_checkpoint(str(checkpoint_copy))
    assert (default_steps(checkpoint), default_guidance(checkpoint)) == (4, 1.0)


def test_image_variations_have_an_image_encoder_and_no_text(variations_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(variations_checkpoint))
    assert checkpoint.family == "image-variations"
    assert list(checkpoint.configs) == ["image_encoder", "unet", "vae"]
    assert checkpoint.tokenizers == ()
    assert checkpoint.sizes() == UNET | {"encoder_size": ENCODER_SIZE}
    assert checkpoint.sizes()["cross_width"] == CROSS_WIDTH
    assert checkpoint.image_processor == ImageProcessorFacts(ENCODER_SIZE, _triple(MEAN), _triple(STD))
    assert (default_steps(checkpoint), default_guidance(checkpoint)) == (20, 7.5)
    open_and_load(variations_checkpoint)


def test_sdxl_inpainting_is_read(sdxl_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sdxl_checkpoint, tmp_path / "xl"))
    configure(UNET_CONFIG, in_channels=9)(folder)
    sizes = open_checkpoint(str(folder)).sizes()
    assert (sizes["unet_channels"], sizes["inpainting_channels"]) == (4, 5)


def test_the_fingerprint_knows_the_image_processor(variations_copy: Path) -> None:
    before = fingerprint(open_checkpoint(str(variations_copy)))
    configure(IMAGE_PROCESSOR, image_mean=[0.5, 0.5, 0.5])(variations_copy)
    assert fingerprint(open_checkpoint(str(variations_copy))) != before


def test_a_safety_checker_is_ignored(variations_copy: Path) -> None:
    (variations_copy / "safety_checker").mkdir()
    configure("model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])(
        variations_copy
    )
    assert open_checkpoint(str(variations_copy)).family == "image-variations"


def test_an_image_encoder_from_a_whole_clip_model_is_accepted(variations_copy: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["text_model.final_layer_norm.weight"] = next(iter(tensors.values())).clone()
        tensors["logit_scale"] = next(iter(tensors.values())).flatten()[0].clone()

    change_tensors("image_encoder", add)(variations_copy)
    open_and_load(variations_copy)


@pytest.fixture
def variations_copy(variations_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(variations_checkpoint, tmp_path / "variations"))


# Kinds that a U-Net's configuration tells, in the tiny text-to-image checkpoint.
OTHER_KINDS: dict[str, tuple[Break, tuple[str, ...]]] = {
    "instruct-pix2pix": (
        configure(UNET_CONFIG, in_channels=8),
        (
            "takes 8 channels",
            "4 more for the latents of a picture to edit",
            "set _class_name in model_index.json to StableDiffusionInstructPix2PixPipeline",
        ),
    ),
    "a U-Net that takes no picture": (
        configure("model_index.json", _class_name="StableDiffusionInstructPix2PixPipeline"),
        ("takes 4 channels; of a StableDiffusionInstructPix2PixPipeline it takes 8",),
    ),
    "CosXL Edit": (configure("model_index.json", is_cosxl_edit=True), ("is_cosxl_edit", "not supported")),
    "depth": (
        configure(UNET_CONFIG, in_channels=5),
        ("takes 5 channels", "1 more for a depth map", "to StableDiffusionDepth2ImgPipeline"),
    ),
    "no depth": (
        configure("model_index.json", _class_name="StableDiffusionDepth2ImgPipeline"),
        ("takes 4 channels; of a StableDiffusionDepth2ImgPipeline it takes 5",),
    ),
    "upscaler": (
        configure(UNET_CONFIG, in_channels=7, num_class_embeds=1000),
        ("takes 7 channels", "3 more for a small picture to enlarge"),
    ),
    "nobody's": (configure(UNET_CONFIG, in_channels=6), ("takes 6 and gives 4 channels", "the VAE has 4")),
    "other outputs": (configure(UNET_CONFIG, out_channels=8), ("takes 4 and gives 8 channels",)),
    "inpainting with other outputs": (
        configure(UNET_CONFIG, in_channels=9, out_channels=8),
        ("takes 9 and gives 8 channels",),
    ),
    "unCLIP": (
        configure(UNET_CONFIG, class_embed_type="projection"),
        ("class_embed_type is 'projection'", "as of unCLIP", "not supported"),
    ),
    "classes": (configure(UNET_CONFIG, num_class_embeds=10), ("num_class_embeds is 10", "not supported")),
    "Kandinsky": (
        configure(UNET_CONFIG, encoder_hid_dim_type="image_proj"),
        ("encoder_hid_dim_type is 'image_proj'", "as of Kandinsky"),
    ),
    "guidance of no width": (
        configure(UNET_CONFIG, time_cond_proj_dim=0),
        ("time_cond_proj_dim is 0", "whole number"),
    ),
    "guidance of a text": (configure(UNET_CONFIG, time_cond_proj_dim="x"), ("time_cond_proj_dim is 'x'",)),
    "guidance of one frequency": (
        configure(UNET_CONFIG, time_cond_proj_dim=2),
        ("time_cond_proj_dim is 2", "at least 4"),
    ),
}


@pytest.mark.parametrize("what", OTHER_KINDS)
def test_a_kind_that_is_not_supported_is_named(checkpoint_copy: Path, what: str) -> None:
    damage, words = OTHER_KINDS[what]
    damage(checkpoint_copy)
    message = message_of(checkpoint_copy)
    assert "U-Net" in message or UNET_CONFIG in message
    for word in words:
        assert word in message


IMAGE_CONFIG = "image_encoder/config.json"
BAD_VARIATIONS: dict[str, tuple[Break, tuple[str, ...]]] = {
    "no image encoder": (remove("image_encoder"), ("no folder image_encoder/", "image_encoder, unet, vae")),
    "no feature extractor": (remove("feature_extractor"), ("preprocessor_config.json is missing",)),
    "processor cut": (write(IMAGE_PROCESSOR, b'{"size": '), ("preprocessor_config.json cannot be read",)),
    "no weights": (remove("image_encoder/model.safetensors"), ("image_encoder has no model.safetensors",)),
    "no projection": (configure(IMAGE_CONFIG, projection_dim=None), ("projection_dim is missing",)),
    "size of a text": (configure(IMAGE_CONFIG, image_size="x"), ("image_size is 'x'", "whole number")),
    "width": (
        configure(IMAGE_CONFIG, projection_dim=24),
        ("gives 24 features", "takes 16", "image_encoder and unet are not of one model"),
    ),
    "sizes": (
        configure(IMAGE_CONFIG, image_size=64),
        ("pictures of 32 pixels", "takes 64", "feature_extractor and image_encoder"),
    ),
    "weight missing": (
        change_tensors("image_encoder", drop_one),
        ("image_encoder: the tensor ", " is missing"),
    ),
    "no resizing": (configure(IMAGE_PROCESSOR, do_resize=False), ("do_resize is False", "only true")),
    "no crop": (configure(IMAGE_PROCESSOR, do_center_crop=0), ("do_center_crop is 0", "only true")),
    "filter": (configure(IMAGE_PROCESSOR, resample=2), ("resample is 2", "bicubic")),
    "factor": (configure(IMAGE_PROCESSOR, rescale_factor=1), ("rescale_factor is 1", "1/255")),
    "factor null": (null(IMAGE_PROCESSOR, "rescale_factor"), ("rescale_factor is None",)),
    "crop": (
        configure(IMAGE_PROCESSOR, crop_size=24),
        ("size is 32 and crop_size 24", "one size for both"),
    ),
    "oblong": (
        configure(IMAGE_PROCESSOR, size={"height": 32, "width": 16}),
        ("size is {'height': 32, 'width': 16}", "one whole number"),
    ),
    "size nothing": (configure(IMAGE_PROCESSOR, size={}), ("size is {}",)),
    "size 0": (configure(IMAGE_PROCESSOR, size=0), ("size is 0",)),
    "size true": (configure(IMAGE_PROCESSOR, size=True), ("size is True",)),
    "mean of two": (configure(IMAGE_PROCESSOR, image_mean=[0.5, 0.5]), ("image_mean is [0.5, 0.5]",)),
    "mean of texts": (configure(IMAGE_PROCESSOR, image_mean=["a"] * 3), ("image_mean is ['a'", "three")),
    "std NaN": (
        configure(IMAGE_PROCESSOR, image_std=[float("nan")] * 3),
        ("preprocessor_config.json cannot be read", "NaN is no finite number"),
    ),
    "std 0": (configure(IMAGE_PROCESSOR, image_std=[1, 1, 0]), ("image_std is [1.0, 1.0, 0.0]", "above 0")),
}


@pytest.mark.parametrize("what", BAD_VARIATIONS)
def test_bad_image_variations_are_refused_in_one_line(variations_copy: Path, what: str) -> None:
    damage, words = BAD_VARIATIONS[what]
    damage(variations_copy)
    message = message_of(variations_copy)
    assert str(variations_copy) in message or "image_encoder" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "config",
    [
        {"size": 64, "crop_size": 64},  # as sd-image-variations-diffusers has it
        {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
        {"size": {"height": 64, "width": 64}, "crop_size": 64, "rescale_factor": 0.00392156862745098},
    ],
    ids=str,
)
def test_sizes_are_read_as_every_version_of_transformers_writes_them(config: dict[str, Any]) -> None:
    facts = image_processor_from_config(Path("preprocessor_config.json"), config)
    assert facts == ImageProcessorFacts(64, _triple(CLIP_MEAN), _triple(CLIP_STD))


def test_what_is_missing_is_clips_own(tmp_path: Path) -> None:
    from transformers.models.clip import image_processing_pil_clip as clip

    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({}))
    facts = image_processor_from_config(file, json.loads(file.read_text()))
    defaults = clip.CLIPImageProcessorPil
    assert facts.size == CLIP_SIZE == defaults.crop_size["height"] == defaults.size["shortest_edge"]
    assert list(facts.mean) == list(defaults.image_mean)
    assert list(facts.std) == list(defaults.image_std)


def _triple(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def test_the_message_of_a_processor_names_the_file() -> None:
    with pytest.raises(CheckpointError, match=r"^here\.json: do_rescale is None; only true is supported$"):
        image_processor_from_config(Path("here.json"), {"do_rescale": None})
