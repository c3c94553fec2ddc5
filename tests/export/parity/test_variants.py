"""Inpainting, latent consistency and image variations: bundles that compute what diffusers computes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from support.checkpoints.checkpoint_damage import UNET_CONFIG, configure
from support.checkpoints.tiny_variants import CROSS_WIDTH, ENCODER_SIZE, GUIDANCE_WIDTH

import tolerances
from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.checkpoint.weights import load_module
from sdrt.export.cli import main as cli
from sdrt.export.graphs.networks import example_inputs, wrapped
from sdrt.export.parity.components import compare
from sdrt.export.parity.reference import reference_pipeline
from sdrt.export.parity.sampling import (
    SAMPLING_GUIDANCE,
    SAMPLING_STEPS,
    reference_embeddings,
    unet_inputs,
    unet_latents,
)
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.families.record import TensorSpec
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.bundle.manifest_json import from_json, to_json
from sdrt.runtime.errors import BundleError

SIZE = (16, 16)
Array = NDArray[np.float32]


def noise(*shape: int) -> Array:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def assert_close(actual: Array, expected: Array) -> None:
    l2, peak = compare(actual, expected)
    assert l2 <= tolerances.UNET_LOOP
    assert peak <= tolerances.GRAPH_PEAK * tolerances.UNET_LOOP


# --- the wrapped U-Net and its inputs against diffusers' own pipelines ---


def diffusers_latents(checkpoint: Checkpoint, latents: Array, **arguments: Any) -> Array:
    pipeline = reference_pipeline(checkpoint)
    result = pipeline(
        num_inference_steps=SAMPLING_STEPS,
        guidance_scale=SAMPLING_GUIDANCE,
        latents=torch.from_numpy(latents.copy()),
        output_type="latent",
        **arguments,
    )
    drawn: Array = result.images.numpy()
    return drawn


def looped(checkpoint: Checkpoint, latents: Array) -> tuple[Array, dict[str, Array]]:
    """The parity gate's loop, and what it gave the U-Net."""
    inputs = unet_inputs(checkpoint, SIZE, reference_embeddings(checkpoint))
    return unet_latents(checkpoint, latents, inputs, wrapped(checkpoint, "unet")), inputs


def inpainting_arguments(inputs: dict[str, Array], factor: int) -> dict[str, Any]:
    """The mask at the pictures' size and the latents of the picture, as diffusers' pipelines take them."""
    mask = torch.from_numpy(inputs["inpainting"][:1, :1])
    return {
        "image": torch.zeros(1, 3, *SIZE),
        "mask_image": mask.repeat_interleave(factor, -1).repeat_interleave(factor, -2),
        "masked_image_latents": torch.from_numpy(inputs["inpainting"][:1, 1:]),
        "strength": 1.0,
        "height": SIZE[0],
        "width": SIZE[1],
    }


def test_inpainting_is_that_of_diffusers(inpainting_checkpoint: Path) -> None:
    checkpoint, latents = open_checkpoint(str(inpainting_checkpoint)), noise(1, 4, 8, 8)
    ours, inputs = looped(checkpoint, latents)
    arguments = inpainting_arguments(inputs, checkpoint.factor)
    assert_close(
        ours, diffusers_latents(checkpoint, latents, **reference_embeddings(checkpoint), **arguments)
    )
    # Not because the U-Net looks at nothing but the sample.
    moved = {**inputs, "inpainting": inputs["inpainting"][:, ::-1].copy()}
    other = unet_latents(checkpoint, latents, moved, wrapped(checkpoint, "unet"))
    assert compare(other, ours)[0] > 100 * tolerances.UNET_LOOP


def test_sdxl_inpainting_is_that_of_diffusers(sdxl_checkpoint: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    folder = Path(shutil.copytree(sdxl_checkpoint, tmp_path / "xl"))
    configure(UNET_CONFIG, in_channels=9)(folder)
    torch.manual_seed(3)
    unet = UNet2DConditionModel.from_config(json.loads((folder / UNET_CONFIG).read_text()))
    unet.half().save_pretrained(folder / "unet", safe_serialization=True)
    checkpoint, latents = open_checkpoint(str(folder)), noise(1, 4, 8, 8)
    ours, inputs = looped(checkpoint, latents)
    arguments = inpainting_arguments(inputs, checkpoint.factor)
    sizes = {"original_size": SIZE, "target_size": SIZE}
    embeddings = reference_embeddings(checkpoint)
    assert_close(ours, diffusers_latents(checkpoint, latents, **embeddings, **arguments, **sizes))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the scheduler's offset, which the pipeline corrects
def test_a_latent_consistency_model_is_told_the_guidance_as_diffusers_tells_it(lcm_checkpoint: Path) -> None:
    checkpoint, latents = open_checkpoint(str(lcm_checkpoint)), noise(1, 4, 8, 8)
    ours, inputs = looped(checkpoint, latents)
    assert {name: len(rows) for name, rows in inputs.items()} == {
        "encoder_hidden_states": 1,  # no unconditional half
        "timestep_cond": 1,
    }
    arguments = {**reference_embeddings(checkpoint), "height": 64, "width": 64}
    assert_close(ours, diffusers_latents(checkpoint, latents, **arguments))
    inputs["timestep_cond"] = np.zeros_like(inputs["timestep_cond"])
    other = unet_latents(checkpoint, latents, inputs, wrapped(checkpoint, "unet"))
    assert compare(other, ours)[0] > 100 * tolerances.UNET_LOOP


def test_image_variations_are_those_of_diffusers(variations_checkpoint: Path) -> None:
    checkpoint, latents = open_checkpoint(str(variations_checkpoint)), noise(1, 4, 8, 8)
    picture = torch.from_numpy(noise(1, 3, ENCODER_SIZE, ENCODER_SIZE))
    with torch.no_grad():
        embeds = wrapped(checkpoint, "image_encoder")(picture)
    assert embeds.shape == (1, 1, CROSS_WIDTH)
    inputs = unet_inputs(checkpoint, SIZE, {"image_embeds": embeds})
    assert not inputs["encoder_hidden_states"][0].any()
    ours = unet_latents(checkpoint, latents, inputs, wrapped(checkpoint, "unet"))
    assert_close(ours, diffusers_latents(checkpoint, latents, image=picture, height=64, width=64))


# --- the bundles ---


def manifest_of(bundle: Path) -> Manifest:
    """Of a bundle whose comparisons all passed, sampling run and diffusers' own pipeline among them."""
    manifest = Bundle.open(bundle).manifest
    figures = manifest.parity["figures"]
    assert {figure["component"] for figure in figures} == {*manifest.components, "sampling", "pipeline"}
    assert all(figure["relative_l2"] <= figure["tolerance"] for figure in figures)
    assert manifest.preview is not None
    return manifest


def input_of(manifest: Manifest, component: str, name: str) -> TensorSpec:
    spec = manifest.components[component].spec.input(name)
    assert spec is not None
    return spec


def unet_of(bundle: Path, feeds: dict[str, Array]) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(bundle / "unet" / "model.onnx", options, ["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == list(feeds)
    return np.asarray(session.run(None, feeds)[0])


def check_unet(bundle: Path, checkpoint_folder: Path) -> None:
    """The saved graph on inputs of the table's names and order against diffusers' network itself."""
    checkpoint = open_checkpoint(str(checkpoint_folder))
    manifest = manifest_of(bundle)
    axes = {"rows": 2, "latent_height": 8, "latent_width": 8, "context": manifest.tokens}
    example = example_inputs(checkpoint, "unet", axes, torch.Generator().manual_seed(9))
    given = dict(zip((spec.name for spec in manifest.components["unet"].spec.inputs), example, strict=True))
    sample = given["sample"]
    for name in {"inpainting", "image_latents", "low_res"} & given.keys():
        sample = torch.cat([sample, given[name]], dim=1)
    with torch.no_grad():
        expected = load_module(checkpoint, "unet")(
            sample,
            given["timestep"],
            given["encoder_hidden_states"],
            class_labels=given.get("class_labels", given.get("noise_level")),
            timestep_cond=given.get("timestep_cond"),
        ).sample
    got = unet_of(bundle, {name: tensor.numpy() for name, tensor in given.items()})
    l2, peak = compare(got, expected.numpy())
    assert l2 <= tolerances.GRAPH_FP32
    assert peak <= tolerances.GRAPH_PEAK * tolerances.GRAPH_FP32


def test_an_inpainting_bundle_takes_the_mask_in_an_input_of_its_own(
    inpainting_bundle: Path, inpainting_checkpoint: Path
) -> None:
    manifest = manifest_of(inpainting_bundle)
    assert input_of(manifest, "unet", "sample").shape == ("rows", 4, "latent_height", "latent_width")
    assert input_of(manifest, "unet", "inpainting").shape == ("rows", 5, "latent_height", "latent_width")
    check_unet(inpainting_bundle, inpainting_checkpoint)


def test_a_bundle_that_edits_takes_the_picture_in_an_input_of_its_own(
    pix2pix_bundle: Path, pix2pix_checkpoint: Path
) -> None:
    manifest = manifest_of(pix2pix_bundle)
    assert (manifest.family, manifest.record.guided_rows) == ("instruct-pix2pix", 3)
    for name in ("sample", "image_latents"):
        assert input_of(manifest, "unet", name).shape == ("rows", 4, "latent_height", "latent_width")
    check_unet(pix2pix_bundle, pix2pix_checkpoint)


def test_bundles_that_lay_noise_over_a_picture_say_how(
    unclip_bundle: Path, unclip_checkpoint: Path, upscaler_bundle: Path, upscaler_checkpoint: Path
) -> None:
    for bundle, checkpoint, most in (
        (unclip_bundle, unclip_checkpoint, 999),
        (upscaler_bundle, upscaler_checkpoint, 50),
    ):
        manifest = manifest_of(bundle)
        assert "vae_encoder" not in manifest.components
        assert manifest.noising is not None
        assert manifest.noising.max_level == most
        check_unet(bundle, checkpoint)
        with pytest.raises(BundleError, match="noising is there where the family wants it"):
            from_json(to_json(replace(manifest, noising=None)))
    assert manifest.noising is not None
    assert manifest.noising.schedule.beta_schedule == "scaled_linear"
    assert input_of(manifest, "unet", "noise_level").dtype == "int64"
    assert input_of(manifest, "unet", "low_res").shape == ("rows", 3, "latent_height", "latent_width")


def test_a_latent_consistency_bundle_has_its_own_defaults(lcm_bundle: Path, lcm_checkpoint: Path) -> None:
    manifest = manifest_of(lcm_bundle)
    assert input_of(manifest, "unet", "timestep_cond").shape == ("rows", GUIDANCE_WIDTH)
    defaults = manifest.defaults
    assert (defaults.sampler, defaults.num_inference_steps, defaults.guidance_scale) == ("lcm", 4, 8.5)
    check_unet(lcm_bundle, lcm_checkpoint)


def test_an_image_variations_bundle_has_an_image_encoder(
    variations_bundle: Path, variations_checkpoint: Path
) -> None:
    manifest = manifest_of(variations_bundle)
    assert manifest.family == "image-variations"
    assert manifest.record.required == ("image_encoder", "unet", "vae_decoder")
    assert manifest.tokens == manifest.limits.max_chunks == 1
    assert manifest.image_processor is not None
    assert manifest.image_processor.size == ENCODER_SIZE
    assert not list(variations_bundle.glob("tokenizer*"))
    check_unet(variations_bundle, variations_checkpoint)


# --- sd-export on what it cannot export ---


def test_sd_export_names_the_kind_before_anything_is_made(
    checkpoint_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(UNET_CONFIG, in_channels=8)(checkpoint_copy)
    out = tmp_path / "out"
    assert cli.main([str(checkpoint_copy), str(out), "--quiet"]) == 4
    printed = capsys.readouterr()
    assert printed.err.startswith(
        "sd-export: the U-Net takes 8 channels, the VAE's 4 and 4 more for the latents of a picture to edit: "
        "that is no StableDiffusionPipeline; set _class_name in model_index.json to "
        "StableDiffusionInstructPix2PixPipeline"
    )
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert not out.exists()


def test_sd_export_shows_what_an_image_processor_may_not_be(
    variations_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(variations_checkpoint, tmp_path / "checkpoint"))
    configure("feature_extractor/preprocessor_config.json", do_normalize=False)(folder)
    assert cli.main([str(folder), str(tmp_path / "out"), "--quiet"]) == 4
    assert (
        "preprocessor_config.json: do_normalize is False; only true is supported" in capsys.readouterr().err
    )
