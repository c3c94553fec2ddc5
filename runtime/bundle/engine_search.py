"""Finding the engine of a bundle that fits what is asked and what is here, or saying why none does."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.engines import (
    ENGINE_NAME,
    ENGINES_FOLDER,
    AxisProfile,
    EngineKey,
    EngineManifest,
    component_sha256,
    engine_from_json,
)
from sdrt.runtime.bundle.limits import MAX_ENGINE_JSON_BYTES, MAX_ENGINES
from sdrt.runtime.bundle.manifest import FileEntry, Manifest
from sdrt.runtime.errors import BackendError, BundleError
from sdrt.runtime.system.untrusted import open_regular, read_limited

Capability = tuple[int, int]  # compute capability: major, minor
_MAX_LISTED: Final = 4  # engines that one message goes into


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine of a bundle, found and parsed; its plan is read and checked by `read_plan`.

    Attributes:
        folder: Where it lies.
        manifest: Its parsed ``engine.json``.
        rebuild: The command that builds it anew.
    """

    folder: Path
    manifest: EngineManifest
    rebuild: str

    def profile_index(self, axes: Mapping[str, int]) -> int | None:
        """The profile that admits a shape and has the nearest optimum; None if none admits it."""
        distances = {
            index: profile.distance(axes)
            for index, profile in enumerate(self.manifest.key.profiles)
            if profile.admits(axes)
        }
        return min(distances, key=lambda index: (distances[index], index)) if distances else None

    def read_header(self, count: int) -> bytes:
        """The plan's first ``count`` bytes, unchecked: enough for TensorRT to say what it was built for.

        Raises:
            BundleError: It is missing or leads out of the engine's folder.
        """
        entry = self.manifest.files[0]
        name = f"{ENGINES_FOLDER}/{self.folder.name}/{entry.path}"
        try:
            with open_regular(_inside(self.folder, entry, name)) as file:
                return file.read(count)
        except ValueError as error:
            raise BundleError(f"{name} cannot be read: {error}; {self.rebuild}") from None
        except OSError as error:
            raise BundleError(f"{name} cannot be read: {error.strerror}; {self.rebuild}") from error

    def read_plan(self, *, verify: bool = True) -> bytes:
        """The plan's bytes, of the recorded size and, with ``verify``, the recorded SHA-256.

        What was checked is what is returned: the file is read once.

        Raises:
            BundleError: It is missing, cut short, altered, or leads out of the engine's folder.
        """
        entry = self.manifest.files[0]
        name = f"{ENGINES_FOLDER}/{self.folder.name}/{entry.path}"
        again = f"remove that folder and build it again: {self.rebuild}"
        file = _inside(self.folder, entry, name)
        try:
            size = file.stat().st_size
            if size != entry.size:
                raise BundleError(
                    f"{name} has {size} bytes, {ENGINE_NAME} says {entry.size}: cut short or altered; {again}"
                )
            data = read_limited(file, entry.size)
        except ValueError as error:
            raise BundleError(f"{name} cannot be read: {error}; {again}") from None
        except OSError as error:
            raise BundleError(f"{name} cannot be read: {error.strerror}; {again}") from error
        if len(data) != entry.size or (verify and hashlib.sha256(data).hexdigest() != entry.sha256):
            raise BundleError(
                f"{name} does not have the SHA-256 that {ENGINE_NAME} records: altered or damaged; {again}"
            )
        return data


def list_engines(bundle: Bundle) -> tuple[list[Engine], list[str]]:
    """Every engine of a bundle, and a line for every folder in ``engines/`` that is none.

    Nothing but the small ``engine.json`` of each is read. Hidden folders are skipped: they are being written.
    """
    engines: list[Engine] = []
    damaged: list[str] = []
    place = bundle.path / ENGINES_FOLDER
    try:
        folders = sorted(entry for entry in place.iterdir() if not entry.name.startswith("."))
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [f"{place} cannot be read: {error.strerror}"]
    if len(folders) > MAX_ENGINES:
        return [], [f"{place} holds {len(folders)} folders, the limit is {MAX_ENGINES}"]
    for folder in folders:
        try:
            manifest = _read_manifest(bundle, folder)
        except BundleError as error:
            damaged.append(str(error))
        else:
            engines.append(Engine(folder, manifest, rebuild_command(bundle, manifest.key)))
    return engines, damaged


def find_engine(
    bundle: Bundle,
    component: str,
    flavour: str,
    version: str,
    capability: Capability | None,
    axes: Mapping[str, int] | None = None,
) -> Engine:
    """The engine of a component whose whole key fits; of several, the one with the nearest optimum.

    Args:
        bundle: An opened bundle.
        component: The component's name.
        flavour: ``tensorrt``, ``tensorrt-rtx`` or ``onnxruntime-cuda``.
        version: The installed version of that flavour's library.
        capability: The GPU's compute capability; None compares it with nothing.
        axes: Sizes of the component's named axes that are asked for; by default any will do.

    Raises:
        BackendError: None fits. The message says for each what differs, what the engine has and what is
            here, and which command builds one that fits.
        BundleError: The bundle has no such component.
    """
    bundle.component(component)
    asked = dict(axes or {})
    every, damaged = list_engines(bundle)
    candidates = [
        engine
        for engine in every
        if engine.manifest.key.component == component and engine.manifest.key.flavour == flavour
    ]
    misfits = {
        engine.folder.name: _misfits(bundle, engine.manifest, version, capability, asked)
        for engine in candidates
    }
    fitting = [engine for engine in candidates if not misfits[engine.folder.name]]
    if fitting:
        return min(fitting, key=lambda engine: (_distance(engine, asked), engine.folder.name))
    command = build_command(bundle, flavour, asked, _other_target(flavour, candidates, capability))
    raise BackendError(_no_engine(component, flavour, misfits, damaged) + f"; build one: {command}")


def build_command(
    bundle: Bundle,
    flavour: str,
    axes: Mapping[str, int] | None = None,
    capability: Capability | None = None,
) -> str:
    """The ``sd-export`` command that builds the engines of one flavour for a shape.

    Args:
        bundle: The bundle to add them to.
        flavour: The flavour of the engines.
        axes: Named axes of one component; ``rows`` counts those of an image under guidance, ``context`` is in
            tokens.
        capability: A compute capability to build for, where the builder's own choice leaves it out.
    """
    asked = axes or {}
    factor = bundle.manifest.latents.factor
    words = ["sd-export", shlex.quote(str(bundle.path)), "--engine", flavour]
    if "batch" in asked or "rows" in asked:
        words += [
            "--batch",
            str(asked.get("batch") or -(-asked["rows"] // bundle.manifest.record.guided_rows)),
        ]
    for side in ("height", "width"):
        pixels = asked.get(side) or asked.get(f"latent_{side}", 0) * factor
        if pixels:
            words += [f"--{side}", str(pixels)]
    if (chunks := asked.get("context", 0) // bundle.manifest.tokens) > 1:
        words += ["--chunks", str(chunks)]
    if capability is not None:
        words += ["--compute-capability", _dotted(capability)]
    return " ".join(words)


def rebuild_command(bundle: Bundle, key: EngineKey) -> str:
    """The ``sd-export`` command that builds an engine of the same sizes, targets and kind anew."""
    words = ["sd-export", shlex.quote(str(bundle.path)), "--engine", key.flavour]
    for profile in key.profiles:
        sizes = [
            f"{name}={low}" if low == high else f"{name}={low}..{best}..{high}"
            for name, (low, best, high) in _user_axes(profile.axes, bundle.manifest).items()
        ]
        words += ["--profile", ",".join(sizes)] if sizes else []
    targets = [target for target in key.targets if not target.endswith("+")]
    if key.flavour == "tensorrt-rtx" and targets:
        words += ["--compute-capability", *targets]
    if key.options.get("refit"):
        words.append("--refit")
    return " ".join(words)


def _user_axes(axes: Mapping[str, AxisProfile], manifest: Manifest) -> dict[str, tuple[int, int, int]]:
    """Minimum, optimum and maximum in what a user knows: pixels in place of latents, chunks of tokens."""
    factor, tokens = manifest.latents.factor, manifest.tokens
    result = {}
    for axis, limit in axes.items():
        times = factor if axis.startswith("latent_") else 1
        over = tokens if axis == "context" else 1
        name = "chunks" if axis == "context" else axis.removeprefix("latent_")
        low, best, high = (size * times // over for size in (limit.minimum, limit.optimum, limit.maximum))
        result[name] = (low, best, high)
    return result


def _inside(folder: Path, entry: FileEntry, name: str) -> Path:
    file = folder / entry.path
    try:
        inside = file.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        inside = False
    if not inside:
        raise BundleError(f"{name} leads outside its folder: refused")
    return file


def _read_manifest(bundle: Bundle, folder: Path) -> EngineManifest:
    where = f"{ENGINES_FOLDER}/{folder.name}/{ENGINE_NAME}"
    file = folder / ENGINE_NAME
    try:
        if not file.resolve().is_relative_to(bundle.path.resolve()):
            raise BundleError(f"{where} leads outside the bundle {bundle.path}: refused")
        text = read_limited(file, MAX_ENGINE_JSON_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{ENGINES_FOLDER}/{folder.name} is no engine: it has no {ENGINE_NAME}") from None
    except ValueError as error:
        raise BundleError(f"{where} cannot be read: {error}; build the engine again") from None
    except OSError as error:
        raise BundleError(f"{where} cannot be read: {error.strerror}") from error
    except RuntimeError:  # what Python 3.11 and 3.12 raise for links in a circle
        raise BundleError(f"{where} leads outside the bundle {bundle.path}: refused") from None
    return engine_from_json(text, where)


def _misfits(
    bundle: Bundle,
    manifest: EngineManifest,
    version: str,
    capability: Capability | None,
    asked: Mapping[str, int],
) -> list[str]:
    """Which parts of the key differ, each with what the engine has and what is here."""
    key, component = manifest.key, bundle.component(manifest.key.component)
    here = component_sha256(component)
    reasons = []
    if key.component_sha256 != here:
        reasons.append(
            f"it was built from another {key.component} "
            f"(SHA-256 {key.component_sha256[:8]}…, the bundle's is {here[:8]}…)"
        )
    if not _version_fits(key.flavour, key.flavour_version, version):
        reasons.append(f"it is for {key.flavour} {key.flavour_version}, {version} is installed")
    if capability is not None and not _runs_on(key.targets, capability):
        reasons.append(
            f"it runs on compute capability {', '.join(key.targets)}, this GPU has {_dotted(capability)}"
        )
    if key.precision != component.precision:
        reasons.append(f"its precision is {key.precision}, the {key.component}'s is {component.precision}")
    if not any(profile.admits(asked) for profile in key.profiles):
        admitted = " or ".join(_sizes(profile.axes, bundle.manifest) for profile in key.profiles)
        own = {name: AxisProfile(*[asked[name]] * 3) for name in key.profiles[0].axes if name in asked}
        reasons.append(f"it admits {admitted}; asked for is {_sizes(own, bundle.manifest)}")
    return reasons


def _version_fits(flavour: str, built: str, installed: str) -> bool:
    """TensorRT's plans are tied to the exact version; a graph runs on its onnxruntime and later ones."""
    if flavour == "onnxruntime-cuda":
        return _numbers(built) <= _numbers(installed)
    return built == installed


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _runs_on(targets: Sequence[str], capability: Capability) -> bool:
    """``8.6`` names one compute capability, ``8.0+`` it and every newer one; no target means any."""
    for target in targets:
        major, minor = map(int, target.removesuffix("+").split("."))
        if (major, minor) == capability or (target.endswith("+") and capability >= (major, minor)):
            return True
    return not targets


def _sizes(axes: Mapping[str, AxisProfile], manifest: Manifest) -> str:
    """Limits in words."""
    words = [
        f"{name} {AxisProfile(*sizes)}{_ABOUT.get(name, '')}"
        for name, sizes in _user_axes(axes, manifest).items()
    ]
    return ", ".join(words) or "one size"


_ABOUT: Final = {"rows": " (two per image under guidance)"}  # or three


def _distance(engine: Engine, asked: Mapping[str, int]) -> float:
    return min(profile.distance(asked) for profile in engine.manifest.key.profiles if profile.admits(asked))


def _other_target(
    flavour: str, candidates: Sequence[Engine], capability: Capability | None
) -> Capability | None:
    """The GPU's capability, where engines exist and were not built for it; TensorRT builds where it runs."""
    if flavour != "tensorrt-rtx" or capability is None or not candidates:
        return None
    built_for = any(_runs_on(engine.manifest.key.targets, capability) for engine in candidates)
    return None if built_for else capability


def _no_engine(component: str, flavour: str, misfits: Mapping[str, list[str]], damaged: list[str]) -> str:
    """All candidates with what differs, the nearest first."""
    lines = [
        f"{ENGINES_FOLDER}/{name}: {'; '.join(reasons)}"
        for name, reasons in sorted(misfits.items(), key=lambda item: (len(item[1]), item[0]))
    ] + damaged
    if not lines:
        return f"the bundle has no {flavour} engine of its {component}"
    more = f" (and {len(lines) - _MAX_LISTED} more)" if len(lines) > _MAX_LISTED else ""
    return f"no {flavour} engine of the {component} fits: {' | '.join(lines[:_MAX_LISTED])}{more}"


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
