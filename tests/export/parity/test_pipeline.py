"""The gate against diffusers' own pipeline: equal where our reader is right, and it sees where it is not."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline
from support.checkpoints.checkpoint_damage import UNET_CONFIG, VAE_CONFIG, configure
from support.runs.reading import compare_reading, is_equal

import tolerances
from sdrt.export.checkpoint import assembly
from sdrt.export.checkpoint import checkpoint as checkpoints
from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.fields import LatentScaling
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.checkpoint.weights import load_module
from sdrt.export.cli import main as cli
from sdrt.export.graphs.from_module import onnx_from_module, save_graph
from sdrt.export.graphs.networks import wrapped
from sdrt.export.options import AxisRange
from sdrt.export.parity.components import ParityReport, check_component, compare, reference_probes
from sdrt.export.parity.pipeline import check_reading
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.errors import ParityError

KINDS = {
    "tiny_checkpoint": "StableDiffusionPipeline",
    "inpainting_checkpoint": "StableDiffusionInpaintPipeline",
    "lcm_checkpoint": "LatentConsistencyModelPipeline",
    "variations_checkpoint": "StableDiffusionImageVariationPipeline",
    "sdxl_checkpoint": "StableDiffusionXLPipeline",
}
# Of Playground 2.5.
PLAYGROUND = {
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    "scaling_factor": 0.5,
}


@pytest.fixture
def copy_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of `KINDS` that may be changed."""

    def copied(kind: str) -> Path:
        return Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / kind))

    return copied


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_own_pipeline_draws_the_same(
    request: pytest.FixtureRequest, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And asks no network for it."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_named: pytest.fail("asked the network"))
    report = compare_reading(request.getfixturevalue(kind))
    assert is_equal(report)
    assert report.left_out == []


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        ("inpainting_checkpoint", "EulerAncestralDiscreteScheduler"),  # after the draws for two pictures
        ("tiny_checkpoint", "KDPM2AncestralDiscreteScheduler"),  # in every other row
        ("tiny_checkpoint", "TCDScheduler"),  # none, with the eta that the pipeline gives
    ],
)
def test_noise_is_drawn_as_by_diffusers(copy_of: Callable[[str], Path], kind: str, scheduler: str) -> None:
    folder = copy_of(kind)
    configure("model_index.json", scheduler=["diffusers", scheduler])(folder)
    report = compare_reading(folder)
    assert is_equal(report)
    assert report.left_out == []


def scheduled(**changes: Any) -> Callable[[Checkpoint], Checkpoint]:
    return lambda checkpoint: replace(checkpoint, schedule=replace(checkpoint.schedule, **changes))


def sized(checkpoint: Checkpoint) -> Checkpoint:
    unet = {**checkpoint.configs["unet"], "sample_size": 16}
    return replace(checkpoint, configs={**checkpoint.configs, "unet": unet})


def scaled(checkpoint: Checkpoint) -> Checkpoint:
    vae = {**checkpoint.configs["vae"], "scaling_factor": 0.51}
    return replace(checkpoint, configs={**checkpoint.configs, "vae": vae})


def padded(checkpoint: Checkpoint) -> Checkpoint:
    tokenizer = checkpoint.tokenizers[0]
    return replace(checkpoint, tokenizers=(replace(tokenizer, ids={**tokenizer.ids, "pad": 0}),))


def processed(checkpoint: Checkpoint) -> Checkpoint:
    assert checkpoint.image_processor is not None
    return replace(checkpoint, image_processor=replace(checkpoint.image_processor, mean=(0.5, 0.5, 0.5)))


# What a reader could leave out, as if ours did: the checkpoint as it would then have been read.
CRIPPLED: dict[str, tuple[str, Callable[[Checkpoint], Checkpoint], str]] = {
    "spacing": ("tiny_checkpoint", scheduled(timestep_spacing="trailing"), "latents differ"),
    "offset": ("tiny_checkpoint", scheduled(steps_offset=0), "latents differ"),
    "last alpha": ("tiny_checkpoint", scheduled(set_alpha_to_one=True), "latents differ"),
    "betas": ("sdxl_checkpoint", scheduled(beta_schedule="linear"), "latents differ"),
    "prediction": ("sdxl_checkpoint", scheduled(prediction_type="v_prediction"), "latents differ"),
    "sampler": ("sdxl_checkpoint", lambda read: replace(read, sampler="heun"), "latents differ"),
    "empty prompt": (
        "sdxl_checkpoint",
        lambda read: replace(read, force_zeros_for_empty_prompt=False),
        "latents differ",
    ),
    "padding": ("tiny_checkpoint", padded, "latents differ"),
    "picture's mean": ("variations_checkpoint", processed, "latents differ"),
    "factor": ("tiny_checkpoint", scaled, "image differ"),
    "factor of the masked picture": ("inpainting_checkpoint", scaled, "latents differ"),
    "size": ("tiny_checkpoint", sized, "32 pixels by default, diffusers' StableDiffusionPipeline draws 16"),
}


@pytest.mark.parametrize("what", CRIPPLED)
def test_what_a_reader_leaves_out_is_seen(request: pytest.FixtureRequest, what: str) -> None:
    kind, cripple, words = CRIPPLED[what]
    with pytest.raises(ParityError) as caught:
        compare_reading(request.getfixturevalue(kind), cripple)
    assert words in str(caught.value)
    assert "nothing was written" in str(caught.value)


def test_latents_mean_and_std_are_read_and_their_loss_is_seen(
    copy_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of("sdxl_checkpoint")
    configure(VAE_CONFIG, **PLAYGROUND)(folder)
    assert is_equal(compare_reading(folder))
    monkeypatch.setattr(checkpoints, "latent_scaling", lambda *_: LatentScaling(0.5))
    with pytest.raises(ParityError, match="the image differ"):
        compare_reading(folder)


def certain_of_latents(vae: Any) -> None:
    """Let a VAE be certain of its latents: samples of its posterior are its mean."""
    encode = vae.encode

    def certain(*args: Any, **named: Any) -> Any:
        encoded = encode(*args, **named)
        encoded.latent_dist.std = torch.zeros_like(encoded.latent_dist.std)
        return encoded

    vae.encode = certain


@pytest.mark.parametrize("channels", [4, 9])
def test_a_picture_is_encoded_as_sdxls_pipelines_encode_it(
    copy_of: Callable[[str], Path], channels: int
) -> None:
    """Image to image takes mean and deviation into account, the inpainting pipeline does not."""
    folder = copy_of("sdxl_checkpoint")
    configure(VAE_CONFIG, **PLAYGROUND)(folder)
    configure(UNET_CONFIG, in_channels=channels)(folder)
    checkpoint = open_checkpoint(str(folder))
    pixels = 2 * torch.rand((1, 3, 16, 16), generator=torch.Generator().manual_seed(1)) - 1
    parts: dict[str, Any] = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    )
    vae = load_module(checkpoint, "vae")
    pipeline = (StableDiffusionXLImg2ImgPipeline if channels == 4 else StableDiffusionXLInpaintPipeline)(
        vae=vae, **parts
    )
    certain_of_latents(vae)
    expected = (
        pipeline.prepare_latents(pixels, None, 1, 1, torch.float32, "cpu", add_noise=False)
        if channels == 4
        else pipeline._encode_vae_image(pixels, torch.Generator())
    )
    with torch.no_grad():
        mean, deviation = wrapped(checkpoint, "vae_encoder")(pixels)
    assert compare(mean.numpy(), expected.detach().numpy())[0] < tolerances.GRAPH_FP32
    spread = torch.tensor(PLAYGROUND["latents_std"]).view(1, -1, 1, 1) if channels == 4 else 1.0
    plain_vae: Any = load_module(checkpoint, "vae")
    plain = 0.5 * plain_vae.encode(pixels).latent_dist.std / spread
    assert compare(deviation.numpy(), plain.detach().numpy())[0] < tolerances.GRAPH_FP32


def test_the_graph_of_a_decoder_holds_mean_and_deviation(
    copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """As constants: they are no weights of the checkpoint."""
    folder = copy_of("sdxl_checkpoint")
    configure(VAE_CONFIG, **PLAYGROUND)(folder)
    checkpoint, report = open_checkpoint(str(folder)), ParityReport()
    module, spec = wrapped(checkpoint, "vae_decoder"), FAMILIES["sdxl"].components["vae_decoder"]
    spec = spec.resolve(checkpoint.sizes(), "fp32")
    sizes = {"batch": 1, "latent_height": 8, "latent_width": 8, "height": 16, "width": 16}
    axes = {axis: AxisRange(size, size) for axis, size in sizes.items()}
    probes = reference_probes(checkpoint, "vae_decoder", module, axes)
    model = onnx_from_module(module, (torch.zeros(1, 4, 8, 8),), spec, axes, 23)
    (file, *_) = save_graph(model, tmp_path / "model.onnx")
    check_component(checkpoint, "vae_decoder", probes, file, "fp32", report)
    assert report.figures


def test_an_export_with_a_reader_that_forgets_a_field_writes_nothing(
    tiny_checkpoint: Path,
    tmp_path: Path,
    traced_before: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    crippled = scheduled(timestep_spacing="trailing")(open_checkpoint(str(tiny_checkpoint)))
    monkeypatch.setattr(assembly, "read_checkpoint", lambda *_args, **_named: crippled)
    assert cli.main([str(tiny_checkpoint), str(tmp_path / "out"), "--quiet", *traced_before]) == 5
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "diffusers' StableDiffusionPipeline, as it loads" in message
    assert list(tmp_path.iterdir()) == []


# A folder that diffusers loads otherwise, or not: what the report says, and whether there are figures.
LEFT_OUT: dict[str, tuple[str, Callable[[Path], None], str, bool]] = {
    "no vae in the index": (
        "tiny_checkpoint",
        configure("model_index.json", vae=None),
        "fails on this folder: Pipeline <class",
        False,
    ),
    "a sampler that we have not": (
        "tiny_checkpoint",
        configure("model_index.json", scheduler=["diffusers", "DPMSolverSinglestepScheduler"]),
        "DPMSolverSinglestepScheduler in diffusers' own pipeline: DDIMScheduler was in its place",
        True,
    ),
    "a distilled model with another scheduler": (
        "lcm_checkpoint",
        configure("model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
        "DDIMScheduler in diffusers' own pipeline: LCMScheduler was in its place",
        True,
    ),
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_the_report_says_what_diffusers_could_not_draw(copy_of: Callable[[str], Path], what: str) -> None:
    kind, change, words, compared = LEFT_OUT[what]
    folder = copy_of(kind)
    change(folder)
    report = compare_reading(folder)
    assert words in report.left_out[0]
    assert is_equal(report) == compared


def test_random_weights_are_said_to_be_none_that_diffusers_loads(tiny_checkpoint: Path) -> None:
    report, checkpoint = ParityReport(), replace(open_checkpoint(str(tiny_checkpoint)), random_seed=1)
    missing: Any = None
    check_reading(checkpoint, tiny_checkpoint, missing, missing, report)
    assert report.left_out == ["diffusers' own pipeline: the weights are random, no folder has them"]


def test_the_size_of_an_old_unet_is_that_of_diffusers(
    copy_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written before 0.9.0 and below 64: diffusers takes it for a mistake, but not in all pipelines."""
    # Drawn; what is drawn by default is compared.
    monkeypatch.setattr("sdrt.export.parity.components.LARGE_SIDE", 16)
    sizes = {}
    for kind in KINDS:
        folder = copy_of(kind)
        configure(UNET_CONFIG, _diffusers_version="0.8.0")(folder)
        sizes[kind] = open_checkpoint(str(folder)).native_size
        compare_reading(folder)
    assert sizes == {kind: 16 if kind in ("lcm_checkpoint", "sdxl_checkpoint") else 128 for kind in KINDS}
