"""The parity gate of engines: a finished engine against its graph on ONNX Runtime, where there is a GPU."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.backends.registry import Choice, load_executor, open_device
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.engine_search import find_engine
from sdrt.runtime.bundle.engines import ENGINES_FOLDER, EngineManifest
from sdrt.runtime.bundle.families.components import (
    CLIP_SKIP,
    CUSTOM_EMBEDDINGS,
    IMAGE,
    INPUT_IDS,
    NOISE_LEVEL,
    TIMESTEP,
)
from sdrt.runtime.bundle.families.record import TensorSpec
from sdrt.runtime.bundle.families.told import usual_row
from sdrt.runtime.bundle.manifest import MANIFEST_NAME
from sdrt.runtime.devices.device import Device
from sdrt.runtime.devices.gpu.discovery import Gpu, find_gpu
from sdrt.runtime.errors import BackendError, ParityError

NO_GPU: Final = "no GPU here"
NOT_ASKED_FOR: Final = "left out, as --no-engine-parity asked"
SEED: Final = 20240229
_CPU: Final = "onnxruntime-cpu"
_VIEW: Final = "view"  # inside the engine's unfinished folder


def compare_engine(
    bundle: Bundle, component: str, folder: Path, engine: EngineManifest
) -> str | list[dict[str, Any]]:
    """Run an engine and its graph on the same random inputs at the optimum of every profile.

    Args:
        bundle: The bundle that the engine is for.
        component: Its name.
        folder: The engine's unfinished folder, with ``engine.json``.
        engine: The parsed ``engine.json``.

    Returns:
        A figure per profile and output: relative errors, and what is allowed; or in words why there is none.

    Raises:
        ParityError: An output is further from the graph's than allowed, or not finite.
        BackendError: The engine does not run.
    """
    try:
        gpu = find_gpu()
    except BackendError:
        return NO_GPU
    if engine.key.precision == "bf16":
        return "ONNX Runtime has no bfloat16 arithmetic on the CPU to compare with"
    with _view(bundle, folder) as view:
        key = engine.key
        try:
            find_engine(view, component, key.flavour, key.flavour_version, gpu.capability)
        except BackendError:
            return f"not built for the GPU of this machine, {gpu.name}"
        return _figures(view, component, engine, gpu)


def _figures(view: Bundle, component: str, engine: EngineManifest, gpu: Gpu) -> list[dict[str, Any]]:
    from sdrt.export.parity.components import compare  # it loads PyTorch

    allowed = tolerance(view, component)
    flavour = engine.key.flavour
    results: list[dict[str, Any]] = []
    with (
        contextlib.closing(open_device(Choice(flavour, (), gpu))) as device,
        contextlib.closing(open_device(Choice(_CPU, ()))) as host,
    ):
        executor = load_executor(view, component, backend=flavour, device=device)
        reference = load_executor(view, component, backend=_CPU, device=host)
        for profile in engine.key.profiles:
            axes = {name: limit.optimum for name, limit in profile.axes.items()}
            sizes = output_axes(axes, view.manifest.latents.factor)
            feeds = random_inputs(view, component, sizes)
            actual, expected = (
                _run(one, where, feeds, sizes) for one, where in ((executor, device), (reference, host))
            )
            for name, want in expected.items():
                l2, largest = compare(actual[name], want)
                figure = {"output": name, "profile": str(profile), "relative_l2": l2, "relative_max": largest}
                results.append({**figure, "tolerance": allowed})
                if not l2 <= allowed:  # also when it is NaN
                    raise ParityError(
                        f"the {flavour} engine of the {component} differs from its graph on ONNX Runtime: "
                        f"{name} at {profile} by {l2:.1e} (relative L2), {allowed:.1e} is allowed"
                    )
    return results


def tolerance(bundle: Bundle, component: str) -> float:
    """The relative L2 that is allowed between an engine and its graph on ONNX Runtime.

    Both are within the export's tolerance of the exact result
    (`sdrt.export.parity.components.rounding_tolerance`, from the sums that the network computes), each by
    roundings of its own, so they are within twice that of each other.

    Raises:
        BackendError: The bundle records no comparison of this component.
    """
    figures = [
        float(figure["tolerance"])
        for figure in bundle.manifest.parity.get("figures", ())
        if figure.get("component") == component
    ]
    if not figures or not all(map(math.isfinite, figures)):
        raise BackendError(
            f"the bundle records no parity figures of its {component}, so its engine cannot be judged: "
            "export the bundle again"
        )
    return 2 * max(figures)


def output_axes(axes: Mapping[str, int], factor: int) -> dict[str, int]:
    """All sizes of a component: of what it reads, and of what follows from that (pixels from latents)."""
    sizes = dict(axes)
    for side in ("height", "width"):
        if f"latent_{side}" in axes:
            sizes[side] = axes[f"latent_{side}"] * factor
        elif side in axes:
            sizes[f"latent_{side}"] = axes[side] // factor
    return sizes


def random_inputs(bundle: Bundle, component: str, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """Seeded inputs in the distribution of real use, in the component's dtypes."""
    generator = np.random.default_rng(SEED)
    return {
        entry.name: _random(entry, bundle, sizes, generator).astype(entry.dtype)
        for entry in bundle.component(component).spec.inputs
    }


def _random(
    entry: TensorSpec, bundle: Bundle, sizes: Mapping[str, int], generator: np.random.Generator
) -> NDArray[Any]:
    from sdrt.export.graphs.networks import CUSTOM_SHARE, EMBEDDING_DEVIATION  # it loads PyTorch

    shape = entry.concrete(sizes)
    manifest = bundle.manifest
    if (options := manifest.record.told.get(entry.name)) is not None:
        size = (manifest.defaults.height, manifest.defaults.width)
        return np.broadcast_to(np.array(usual_row(options, size, unconditional=False)), shape)
    if entry.name == NOISE_LEVEL:
        assert bundle.manifest.noising is not None  # by the manifest's rules
        return generator.integers(0, bundle.manifest.noising.max_level + 1, shape)
    if entry.name == INPUT_IDS:
        own = generator.random(shape) < CUSTOM_SHARE
        return np.where(own, -1, generator.integers(0, manifest.tokenizers[0].bos, shape))
    if entry.name == CUSTOM_EMBEDDINGS:
        return EMBEDDING_DEVIATION * generator.standard_normal(shape)
    if entry.name == CLIP_SKIP:
        return generator.integers(0, manifest.limits.max_clip_skip + 1, shape)
    if entry.name == TIMESTEP:
        return generator.uniform(0, manifest.schedule.num_train_timesteps - 1, shape)
    if entry.name == IMAGE:
        return generator.uniform(-1, 1, shape)
    return generator.standard_normal(shape)


def _run(
    executor: Executor, device: Device, feeds: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]
) -> dict[str, NDArray[Any]]:
    inputs = {name: device.zeros(array.shape, array.dtype) for name, array in feeds.items()}
    for name, array in feeds.items():
        device.upload(array, inputs[name])
    outputs = {
        entry.name: device.zeros(entry.concrete(sizes), entry.dtype) for entry in executor.spec.outputs
    }
    executor.bind(inputs, outputs)()
    return {name: np.array(device.download(buffer)) for name, buffer in outputs.items()}


@contextlib.contextmanager
def _view(bundle: Bundle, folder: Path) -> Iterator[Bundle]:
    """The bundle as it will be with just this engine in it, of hard links: executors open whole bundles."""
    place = folder / _VIEW
    files = {MANIFEST_NAME: bundle.path / MANIFEST_NAME}
    files |= {entry.path: bundle.file(entry) for entry in bundle.manifest.files()}
    for file in folder.iterdir():
        if file.is_file():
            files[f"{ENGINES_FOLDER}/engine/{file.name}"] = file
    try:
        for name, file in files.items():
            target = place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file.resolve(), target)
            except OSError:  # a file system without hard links
                shutil.copy(file, target)
        yield Bundle(place, bundle.manifest)
    finally:
        shutil.rmtree(place, ignore_errors=True)
