"""What a single file is, from its header: published models at their full size, and what they hold beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints.ldm_names import UNET
from support.checkpoints.published import CONFIGS
from support.checkpoints.published_headers import (
    REFINER_UNET,
    Shapes,
    network_shapes,
    shapes_of,
    write_header,
)

from sdrt.export.checkpoint.assembly import Assembly, Parts, assembly_of
from sdrt.export.checkpoint.overrides import Overrides
from sdrt.export.checkpoint.part import FilePart
from sdrt.runtime.errors import CheckpointError, UsageError

BESIDE: Mapping[str, Shapes] = {
    "v_pred": {"v_pred": ()},
    "zero snr": {"v_pred": (), "ztsnr": ()},
    "edm": {"edm_mean": (1, 4, 1, 1), "edm_std": (1, 4, 1, 1)},
    "cosxl": {"edm_vpred.sigma_max": (), "edm_vpred.sigma_min": ()},
}


def read(file: Path, **overrides: Any) -> Assembly:
    return assembly_of(Parts(str(file), overrides=Overrides(**overrides)))


@dataclass(frozen=True)
class Case:
    """A published model in a file of a name, with fields of its U-Net and tensors beside.

    ``words`` are in its line; ``fields`` in its scheduler's configuration.
    """

    published: str
    words: str
    scheduler: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    file: str = "model"
    unet: str = "{}"
    beside: str = ""


EPSILON, V = {"prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}
ZERO = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
X0 = {"prediction_type": "sample", "timestep_spacing": "trailing"}
TRAILING = {**EPSILON, "timestep_spacing": "trailing"}
PNDM, DDIM, LCM = "PNDMScheduler", "DDIMScheduler", "LCMScheduler"
EULER, EULER_A = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
BY_MARKERS = "predicts v_prediction (tensor v_pred, tensor ztsnr), zero terminal SNR"
OLD, NEW, XL = "sd-1.4", "sd-2.1-768", "sdxl-base"
CASES = {
    "1.5": Case(OLD, "is Stable Diffusion 1.x, predicts epsilon, ", PNDM),
    "1.5 v": Case(OLD, BY_MARKERS, DDIM, ZERO, beside="zero snr"),
    "1.5 inpainting": Case("sd-1.5-inpainting", "1.x inpainting", PNDM),
    "LCM": Case(OLD, "1.x, a latent consistency model", LCM, EPSILON, unet='{"time_cond_proj_dim": 256}'),
    "LCM merged": Case(OLD, "LCM merged (by its name)", LCM, EPSILON, file="dreamshaper-LCM_v7"),
    "pix2pix": Case(OLD, "is InstructPix2Pix, predicts", PNDM, unet='{"in_channels": 8}'),
    "SDXL pix2pix": Case(XL, "is SDXL InstructPix2Pix", EULER, EPSILON, unet='{"in_channels": 8}'),
    "2.1": Case(NEW, "2.x for 768 pixels (as diffusers takes", DDIM, V),
    "2.1 base": Case(NEW, "2.x base (by its name)", PNDM, EPSILON, file="v2-1_512-ema-pruned"),
    "2 inpainting": Case("sd-2-inpainting", "2.x inpainting", PNDM, EPSILON),
    "2 depth": Case(NEW, "is Stable Diffusion 2 depth", PNDM, EPSILON, unet='{"in_channels": 5}'),
    "Turbo": Case(NEW, "Stable Diffusion Turbo (by its name)", EULER, TRAILING, file="sd_turbo"),
    "SDXL": Case(XL, "is SDXL base, predicts epsilon, ", EULER, EPSILON),
    "SDXL v": Case(XL, BY_MARKERS, EULER, ZERO, beside="zero snr"),
    "SDXL v alone": Case(XL, "v_prediction (tensor v_pred), s", EULER, V, beside="v_pred"),
    "SDXL inpainting": Case(XL, "SDXL inpainting", EULER, EPSILON, unet='{"in_channels": 9}'),
    "SDXL Turbo": Case(XL, "SDXL Turbo (by its name)", EULER_A, TRAILING, file="sd_xl_turbo_1.0_fp16"),
    "SDXL Lightning": Case(XL, "SDXL Lightning", EULER, TRAILING, file="sdxl_lightning_4step"),
    "Turbo merged": Case(XL, "SDXL with Turbo merged", EULER_A, TRAILING, file="dreamXL_v21TurboDPMSDE"),
    "Lightning x0": Case(XL, "SDXL Lightning", EULER, X0, file="sdxl_lightning_1step_x0"),
    "SDXL LCM": Case(XL, "SDXL, a latent c", LCM, EPSILON, unet='{"time_cond_proj_dim": 256}'),
    "refiner": Case(XL, "is the SDXL refiner, predicts epsilon", EULER, EPSILON, unet=REFINER_UNET),
    "Playground": Case(XL, "Playground 2.5", "EDMDPMSolverMultistepScheduler", EPSILON, beside="edm"),
    "CosXL": Case(XL, "CosXL", "EDMEulerScheduler", V, beside="cosxl"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_published_model_is_known_by_its_header(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    header = {**shapes_of(case.published, case.unet), **BESIDE.get(case.beside, {})}
    assembly = read(write_header(tmp_path / f"{case.file}.safetensors", header))
    assert case.words in assembly.line
    written = assembly.documents["scheduler/scheduler_config.json"]
    assert written["_class_name"] == case.scheduler
    assert {**written, **case.fields} == written
    for folder in assembly.family.folders:
        wanted = network_shapes(case.published, folder, case.unet if folder == "unet" else "{}")
        given = assembly.tensors(folder)
        assert {plain(key): shape for key, shape in given.items()} == {
            plain(key): shape for key, shape in wanted.items()
        }


def plain(name: str) -> str:
    return name.removeprefix("text_model.")


def test_configurations_of_published_kinds_are_those_that_were_published(tmp_path: Path) -> None:
    """But for what says nothing: versions, names, and sizes that no picture depends on."""
    for published in ("sd-1.4", "sd-1.5-inpainting", "sd-2-inpainting", "sd-2.1-768", "sdxl-base"):
        assembly = read(write_header(tmp_path / f"{published}.safetensors", shapes_of(published)))
        for folder, part in assembly.parts.items():
            assert isinstance(part, FilePart)
            ours, theirs = part.config, CONFIGS[published][f"{folder}/config.json"]
            differing = {key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]}
            assert differing <= SAY_NOTHING.get(folder, set()), (published, folder)


# What the VAE's own tiles would be; heads of attention that an unread precision asks for.
SAY_NOTHING = {"vae": {"sample_size"}, "unet": {"upcast_attention"}}


def test_what_the_user_says_overrules_the_file(tmp_path: Path) -> None:
    file = write_header(tmp_path / "model-lcm.safetensors", shapes_of(NEW))
    base = read(file, prediction_type="epsilon")
    assert "2.x base, predicts epsilon" in base.line
    turbo = read(file, family="sd-turbo")
    assert "Stable Diffusion Turbo (--family)" in turbo.line
    zero = read(file, zero_snr=True).documents["scheduler/scheduler_config.json"]
    assert (zero["rescale_betas_zero_snr"], zero["timestep_spacing"]) == (True, "trailing")
    marked = write_header(tmp_path / "marked.safetensors", {**shapes_of(OLD), **BESIDE["zero snr"]})
    plain = read(marked, prediction_type="epsilon").documents["scheduler/scheduler_config.json"]
    assert plain["prediction_type"] == "epsilon"
    assert "rescale_betas_zero_snr" not in plain
    xl = write_header(tmp_path / "xl.safetensors", shapes_of(XL))
    lightning = read(xl, family="sdxl-lightning").documents["scheduler/scheduler_config.json"]
    assert {**lightning, **TRAILING} == lightning
    with pytest.raises(UsageError, match=r"--family is playground: .* has no tensor edm_mean and edm_std"):
        read(marked, family="playground")
    with pytest.raises(UsageError, match=r"--family is sdxl, .* reads 2048 .* takes 4 and reads 768"):
        read(marked, family="sdxl")


def test_metadata_say_what_the_model_predicts(tmp_path: Path) -> None:
    said = {"modelspec.predict_key": "v", "modelspec.title": "A Lightning Bolt"}
    assembly = read(write_header(tmp_path / "x.safetensors", shapes_of(XL), metadata=said))
    assert "SDXL Lightning (by its name), predicts v_prediction (its modelspec.predict_key)" in assembly.line
    architecture = {"modelspec.architecture": "stable-diffusion-v2-512"}
    assembly = read(write_header(tmp_path / "y.safetensors", shapes_of(NEW), metadata=architecture))
    assert "2.x base (by its name)" in assembly.line


def test_fp8_and_ema_copies_are_said(tmp_path: Path) -> None:
    ema = {f"model_ema.{index}": (2,) for index in range(3)}
    assembly = read(write_header(tmp_path / "x.safetensors", {**shapes_of(OLD), **ema}, dtype="F8_E4M3"))
    assert assembly.line.endswith("fp8 (F8_E4M3), widened to fp16, its EMA copies left out")


FIRST, KEYS = (
    f"{UNET}input_blocks.0.0.weight",
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {FIRST: (320, 8, 3, 3), KEYS: (320, 2048), **BESIDE["cosxl"]},
            "is CosXL Edit: its U-Net reads scaled",
        ),
        ({FIRST: (256, 7, 3, 3), KEYS: (320, 1024)}, "is Stable Diffusion x4 upscaler"),
        (
            {FIRST: (320, 4, 3, 3), KEYS: (320, 1024), f"{UNET}label_emb.0.0.weight": (1280, 2048)},
            "is Stable unCLIP 2.1",
        ),
        ({FIRST: (320, 4, 3, 3), KEYS: (320, 96)}, "takes 4 channels and reads 96 features.*--config FOLDER"),
        ({FIRST: (320, 4, 3, 3), KEYS: ()}, "takes 4 channels and reads 0 features"),
        (
            {FIRST: (320, 4, 3, 3), KEYS: (320, 2048), "edm_mean": (0,), "edm_std": (0,)},
            r"the tensor edm_mean is F\d\d of the shape \[0\]: a few floating",
        ),
        ({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (9, 3)}, "a transformer in place of a U-Net"),
    ],
)
def test_kinds_that_are_not_supported_are_called_by_their_names(
    tensors: Shapes, words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        read(write_header(tmp_path / "x.safetensors", tensors))


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    scaled = {**shapes_of(OLD), f"{UNET}out.2.scale_weight": ()}
    with pytest.raises(CheckpointError, match=r"out\.2\.scale_weight: its weights are quantised"):
        read(write_header(tmp_path / "x.safetensors", scaled, dtype="F8_E4M3"))
    with pytest.raises(CheckpointError, match=r"is U8; read are fp64, fp32, fp16, bf16 and fp8"):
        read(write_header(tmp_path / "y.safetensors", shapes_of(OLD), dtype="U8"))
