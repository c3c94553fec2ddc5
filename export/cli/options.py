"""The command line of ``sd-export``: its options, and which of them go together."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from sdrt.export.checkpoint.single_file.published import FAMILIES
from sdrt.export.engines.options import (
    MAX_LEVEL,
    EngineOptions,
    Extent,
    parse_bytes,
    parse_extent,
    parse_profiles,
    parse_targets,
)
from sdrt.runtime.admission.graph_operators import MAX_OPSET, MIN_OPSET
from sdrt.runtime.bundle.engines import FLAVOURS
from sdrt.runtime.bundle.families.record import PRECISIONS
from sdrt.runtime.bundle.manifest import MANIFEST_NAME
from sdrt.runtime.cli.lora_options import AddLora
from sdrt.runtime.console.run_command import Parser
from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers.guidance import MAX_GUIDANCE_SCALE
from sdrt.runtime.samplers.schedule import PREDICTION_TYPES

ARCHITECTURES: Final = ("sd15", "sd21", "sdxl")
MAX_BATCH: Final = 64
SIZES: Final = ("batch", "height", "width", "chunks")
DEFAULT_BATCH: Final = "1..4"
MAX_CHUNKS: Final = 16
DEFAULT_CHUNKS: Final = 4
# Options that bring or replace one network of the checkpoint.
PARTS: Final = ("unet", "vae", "text_encoder", "text_encoder_2")
_DEFAULTS: Final = ("default_steps", "default_guidance")
# Options that say what MODEL is and what belongs to it.
_OF_MODEL: Final = (
    *PARTS,
    *("config", "family", "prediction_type", "zero_snr", "revision", "lora", "lora_partial"),
)

EPILOG: Final = """examples:
  sd-export stable-diffusion-v1-5/stable-diffusion-v1-5 sd15 --fp16 --engine tensorrt-rtx
  sd-export model.safetensors OUT --vae vae-ft-mse-840000.safetensors
  sd-export sd15 --engine tensorrt --batch 1 --height 512 --width 512
  sd-export sd15 --engine tensorrt-rtx --profile batch=1 --profile batch=2..4,height=512,width=512
  sd-export --architecture sd15 --random-weights random --fp16

exit status: 0 done; 2 usage; 3 the bundle cannot be used; 4 the checkpoint cannot be used; 5 over the
parity tolerance; 6 NaN or infinity; 7 a backend is missing or cannot build an engine; 8 OUT cannot be
written; 130 interrupted; 1 anything else. Unless the status is 0 nothing is written, and an older bundle
at OUT is kept; but a new bundle stays when it is only its engines that cannot be built."""


def parser() -> Parser:
    """The command line of ``sd-export``."""
    result = Parser(
        prog="sd-export",
        usage="sd-export MODEL OUT [--engine FLAVOUR] [options]\n"
        "       sd-export BUNDLE --engine FLAVOUR [options]\n"
        "       sd-export --architecture NAME --random-weights OUT [options]",
        description="Export a Stable Diffusion checkpoint to a bundle of ONNX graphs, each compared "
        "with PyTorch before it ships, and compile engines for the bundle.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a single file (.safetensors), a diffusers folder, a hub id owner/name, or a bundle",
    )
    result.add_argument("out", metavar="OUT", nargs="?", help="the bundle's folder, made by this")
    _add_sizes(result)
    _add_checkpoint(result.add_argument_group("checkpoint"))
    _add_export(result.add_argument_group("export"))
    _add_engines(result.add_argument_group("engines"))
    result.add_argument("--force", action="store_true", help="replace an older bundle, or older engines")
    result.add_argument("--quiet", action="store_true", help="print errors only")
    return result


def _add_sizes(result: argparse.ArgumentParser) -> None:
    result.add_argument(
        "--batch",
        metavar="N|MIN..MAX",
        help=f"images per call (default: {DEFAULT_BATCH}; for engines alone: all that the bundle admits)",
    )
    for side in ("height", "width"):
        result.add_argument(
            f"--{side}",
            metavar="N|MIN..MAX",
            help="pixels, fixed or a range (default: from half to twice the model's own; with --engine the "
            "model's own, fixed; for engines alone: all that the bundle admits). For engines all four may be "
            "MIN..OPT..MAX, OPT being the fastest",
        )
    result.add_argument(
        "--chunks",
        metavar="N|MIN..MAX",
        help="of long prompts, 75 tokens each: graphs admit 1 to the largest number that stands here "
        f"(default: {DEFAULT_CHUNKS}), engines just what stands here (default: 1, which is the fastest)",
    )


def _add_checkpoint(group: Any) -> None:
    group.add_argument("--vae", metavar="FILE|FOLDER", help="a VAE in place of MODEL's, or where it has none")
    for option, words in (
        ("--unet", "a U-Net, such as SDXL Lightning's of some steps"),
        ("--text-encoder", "a text encoder"),
        ("--text-encoder-2", "SDXL's second one"),
    ):
        group.add_argument(option, metavar="FILE|FOLDER", help=f"{words}, likewise")
    group.add_argument(
        "--config",
        metavar="FOLDER",
        help="of a single file: configurations and tokenizer of this diffusers folder (default: those of the "
        "published kind that the file is found to be)",
    )
    group.add_argument(
        "--family",
        choices=FAMILIES,
        metavar="NAME",
        help=f"of a single file: what it is, one of {', '.join(FAMILIES)} (default: what its tensors say)",
    )
    group.add_argument(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        help="what the U-Net predicts (default: what the file or the scheduler's configuration says)",
    )
    group.add_argument(
        "--zero-snr",
        action="store_true",
        help="the model was trained with zero terminal SNR: betas are rescaled, steps begin at the last "
        "timestep (default: as above)",
    )
    group.add_argument(
        "--lora",
        action=AddLora,
        metavar="FILE[=WEIGHT]",
        help="a LoRA (.safetensors) that is merged for good, and how strongly (default: 1); may be given "
        "several times. sd-run --lora merges one without an export",
    )
    group.add_argument(
        "--lora-partial",
        action="store_true",
        help="take of LoRAs what has a place in the model; by default one with anything else is refused",
    )
    group.add_argument("--revision", help="branch, tag or commit on the hub")


def _add_export(group: Any) -> None:
    precision = group.add_mutually_exclusive_group()
    precision.add_argument("--dtype", choices=PRECISIONS, help="of weights and arithmetic (default: fp32)")
    precision.add_argument(
        "--fp16", action="store_const", const="fp16", dest="dtype", help="the same as --dtype fp16"
    )
    group.add_argument(
        "--vae-dtype",
        choices=("fp16", "fp32"),
        help="of the VAE beside --fp16 (default: fp32 where fp16 cannot hold its values or an SDXL "
        "checkpoint says force_upcast, else fp16; given fp16, what would overflow inside stays fp32)",
    )
    group.add_argument(
        "--fp16-weights",
        action="store_true",
        help="with fp32 arithmetic: store weights that fp16 holds exactly as fp16, half the file",
    )
    group.add_argument(
        "--full-parity",
        action="store_true",
        help="compare a large model at its own size too, minutes longer (default: small pictures only)",
    )
    group.add_argument(
        "--default-steps",
        type=int,
        metavar="N",
        help="steps of a picture whose request does not say it (default: 4 of a model that was distilled to "
        "few steps, if its name does not say another number; 20 of others)",
    )
    group.add_argument(
        "--default-guidance",
        type=float,
        metavar="W",
        help="guidance, likewise (default: that of diffusers' pipeline; 1, none, of distilled models)",
    )
    group.add_argument("--opset", type=int, help=f"ONNX opset, 18 to 23 (default: {MAX_OPSET})")
    group.add_argument(
        "--architecture",
        choices=ARCHITECTURES,
        help="in place of MODEL: a published architecture, with --random-weights",
    )
    group.add_argument(
        "--random-weights", action="store_true", help="seeded random weights, to measure speed and memory"
    )
    group.add_argument("--weights-seed", type=int, metavar="N", help="of the random weights (default: 0)")


def _add_engines(group: Any) -> None:
    group.add_argument(
        "--engine",
        action="append",
        choices=FLAVOURS,
        metavar="FLAVOUR",
        help=f"compile engines: {', '.join(FLAVOURS)}; may be given several times",
    )
    group.add_argument(
        "--profile",
        action="append",
        metavar="AXIS=SIZE,…",
        help="one optimization profile of several, such as batch=1,height=512,width=256..512..768; what it "
        "leaves out is as in --batch, --height, --width; rows=N is the U-Net's batch",
    )
    group.add_argument(
        "--compute-capability",
        nargs="+",
        metavar="N.N",
        help="GPUs to build for, such as 8.6 8.9, or current (tensorrt-rtx; default: 8.0 and newer)",
    )
    group.add_argument("--workspace", metavar="SIZE", help="most scratch memory of a layer, such as 4GiB")
    group.add_argument(
        "--optimization-level",
        type=int,
        metavar="0..5",
        help="0 is fast to build, 5 fast to run (default: 3)",
    )
    group.add_argument("--refit", action="store_true", help="engines whose weights can be replaced later")
    group.add_argument(
        "--timing-cache",
        metavar="FILE",
        help="tensorrt: where kernel timings are kept (default: in the user's cache)",
    )
    group.add_argument(
        "--allow-unfused-attention",
        action="store_true",
        help="do not fail where TensorRT runs an attention as separate kernels",
    )
    group.add_argument(
        "--no-engine-parity",
        action="store_true",
        help="do not compare engines with their graphs, where a GPU could: they say so from then on",
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check what can be checked without the model; afterwards ``mode`` says what to do.

    ``mode`` is ``export`` (``model`` or ``architecture``, ``out``) or ``engines`` (``model`` is a bundle).

    Raises:
        UsageError: Options that do not go together, or a value outside its range.
        SystemExit: argparse's own errors, and ``--help``.
    """
    # Intermixed: `MODEL --fp16 OUT` must work although both are optional.
    commands = parser()
    arguments = commands.parse_intermixed_args(commands.own_words(sys.argv[1:] if argv is None else argv))
    _place_names(arguments)
    _check_architecture(arguments)
    arguments.mode = _mode(arguments)
    for name in ("dtype", "vae_dtype", "opset", "fp16_weights", "full_parity", *_DEFAULTS, *_OF_MODEL):
        if arguments.mode == "engines" and _given(arguments, name):
            raise UsageError(
                f"--{name.replace('_', '-')} is for exporting; {arguments.model} is a bundle already: "
                "export its checkpoint again to change that"
            )
    arguments.dtype = arguments.dtype or "fp32"
    arguments.opset = MAX_OPSET if arguments.opset is None else arguments.opset
    arguments.sizes = {
        name: parse_extent(f"--{name}", text)
        for name in SIZES
        if (text := getattr(arguments, name)) is not None
    }
    _check_values(arguments)
    return arguments


def _place_names(arguments: argparse.Namespace) -> None:
    """With --architecture the one name is OUT."""
    if arguments.architecture is not None:
        if arguments.out is not None:
            raise UsageError(
                f"--architecture takes the place of MODEL: give OUT alone, not {arguments.model}"
            )
        arguments.model, arguments.out = None, arguments.model
    elif arguments.model is None:
        raise UsageError("MODEL is missing (see sd-export --help)")
    for name in ("model", "out"):
        text = getattr(arguments, name)
        if text is not None and not text.strip():
            raise UsageError(f"{name.upper()} is empty: give a name")
    if arguments.out is not None:
        arguments.out = Path(arguments.out)


def _check_architecture(arguments: argparse.Namespace) -> None:
    if (arguments.architecture is None) == arguments.random_weights:
        raise UsageError(
            "--architecture and --random-weights go together: published weights come with a MODEL"
        )
    if arguments.weights_seed is not None and not arguments.random_weights:
        raise UsageError("--weights-seed is for --random-weights")
    for name in _OF_MODEL:
        if arguments.architecture is not None and _given(arguments, name):
            raise UsageError(f"--{name.replace('_', '-')} is for a MODEL, not for --architecture")
    if arguments.lora_partial and not arguments.lora:
        raise UsageError("--lora-partial is for --lora FILE")
    for name in (*PARTS, "config"):
        if (place := getattr(arguments, name)) is not None and not place.strip():
            raise UsageError(f"--{name.replace('_', '-')} is empty: give a file or a folder")
    if arguments.config is not None and arguments.family is not None:
        raise UsageError("--config and --family both say what a single file is: give one of them")
    arguments.weights_seed = arguments.weights_seed or 0
    if arguments.weights_seed < 0:
        raise UsageError(f"--weights-seed is {arguments.weights_seed}: 0 or more")


def _mode(arguments: argparse.Namespace) -> str:
    is_bundle = arguments.model is not None and (Path(arguments.model) / MANIFEST_NAME).is_file()
    if is_bundle and arguments.out is not None:
        raise UsageError(
            f"{arguments.model} is a bundle already: `sd-export {arguments.model} --engine FLAVOUR` "
            "adds engines to it in its place, without OUT"
        )
    if is_bundle and not arguments.engine:
        raise UsageError(f"{arguments.model} is a bundle already; say with --engine which engines to add")
    if not is_bundle and arguments.out is None and arguments.engine and arguments.model is not None:
        raise UsageError(
            f"{arguments.model} is no bundle (there is no {MANIFEST_NAME}) and OUT is missing: give a bundle "
            "to add engines to, or a model and the folder of the bundle to make"
        )
    if not is_bundle and arguments.out is None:
        raise UsageError(
            f"OUT is missing: the folder of the bundle to make of {arguments.model or arguments.architecture}"
        )
    return "engines" if is_bundle else "export"


def _check_values(arguments: argparse.Namespace) -> None:
    batch = arguments.sizes.get("batch")
    if batch is not None and batch.maximum > MAX_BATCH:
        raise UsageError(f"--batch is {arguments.batch!r}: at most {MAX_BATCH}")
    chunks = arguments.sizes.get("chunks")
    if chunks is not None and chunks.maximum > MAX_CHUNKS:
        raise UsageError(f"--chunks is {arguments.chunks!r}: at most {MAX_CHUNKS}")
    if not MIN_OPSET <= arguments.opset <= MAX_OPSET:
        raise UsageError(f"--opset is {arguments.opset}: {MIN_OPSET} to {MAX_OPSET}")
    if arguments.fp16_weights and arguments.dtype != "fp32":
        raise UsageError(f"--fp16-weights goes with --dtype fp32, not with {arguments.dtype}")
    if arguments.vae_dtype is not None and arguments.dtype != "fp16":
        raise UsageError(f"--vae-dtype goes with --dtype fp16, not with {arguments.dtype}")
    if arguments.optimization_level is not None and not 0 <= arguments.optimization_level <= MAX_LEVEL:
        raise UsageError(f"--optimization-level is {arguments.optimization_level}: 0 to {MAX_LEVEL}")
    steps, guidance = arguments.default_steps, arguments.default_guidance
    if steps is not None and steps < 1:
        raise UsageError(f"--default-steps is {steps}: 1 or more")
    if guidance is not None and not 0 <= guidance <= MAX_GUIDANCE_SCALE:  # so written that NaN is refused
        raise UsageError(f"--default-guidance is {guidance:g}: 0 to {MAX_GUIDANCE_SCALE:g}")
    arguments.engines = engine_options(arguments)
    if arguments.engines:
        return
    for name in (
        "profile",
        "compute_capability",
        "workspace",
        "optimization_level",
        "refit",
        "timing_cache",
        "allow_unfused_attention",
        "no_engine_parity",
    ):
        if _given(arguments, name):
            raise UsageError(f"--{name.replace('_', '-')} is for engines: give --engine too")
    for name, extent in arguments.sizes.items():
        if extent.optimum is not None:
            raise UsageError(
                f"--{name} is {getattr(arguments, name)!r}: OPT is for engines, give --engine too; "
                "a graph has only MIN..MAX"
            )


def _given(arguments: argparse.Namespace, name: str) -> bool:
    """Whether an option without a default was used; 0 is a value."""
    value = getattr(arguments, name)
    return value is not None and value is not False


def engine_options(arguments: argparse.Namespace) -> list[EngineOptions]:
    """What was asked of the engines of each flavour; none without --engine.

    Raises:
        UsageError: A value is malformed.
    """
    shared: dict[str, Extent] = arguments.sizes
    cache = arguments.timing_cache
    return [
        EngineOptions(
            flavour=flavour,
            profiles=parse_profiles(arguments.profile or (), shared),
            workspace=None
            if arguments.workspace is None
            else parse_bytes("--workspace", arguments.workspace),
            level=3 if arguments.optimization_level is None else arguments.optimization_level,
            targets=parse_targets(arguments.compute_capability or ()),
            refit=arguments.refit,
            timing_cache=Path(cache) if cache else None,
            allow_unfused=arguments.allow_unfused_attention,
            compare=not arguments.no_engine_parity,
        )
        for flavour in dict.fromkeys(arguments.engine or ())
    ]
