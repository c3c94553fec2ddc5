"""fp16 exports of networks whose values fp16 cannot hold: mended and said, or refused by layer and value."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.references.contrib_definitions import written_out
from support.runs.onnx_runs import run

import tolerances
from sdrt.export import writer as bundle_writer
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.checkpoint.weights import HalfOverflowError, load_module
from sdrt.export.cli import main as cli
from sdrt.export.engines.writer import islands_of
from sdrt.export.graphs.from_module import onnx_from_module
from sdrt.export.graphs.half_precision import planned_precision, why_planned
from sdrt.export.graphs.range_audit import FP16_LARGEST, audit_ranges
from sdrt.export.manifest import check_manifest
from sdrt.export.options import AxisRange, ExportOptions
from sdrt.export.parity.components import compare
from sdrt.export.parity.reference import reference_pipeline
from sdrt.export.passes.pipeline import prepare_for_onnxruntime_cuda, prepare_for_tensorrt
from sdrt.runtime import Pipeline
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.errors import NumericsError

FILES = {
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
# Weights that are the last of a branch which a normalisation follows, and a factor that fp16 still holds.
LARGE = {
    "text_encoder": ("layers.1.mlp.fc2.weight", 2.0**16.5),
    "unet": ("down_blocks.0.resnets.0.conv2.weight", 2.0**18),
    "vae": ("decoder.mid_block.resnets.0.conv2.weight", 2.0**18),
}
ONE_SIZE = ("--height", "18", "--width", "16", "--batch", "1")  # as `fp16_bundle` has it


def scale(checkpoint: Path, network: str, ending: str, factor: float) -> str:
    """Multiply one tensor of a checkpoint, in float32 where fp16 does not hold it; return its name."""
    file = checkpoint / FILES[network]
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith(ending)]
    scaled = tensors[name].float() * factor
    fits = float(scaled.abs().max()) <= FP16_LARGEST
    tensors[name] = scaled.half() if fits else scaled
    save_file(tensors, file, metadata={"format": "pt"})
    return str(name)


def tracing_only(traced: tuple[str, ...], graphs: Path) -> Callable[..., ir.Model]:
    """For `onnx_from_module`: the graphs of networks that are not traced are those of a bundle."""

    def graph(module: Any, args: Any, spec: Any, *rest: Any) -> ir.Model:
        if spec.name in traced:
            return onnx_from_module(module, args, spec, *rest)
        return ir.load(graphs / spec.name / "model.onnx")

    return graph


@pytest.fixture(scope="module")
def overflowing(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in fp16 whose text encoder, U-Net and VAE decoder pass 65,504 inside. Read only."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("overflowing") / "tiny"))
    for network, (ending, factor) in LARGE.items():
        scale(folder, network, ending, factor)
    return folder


@pytest.fixture(scope="module")
def exported(
    overflowing: Path, fp16_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """Its fp16 bundle, and what the export said. Read only."""
    out = tmp_path_factory.mktemp("exported") / "bundle"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        traced = ("text_encoder", "unet", "vae_decoder")
        patch.setattr(bundle_writer, "onnx_from_module", tracing_only(traced, fp16_bundle))
        patch.setattr(cli, "put", said.append)
        assert cli.main([str(overflowing), str(out), "--fp16", *ONE_SIZE]) == 0
    return out, said


@pytest.fixture(scope="module")
def whole_fp16(
    overflowing: Path, exported: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same with ``--vae-dtype fp16``. Read only."""
    out = tmp_path_factory.mktemp("whole") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle_writer, "onnx_from_module", tracing_only(("vae_decoder",), exported[0]))
        options = ["--fp16", "--vae-dtype", "fp16", "--quiet", *ONE_SIZE]
        assert cli.main([str(overflowing), str(out), *options]) == 0
    return out


def load(bundle: Path, component: str) -> ir.Model:
    model: ir.Model = ir.load(bundle / component / "model.onnx")
    ir.external_data.load_to_model(model)
    return model


def feeds_of(model: ir.Model) -> dict[str, Any]:
    """Seeded inputs of the sizes that the graph has, two rows and 77 tokens where it leaves them open."""
    generator = np.random.default_rng(2)
    feeds = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        open_sizes = {"rows": 2, "context": 77}
        shape = [size if isinstance(size, int) else open_sizes[str(size)] for size in value.shape]
        feeds[str(value.name)] = generator.standard_normal(shape).astype(value.dtype.numpy())
    return feeds | ({"timestep": np.full(2, 500, np.float32)} if "timestep" in feeds else {})


# --- mended ---


def test_the_export_says_what_is_kept_in_fp32_and_the_bundle_too(exported: tuple[Path, list[str]]) -> None:
    out, said = exported
    manifest = Bundle.open(out).manifest
    assert {name: part.precision for name, part in manifest.components.items()} == {
        "text_encoder": "fp16",
        "unet": "fp16",
        "vae_decoder": "fp32",
        "vae_encoder": "fp16",
    }
    for name, layer in (
        ("text_encoder", "encoder.layers.1.mlp.fc2"),
        ("unet", "down_blocks.0.resnets.0.conv2"),
    ):
        kept = manifest.ranges[name]["islands"]
        told = f"{name}: {len(kept)} tensors kept in fp32, from {layer},"
        assert [told in line for line in said].count(True) == 1
        audit = audit_ranges(out / name / "model.onnx", [feeds_of(load(out, name))])
        assert (audit.precision, audit.over, audit.near) == ("fp16", (), ())
    why = manifest.ranges["vae_decoder"]["fp32"]
    assert "decoder.mid_block.resnets.0.conv2, conv2d_3 (Conv) reach" in why
    assert any(line.endswith(f"vae_decoder: fp32 in place of fp16, since {why}") for line in said)
    assert manifest.ranges["vae_encoder"]["islands"] == []


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "openvino-cpu"])
@pytest.mark.parametrize("kind", ["exported", "whole_fp16"])
def test_pictures_are_those_of_fp32(
    overflowing: Path, kind: str, backend: str, request: pytest.FixtureRequest
) -> None:
    """Against diffusers in float32; a VAE that is fp32 and one with islands, both beside an fp16 U-Net."""
    given = request.getfixturevalue(kind)
    bundle = given[0] if isinstance(given, tuple) else given
    latents = np.random.default_rng(4).standard_normal((1, 4, 9, 8)).astype(np.float32)
    common: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}
    with Pipeline.load(bundle, backend=backend, threads=1) as pipeline:
        drawn = pipeline("a red apple", sampler="ddim", latents=latents, **common)
    reference = reference_pipeline(open_checkpoint(str(overflowing)))
    expected = reference(
        "a red apple", latents=torch.from_numpy(latents), height=64, width=64, output_type="np", **common
    ).images[0]
    error = np.asarray(drawn.images[0], np.float64) / 255 - expected
    assert 10 * np.log10(1 / np.mean(error**2)) >= tolerances.FP16_PSNR_DB


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_graphs_for_onnxruntime_cuda_keep_their_islands(
    whole_fp16: Path, component: str, tmp_path: Path
) -> None:
    model = load(whole_fp16, component)
    feeds = feeds_of(model)
    before = run(model, feeds, tmp_path)
    prepare_for_onnxruntime_cuda(model, component, "fp16")
    after = run(written_out(model), feeds, tmp_path)
    for old, new in zip(before, after, strict=True):
        assert np.isfinite(new.astype(np.float32)).all()
        assert compare(new, old)[0] <= tolerances.PASSES_FP16


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_engines_of_tensorrt_have_the_bundles_islands(
    exported: tuple[Path, list[str]], whole_fp16: Path, component: str
) -> None:
    bundle = whole_fp16 if component == "vae_decoder" else exported[0]
    model, names = load(bundle, component), islands_of(Bundle.open(bundle), component)
    types = {str(value.name): value.dtype for node in model.graph for value in node.outputs}
    assert names
    assert {types[name] for name in names} == {ir.DataType.FLOAT}
    report = prepare_for_tensorrt(model, component, "fp16", names)
    assert (report.islands, report.casts) == ((), 0)
    after = {str(value.name): value.dtype for node in model.graph for value in node.outputs}
    assert {after[name] for name in names} == {ir.DataType.FLOAT}


# --- said by the checkpoint ---


def options(**changes: Any) -> ExportOptions:
    side = AxisRange(16, 16)
    return ExportOptions("fp16", False, AxisRange(1, 1), side, side, 1, 23, **changes)


@pytest.mark.parametrize(
    ("says", "asked", "precision"),
    [(True, None, "fp32"), (None, None, "fp32"), (False, None, "fp16"), (True, "fp16", "fp16")],
)
def test_force_upcast_of_sdxl_is_an_fp32_vae(
    sdxl_checkpoint: Path, says: bool | None, asked: Any, precision: str
) -> None:
    checkpoint = open_checkpoint(str(sdxl_checkpoint))
    config: dict[str, Any] = {**checkpoint.configs["vae"], "force_upcast": says}
    if says is None:
        del config["force_upcast"]
    checkpoint.configs["vae"].clear()
    checkpoint.configs["vae"].update(config)
    given = options(vae_precision=asked)
    planned = {name: planned_precision(checkpoint, given, name) for name in ("unet", "vae_decoder")}
    assert planned == {"unet": "fp16", "vae_decoder": precision}
    why = why_planned(checkpoint, given, "vae_decoder")
    assert ("force_upcast" in why and "--vae-dtype fp16" in why) == (precision == "fp32")
    check_manifest(checkpoint, given)


def test_force_upcast_is_not_read_elsewhere(tiny_checkpoint: Path) -> None:
    """diffusers' StableDiffusionPipeline decodes in the VAE's own precision."""
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    assert checkpoint.configs["vae"]["force_upcast"]
    assert planned_precision(checkpoint, options(), "vae_decoder") == "fp16"


# --- refused ---


def test_weights_that_fp16_cannot_hold_are_named(checkpoint_copy: Path) -> None:
    name = scale(checkpoint_copy, "vae", "decoder.conv_in.weight", 2.0**20)
    largest = float(load_file(checkpoint_copy / FILES["vae"])[name].abs().max())
    assert largest > FP16_LARGEST
    checkpoint = open_checkpoint(str(checkpoint_copy))
    with pytest.raises(HalfOverflowError, match=f"the weights {name} reach {largest:,.0f}, and fp16 holds"):
        load_module(checkpoint, "vae", torch.float16)


REFUSED: Mapping[str, tuple[str, str, float, tuple[str, ...], str]] = {
    "weights": (
        "text_encoder",
        "layers.0.mlp.fc1.weight",
        2.0**24,
        (),
        r"text_encoder does not fit into fp16: the weights \S*encoder\.layers\.0\.mlp\.fc1\.weight reach",
    ),
    "an output": (
        "text_encoder",
        "layers.0.mlp.fc2.weight",
        2.0**16.5,
        ("text_encoder",),
        r"text_encoder does not fit into fp16: the values of encoder\.layers\.0\S* \S+ \(\w+\) reach",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_nothing_mends_is_one_line_with_layer_value_and_remedies(
    checkpoint_copy: Path,
    fp16_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    network, ending, factor, traced, words = REFUSED[what]
    scale(checkpoint_copy, network, ending, factor)
    monkeypatch.setattr(bundle_writer, "onnx_from_module", tracing_only(traced, fp16_bundle))
    arguments = [str(checkpoint_copy), str(tmp_path / "out"), "--fp16", "--quiet", *ONE_SIZE]
    assert cli.main(arguments) == NumericsError.exit_status
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    with pytest.raises(NumericsError, match=words + r" \d[\d,]+, and fp16 holds 65,504; .*--dtype fp32"):
        raise NumericsError(message)
    assert "--fp16-weights" in message
    assert not (tmp_path / "out").exists()
