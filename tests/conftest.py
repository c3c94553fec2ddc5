"""Fixtures that several folders share: a checkpoint that exports in seconds, and its bundle."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.checkpoints.tiny_variants import (
    write_model_index,
    write_tiny_depth_checkpoint,
    write_tiny_image_variations_checkpoint,
    write_tiny_inpainting_checkpoint,
    write_tiny_lcm_checkpoint,
    write_tiny_pix2pix_checkpoint,
    write_tiny_unclip_checkpoint,
    write_tiny_upscaler_checkpoint,
)
from support.made_once import exported_once, leave_what_lasts, made_once
from support.runs.browsers import find_browser

from sdrt.runtime.system.telemetry import switch_telemetry_off

if TYPE_CHECKING:
    from sdrt.benchmarks.gallery.sections import Section

# Nothing in the tests may reach a network, and no library may try.
switch_telemetry_off()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# A shell starts what it runs in the background with SIGINT ignored, and so would all that the tests start:
# those that press Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What is compiled and measured on the way is not left in the user's own cache. (Workers of pytest-xdist are
# started by a process that has set it already.)
_USER_CACHE = os.environ.setdefault("SDRT_TESTS_USER_CACHE", os.environ.get("SDRT_CACHE", "")) or None
_CACHE = tempfile.TemporaryDirectory(prefix="sdrt-tests-")
os.environ["SDRT_CACHE"] = _CACHE.name

# Two workers have a core each; what they start, too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY_MERGES = 200
TINY_SIZE = 16  # pixels: 8 latents at a VAE factor of 2


# Files that take minutes, or make what many others share: with several workers they are begun first, so that
# nobody waits for the last of them.
LONG = (
    "test_build.py",
    "test_bench_cli.py",
    "test_openvino_kinds.py",
    "test_half_precision.py",
    "test_gallery.py",
    "test_sd_export.py",
    "test_quiet.py",
    "test_pipeline.py",
    "test_gpu_subjects.py",
    "test_openvino_cpu.py",
    "test_interrupts.py",
    "test_cache_attacks.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first where workers take one after the other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        rank = {name: place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: rank.get(item.path.name, len(LONG)))


def write_tiny_checkpoint(folder: Path) -> None:
    """A Stable Diffusion 1.x checkpoint of some 50 thousand seeded random weights in fp16."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from sdrt.export.checkpoint.tokenizer_json import write_tokenizer_folder

    torch.manual_seed(0)
    vocabulary = 512 + TINY_MERGES + 2
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=TINY_SIZE // 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=TINY_SIZE,
        scaling_factor=0.5,
    )
    for name, module in (("text_encoder", text), ("unet", unet), ("vae", vae)):
        module.half().save_pretrained(folder / name, safe_serialization=True)
    PNDMScheduler(  # as Stable Diffusion 1.x comes with
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        skip_prk_steps=True,
    ).save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir()
    write_tokenizer_folder(folder / "tokenizer", TINY_MERGES)
    write_model_index(folder, "StableDiffusionPipeline", scheduler="PNDMScheduler")


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> None:
    """See `leave_what_lasts`."""
    leave_what_lasts()


@pytest.fixture
def user_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own cache, which holds what takes minutes to install."""
    if _USER_CACHE is None:
        monkeypatch.delenv("SDRT_CACHE")
    else:
        monkeypatch.setenv("SDRT_CACHE", _USER_CACHE)


@pytest.fixture(scope="session")
def browser() -> str:
    """A Chromium."""
    return find_browser()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights; read only, copy it to change it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return made_once("tiny-checkpoint", folder, write_tiny_checkpoint, write_model_index)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint's bundle: fp32, batches of 1 to 2, sides of 16 to 32 pixels. Read only."""

    def export(out: Path) -> None:
        from sdrt.export.cli.main import main

        sizes = ["--height", "16..32", "--width", "16..32", "--batch", "1..2"]
        assert main([str(tiny_checkpoint), str(out), "--fp16-weights", "--quiet", *sizes]) == 0

    return exported_once("tiny-bundle", tmp_path_factory.mktemp("bundle") / "tiny", export, tiny_checkpoint)


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def _variant(write: Callable[[Path, Path], None], tiny: Path, factory: pytest.TempPathFactory) -> Path:
    name = write.__name__.removeprefix("write_").replace("_", "-")

    def make(folder: Path) -> None:
        write(folder, tiny)

    return made_once(name, factory.mktemp(name) / "tiny", make, write, tiny)


TINY_GRAPHS = ("text_encoder", "vae_decoder", "vae_encoder")


def _variant_bundle(
    name: str,
    checkpoint: Path,
    tiny_bundle: Path,
    factory: pytest.TempPathFactory,
    same: Sequence[str] = TINY_GRAPHS,
) -> Path:
    """One image of one size. Networks that are the tiny checkpoint's (``same``) have its bundle's graphs."""

    def export(out: Path) -> None:
        import onnx_ir as ir

        from sdrt.export import writer as bundle_writer
        from sdrt.export.cli.main import main
        from sdrt.export.graphs.from_module import onnx_from_module

        def graph(module: Any, args: Any, spec: Any, *rest: Any) -> ir.Model:
            if spec.name in same:
                return ir.load(tiny_bundle / spec.name / "model.onnx")
            return onnx_from_module(module, args, spec, *rest)

        sizes = ["--height", "16", "--width", "16", "--batch", "1", "--chunks", "1"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bundle_writer, "onnx_from_module", graph)
            assert main([str(checkpoint), str(out), "--quiet", *sizes]) == 0

    return exported_once(name, factory.mktemp("bundle") / "tiny", export, checkpoint, tiny_bundle)


@pytest.fixture(scope="session")
def inpainting_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a U-Net of 9 channels; read only."""
    return _variant(write_tiny_inpainting_checkpoint, tiny_checkpoint, tmp_path_factory)


@pytest.fixture(scope="session")
def lcm_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent consistency model's checkpoint; read only."""
    return _variant(write_tiny_lcm_checkpoint, tiny_checkpoint, tmp_path_factory)


@pytest.fixture(scope="session")
def depth_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose U-Net reads a depth map; read only."""
    return _variant(write_tiny_depth_checkpoint, tiny_checkpoint, tmp_path_factory)


@pytest.fixture(scope="session")
def variations_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an image encoder in place of the text's; read only."""
    return _variant(write_tiny_image_variations_checkpoint, tiny_checkpoint, tmp_path_factory)


@pytest.fixture(scope="session")
def inpainting_bundle(
    inpainting_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Its bundle: fp32, one image of 16 x 16 pixels. Read only."""
    return _variant_bundle("inpainting-bundle", inpainting_checkpoint, tiny_bundle, tmp_path_factory)


@pytest.fixture(scope="session")
def pix2pix_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a U-Net that reads the latents of a picture; read only."""
    return _variant(write_tiny_pix2pix_checkpoint, tiny_checkpoint, tmp_path_factory)


@pytest.fixture(scope="session")
def pix2pix_bundle(
    pix2pix_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Its bundle, as that of `inpainting_bundle`; its VAE's encoder does not scale latents."""
    return _variant_bundle(
        "pix2pix-bundle", pix2pix_checkpoint, tiny_bundle, tmp_path_factory, TINY_GRAPHS[:2]
    )


@pytest.fixture(scope="session")
def unclip_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that draws from a picture's embedding and a text; read only."""
    return _variant(write_tiny_unclip_checkpoint, tiny_checkpoint, tmp_path_factory)


@pytest.fixture(scope="session")
def unclip_bundle(
    unclip_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Its bundle, as that of `inpainting_bundle`."""
    return _variant_bundle("unclip-bundle", unclip_checkpoint, tiny_bundle, tmp_path_factory)


@pytest.fixture(scope="session")
def upscaler_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that enlarges pictures; read only."""
    return _variant(write_tiny_upscaler_checkpoint, tiny_checkpoint, tmp_path_factory)


@pytest.fixture(scope="session")
def upscaler_bundle(
    upscaler_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Its bundle, as that of `inpainting_bundle`; its VAE's decoder scales latents otherwise."""
    return _variant_bundle(
        "upscaler-bundle", upscaler_checkpoint, tiny_bundle, tmp_path_factory, TINY_GRAPHS[:1]
    )


@pytest.fixture(scope="session")
def lcm_bundle(lcm_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle, as that of `inpainting_bundle`."""
    return _variant_bundle("lcm-bundle", lcm_checkpoint, tiny_bundle, tmp_path_factory)


@pytest.fixture(scope="session")
def depth_bundle(depth_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle, as that of `inpainting_bundle`."""
    return _variant_bundle("depth-bundle", depth_checkpoint, tiny_bundle, tmp_path_factory)


@pytest.fixture(scope="session")
def variations_bundle(
    variations_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Its bundle, as that of `inpainting_bundle`."""
    return _variant_bundle("variations-bundle", variations_checkpoint, tiny_bundle, tmp_path_factory)


@pytest.fixture(scope="session")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Section]]:
    """The page of ``make gallery`` as it is made, and its sections with all pictures drawn."""
    from sdrt.benchmarks.gallery.drawing import write_gallery
    from sdrt.benchmarks.gallery.sections import sections

    drawn = sections()
    return write_gallery(tmp_path_factory.mktemp("gallery"), drawn), drawn
