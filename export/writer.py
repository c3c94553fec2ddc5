"""Checkpoint → bundle: every step of an export in order, inside a folder that appears when complete."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.weights import HalfOverflowError, check_architectures, release_weights
from sdrt.export.graphs.from_module import TORCH_DTYPES, onnx_from_module, save_graph
from sdrt.export.graphs.half_precision import (
    islands,
    may_be_fp32,
    planned_precision,
    refusal,
    why_planned,
)
from sdrt.export.graphs.networks import example_inputs, wrapped
from sdrt.export.graphs.preview import fit_preview
from sdrt.export.graphs.range_audit import audit_ranges
from sdrt.export.graphs.weight_map import holders_of, weight_map
from sdrt.export.manifest import (
    check_manifest,
    compared_small,
    draft_manifest,
    gate_size,
    graph_axes,
    manifest_of,
    of_small_pictures,
    tokenizer_files,
    with_figures,
)
from sdrt.export.options import AxisRange, ExportOptions
from sdrt.export.parity.components import (
    ParityReport,
    arithmetic,
    check_component,
    feeds,
    probe_inputs,
    reference_probes,
)
from sdrt.export.parity.frugal_executor import give_memory_back
from sdrt.export.parity.pipeline import check_reading, compared_side
from sdrt.export.parity.reference import gate_sampler
from sdrt.export.parity.sampling import (
    SAMPLING_STEPS,
    SamplingProbe,
    check_sampling,
    initial_latents,
    reference_embeddings,
    sampling_probe,
    unet_inputs,
)
from sdrt.export.passes.fp32_islands import insert_islands
from sdrt.export.passes.weight_storage import store_weights_in_fp16
from sdrt.export.passes.widen import widen_bfloat16
from sdrt.runtime.admission.records import accept
from sdrt.runtime.bundle.bundle import sha256
from sdrt.runtime.bundle.families.components import SAMPLE, TIMESTEP
from sdrt.runtime.bundle.families.record import ComponentSpec, Precision
from sdrt.runtime.bundle.manifest import (
    MANIFEST_NAME,
    Component,
    FileEntry,
    Manifest,
    TokenizerFacts,
)
from sdrt.runtime.bundle.manifest_json import to_json
from sdrt.runtime.bundle.weight_map import WEIGHTS_NAME, Holder
from sdrt.runtime.samplers.registry import make_table
from sdrt.runtime.system.files import new_folder, writing

SEED: Final = 20240229  # of the random inputs that components are compared on

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
        NumericsError: fp16 cannot hold a component, or the checkpoint gives NaN itself.
        OutputError: ``out`` exists or cannot be written.
    """
    started = time.perf_counter()
    report = ParityReport()
    check_manifest(checkpoint, options)
    check_architectures(checkpoint)
    with new_folder(out, replace=overwrite) as folder, _runnable(folder, options) as runnable:
        job = _Job(checkpoint, options, out, folder, runnable, report, progress)
        job.tokenizers.extend(_write_tokenizers(job))
        components = {name: _write_component(job, name) for name in checkpoint.record.components}
        weights, preview = _write_weight_map(job), fit_preview(checkpoint)
        manifest = replace(
            manifest_of(checkpoint, options, components, job.tokenizers, weights=weights, preview=preview),
            ranges=job.ranges,
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

    ``ranges`` collects the range audit of each component of an fp16 bundle, and why one is fp32 all the same;
    ``sampling`` the reference's sampling run, ``run_inputs`` what components are given in it, beside random
    inputs for the range audit; ``tokenizers`` what was written of them; ``holders`` which initializer holds
    which tensor of each component's network.
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
    tokenizers: list[TokenizerFacts] = field(default_factory=list)
    run_inputs: dict[str, list[Sequence[NDArray[Any]]]] = field(default_factory=dict)
    holders: dict[str, dict[str, Holder]] = field(default_factory=dict)

    def keep_in_fp32(self, component: str, why: str) -> None:
        """Say and record that a component of an fp16 bundle is fp32 as a whole."""
        self.progress(f"{component}: fp32 in place of fp16, since {why}")
        self.ranges[component] = {**self.ranges.get(component, {}), "islands": [], "fp32": why}


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


@dataclass(frozen=True, slots=True)
class _Traced:
    """A component that is saved and not compared yet: its network, and the graph that can run here."""

    module: torch.nn.Module
    component: Component
    runs: Path


def _write_component(job: _Job, name: str) -> Component:
    """Export one component, save it, and compare the saved file with the float32 reference.

    PyTorch's network and ONNX Runtime's are never in memory together, but for the range audit of an fp16
    graph, whose weights stay in the file.
    """
    checkpoint, options = job.checkpoint, job.options
    # Before the largest network is there, so that the text encoders are not in memory beside it.
    embeddings = reference_embeddings(checkpoint) if name == "unet" else {}
    if name == "unet" and options.precision == "fp16":
        job.run_inputs[name] = [_first_step(job, embeddings)]
    part = _fitting(job, name)
    module, precision = part.module, part.component.precision
    job.progress(f"{name}: compare")
    if precision != "fp32" and checkpoint.random_seed is None:
        # The reference has the checkpoint's own weights, not rounded ones.
        release_weights(module)
        give_memory_back()
        module = wrapped(checkpoint, name)
    module.float()  # random weights are fp16 numbers: nothing was rounded
    give_memory_back()
    small = compared_small(checkpoint, options)
    probes = reference_probes(checkpoint, name, module, graph_axes(checkpoint, options), small=small)
    if name == "unet":
        job.sampling.append(_sample(job, module, embeddings))
        job.run_inputs["vae_decoder"] = [[_rows(job, "batch", job.sampling[0].expected)]]
        job.progress(f"{name}: compare with diffusers' own pipeline")
        drafted = draft_manifest(checkpoint, reading_options(checkpoint, options), job.tokenizers)
        check_reading(checkpoint, job.folder, drafted, module, job.report)
    release_weights(module)
    give_memory_back()
    check_component(checkpoint, name, probes, part.runs, precision, job.report)
    give_memory_back()
    return part.component


def _fitting(job: _Job, name: str) -> _Traced:
    """A component in the precision that was asked for, or in fp32 where it does not fit into fp16.

    Raises:
        NumericsError: It does not fit, and must not be fp32.
    """
    checkpoint, options = job.checkpoint, job.options
    if why := why_planned(checkpoint, options, name):
        job.keep_in_fp32(name, why)
    try:
        return _traced(job, name, planned_precision(checkpoint, options, name))
    except HalfOverflowError as error:
        if not may_be_fp32(options, name):
            raise refusal(name, error) from error
        job.keep_in_fp32(name, str(error))
    shutil.rmtree(job.folder / name, ignore_errors=True)
    return _traced(job, name, "fp32")


def _traced(job: _Job, name: str, precision: Precision) -> _Traced:
    """One component as a saved graph; in fp16 with islands of fp32 where it would overflow.

    Raises:
        HalfOverflowError: Islands are not the remedy.
    """
    checkpoint, options = job.checkpoint, job.options
    spec = checkpoint.record.components[name].resolve(checkpoint.sizes(), precision)
    axes = graph_axes(checkpoint, options)
    job.progress(f"{name}: load")
    give_memory_back()
    module = wrapped(checkpoint, name, TORCH_DTYPES[precision])
    job.progress(f"{name}: export")
    model = onnx_from_module(module, _traced_inputs(job, spec, axes, precision), spec, axes, options.opset)
    if options.fp16_weights:
        store_weights_in_fp16(model)
    files = _save(job, model, job.folder / name)
    if precision == "fp16" and (kept := _islands(job, files[0], spec)):
        insert_islands(model, kept)
        files = _save(job, model, job.folder / name)
    job.holders[name] = holders_of(model, module, name)
    runs = files[0]
    if job.runnable != job.folder:
        widen_bfloat16(model)
        runs = _save(job, model, job.runnable / name)[0]
    entries = tuple(_entry(job.folder, file) for file in files)
    return _Traced(module, Component(f"{name}/model.onnx", entries, precision, spec), runs)


def _islands(job: _Job, model: Path, spec: ComponentSpec) -> tuple[str, ...]:
    """Measure an fp16 graph, record it, and say what of it must be fp32.

    Raises:
        HalfOverflowError: Islands are not the remedy.
    """
    checkpoint, options, name = job.checkpoint, job.options, spec.name
    job.progress(f"{name}: measure")
    small = compared_small(checkpoint, options)
    probes = probe_inputs(checkpoint, name, graph_axes(checkpoint, options), small=small)
    inputs = [[tensor.numpy() for tensor in given] for _, given in probes]
    audit = audit_ranges(model, [feeds(spec, given) for given in (*inputs, *job.run_inputs.get(name, ()))])
    job.ranges[name] = audit.to_dict()
    for line in audit.lines(count=1):
        job.progress(f"{name}: {line.strip()}")
    kept = islands(audit, spec, whole=may_be_fp32(options, name))
    if kept:
        first = next(entry for entry in audit.ranges if entry.tensor == kept[0])
        job.progress(f"{name}: {len(kept)} tensors kept in fp32, from {first.where} on")
    return kept


def reading_options(checkpoint: Checkpoint, options: ExportOptions) -> ExportOptions:
    """Of the float32 bundle of one small picture that `check_reading` draws with."""
    side, one = compared_side(checkpoint), AxisRange(1, 1)
    pixels = AxisRange(side, side)
    return replace(options, precision="fp32", batch=one, height=pixels, width=pixels, chunks=1)


def _sample(job: _Job, unet: torch.nn.Module, embeddings: Mapping[str, torch.Tensor]) -> SamplingProbe:
    """The reference's sampling run, made while its U-Net is in memory."""
    size = gate_size(job.checkpoint, job.options)
    return sampling_probe(job.checkpoint, size, embeddings, unet)


def _first_step(job: _Job, embeddings: Mapping[str, torch.Tensor]) -> list[NDArray[Any]]:
    """What the U-Net is given in the sampling run, at a timestep in the middle; in the order of the table."""
    checkpoint, size = job.checkpoint, gate_size(job.checkpoint, job.options)
    timesteps = make_table(gate_sampler(checkpoint), checkpoint.schedule, SAMPLING_STEPS).timesteps
    inputs = {
        SAMPLE: initial_latents(checkpoint, size),
        **unet_inputs(checkpoint, size, embeddings),
    }
    given = {name: _rows(job, "rows", rows) for name, rows in inputs.items()}
    middle = timesteps[len(timesteps) // 2 :][:1].astype(np.float32)
    given[TIMESTEP] = np.repeat(middle, len(given[SAMPLE]))
    spec = checkpoint.record.components["unet"].resolve(checkpoint.sizes(), "fp32")
    return [given[entry.name] for entry in spec.inputs]


def _rows(job: _Job, axis: str, rows: NDArray[Any]) -> NDArray[Any]:
    """As many rows as guidance has of the U-Net, or as the graph takes at least; the first ones again."""
    extent = graph_axes(job.checkpoint, job.options)[axis]
    count = job.checkpoint.record.guided_rows if axis == "rows" else 1
    return np.resize(rows, (extent.nearest(count), *rows.shape[1:]))


def _save(job: _Job, model: ir.Model, folder: Path) -> tuple[Path, ...]:
    with writing(job.out):
        shutil.rmtree(folder, ignore_errors=True)  # what was measured without its islands
        folder.mkdir()
        return save_graph(model, folder / "model.onnx")


def _write_runnable(job: _Job, manifest: Manifest) -> None:
    """Give the folder of the parity gate a manifest, so that the runtime can open it and draw in time."""
    checkpoint, components = job.checkpoint, manifest.components
    if compared_small(checkpoint, job.options):
        manifest, left_out = of_small_pictures(checkpoint, job.options, manifest)
        job.report.left_out += left_out
    if job.runnable != job.folder:
        table = checkpoint.record.components
        components = {
            name: replace(
                part,
                precision=arithmetic(part.precision),
                spec=table[name].resolve(checkpoint.sizes(), arithmetic(part.precision)),
                files=tuple(_entry(job.runnable, file) for file in sorted((job.runnable / name).iterdir())),
            )
            for name, part in components.items()
        }
    with writing(job.out):
        if job.runnable != job.folder:
            for entry in (*(facts.file for facts in manifest.tokenizers), manifest.weights):
                shutil.copy(job.folder / entry.path, job.runnable)
        text = to_json(replace(manifest, components=components))
        (job.runnable / MANIFEST_NAME).write_text(text, encoding="utf-8")
    for part in components.values():
        accept(part.files)


def _traced_inputs(
    job: _Job, spec: ComponentSpec, axes: Mapping[str, AxisRange], precision: Precision
) -> tuple[torch.Tensor, ...]:
    """Example inputs in the graph's dtypes; sizes of 2 and more, since the tracer takes 1 for a constant."""
    sizes = {axis: extent.minimum if extent.fixed else _middle(extent) for axis, extent in axes.items()}
    generator = torch.Generator().manual_seed(SEED)
    example = example_inputs(job.checkpoint, spec.name, sizes, generator)
    dtype = TORCH_DTYPES[precision]
    return tuple(
        tensor if entry.dtype in ("int64", "float32") else tensor.to(dtype)
        for tensor, entry in zip(example, spec.inputs, strict=True)
    )


def _middle(extent: AxisRange) -> int:
    """A size inside the range that the tracer does not take for a constant."""
    return min(max(extent.minimum, 2 * extent.multiple), extent.maximum)


def _write_tokenizers(job: _Job) -> list[TokenizerFacts]:
    facts = []
    for name, tokenizer in zip(tokenizer_files(job.checkpoint), job.checkpoint.tokenizers, strict=True):
        target = job.folder / name
        with writing(job.out):
            target.write_bytes(tokenizer.to_json())
        facts.append(TokenizerFacts(file=_entry(job.folder, target), **tokenizer.ids))
    return facts


def _write_weight_map(job: _Job) -> FileEntry:
    target = job.folder / WEIGHTS_NAME
    with writing(job.out):
        target.write_text(weight_map(job.checkpoint, job.holders).to_json(), encoding="utf-8")
    return _entry(job.folder, target)


def _entry(folder: Path, file: Path) -> FileEntry:
    return FileEntry(file.relative_to(folder).as_posix(), file.stat().st_size, sha256(file))
