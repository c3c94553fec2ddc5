"""The manifest of an export: what it says before the first graph is there, and the sizes of the graphs."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import sdrt
from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.fingerprint import fingerprint
from sdrt.export.checkpoint.scheduler import DISTILLED
from sdrt.export.graphs.half_precision import planned_precision
from sdrt.export.options import AxisRange, ExportOptions
from sdrt.export.parity.components import LARGE_PARAMETERS, ParityReport, is_large, large_side
from sdrt.runtime.bundle.families.components import ENCODER_HIDDEN_STATES
from sdrt.runtime.bundle.manifest import (
    Component,
    Defaults,
    FileEntry,
    LatentGeometry,
    Limits,
    Manifest,
    Preview,
    SizeLimit,
    TokenizerFacts,
)
from sdrt.runtime.bundle.manifest_json import from_json, to_json
from sdrt.runtime.bundle.weight_map import WEIGHTS_NAME
from sdrt.runtime.errors import BundleError, CheckpointError
from sdrt.runtime.system.untrusted import read_limited

DEFAULT_STEPS: Final = 20
DISTILLED_STEPS: Final = 4  # LatentConsistencyModelPipeline's
TOLD_GUIDANCE: Final = 8.5  # LatentConsistencyModelPipeline's, whose U-Net is told it
MAX_CARD_BYTES: Final = 1 << 20
TOOLS: Final = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")


def check_manifest(checkpoint: Checkpoint, options: ExportOptions) -> None:
    """Put the manifest together before the first graph is there: nothing in it may fail after minutes.

    Raises:
        CheckpointError: A rule of the manifest is broken.
    """
    tokenizers = [
        TokenizerFacts(file=_placeholder(name), **tokenizer.ids)
        for name, tokenizer in zip(tokenizer_files(checkpoint), checkpoint.tokenizers, strict=True)
    ]
    try:
        from_json(to_json(draft_manifest(checkpoint, options, tokenizers)))
    except BundleError as error:
        raise CheckpointError(f"{checkpoint.path} cannot be made a bundle: {error}") from error


def draft_manifest(
    checkpoint: Checkpoint, options: ExportOptions, tokenizers: Sequence[TokenizerFacts]
) -> Manifest:
    """The manifest as it will be, with placeholders for the files of the graphs."""
    components = {}
    for name, row in checkpoint.record.components.items():
        precision, file = planned_precision(checkpoint, options, name), f"{name}/model.onnx"
        spec = row.resolve(checkpoint.sizes(), precision)
        components[name] = Component(file, (_placeholder(file),), precision, spec)
    return manifest_of(
        checkpoint,
        options,
        components,
        tokenizers,
        weights=_placeholder(WEIGHTS_NAME),
        preview=Preview(((0.0, 0.0, 0.0),) * checkpoint.sizes()["latent_channels"], (0.0, 0.0, 0.0)),
    )


def _placeholder(path: str) -> FileEntry:
    return FileEntry(path, 0, "0" * 64)


def compared_small(checkpoint: Checkpoint, options: ExportOptions) -> bool:
    """Whether the parity gate draws small pictures only, since the model is large."""
    return is_large(checkpoint) and not options.full_parity


def graph_axes(checkpoint: Checkpoint, options: ExportOptions) -> dict[str, AxisRange]:
    """The range of every dynamic axis of the components table.

    Graphs that are compared small admit smaller pictures than were asked for; the manifest keeps the limits
    that were asked for.
    """
    factor = checkpoint.factor
    height, width = options.height, options.width
    if compared_small(checkpoint, options):
        height, width = (_traced_side(checkpoint, side) for side in (height, width))

    tokens = checkpoint.sizes().get("tokens", 1)

    def latent(side: AxisRange) -> AxisRange:
        multiple = 1 if side.fixed else side.multiple // factor
        return AxisRange(side.minimum // factor, side.maximum // factor, multiple)

    return {
        "batch": options.batch,
        # One row an image without guidance, two or three with it.
        "rows": AxisRange(options.batch.minimum, checkpoint.record.guided_rows * options.batch.maximum),
        "height": height,
        "width": width,
        "context": AxisRange(tokens, tokens * most_chunks(checkpoint, options), tokens),
        "latent_height": latent(height),
        "latent_width": latent(width),
    }


def _traced_side(checkpoint: Checkpoint, side: AxisRange) -> AxisRange:
    """One side of a large model from the compared size on, where all levels can halve what was asked for."""
    multiple, small = checkpoint.size_multiple, large_side(checkpoint)
    if side.minimum % multiple or side.minimum <= small:
        return side
    return AxisRange(small, side.maximum, multiple)


def of_small_pictures(
    checkpoint: Checkpoint, options: ExportOptions, manifest: Manifest
) -> tuple[Manifest, list[str]]:
    """The same manifest with the sizes that the gate draws of a large model, and what is left out by it."""
    axes = graph_axes(checkpoint, options)
    height, width = gate_size(checkpoint, options)
    left_out = []
    defaults, sides = manifest.defaults, [axes[name] for name in ("height", "width")]
    if (height, width) != (defaults.height, defaults.width):
        left_out.append(
            f"pictures of {defaults.height} x {defaults.width} pixels: the U-Net has more than "
            f"{LARGE_PARAMETERS / 1e6:.0f} million parameters, so only {height} x {width} was compared, on "
            "the same graphs (--full-parity compares both)"
        )
    small = replace(
        manifest,
        limits=replace(
            manifest.limits,
            height=SizeLimit(sides[0].minimum, sides[0].maximum, sides[0].multiple),
            width=SizeLimit(sides[1].minimum, sides[1].maximum, sides[1].multiple),
        ),
        defaults=replace(defaults, height=height, width=width),
    )
    return small, left_out


def manifest_of(
    checkpoint: Checkpoint,
    options: ExportOptions,
    components: Mapping[str, Component],
    tokenizers: Sequence[TokenizerFacts],
    *,
    weights: FileEntry,
    preview: Preview,
) -> Manifest:
    """What a checkpoint and the options say, and the given parts; nothing of the export itself."""
    height, width = default_size(checkpoint, options)
    return Manifest(
        family=checkpoint.family,
        components=components,
        latents=LatentGeometry(checkpoint.sizes()["latent_channels"], checkpoint.factor),
        schedule=checkpoint.schedule,
        tokenizers=tuple(tokenizers),
        weights=weights,
        preview=preview,
        force_zeros_for_empty_prompt=checkpoint.force_zeros_for_empty_prompt,
        image_processor=checkpoint.image_processor,
        noising=checkpoint.noising,
        text_output=_text_output(checkpoint),
        defaults=Defaults(
            height,
            width,
            default_steps(checkpoint) if options.steps is None else options.steps,
            default_guidance(checkpoint) if options.guidance is None else options.guidance,
            checkpoint.sampler,
            checkpoint.sampler_options,
        ),
        limits=Limits(
            options.batch.minimum,
            options.batch.maximum,
            SizeLimit(options.height.minimum, options.height.maximum, options.height.multiple),
            SizeLimit(options.width.minimum, options.width.maximum, options.width.multiple),
            max_chunks=most_chunks(checkpoint, options),
            max_clip_skip=checkpoint.max_clip_skip,
        ),
    )


def tokenizer_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The files of the bundle that the checkpoint's tokenizers become."""
    return tuple(f"{name}.json" for name in checkpoint.record.tokenizers)


def _text_output(checkpoint: Checkpoint) -> str:
    record = checkpoint.record
    return record.encoders[0].gives[ENCODER_HIDDEN_STATES] if record.reads_text else ""


def default_steps(checkpoint: Checkpoint) -> int:
    """A few where a name or the sampler says that the model was distilled for that."""
    steps = DISTILLED_STEPS if checkpoint.sampler in DISTILLED else DEFAULT_STEPS
    if checkpoint.few_steps is not None:
        steps = checkpoint.few_steps.steps
    return min(steps, checkpoint.schedule.num_train_timesteps)


def default_guidance(checkpoint: Checkpoint) -> float:
    """That of diffusers' pipeline; none for a distilled U-Net that is not told it, which has it inside."""
    if checkpoint.distilled_guidance:
        return TOLD_GUIDANCE
    if checkpoint.few_steps is not None:
        return checkpoint.few_steps.guidance
    return 1.0 if checkpoint.sampler in DISTILLED else checkpoint.kind.guidance


def most_chunks(checkpoint: Checkpoint, options: ExportOptions) -> int:
    """Chunks of the longest prompt; without text there is one, the picture's embedding."""
    return options.chunks if checkpoint.tokenizers else 1


def default_size(checkpoint: Checkpoint, options: ExportOptions) -> tuple[int, int]:
    """The size the model was trained at, brought inside the exported ranges."""
    native = checkpoint.native_size
    return options.height.nearest(native), options.width.nearest(native)


def gate_size(checkpoint: Checkpoint, options: ExportOptions) -> tuple[int, int]:
    """The size in pixels of the parity gate's sampling run: the default one, of a large model a small one."""
    if not compared_small(checkpoint, options):
        return default_size(checkpoint, options)
    axes, small = graph_axes(checkpoint, options), large_side(checkpoint)
    return axes["height"].nearest(small), axes["width"].nearest(small)


def with_figures(
    manifest: Manifest, report: ParityReport, checkpoint: Checkpoint, seconds: float
) -> Manifest:
    provenance: dict[str, Any] = {
        "source": _source(checkpoint),
        "source_sha256": fingerprint(checkpoint),
        **({"read_as": checkpoint.read_as} if checkpoint.read_as else {}),
        **({"loras": list(checkpoint.loras)} if checkpoint.loras else {}),
        "licence": _licence(checkpoint),
        "sdrt": sdrt.__version__,
        "python": platform.python_version(),
        "versions": {tool: version(tool) for tool in TOOLS},
        "export_seconds": round(seconds, 1),
    }
    return replace(manifest, provenance=provenance, parity=report.to_dict())


def _source(checkpoint: Checkpoint) -> str:
    """The folder's own name, not where it lay; or the hub id."""
    given = Path(checkpoint.source)
    return given.resolve().name if given.exists() else checkpoint.source


def _licence(checkpoint: Checkpoint) -> str:
    """The licence that the model card's front matter names, or ``unknown``."""
    try:
        card = read_limited(checkpoint.path / "README.md", MAX_CARD_BYTES).decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return "unknown"
    for line in card.splitlines()[:40]:
        key, _, value = line.partition(":")
        if key.strip().lower() in ("license", "licence") and value.strip():
            return value.strip()
    return "unknown"
