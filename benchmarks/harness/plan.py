"""From the words of the command to what is to be run: the models, the settings, the subjects."""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sdrt.benchmarks.document.document import Subject
from sdrt.benchmarks.document.recorder import Recorder
from sdrt.benchmarks.harness.export_model import exported
from sdrt.benchmarks.harness.progress import Progress
from sdrt.benchmarks.harness.run import Settings, SubjectPlan
from sdrt.benchmarks.options import AUTO, EMBEDDED_NAME, GPU_ONLY, NONE, ONLY, names
from sdrt.benchmarks.peers import registry as peers
from sdrt.benchmarks.peers.prepare import prepared
from sdrt.runtime.backends.executor import usable_cores
from sdrt.runtime.bundle.bundle import EMBEDDED, Bundle
from sdrt.runtime.bundle.manifest import MANIFEST_NAME, Limits, Manifest
from sdrt.runtime.errors import BackendError, SdrtError, UsageError
from sdrt.runtime.system.child_process import Tell

INDEX: Final = "model_index.json"
BATCHES: Final = (1, 2, 4, 8)
GPU_BATCHES: Final = (1, 4)
ENGINES_SHARE: Final = 0.3  # of the time that was given, for the engines of one backend
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model.

    Attributes:
        name: Short, unique in the report.
        source: As on the command line.
        bundle: What sdrt draws from.
        checkpoint: What peers start from: a folder, the name of an architecture, or None where it is unknown.
    """

    name: str
    source: str
    bundle: Bundle
    checkpoint: str | None


def find_model(word: str, arguments: argparse.Namespace, progress: Progress) -> ModelPlan:
    """Find a model, and export it if it is none of ours.

    Args:
        word: Of the command line.
        arguments: The rest of it.
        progress: Told what takes long.

    Raises:
        UsageError: There is no such model, or it does not draw from a prompt alone.
        SdrtError: It cannot be opened or exported.
    """
    from sdrt.export.cli.options import ARCHITECTURES

    folder = Path(word)
    if word == EMBEDDED_NAME and not (folder / MANIFEST_NAME).is_file():
        own = EMBEDDED.parent if (EMBEDDED.parent / INDEX).is_file() else None
        return _checked(word, word, Bundle.open(), _given(arguments, own))
    if (folder / MANIFEST_NAME).is_file():
        return _checked(folder.resolve().name, word, Bundle.open(folder), _given(arguments, None))
    is_hub_id = word.count("/") == 1 and not word.startswith((".", "/"))
    if word not in ARCHITECTURES and not (folder / INDEX).is_file() and (folder.exists() or not is_hub_id):
        known = ", ".join((EMBEDDED_NAME, *ARCHITECTURES))
        raise UsageError(
            f"MODEL is {word!r}: give a bundle (a folder with {MANIFEST_NAME}), a checkpoint (a folder with "
            f"{INDEX}, or a hub id owner/name), or one of {known}"
        )
    if arguments.checkpoint is not None:
        raise UsageError(f"--checkpoint goes with a bundle; {word} is exported from itself")
    progress.block(f"exporting {word}", 1)
    bundle = Bundle.open(exported(word, export_options(arguments), progress.ongoing))
    return _checked(folder.resolve().name if folder.is_dir() else word, word, bundle, word)


def _given(arguments: argparse.Namespace, otherwise: Path | None) -> str | None:
    given = arguments.checkpoint
    if given is not None and not (given / INDEX).is_file():
        raise UsageError(f"--checkpoint is {given}: it has no {INDEX}, so it is no checkpoint of diffusers")
    folder = given if given is not None else otherwise
    return None if folder is None else str(folder.resolve())


def export_options(arguments: argparse.Namespace) -> list[str]:
    """For ``sd-export``: what is measured."""
    options = ["--batch", f"1..{max(_batches(arguments))}", *(["--fp16"] if arguments.gpu else [])]
    for index, side in enumerate(("height", "width")):
        if arguments.sizes:
            extents = [size[index] for size in arguments.sizes]
            options += [f"--{side}", f"{min(extents)}..{max(extents)}"]
    return options


def _batches(arguments: argparse.Namespace) -> tuple[int, ...]:
    default = (1, 2) if arguments.quick else GPU_BATCHES if arguments.gpu else BATCHES
    return tuple(arguments.batches or default)


def _checked(name: str, source: str, bundle: Bundle, checkpoint: str | None) -> ModelPlan:
    manifest = bundle.manifest
    if manifest.needs_picture:
        kind = "a picture and a mask" if manifest.reads_mask else "a picture"
        raise UsageError(
            f"{source} draws from {kind}: sd-bench measures models that draw from a prompt alone"
        )
    if manifest.limits.min_batch != 1:
        raise UsageError(
            f"{source} draws at least {manifest.limits.min_batch} pictures at once: "
            "export it with --batch 1..N"
        )
    return ModelPlan(name, source, bundle, checkpoint)


def settings_for(manifest: Manifest, arguments: argparse.Namespace, note: Note) -> Settings:
    """What is measured of one model, from the command line and the model's own defaults.

    Raises:
        UsageError: A size that the bundle does not admit.
    """
    quick, gpu, defaults = arguments.quick, arguments.gpu, manifest.defaults
    blocks = arguments.only or (GPU_ONLY if gpu else ONLY)
    steps = arguments.steps or (2 if quick else defaults.num_inference_steps)
    own_alone = quick or gpu or "growth" not in blocks
    sizes = arguments.sizes or default_sizes(manifest, own_alone=own_alone)
    for height, width in sizes:
        if not (manifest.limits.height.admits(height) and manifest.limits.width.admits(width)):
            raise UsageError(
                f"--sizes has {height}x{width}: the bundle admits a height of {manifest.limits.height} and a "
                f"width of {manifest.limits.width}"
            )
    rounds = arguments.rounds or (2 if quick else 5 if gpu else 10)
    return Settings(
        steps=steps,
        sizes=sizes,
        batches=_admitted(_batches(arguments), manifest.limits, note),
        growth_steps=growth_steps(steps)[-2:] if quick else growth_steps(steps),
        rounds=rounds,
        growth_rounds=1 if quick else min(3, rounds),
        cold_rounds=arguments.cold_rounds or (1 if quick else 5),
        threads=arguments.threads or usable_cores(),
        guidance_scale=arguments.guidance_scale or max(defaults.guidance_scale, 1.5),
        blocks=blocks,
        quick=quick,
    )


def default_sizes(manifest: Manifest, *, own_alone: bool = False) -> tuple[tuple[int, int], ...]:
    """The model's own size, and squares up to the largest that the bundle admits for how it grows."""
    defaults, limits = manifest.defaults, manifest.limits
    own = (defaults.height, defaults.width)
    if own_alone:
        return (own,)
    largest = min(limits.height.maximum, limits.width.maximum)
    multiple = max(limits.height.multiple, limits.width.multiple)
    middle = (max(own) + largest) // 2 // multiple * multiple
    squares = [(side, side) for side in (middle, largest)]
    admitted = [size for size in squares if limits.height.admits(size[0]) and limits.width.admits(size[1])]
    return tuple(dict.fromkeys([own, *(size for size in admitted if size[0] > max(own))]))


def growth_steps(steps: int) -> tuple[int, ...]:
    """A quarter of the steps of a picture up to twice as many; two at least."""
    return tuple(sorted({max(2, round(steps * factor)) for factor in (0.25, 0.5, 1, 2)}))


def _admitted(batches: tuple[int, ...], limits: Limits, note: Note) -> tuple[int, ...]:
    left_out = [batch for batch in batches if not limits.min_batch <= batch <= limits.max_batch]
    if left_out:
        which = ", ".join(map(str, left_out))
        note(f"batch {which} is left out: the bundle draws up to {limits.max_batch} pictures at once")
    return tuple(batch for batch in batches if batch not in left_out)


def backend_plans(
    model: ModelPlan,
    arguments: argparse.Namespace,
    settings: Settings,
    recorder: Recorder,
    progress: Progress,
) -> list[SubjectPlan]:
    """sdrt on each backend that was asked for; engines that a named one lacks are built.

    With ``--gpu`` they are built for all that need a GPU, and one that cannot be had is a row of the report.

    Raises:
        UsageError: No backend of that name.
        BackendError: One that was named cannot run here.
        SdrtError: Its engines cannot be built.
    """
    from sdrt.runtime.backends.backend import BACKENDS
    from sdrt.runtime.backends.registry import find_backend

    if arguments.backends == NONE:
        return []
    automatic = arguments.backends == AUTO
    every = tuple(name for name in BACKENDS if not arguments.gpu or find_backend(name).needs_gpu)
    limit = math.inf if arguments.seconds is None else arguments.seconds * ENGINES_SHARE
    found = []
    for name in every if automatic else names(arguments.backends):
        try:
            bundle = _runnable(
                model.bundle, name, settings, progress, limit, builds=not automatic or arguments.gpu
            )
        except SdrtError as error:
            if not automatic or not (arguments.gpu or isinstance(error, BackendError)):
                raise
            progress.note(f"{name} is left out: {str(error).partition('; ')[0]}")
            if arguments.gpu:  # no subject of the report: its first one is what ratios compare
                recorder.fail(model.name, name, "engines", error)
            continue
        backend = find_backend(name)
        device = "cuda" if backend.needs_gpu else "cpu"
        subject = Subject(name, f"sdrt, {backend.label}", "backend", device=device)
        words = (sys.executable, str(peers.WORKERS / "worker_sdrt.py"), "--backend", name)
        size = _installed_bytes(f"sdrt[{backend.extra}]", settings, progress.note)
        found.append(SubjectPlan(subject, words, bundle.path.resolve(), installed_bytes=size))
    return found


def _runnable(
    bundle: Bundle, name: str, settings: Settings, progress: Progress, limit: float, *, builds: bool
) -> Bundle:
    """The bundle, or a copy of it with the engines that a backend needs and the bundle has not.

    Raises:
        BackendError: The backend cannot run it here.
        SdrtError: The engines cannot be built in ``limit`` seconds.
    """
    from sdrt.benchmarks.harness.engine_models import with_engines
    from sdrt.runtime.backends.backend import RequestShape
    from sdrt.runtime.backends.registry import choose_backend, find_backend
    from sdrt.runtime.devices.gpu import discovery

    shape = RequestShape(1, *settings.sizes[0])
    try:
        choose_backend(bundle, name, shape)
    except BackendError as error:
        if not builds or not find_backend(name).needs_gpu:
            raise
        try:
            gpu = discovery.find_gpu()
        except BackendError:
            raise error from None
        progress.block(f"{name}: engines, built unless they are there", 1)
        copy = with_engines(bundle, name, gpu, settings.sizes, settings.batches, progress.ongoing, limit)
        choose_backend(copy, name, shape)
        return copy
    return bundle


def _installed_bytes(requirement: str, settings: Settings, note: Note) -> int | None:
    """Of sdrt and what it needs; a smoke run does without, since a checkout has to be built for it."""
    if "cold" not in settings.blocks or settings.quick:
        return None
    from sdrt.benchmarks.peers.installed_size import installed_bytes

    try:
        return installed_bytes([requirement], Path(sysconfig.get_paths()["purelib"]))
    except BackendError as error:
        note(f"the installed size of {requirement} is not known: {error}")
        return None


def check_peers(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The peers to run: those that were named, or all of the device that are installed.

    Raises:
        UsageError: No peer of that name.
        BackendError: One that was named is not installed.
    """
    if arguments.peers == NONE:
        return ()
    if arguments.peers == AUTO:
        device = "cuda" if arguments.gpu else "cpu"
        # torch.compile takes minutes on a GPU: it is for those who name it.
        return tuple(
            name
            for name, peer in peers.PEERS.items()
            if peer.device == device and peers.is_installed(name) and name != "torch-compile-cuda"
        )
    wanted = names(arguments.peers)
    for name in wanted:
        if name not in peers.PEERS:
            raise UsageError(f"unknown peer {name!r}; there is {AUTO}, {NONE}, {', '.join(peers.PEERS)}")
        peers.check_installed(name)
    return wanted


def peer_plans(
    model: ModelPlan, arguments: argparse.Namespace, recorder: Recorder, progress: Progress
) -> list[SubjectPlan]:
    """Each peer with its form of the checkpoint, converted if need be; one without is a row of the report."""
    wanted = check_peers(arguments)
    if wanted and model.checkpoint is None:
        if arguments.peers != AUTO:
            raise UsageError(
                f"the peers {', '.join(wanted)} start from a checkpoint, and {model.source} is a bundle: "
                "name what it was exported from with --checkpoint DIR, or give --peers none"
            )
        progress.note(
            f"no peers: they start from a checkpoint, and {model.source} is a bundle; see --checkpoint"
        )
        return []
    found = []
    for name in wanted:
        assert model.checkpoint is not None
        subject = Subject(name, peers.PEERS[name].label, "peer", device=peers.PEERS[name].device)
        progress.block(f"{name}: bringing the model into its form", 1)
        try:
            folder = prepared(name, model.checkpoint, progress.ongoing)
        except SdrtError as error:
            recorder.set_subject(subject)
            recorder.fail(model.name, name, "converting the model", error)
            progress.note(f"{name}: the model was not converted: {error}")
            continue
        words = tuple(peers.worker_command(name))
        found.append(SubjectPlan(subject, words, folder, installed_bytes=peers.installed_bytes(name)))
    return found


def reference_plan(model: ModelPlan, tell: Tell) -> SubjectPlan | None:
    """diffusers of this interpreter, for fidelity; None where it or the checkpoint is not there.

    ``tell`` is told what bringing the checkpoint into its form does, see `prepared`.

    Raises:
        SdrtError: The checkpoint cannot be brought into its form.
    """
    if not peers.importable() or model.checkpoint is None:
        return None
    words = (sys.executable, str(peers.WORKERS / "worker_diffusers.py"))
    return SubjectPlan(
        Subject("diffusers", "diffusers", "peer"), words, prepared("diffusers", model.checkpoint, tell)
    )
