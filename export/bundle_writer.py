"""Checkpoint → bundle: every step of an export in order, inside a folder that appears when complete."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import torch

from sdrt.export.bundle_manifest import (
    TOKENIZER_FILES,
    check_manifest,
    compared_small,
    gate_size,
    graph_axes,
    manifest_of,
    of_small_pictures,
    with_figures,
)
from sdrt.export.checkpoint import Checkpoint
from sdrt.export.frugal_executor import give_memory_back
from sdrt.export.graph import TORCH_DTYPES, AxisRange, onnx_from_module, save_graph
from sdrt.export.modules import example_inputs, wrapped
from sdrt.export.parity import (
    ParityReport,
    Probe,
    arithmetic,
    check_component,
    feeds,
    is_large,
    reference_probes,
)
from sdrt.export.parity_sampling import SamplingProbe, check_sampling, reference_embeddings, sampling_probe
from sdrt.export.pass_weight_storage import store_weights_in_fp16
from sdrt.export.pass_widen import widen_bfloat16
from sdrt.export.preview import fit_preview
from sdrt.export.range_audit import audit_ranges
from sdrt.export.weights import check_architectures, release_weights
from sdrt.runtime.admission import accept
from sdrt.runtime.bundle import sha256
from sdrt.runtime.components import ComponentSpec, Precision, components_of
from sdrt.runtime.files import new_folder, writing
from sdrt.runtime.manifest import (
    MANIFEST_NAME,
    Component,
    FileEntry,
    Manifest,
    TokenizerFacts,
)
from sdrt.runtime.manifest_json import to_json

SEED: Final = 20240229  # of the random inputs that components are compared on


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What the user asked of an export.

    Attributes:
        precision: Of weights and arithmetic in the graphs.
        fp16_weights: Store fp32 weights as fp16 where that loses nothing (precision fp32 only).
        batch: Images per call.
        height: Pixels.
        width: Pixels.
        chunks: The most chunks of a long prompt.
        opset: ONNX opset.
        full_parity: Compare a large model at its own size too: minutes longer.
    """

    precision: Precision
    fp16_weights: bool
    batch: AxisRange
    height: AxisRange
    width: AxisRange
    chunks: int
    opset: int
    full_parity: bool = False


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
        tokenizers = _write_tokenizers(job)
        components = {name: _write_component(job, name) for name in components_of(checkpoint.family)}
        manifest = replace(
            manifest_of(checkpoint, options, components, tokenizers),
            ranges=job.ranges,
            preview=fit_preview(checkpoint),
        )
        progress("sampling run")
        _write_runnable(job, manifest)
        check_sampling(checkpoint, runnable, job.sampling[0], options.precision, report)
        report.raise_if_over()
        for comparison in report.left_out:
            progress(f"not compared: {comparison}")
        final = with_figures(manifest, report, checkpoint, time.perf_counter() - started)
        with writing(out):
            (folder / MANIFEST_NAME).write_text(to_json(final), encoding="utf-8")
    for part in final.components.values():
        accept(part.files)
    for facts in final.tokenizers:
        accept([facts.file])
    return report


@dataclass(frozen=True, slots=True)
class _Job:
    """One export while it runs. ``runnable`` is where the parity gate finds graphs that can run here.

    ``ranges`` collects the range audit of each component of an fp16 bundle, ``sampling`` the reference's
    sampling run.
    """

    checkpoint: Checkpoint
    options: ExportOptions
    out: Path
    folder: Path
    runnable: Path
    report: ParityReport
    progress: Progress
    ranges: dict[str, Any] = field(default_factory=dict)
    sampling: list[SamplingProbe] = field(default_factory=list)


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
    """Export one component, save it, and compare the saved file with the float32 reference.

    PyTorch's network and ONNX Runtime's are never in memory together.
    """
    checkpoint, options = job.checkpoint, job.options
    spec = components_of(checkpoint.family)[name].resolve(checkpoint.sizes(), options.precision)
    axes = graph_axes(checkpoint, options)
    dtype = TORCH_DTYPES[options.precision]
    job.progress(f"{name}: load")
    # Before the largest network is there, so that the text encoders are not in memory beside it.
    embeddings = reference_embeddings(checkpoint) if name == "unet" else {}
    give_memory_back()
    module = wrapped(checkpoint, name, dtype)
    job.progress(f"{name}: export")
    model = onnx_from_module(module, _traced_inputs(job, spec, axes), spec, axes, options.opset)
    if options.fp16_weights:
        store_weights_in_fp16(model)
    files = _save(job, model, job.folder / name)
    runs = files[0]
    if job.runnable != job.folder:
        widen_bfloat16(model)
        runs = _save(job, model, job.runnable / name)[0]
    del model
    job.progress(f"{name}: compare")
    if dtype is not torch.float32 and checkpoint.random_seed is None:
        # The reference has the checkpoint's own weights, not rounded ones.
        release_weights(module)
        give_memory_back()
        module = wrapped(checkpoint, name)
    module.float()  # random weights are fp16 numbers: nothing was rounded
    give_memory_back()
    small = compared_small(checkpoint, options)
    probes = reference_probes(checkpoint, name, module, axes, small=small)
    if name == "unet":
        job.sampling.append(_sample(job, module, embeddings))
    release_weights(module)
    give_memory_back()
    check_component(checkpoint, name, probes, runs, options.precision, job.report)
    give_memory_back()
    if options.precision == "fp16":
        _audit(job, runs, spec, probes[-1:] if is_large(checkpoint) else probes)
    return Component(
        model=f"{name}/model.onnx",
        files=tuple(_entry(job.folder, file) for file in files),
        precision=options.precision,
        spec=spec,
    )


def _sample(job: _Job, unet: torch.nn.Module, embeddings: Mapping[str, torch.Tensor]) -> SamplingProbe:
    """The reference's sampling run, made while its U-Net is in memory."""
    size = gate_size(job.checkpoint, job.options)
    return sampling_probe(job.checkpoint, size, embeddings, unet)


def _audit(job: _Job, model: Path, spec: ComponentSpec, probes: Sequence[Probe]) -> None:
    """Record the largest magnitudes inside of an fp16 graph."""
    audit = audit_ranges(model, [feeds(spec, probe) for probe in probes])
    job.ranges[spec.name] = audit.to_dict()
    for line in audit.lines(count=1):
        job.progress(f"{spec.name}: {line.strip()}")


def _save(job: _Job, model: ir.Model, folder: Path) -> tuple[Path, ...]:
    with writing(job.out):
        folder.mkdir()
        return save_graph(model, folder / "model.onnx")


def _write_runnable(job: _Job, manifest: Manifest) -> None:
    """Give the folder of the parity gate a manifest, so that the runtime can open it and draw in time."""
    checkpoint, components = job.checkpoint, manifest.components
    if compared_small(checkpoint, job.options):
        manifest, left_out = of_small_pictures(checkpoint, job.options, manifest)
        job.report.left_out += left_out
    if job.runnable != job.folder:
        runs_in = arithmetic(job.options.precision)
        table = components_of(checkpoint.family)
        components = {
            name: replace(
                part,
                precision=runs_in,
                spec=table[name].resolve(checkpoint.sizes(), runs_in),
                files=tuple(_entry(job.runnable, file) for file in sorted((job.runnable / name).iterdir())),
            )
            for name, part in components.items()
        }
    with writing(job.out):
        if job.runnable != job.folder:
            for facts in manifest.tokenizers:
                shutil.copy(job.folder / facts.file.path, job.runnable)
        text = to_json(replace(manifest, components=components))
        (job.runnable / MANIFEST_NAME).write_text(text, encoding="utf-8")
    for part in components.values():
        accept(part.files)


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


def _write_tokenizers(job: _Job) -> list[TokenizerFacts]:
    facts = []
    for name, tokenizer in zip(TOKENIZER_FILES, job.checkpoint.tokenizers, strict=False):
        target = job.folder / name
        with writing(job.out):
            target.write_bytes(tokenizer.to_json())
        facts.append(TokenizerFacts(file=_entry(job.folder, target), **tokenizer.ids))
    return facts


def _entry(folder: Path, file: Path) -> FileEntry:
    return FileEntry(file.relative_to(folder).as_posix(), file.stat().st_size, sha256(file))
