"""Checkpoint → bundle: every step of an export in order, inside a folder that appears when complete."""

from __future__ import annotations

import contextlib
import copy
import gc
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import torch

import sdrt
from sdrt.export.checkpoint import Checkpoint, fingerprint
from sdrt.export.graph import TORCH_DTYPES, AxisRange, onnx_from_module, save_graph
from sdrt.export.modules import WRAPPERS, example_inputs
from sdrt.export.parity import ParityReport, check_component, check_sampling
from sdrt.export.pass_weight_storage import store_weights_in_fp16
from sdrt.export.pass_widen import widen_bfloat16
from sdrt.export.weights import check_architectures, load_module
from sdrt.runtime.bundle import sha256
from sdrt.runtime.components import COMPONENTS, ComponentSpec, Precision
from sdrt.runtime.errors import BundleError, CheckpointError
from sdrt.runtime.files import new_folder, writing
from sdrt.runtime.manifest import (
    MANIFEST_NAME,
    Component,
    Defaults,
    FileEntry,
    LatentGeometry,
    Limits,
    Manifest,
    SizeLimit,
    TokenizerFacts,
    from_json,
    to_json,
)

SEED: Final = 20240229  # of the random inputs that components are compared on
DEFAULT_STEPS: Final = 20
TOOLS: Final = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What the user asked of an export.

    Attributes:
        precision: Of weights and arithmetic in the graphs.
        fp16_weights: Store fp32 weights as fp16 where that loses nothing (precision fp32 only).
        batch: Images per call.
        height: Pixels.
        width: Pixels.
        opset: ONNX opset.
    """

    precision: Precision
    fp16_weights: bool
    batch: AxisRange
    height: AxisRange
    width: AxisRange
    opset: int


Progress = Callable[[str], None]


def write_bundle(
    checkpoint: Checkpoint,
    out: Path,
    options: ExportOptions,
    *,
    overwrite: bool = False,
    progress: Progress = lambda _: None,
) -> ParityReport:
    """Export a checkpoint, compare every part with PyTorch, and put the bundle at ``out``.

    Args:
        checkpoint: A checked checkpoint.
        out: The folder to make.
        options: Precision, ranges, opset.
        overwrite: Replace an older folder at ``out``.
        progress: Told the name of each stage as it starts.

    Raises:
        CheckpointError: The weights do not load, or no bundle can hold this checkpoint.
        ParityError: A component or the sampling run is over its tolerance; nothing is left behind.
        OutputError: ``out`` exists or cannot be written.
    """
    started = time.perf_counter()
    report = ParityReport()
    check_manifest(checkpoint, options)
    check_architectures(checkpoint)
    with new_folder(out, replace=overwrite) as folder, _runnable(folder, options) as runnable:
        job = _Job(checkpoint, options, out, folder, runnable, report, progress)
        tokenizer = _write_tokenizer(job)
        components = {name: _write_component(job, name) for name in COMPONENTS}
        manifest = _manifest(checkpoint, options, components, tokenizer)
        progress("sampling run")
        _write_runnable(job, manifest)
        check_sampling(checkpoint, runnable, options.precision, report)
        report.raise_if_over()
        final = _with_figures(manifest, report, checkpoint, time.perf_counter() - started)
        with writing(out):
            (folder / MANIFEST_NAME).write_text(to_json(final), encoding="utf-8")
    return report


@dataclass(frozen=True, slots=True)
class _Job:
    """One export while it runs. ``runnable`` is where the parity gate finds graphs that can run here."""

    checkpoint: Checkpoint
    options: ExportOptions
    out: Path
    folder: Path
    runnable: Path
    report: ParityReport
    progress: Progress


def check_manifest(checkpoint: Checkpoint, options: ExportOptions) -> None:
    """Put the manifest together before the first graph is there: nothing in it may fail after minutes.

    Raises:
        CheckpointError: A rule of the manifest is broken.
    """
    sizes, precision = checkpoint.sizes(), options.precision
    components = {
        name: Component(f"{name}/model.onnx", (_placeholder(f"{name}/model.onnx"),), precision, spec)
        for name, spec in ((name, row.resolve(sizes, precision)) for name, row in COMPONENTS.items())
    }
    tokenizer = TokenizerFacts(file=_placeholder("tokenizer.json"), **checkpoint.tokenizer.ids)
    try:
        from_json(to_json(_manifest(checkpoint, options, components, tokenizer)))
    except BundleError as error:
        raise CheckpointError(f"{checkpoint.path} cannot be made a bundle: {error}") from error


def _placeholder(path: str) -> FileEntry:
    return FileEntry(path, 0, "0" * 64)


@contextlib.contextmanager
def _runnable(folder: Path, options: ExportOptions) -> Iterator[Path]:
    """The folder that the parity gate reads: the bundle itself, or a place in it for widened copies.

    The copies take gigabytes. Inside the unfinished bundle they are on a disk that has room, and what a
    SIGKILL leaves of them is deleted by the next export.
    """
    if options.precision != "bf16":
        yield folder
        return
    place = folder / "widened"
    place.mkdir()
    yield place
    shutil.rmtree(place)


def _write_component(job: _Job, name: str) -> Component:
    """Export one component, save it, and compare the saved file with the float32 reference."""
    checkpoint, options = job.checkpoint, job.options
    subfolder, wrapper = WRAPPERS[name]
    spec = COMPONENTS[name].resolve(checkpoint.sizes(), options.precision)
    axes = graph_axes(checkpoint, options)
    job.progress(f"{name}: load")
    reference = wrapper(load_module(checkpoint, subfolder)).eval()
    job.progress(f"{name}: export")
    dtype = TORCH_DTYPES[options.precision]
    # A copy: the reference of the comparison keeps the checkpoint's own weights, not rounded ones.
    traced = reference if dtype is torch.float32 else copy.deepcopy(reference).to(dtype)
    model = onnx_from_module(traced, _traced_inputs(job, spec, axes), spec, axes, options.opset)
    del traced
    if options.fp16_weights:
        store_weights_in_fp16(model)
    files = _save(job, model, job.folder / name)
    runs = files[0]
    if job.runnable != job.folder:
        widen_bfloat16(model)
        runs = _save(job, model, job.runnable / name)[0]
    del model
    gc.collect()
    job.progress(f"{name}: compare")
    check_component(checkpoint, name, reference, runs, options.precision, axes, job.report)
    return Component(
        model=f"{name}/model.onnx",
        files=tuple(_entry(job.folder, file) for file in files),
        precision=options.precision,
        spec=spec,
    )


def _save(job: _Job, model: ir.Model, folder: Path) -> tuple[Path, ...]:
    with writing(job.out):
        folder.mkdir()
        return save_graph(model, folder / "model.onnx")


def _write_runnable(job: _Job, manifest: Manifest) -> None:
    """Give the folder of the parity gate a manifest, so that the runtime can open it."""
    if job.runnable == job.folder:
        with writing(job.out):
            (job.folder / MANIFEST_NAME).write_text(to_json(manifest), encoding="utf-8")
        return
    widened = {
        name: replace(
            part,
            precision="fp32",
            spec=COMPONENTS[name].resolve(job.checkpoint.sizes(), "fp32"),
            files=tuple(_entry(job.runnable, file) for file in sorted((job.runnable / name).iterdir())),
        )
        for name, part in manifest.components.items()
    }
    text = to_json(replace(manifest, components=widened))
    with writing(job.out):
        shutil.copy(job.folder / manifest.tokenizer.file.path, job.runnable)
        (job.runnable / MANIFEST_NAME).write_text(text, encoding="utf-8")


def _traced_inputs(job: _Job, spec: ComponentSpec, axes: Mapping[str, AxisRange]) -> tuple[torch.Tensor, ...]:
    """Example inputs in the graph's dtypes; sizes of 2 and more, since the tracer takes 1 for a constant."""
    sizes = {axis: extent.minimum if extent.fixed else _middle(extent) for axis, extent in axes.items()}
    generator = torch.Generator().manual_seed(SEED)
    example = example_inputs(job.checkpoint, spec.name, sizes, generator)
    dtype = TORCH_DTYPES[job.options.precision]
    return tuple(
        tensor if entry.dtype in ("int64", "float32") else tensor.to(dtype)
        for tensor, entry in zip(example, spec.inputs, strict=True)
    )


def _middle(extent: AxisRange) -> int:
    """A size inside the range that the tracer does not take for a constant."""
    return min(max(extent.minimum, 2 * extent.multiple), extent.maximum)


def graph_axes(checkpoint: Checkpoint, options: ExportOptions) -> dict[str, AxisRange]:
    """The range of every dynamic axis of the components table."""
    factor = checkpoint.factor

    def latent(side: AxisRange) -> AxisRange:
        multiple = 1 if side.fixed else side.multiple // factor
        return AxisRange(side.minimum // factor, side.maximum // factor, multiple)

    return {
        "batch": options.batch,
        # One row an image without guidance, two with it.
        "rows": AxisRange(options.batch.minimum, 2 * options.batch.maximum),
        "height": options.height,
        "width": options.width,
        "latent_height": latent(options.height),
        "latent_width": latent(options.width),
    }


def _write_tokenizer(job: _Job) -> TokenizerFacts:
    tokenizer, target = job.checkpoint.tokenizer, job.folder / "tokenizer.json"
    with writing(job.out):
        target.write_bytes(tokenizer.to_json())
    return TokenizerFacts(file=_entry(job.folder, target), **tokenizer.ids)


def _entry(folder: Path, file: Path) -> FileEntry:
    return FileEntry(file.relative_to(folder).as_posix(), file.stat().st_size, sha256(file))


def _manifest(
    checkpoint: Checkpoint,
    options: ExportOptions,
    components: Mapping[str, Component],
    tokenizer: TokenizerFacts,
) -> Manifest:
    height, width = default_size(checkpoint, options)
    steps = min(DEFAULT_STEPS, checkpoint.schedule.num_train_timesteps)
    return Manifest(
        family="sd",
        components=components,
        latents=LatentGeometry(checkpoint.sizes()["latent_channels"], checkpoint.factor),
        schedule=checkpoint.schedule,
        tokenizer=tokenizer,
        text_output="last_hidden_state",
        defaults=Defaults(height, width, steps, 7.5, checkpoint.sampler),
        limits=Limits(
            options.batch.minimum,
            options.batch.maximum,
            SizeLimit(options.height.minimum, options.height.maximum, options.height.multiple),
            SizeLimit(options.width.minimum, options.width.maximum, options.width.multiple),
        ),
    )


def default_size(checkpoint: Checkpoint, options: ExportOptions) -> tuple[int, int]:
    """The size the model was trained at, brought inside the exported ranges."""
    native = checkpoint.native_size
    return options.height.nearest(native), options.width.nearest(native)


def _with_figures(
    manifest: Manifest, report: ParityReport, checkpoint: Checkpoint, seconds: float
) -> Manifest:
    provenance: dict[str, Any] = {
        "source": _source(checkpoint),
        "source_sha256": fingerprint(checkpoint),
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
    card = checkpoint.path / "README.md"
    if not card.is_file():
        return "unknown"
    for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:40]:
        key, _, value = line.partition(":")
        if key.strip().lower() in ("license", "licence") and value.strip():
            return value.strip()
    return "unknown"
