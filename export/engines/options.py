"""What a user asks of an engine build, parsed and checked before anything is loaded.

Sizes are in the user's units (images, pixels). An engine's profile is in those of the component's own axes;
`component_profile` goes from one to the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sdrt.runtime.bundle.engines import AxisProfile, Profile
from sdrt.runtime.bundle.families.record import ComponentSpec
from sdrt.runtime.bundle.manifest import Manifest, SizeLimit
from sdrt.runtime.errors import UsageError

EXTENT: Final = re.compile(r"(\d{1,9})(?:\.\.(\d{1,9}))?(?:\.\.(\d{1,9}))?")
EXTENT_FORMS: Final = "a number, MIN..MAX or MIN..OPT..MAX, such as 512, 256..768 or 256..512..768"
PROFILE_AXES: Final = ("batch", "rows", "height", "width", "chunks")
MAX_PROFILES: Final = 8
MAX_LEVEL: Final = 5
CURRENT: Final = "current"  # the GPU of this machine, in place of a compute capability
_TARGET: Final = re.compile(r"\d{1,2}\.\d")
_BYTES: Final = re.compile(r"(\d{1,9})\s*(MiB|GiB)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Extent:
    """Sizes of one axis as given: ``minimum`` to ``maximum``, fastest at ``optimum`` if that was said."""

    minimum: int
    optimum: int | None
    maximum: int

    def at(self, usual: int) -> AxisProfile:
        """With an optimum: the one given, else ``usual``, brought inside."""
        best = self.optimum if self.optimum is not None else usual
        return AxisProfile(self.minimum, min(max(best, self.minimum), self.maximum), self.maximum)


ONE: Final = Extent(1, None, 1)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the user asked of the engines of one flavour.

    Attributes:
        flavour: ``tensorrt``, ``tensorrt-rtx`` or ``onnxruntime-cuda``.
        profiles: One mapping per optimization profile from `PROFILE_AXES` to sizes; what is missing is taken
            from the bundle's limits.
        workspace: The most scratch memory of a layer in bytes; None leaves it to the library.
        level: TensorRT's builder optimization level, 0 (fast to build) to 5 (fast to run).
        targets: Compute capabilities such as ``8.6``, or ``current``; none leaves it to the flavour.
        refit: Whether weights can be replaced in the finished engine.
        timing_cache: Where measured kernel timings are kept from build to build; None: in the user's cache.
        allow_unfused: Whether TensorRT may run an attention as separate kernels.
        compare: Whether the engine is compared with its graph where there is a GPU.
    """

    flavour: str
    profiles: tuple[Mapping[str, Extent], ...] = ({},)
    workspace: int | None = None
    level: int = 3
    targets: tuple[str, ...] = ()
    refit: bool = False
    timing_cache: Path | None = None
    allow_unfused: bool = False
    compare: bool = True


def parse_extent(option: str, text: str) -> Extent:
    """``N``, ``MIN..MAX`` or ``MIN..OPT..MAX``.

    Raises:
        UsageError: Not of that form, zero, or not in ascending order.
    """
    match = EXTENT.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{option} is {text!r}: {EXTENT_FORMS}")
    numbers = [int(number) for number in match.groups() if number is not None]
    if numbers[0] < 1 or numbers != sorted(numbers):
        order = "MIN must be at least 1 and at most MAX" if len(numbers) < 3 else "1 ≤ MIN ≤ OPT ≤ MAX"
        raise UsageError(f"{option} is {text!r}: {order}")
    return Extent(numbers[0], numbers[1] if len(numbers) == 3 else None, numbers[-1])


def parse_profile(text: str) -> dict[str, Extent]:
    """``--profile batch=1,height=512,width=256..512..768`` as a mapping from axis to sizes.

    Raises:
        UsageError: An axis is unknown or named twice, or a size is not of the form.
    """
    sizes: dict[str, Extent] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        name = name.strip()
        if not equals or name not in PROFILE_AXES:
            raise UsageError(
                f"--profile is {text!r}: AXIS=SIZE,… with the axes {', '.join(PROFILE_AXES)}, "
                "such as batch=1,height=512,width=256..512..768"
            )
        if name in sizes:
            raise UsageError(f"--profile is {text!r}: {name} is there twice")
        sizes[name] = parse_extent(f"{name} of --profile", value)
    return sizes


def parse_profiles(texts: Sequence[str], shared: Mapping[str, Extent]) -> tuple[Mapping[str, Extent], ...]:
    """One profile per ``--profile``; what it leaves out is as in ``shared`` (``--batch``, ``--height`` …).

    Raises:
        UsageError: One is malformed, there are too many, or two are the same.
    """
    if len(texts) > MAX_PROFILES:
        raise UsageError(f"--profile is there {len(texts)} times: at most {MAX_PROFILES}")
    profiles = tuple({**shared, **parse_profile(text)} for text in texts) or (dict(shared),)
    if any(profiles.count(profile) > 1 for profile in profiles):
        raise UsageError("--profile is there twice with the same sizes")
    return profiles


def parse_bytes(option: str, text: str) -> int:
    """``512MiB`` or ``4GiB`` in bytes.

    Raises:
        UsageError: Not of that form, or zero.
    """
    match = _BYTES.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise UsageError(f"{option} is {text!r}: a size such as 512MiB or 4GiB")
    return int(match[1]) << (20 if match[2].lower() == "mib" else 30)


def parse_targets(texts: Sequence[str]) -> tuple[str, ...]:
    """Compute capabilities such as ``8.6`` in ascending order, or ``current`` alone.

    Raises:
        UsageError: One is of another form, or ``current`` stands beside others.
    """
    if CURRENT in texts and len(set(texts)) > 1:
        raise UsageError(f"--compute-capability: {CURRENT} stands alone, given {' '.join(texts)}")
    for text in texts:
        if text != CURRENT and _TARGET.fullmatch(text) is None:
            raise UsageError(f"--compute-capability is {text!r}: a number such as 8.6, or {CURRENT}")
    return tuple(sorted(set(texts), key=lambda text: [int(number) for number in re.findall(r"\d+", text)]))


def sizes_of_profile(manifest: Manifest, given: Mapping[str, Extent]) -> dict[str, AxisProfile]:
    """One profile in the user's units, complete: what was not given is all that the bundle admits.

    Without an optimum, sides take the bundle's default size and the batch its smallest, one image as a rule.
    ``rows`` is the U-Net's batch: from one row an image (no guidance) to those of guidance, best at these. Of
    ``chunks`` there is one unless more are asked for: a fixed size is the fastest.

    Raises:
        UsageError: The bundle's graphs do not admit a size.
    """
    limits, defaults = manifest.limits, manifest.defaults
    batch = given.get("batch", Extent(limits.min_batch, None, limits.max_batch)).at(limits.min_batch)
    if not limits.min_batch <= batch.minimum <= batch.maximum <= limits.max_batch:
        raise UsageError(
            f"batch {batch}: the bundle's graphs admit {limits.min_batch} to {limits.max_batch} images a "
            "call; give a batch inside, or export the bundle again with a wider --batch"
        )
    guided = manifest.record.guided_rows
    asked = given.get("rows", Extent(batch.minimum, guided * batch.optimum, guided * batch.maximum))
    most = guided * limits.max_batch
    if not limits.min_batch <= asked.minimum <= asked.maximum <= most:
        raise UsageError(f"rows {asked.at(1)}: the bundle's graphs admit {limits.min_batch} to {most} rows")
    chunks = given.get("chunks", ONE).at(1)
    if chunks.maximum > limits.max_chunks:
        raise UsageError(
            f"chunks {chunks}: the bundle's graphs admit prompts of {_counted(limits.max_chunks)}; give "
            "fewer, or export the bundle again with a larger --chunks"
        )
    return {
        "batch": batch,
        "chunks": chunks,
        "rows": asked.at(guided * batch.optimum),
        "height": _side("height", given.get("height"), limits.height, defaults.height),
        "width": _side("width", given.get("width"), limits.width, defaults.width),
    }


def _counted(chunks: int) -> str:
    return "one chunk only" if chunks == 1 else f"1 to {chunks} chunks"


def _side(name: str, given: Extent | None, limit: SizeLimit, usual: int) -> AxisProfile:
    extent = given or Extent(limit.minimum, None, limit.maximum)
    side = extent.at(usual)
    for size in (side.minimum, side.optimum, side.maximum):
        if not limit.admits(size):
            raise UsageError(
                f"{name} {side}: the bundle's graphs admit {limit}, not {size}; give a {name} inside, or "
                f"export the bundle again with a wider --{name}"
            )
    return side


def component_profile(
    spec: ComponentSpec, sizes: Mapping[str, AxisProfile], factor: int, tokens: int
) -> Profile:
    """The profile of one component: the named axes of its inputs, latents in latents, chunks in tokens.

    Args:
        spec: The component, from the manifest.
        sizes: From `sizes_of_profile`.
        factor: Pixels of one latent.
        tokens: Of one chunk.
    """
    latents = {
        f"latent_{side}": AxisProfile(*(size // factor for size in _three(sizes[side])))
        for side in ("height", "width")
    }
    context = AxisProfile(*(chunks * tokens for chunks in _three(sizes["chunks"])))
    every = {**sizes, **latents, "context": context}
    named = dict.fromkeys(axis for entry in spec.inputs for axis in entry.shape if isinstance(axis, str))
    return Profile({axis: every[axis] for axis in named})


def input_shapes(spec: ComponentSpec, profile: Profile) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The smallest, best and largest shape of every input."""
    corners = [
        {name: getattr(limit, corner) for name, limit in profile.axes.items()}
        for corner in ("minimum", "optimum", "maximum")
    ]
    return {entry.name: tuple(entry.concrete(axes) for axes in corners) for entry in spec.inputs}


def _three(limit: AxisProfile) -> tuple[int, int, int]:
    return limit.minimum, limit.optimum, limit.maximum
