"""The early look: every class, field and header of a checkpoint, before anything is built or loaded."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from support.checkpoints.checkpoint_damage import (
    TEXT_CONFIG,
    UNET_CONFIG,
    VAE_CONFIG,
    WEIGHTS,
    Break,
    change_tensors,
    configure,
    drop_one,
    early_message,
    shorten_a_matrix,
    write,
)
from support.checkpoints.strange_files import make_device, make_pipe

from sdrt.export.checkpoint.families import PIPELINES
from sdrt.export.checkpoint.fields import FIELDS, SCALING_FACTOR
from sdrt.export.checkpoint.fit import OTHER_INPUTS
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.checkpoint.weights import check_architectures, load_module
from sdrt.export.cli import main as cli
from sdrt.runtime.errors import CheckpointError

INDEX = "model_index.json"


# --- classes


OTHER_PIPELINES = {
    "Zero123PlusPipeline": "takes more than text",
    "MarigoldDepthPipeline": "draws depths",
    "StableDiffusionLDM3DPipeline": "draws depths",
    "StableDiffusionControlNetPipeline": 'set _class_name in model_index.json to "StableDiffusionPipeline"',
    "StableDiffusionXLControlNetPipeline": '"StableDiffusionXLPipeline"',
    "PaintByExamplePipeline": "takes more than text",
    "StableDiffusionLatentUpscalePipeline": "takes more than text",
    "StableDiffusionPanoramaPipeline": "in another way",
    "StableUnCLIPPipeline": "takes more than text",
    "KolorsPipeline": "ChatGLM",
    "FlaxStableDiffusionPipeline": "Flax",
    "OnnxStableDiffusionPipeline": "an export already",
    "AnimateDiffPipeline": "films",
    "MyOwnPipeline": "supported are those of Stable Diffusion",
}


@pytest.mark.parametrize("name", OTHER_PIPELINES)
def test_another_pipeline_is_refused_by_its_name(checkpoint_copy: Path, name: str) -> None:
    configure(INDEX, _class_name=name)(checkpoint_copy)
    message = early_message(checkpoint_copy)
    assert name in message
    assert OTHER_PIPELINES[name] in message


def test_every_supported_pipeline_is_one_of_diffusers() -> None:
    assert all(hasattr(diffusers, name) for name in PIPELINES)


OTHERS: dict[str, tuple[Break, tuple[str, ...]]] = {
    "no pipeline": (configure(INDEX, _class_name=None), ("has no _class_name", "StableDiffusionPipeline")),
    "code": (configure(INDEX, _class_name=["pipeline", "Mine"]), ("['pipeline', 'Mine']", "not supported")),
    "refiner's mark": (
        configure(INDEX, _class_name="StableDiffusionXLImg2ImgPipeline", requires_aesthetics_score=True),
        ("no folder text_encoder_2/",),
    ),
    "tiny VAE": (
        configure(VAE_CONFIG, _class_name="AutoencoderTiny", block_out_channels=None, latent_channels=None),
        ("vae/config.json is of the class AutoencoderTiny", "AutoencoderKL"),
    ),
    "tiny VAE in the index": (
        configure(INDEX, vae=["diffusers", "AutoencoderTiny"]),
        ("vae is ['diffusers', 'AutoencoderTiny']", "supported is AutoencoderKL"),
    ),
    "asymmetric VAE": (
        configure(VAE_CONFIG, _class_name="AsymmetricAutoencoderKL"),
        ("another kind of VAE",),
    ),
    "VQ": (configure(VAE_CONFIG, _class_name="VQModel"), ("class VQModel", "another kind of VAE")),
    "LDM3D": (configure(VAE_CONFIG, in_channels=6, out_channels=6), ("in_channels is 6", "LDM3D")),
    "films": (configure(UNET_CONFIG, _class_name="UNetMotionModel"), ("UNetMotionModel", "for films")),
    "ChatGLM": (configure(TEXT_CONFIG, architectures=["ChatGLMModel"]), ("of the class ChatGLMModel",)),
    "whole CLIP": (configure(TEXT_CONFIG, model_type="clip"), ("model_type is clip", "save the part")),
    "own U-Net": (configure(INDEX, unet=["mine", "MyUNet"]), ("unet is ['mine', 'MyUNet']",)),
    "no text encoder": (configure(INDEX, text_encoder=[None, None]), ("text_encoder is null", "refiner")),
    "own scheduler": (configure(INDEX, scheduler=["mine", "MyScheduler"]), ("scheduler is ['mine',",)),
    "LCM without guidance": (
        configure(INDEX, _class_name="LatentConsistencyModelPipeline"),
        ("no time_cond_proj_dim", "LCMScheduler"),
    ),
    "what only SDXL gives": (
        configure(UNET_CONFIG, addition_embed_type="text_time"),
        ("addition_embed_type is 'text_time'", "StableDiffusionPipeline gives it nothing"),
    ),
    "mean of three": (
        configure(VAE_CONFIG, latents_mean=[0, 1, 2]),
        ("latents_mean is [0, 1, 2]", "4 finite"),
    ),
    "std of 0": (configure(VAE_CONFIG, latents_std=[1, 1, 1, 0]), ("latents_std", "each must be above 0")),
    # What would be fetched or run.
    "kernel": (
        configure(TEXT_CONFIG, attn_implementation="owner/kernel"),
        ("attn_implementation is owner/kernel", "kernels are never fetched"),
    ),
    "inner kernel": (
        configure(TEXT_CONFIG, _attn_implementation_internal="owner/kernel:f"),
        ("owner/kernel:f", "never fetched"),
    ),
    "kernels by part": (configure(TEXT_CONFIG, attn_implementation={"": "a/b"}), ("never fetched",)),
    "code of a text encoder": (
        configure(TEXT_CONFIG, auto_map={"AutoModel": "owner/code--model.Model"}),
        ("auto_map", "never run"),
    ),
    "quantised": (
        configure(UNET_CONFIG, quantization_config={"quant_method": "bitsandbytes"}),
        ("quantization_config", "fp16 or fp32"),
    ),
    "adapter": (write("text_encoder/adapter_config.json", b"{}"), ("a PEFT adapter",)),
    # Limits.
    "layers": (configure(TEXT_CONFIG, num_hidden_layers=10**6), ("has 1000000", "limit of 256")),
    "levels": (configure(UNET_CONFIG, block_out_channels=[8] * 99), ("has 99 entries, more than 16",)),
    "transformers": (
        configure(UNET_CONFIG, layers_per_block=16, transformer_layers_per_block=64),
        ("make 4224 transformers", "limit of 2048"),
    ),
    "widths": (configure(VAE_CONFIG, block_out_channels=[8, 10**9]), ("has 1000000000", "limit of 16384")),
    "nested": (write(UNET_CONFIG, b"[" * 10**5 + b"]" * 10**5), ("nested", "the limit")),
    "long": (write(UNET_CONFIG, b" " * (1 << 21)), ("more than 1048576 bytes",)),
    "header": (
        write(WEIGHTS["unet"], (1 << 40).to_bytes(8, "little") + b"{}"),
        ("header would have 1099511627776 bytes", "limit of 16777216"),
    ),
    "LFS": (
        write(WEIGHTS["unet"], b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("a Git LFS pointer", "git lfs pull"),
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_not_supported_is_refused_by_what_it_is(checkpoint_copy: Path, what: str) -> None:
    damage, words = OTHERS[what]
    damage(checkpoint_copy)
    message = early_message(checkpoint_copy)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "file", [INDEX, UNET_CONFIG, "tokenizer/vocab.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize(("make", "kind"), [(make_pipe, "pipe"), (make_device, "device")])
def test_a_pipe_or_a_device_in_place_of_a_file_is_refused_at_once(
    checkpoint_copy: Path, file: str, make: Callable[[Path], None], kind: str
) -> None:
    make(checkpoint_copy / file)
    assert f"is a {kind}: a regular file is wanted" in early_message(checkpoint_copy)


def test_the_look_comes_before_torch(checkpoint_copy: Path, tmp_path: Path) -> None:
    """And within a second of processor time, interpreter and all."""
    configure(TEXT_CONFIG, num_hidden_layers=10**6)(checkpoint_copy)
    code = (
        "import sys, time; from sdrt.export.cli.main import main\n"
        f"status = main([{str(checkpoint_copy)!r}, {str(tmp_path / 'out')!r}])\n"
        "print(status, 'torch' in sys.modules, time.process_time() < 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "4 False True\n"
    assert done.stderr.count("\n") == 1


# --- headers


HEADERS: dict[str, tuple[str, Break, tuple[str, ...]]] = {
    "shape": ("vae", change_tensors("vae", shorten_a_matrix), ("has the shape [", "by config.json it is [")),
    "missing": ("vae", change_tensors("vae", drop_one), ("the tensor ", " is missing")),
    "too many": (
        "unet",
        change_tensors("unet", lambda tensors: tensors.update({"extra.weight": torch.zeros(2)})),
        ("the tensor extra.weight has no place",),
    ),
    "whole numbers": (
        "text_encoder",
        change_tensors(
            "text_encoder",
            lambda tensors: tensors.update({key: tensor.to(torch.int8) for key, tensor in tensors.items()}),
        ),
        ("is I8, whole numbers", "quantised"),
    ),
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_are_compared_with_the_networks_before_anything_is_loaded(
    checkpoint_copy: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, damage, words = HEADERS[what]
    damage(checkpoint_copy)
    monkeypatch.setattr("sdrt.export.checkpoint.weights.load_module", lambda *_: pytest.fail("loaded"))
    with pytest.raises(CheckpointError) as caught:
        check_architectures(open_checkpoint(str(checkpoint_copy)))
    assert f"/{name}: " in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_both_names_of_a_text_encoders_tensors_are_accepted(checkpoint_copy: Path, prefix: str) -> None:
    """transformers 5 saves them without ``text_model.``, transformers 4 with it."""

    def rename(tensors: dict[str, Any]) -> None:
        for key in list(tensors):
            tensors[prefix + key.removeprefix("text_model.")] = tensors.pop(key)

    change_tensors("text_encoder", rename)(checkpoint_copy)
    checkpoint = open_checkpoint(str(checkpoint_copy))
    check_architectures(checkpoint)
    load_module(checkpoint, "text_encoder")


# --- fields


@pytest.mark.parametrize(
    ("part", "kind"), [("vae", diffusers.AutoencoderKL), ("unet", diffusers.UNet2DConditionModel)]
)
def test_every_field_of_a_configuration_has_a_reader(part: str, kind: Any) -> None:
    """A field that diffusers adds has to be decided on."""
    fields = set(inspect.signature(kind.__init__).parameters) - {"self", "args", "kwargs"}
    assert set(FIELDS[part]) == fields


def test_the_defaults_that_are_read_here_are_those_of_diffusers() -> None:
    assert (
        inspect.signature(diffusers.AutoencoderKL.__init__).parameters["scaling_factor"].default
        == SCALING_FACTOR
    )
    absent = {field for field, role in FIELDS["unet"].items() if role == "absent"}
    assert absent == set(OTHER_INPUTS)
    defaults = inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters
    assert {defaults[field].default for field in absent} == {None}


def test_a_vae_without_a_scaling_factor_has_diffusers_own(checkpoint_copy: Path) -> None:
    configure(VAE_CONFIG, scaling_factor=None)(checkpoint_copy)
    assert open_checkpoint(str(checkpoint_copy)).decoded.factor == SCALING_FACTOR


# --- remarks


REMARKS: dict[str, tuple[Break, str]] = {
    "ControlNet": (
        configure(INDEX, controlnet=["diffusers", "ControlNetModel"]),
        "controlnet (ControlNetModel) of model_index.json is left out",
    ),
    "IP-Adapter": (
        configure(INDEX, image_encoder=["transformers", "CLIPVisionModelWithProjection"]),
        "image_encoder (CLIPVisionModelWithProjection) of model_index.json is left out",
    ),
    "unknown": (configure(INDEX, prior=["diffusers", "PriorTransformer"]), "prior (PriorTransformer)"),
    "folder": (
        lambda folder: (folder / "controlnet").mkdir(),
        "controlnet/, which model_index.json does not",
    ),
    "watermark": (configure(INDEX, add_watermarker=True), "without a watermark"),
    "unknown field": (configure(VAE_CONFIG, brightness=2), "vae/config.json has brightness, unknown to"),
    "shift": (configure(VAE_CONFIG, shift_factor=0.1), "shift_factor is 0.1, which no pipeline"),
    "latents of SDXL alone": (
        configure(VAE_CONFIG, latents_mean=[0, 0, 0, 1], latents_std=[1, 1, 1, 1]),
        "latents_mean and latents_std are read by SDXL's pipelines only",
    ),
    "silent": (
        configure(
            INDEX,
            safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
            feature_extractor=["transformers", "CLIPImageProcessor"],
            image_encoder=[None, None],
            requires_safety_checker=True,
        ),
        "",
    ),
}


@pytest.mark.parametrize("what", REMARKS)
def test_what_is_left_out_is_named(checkpoint_copy: Path, what: str) -> None:
    change, words = REMARKS[what]
    before = open_checkpoint(str(checkpoint_copy)).remarks
    change(checkpoint_copy)
    remarks = [line for line in open_checkpoint(str(checkpoint_copy)).remarks if line not in before]
    assert len(remarks) == bool(words)
    assert words in "".join(remarks)


@pytest.mark.parametrize("quiet", [True, False])
def test_remarks_are_warnings_of_the_command(
    checkpoint_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    configure(INDEX, controlnet=["diffusers", "ControlNetModel"])(checkpoint_copy)
    change_tensors("vae", drop_one)(checkpoint_copy)  # so that it ends before a minute of tracing
    assert cli.main([str(checkpoint_copy), str(tmp_path / "out"), *["--quiet"][: int(quiet)]]) == 4
    *warnings, _ = capsys.readouterr().err.splitlines()
    assert all(line.startswith("sd-export: warning: ") for line in warnings)
    assert any("warning: controlnet (ControlNetModel)" in line for line in warnings) != quiet
    assert bool(warnings) != quiet


def test_the_index_says_which_class_reads_the_scheduler(checkpoint_copy: Path) -> None:
    """As in diffusers, whatever class wrote the file."""
    configure(INDEX, scheduler=["diffusers", "EulerDiscreteScheduler"])(checkpoint_copy)
    checkpoint = open_checkpoint(str(checkpoint_copy))
    assert checkpoint.sampler == "euler"
    assert "EulerDiscreteScheduler reads scheduler_config.json, which PNDMScheduler wrote" in "".join(
        checkpoint.remarks
    )


def test_a_library_that_the_index_names_is_never_imported(
    variations_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(variations_checkpoint, tmp_path / "copy"))
    configure(INDEX, feature_extractor=["antigravity", "CLIPImageProcessor"])(folder)
    assert "feature_extractor is ['antigravity', 'CLIPImageProcessor']" in early_message(folder)
