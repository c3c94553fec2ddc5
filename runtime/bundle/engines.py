"""Compiled engines of a bundle: what each was made from and for, found by what is asked and what is here.

An engine is a folder ``engines/<flavour>-<version>-<targets>-<component>-<profile>-<hash>`` with an
``engine.json`` beside its plan. The folder's name is for people: everything is read from ``engine.json``,
as strictly as the bundle's manifest. An engine is used only if every part of its key fits.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from sdrt.runtime.bundle.families.record import DYNAMIC_AXES, PRECISIONS
from sdrt.runtime.bundle.json_records import JsonReader, plain
from sdrt.runtime.bundle.limits import MAX_AXIS, MAX_FILES, MAX_PROFILES
from sdrt.runtime.bundle.manifest import Component, FileEntry
from sdrt.runtime.bundle.manifest_rules import check_file
from sdrt.runtime.errors import BundleError

ENGINES_FOLDER: Final = "engines"
ENGINE_NAME: Final = "engine.json"
FORMAT: Final = "sdrt-engine"
FORMAT_VERSION: Final = 1
# For onnxruntime-cuda the "plan" is a rewritten graph that shares the weights of the component's own.
FLAVOURS: Final = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")
_TARGET: Final = re.compile(r"[1-9]\d?\.\d\+?")  # "8.6", or "8.0+": that compute capability and newer
_VERSION: Final = re.compile(r"\d+(\.\d+)*[0-9A-Za-z.+]*")


@dataclass(frozen=True, slots=True)
class AxisProfile:
    """Sizes of one named axis that an engine admits, and the one that it is fastest at."""

    minimum: int
    optimum: int
    maximum: int

    def __str__(self) -> str:
        if self.minimum == self.maximum:
            return f"{self.minimum}"
        return f"{self.minimum}..{self.maximum}"


@dataclass(frozen=True, slots=True)
class Profile:
    """One optimization profile: the component's named axes, in the units of its spec (latents or pixels).

    ``axes`` holds the dynamic axes of the component's inputs, such as ``rows``, ``latent_height`` and
    ``latent_width`` for the U-Net.
    """

    axes: dict[str, AxisProfile]

    def admits(self, axes: Mapping[str, int]) -> bool:
        """Whether every axis that both name is within its limits."""
        return all(
            limit.minimum <= axes[name] <= limit.maximum for name, limit in self.axes.items() if name in axes
        )

    def distance(self, axes: Mapping[str, int]) -> float:
        """How far a shape is from the optimum: the sum of |ln(asked / optimum)| over the axes."""
        return sum(
            abs(math.log(axes[name] / limit.optimum)) for name, limit in self.axes.items() if name in axes
        )

    def __str__(self) -> str:
        return ", ".join(f"{name} {limit}" for name, limit in self.axes.items()) or "one size"


@dataclass(frozen=True, slots=True)
class EngineKey:
    """Everything that decides whether an engine may be used here.

    Attributes:
        component: Its name in the bundle.
        component_sha256: See `component_sha256`.
        flavour: One of `FLAVOURS`.
        flavour_version: The library's version, such as ``1.7.1.116``.
        targets: Compute capabilities it runs on: ``8.6``, or ``8.0+`` for that and newer; none means any.
        precision: The component's.
        profiles: In the plan's order; at least one.
        options: What else was asked of the builder, plain JSON values; compared with nothing, but part of
            the name, so that engines with other options live side by side.
    """

    component: str
    component_sha256: str
    flavour: str
    flavour_version: str
    targets: tuple[str, ...]
    precision: str
    profiles: tuple[Profile, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def hash8(self) -> str:
        """Eight hex digits over the whole key."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def folder_name(self) -> str:
        """The engine's folder inside ``engines/``."""
        targets = "_".join(f"sm{target.replace('.', '')}" for target in self.targets) or "portable"
        return "-".join(
            (
                self.flavour,
                self.flavour_version,
                targets.replace("+", "plus"),
                self.component,
                _profile_name(self.profiles[0]),
                self.hash8(),
            )
        )


@dataclass(frozen=True, slots=True)
class EngineManifest:
    """``engine.json``: the key, the files (paths relative to the engine's folder, the plan first), and facts.

    ``facts`` is what may be of interest and is never compared: build seconds, memory, attention layers.
    """

    key: EngineKey
    files: tuple[FileEntry, ...]
    facts: dict[str, Any] = field(default_factory=dict)


def component_sha256(component: Component) -> str:
    """The hash that ties an engine to a component: SHA-256 over path and hash of each of its files."""
    lines = sorted(f"{entry.path} {entry.sha256}\n" for entry in component.files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def engine_to_json(manifest: EngineManifest) -> str:
    """The engine's manifest as JSON text."""
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **plain(manifest)}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def engine_from_json(text: str | bytes, where: str = ENGINE_NAME) -> EngineManifest:
    """Parse and check an engine's manifest; ``where`` names it in messages.

    Raises:
        BundleError: Not an engine's manifest, of another format, a field missing, unknown or of a wrong
            type, a path that leaves the engine's folder, or sizes that make no sense.
    """
    reader = JsonReader(where, "build the engine again")
    manifest = reader.read(EngineManifest, reader.document(text, FORMAT, FORMAT_VERSION))
    _check_manifest(manifest, where)
    return manifest


def _profile_name(profile: Profile) -> str:
    """Such as ``1to8x64x64``: the axes' limits in their order."""
    return "x".join(str(limit).replace("..", "to") for limit in profile.axes.values()) or "fixed"


def _check_manifest(manifest: EngineManifest, where: str) -> None:
    key = manifest.key
    limits = [limit for profile in key.profiles for limit in profile.axes.values()]
    axes = [set(profile.axes) for profile in key.profiles]
    rules = {
        f"flavour is one of {', '.join(FLAVOURS)}": key.flavour in FLAVOURS,
        "component is a name": re.fullmatch("[a-z0-9_]+", key.component) is not None,
        "flavour_version is a version": _VERSION.fullmatch(key.flavour_version) is not None,
        "targets are compute capabilities such as 8.6 or 8.0+": all(map(_TARGET.fullmatch, key.targets)),
        f"precision is one of {', '.join(PRECISIONS)}": key.precision in PRECISIONS,
        "component_sha256 is 64 hex digits": re.fullmatch("[0-9a-f]{64}", key.component_sha256) is not None,
        "there is a profile, and all profiles have the same axes": bool(axes)
        and axes.count(axes[0]) == len(axes),
        "1 ≤ minimum ≤ optimum ≤ maximum": all(
            1 <= limit.minimum <= limit.optimum <= limit.maximum for limit in limits
        ),
        f"there are 1 to {MAX_PROFILES} profiles": 1 <= len(key.profiles) <= MAX_PROFILES,
        f"sizes are at most {MAX_AXIS}": all(limit.maximum <= MAX_AXIS for limit in limits),
        f"there is a plan, and at most {MAX_FILES} files": 1 <= len(manifest.files) <= MAX_FILES,
        "each file is listed once": len({entry.path for entry in manifest.files}) == len(manifest.files),
    }
    for rule, holds in rules.items():
        if not holds:
            raise BundleError(f"{where} breaks a rule: {rule}; build the engine again")
    for name in {name for profile in key.profiles for name in profile.axes}:
        if name not in DYNAMIC_AXES:
            raise BundleError(f"{where} has a profile for {name[:40]!r}, which is no axis of a component")
    for entry in manifest.files:
        check_file(entry, where, "the engine's folder")
