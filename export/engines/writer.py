"""Bundle → engines: every component of a bundle compiled for one flavour; the folders appear together."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import sdrt
from sdrt.export.engines.compare import NOT_ASKED_FOR, compare_engine
from sdrt.export.engines.flavours import flavour_version, resolve_targets
from sdrt.export.engines.options import (
    CURRENT,
    EngineOptions,
    Extent,
    component_profile,
    input_shapes,
    sizes_of_profile,
)
from sdrt.export.engines.process import BuildResult, OnPhase, run_build
from sdrt.kernels.cache import usable_folder
from sdrt.runtime.admission.first_load import check_component
from sdrt.runtime.admission.records import EXPORTED, accepted
from sdrt.runtime.backends.onnxruntime_cuda.library import NAME as ORT_CUDA
from sdrt.runtime.backends.trt.library import TENSORRT
from sdrt.runtime.bundle.bundle import Bundle, sha256
from sdrt.runtime.bundle.engines import (
    ENGINE_NAME,
    ENGINES_FOLDER,
    EngineKey,
    EngineManifest,
    component_sha256,
    engine_from_json,
    engine_to_json,
)
from sdrt.runtime.bundle.limits import MAX_ENGINE_JSON_BYTES
from sdrt.runtime.bundle.manifest import FileEntry
from sdrt.runtime.errors import BundleError
from sdrt.runtime.system.files import new_folder, writing
from sdrt.runtime.system.interrupts import finishing, undone
from sdrt.runtime.system.untrusted import read_limited

LAYERS_NAME: Final = "layers.json"
PLAN_NAMES: Final = {ORT_CUDA: "model.onnx"}
PLAN_NAME: Final = "model.plan"
_WORK: Final = "work"  # inside an engine's unfinished folder


@dataclass(frozen=True, slots=True)
class EngineReport:
    """One engine after a run of `add_engines`.

    Attributes:
        component: Its name.
        folder: Where the engine is.
        manifest: Its ``engine.json``.
        new: Whether this run built it; an engine of the same key was there already otherwise.
    """

    component: str
    folder: Path
    manifest: EngineManifest
    new: bool


@dataclass(frozen=True, slots=True)
class Listener:
    """Who is told what happens: ``stage`` of each part as it begins, ``phase`` how far its build is."""

    stage: Callable[[str], None] = lambda _text: None
    phase: OnPhase = lambda _phase, _fraction: None


def add_engines(
    path: Path,
    options: EngineOptions,
    *,
    components: Collection[str] | None = None,
    replace: bool = False,
    listener: Listener | None = None,
) -> list[EngineReport]:
    """Build the engines of a bundle's components; they appear together, or none does.

    Args:
        path: The bundle's folder.
        options: Flavour, sizes, and what the builder is told.
        components: Which; by default all.
        replace: Build anew what is there already under the same key.
        listener: Told what happens.

    Raises:
        BundleError: No usable bundle at ``path``, or a graph in it that may not be loaded.
        UsageError: The bundle's graphs do not admit a size, or the flavour an option.
        BackendError: The flavour is missing, or cannot build a component.
        ParityError: With a GPU: an engine's outputs are too far from the graph's.
        OutputError: The bundle cannot be written.
    """
    listener = listener or Listener()
    version = flavour_version(options.flavour)
    targets = resolve_targets(options.flavour, options.targets)
    bundle = Bundle.open(path)
    names = bundle.manifest.components if components is None else components
    _refuse_harmful_graphs(bundle, names)
    keys = [engine_key(bundle, name, options, version, targets) for name in names]
    place = bundle.path / ENGINES_FOLDER
    there = {key.component: _existing(place, key) for key in keys}
    reports: dict[str, EngineReport] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_engines_folder(place))
        for key in keys:
            name, found = key.component, there[key.component]
            target = place / key.folder_name()
            if found is not None and not replace:
                listener.stage(f"{name}: engines/{target.name} is there already")
                reports[name] = EngineReport(name, target, found, new=False)
                continue
            listener.stage(f"{name}: build for {key.flavour}")
            folder = stack.enter_context(new_folder(target, replace=target.exists()))
            manifest = _build(bundle, key, options, folder, listener)
            reports[name] = EngineReport(name, target, manifest, new=True)
    return [reports[key.component] for key in keys]


def _refuse_harmful_graphs(bundle: Bundle, names: Collection[str]) -> None:
    """Look through the graphs that this user did not export, before a builder reads them.

    Raises:
        BundleError: One is no graph that may be loaded.
    """
    if bundle.embedded:
        return
    for part in map(bundle.component, names):
        if not accepted(part.files, EXPORTED):
            check_component(bundle, part)


def engine_key(
    bundle: Bundle, component: str, options: EngineOptions, version: str, targets: Sequence[str]
) -> EngineKey:
    """The full key of the engine that a build with these options gives.

    Raises:
        UsageError: The bundle's graphs do not admit a size.
    """
    manifest = bundle.manifest
    part, factor = bundle.component(component), manifest.latents.factor
    # A rewritten graph loses nothing by admitting every length.
    usual = {"chunks": Extent(1, None, manifest.limits.max_chunks)} if options.flavour == ORT_CUDA else {}
    sizes = [sizes_of_profile(manifest, {**usual, **given}) for given in options.profiles]
    every = [component_profile(part.spec, row, factor, manifest.tokens) for row in sizes]
    # Profiles that differ only in axes which this component has not are one to it.
    profiles = tuple(profile for index, profile in enumerate(every) if profile not in every[:index])
    chosen: dict[str, Any] = {}
    if options.flavour != ORT_CUDA:
        chosen = {"level": options.level, "workspace": options.workspace, "refit": options.refit}
    return EngineKey(
        component=component,
        component_sha256=component_sha256(part),
        flavour=options.flavour,
        flavour_version=version,
        targets=tuple(targets),
        precision=part.precision,
        profiles=profiles,
        options=chosen,
    )


@contextlib.contextmanager
def _engines_folder(place: Path) -> Any:
    """The bundle's folder of engines; one that was made here and stayed empty goes again."""
    with contextlib.ExitStack() as undo:
        with finishing(), writing(place):
            place.mkdir(exist_ok=True)
            undo.callback(_remove_if_empty, place)
            undo.enter_context(undone(partial(_remove_if_empty, place)))
        yield


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is not empty
        folder.rmdir()


def _existing(place: Path, key: EngineKey) -> EngineManifest | None:
    """The engine of just this key, if it is there and whole."""
    folder = place / key.folder_name()
    try:
        text = read_limited(folder / ENGINE_NAME, MAX_ENGINE_JSON_BYTES)
        manifest = engine_from_json(text, f"{folder.name}/{ENGINE_NAME}")
        whole = all((folder / entry.path).stat().st_size == entry.size for entry in manifest.files)
    except (OSError, ValueError, BundleError):
        return None
    return manifest if whole and manifest.key == key else None


def _build(
    bundle: Bundle, key: EngineKey, options: EngineOptions, folder: Path, listener: Listener
) -> EngineManifest:
    """Build one engine into ``folder``: plan, layers, and last its manifest."""
    work = folder / _WORK
    with writing(folder):
        work.mkdir()
    plan = folder / PLAN_NAMES.get(key.flavour, PLAN_NAME)
    started = time.perf_counter()
    result = run_build(build_job(bundle, key, options, folder, plan), work, on_phase=listener.phase)
    shutil.rmtree(work)
    files = tuple(
        FileEntry(file.name, file.stat().st_size, sha256(file))
        for file in (plan, folder / LAYERS_NAME)
        if file.exists()
    )
    draft = EngineManifest(key, files)
    with writing(folder):
        (folder / ENGINE_NAME).write_text(engine_to_json(draft), encoding="utf-8")
    compared = compare_engine(bundle, key.component, folder, draft) if options.compare else NOT_ASKED_FOR
    facts = _facts(result, time.perf_counter() - started, compared)
    manifest = EngineManifest(key, files, facts)
    with writing(folder):
        (folder / ENGINE_NAME).write_text(engine_to_json(manifest), encoding="utf-8")
    return manifest


def build_job(
    bundle: Bundle, key: EngineKey, options: EngineOptions, folder: Path, plan: Path
) -> dict[str, Any]:
    """What the child is told; see `sdrt.export.engines.child`."""
    part = bundle.component(key.component)
    files = {entry.path: bundle.file(entry).absolute() for entry in part.files}
    model = files.pop(part.model)
    return {
        "flavour": key.flavour,
        "component": key.component,
        "precision": key.precision,
        "model": str(model),
        "weights": [str(file) for file in files.values()],
        "islands": islands_of(bundle, key.component),
        "work": str((folder / _WORK).absolute()),
        "plan": str(plan.absolute()),
        "layers": str((folder / LAYERS_NAME).absolute()),
        "shapes": [input_shapes(part.spec, profile) for profile in key.profiles],
        "workspace": options.workspace,
        "level": options.level,
        "targets": [] if CURRENT in options.targets else list(options.targets),
        "current": CURRENT in options.targets,
        "refit": options.refit,
        "timing_cache": timing_cache(options, key),
        "allow_unfused": options.allow_unfused,
    }


def timing_cache(options: EngineOptions, key: EngineKey) -> str | None:
    """The file of kernel timings: TensorRT measures as it builds, TensorRT for RTX measures nothing.

    Raises:
        OutputError: The file that the user named cannot be there.
    """
    if options.flavour != TENSORRT:
        return None
    if options.timing_cache is not None:
        with writing(options.timing_cache):
            options.timing_cache.parent.mkdir(parents=True, exist_ok=True)
        return str(options.timing_cache.absolute())
    folder = usable_folder("timings", make=True)
    if folder is None:  # a cache that cannot be kept only costs time
        return None
    return str((folder / f"{key.flavour_version}-sm{'_'.join(key.targets)}.cache").absolute())


def islands_of(bundle: Bundle, component: str) -> list[str]:
    """The tensors of a component that its graph keeps in float32 since the export."""
    audit = bundle.manifest.ranges.get(component, {})
    return [str(name) for name in audit.get("islands", ())] if isinstance(audit, Mapping) else []


def _facts(result: BuildResult, seconds: float, compared: Any) -> dict[str, Any]:
    return {
        "sdrt": sdrt.__version__,
        "build_seconds": round(result.seconds, 1),
        "total_seconds": round(seconds, 1),
        "peak_memory_bytes": result.peak_bytes,
        **result.facts,
        "compared": compared,
    }
