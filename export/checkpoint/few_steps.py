"""Models that were distilled to draw in a few steps: what tells them, and how they are drawn by default.

Their pipelines, networks and sizes are those of other models. That they want few steps and no guidance stands
in their names alone, and for SDXL Turbo in a scheduler that nothing else comes with. (Latent consistency
models are told by their U-Net or their sampler: `sdrt.export.manifest.default_steps`.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sdrt.export.checkpoint.limits import MAX_CONFIG_BYTES
from sdrt.runtime.system.untrusted import read_limited

TRAILING: Final = {"timestep_spacing": "trailing"}
_EULER: Final = {"_class_name": "EulerDiscreteScheduler", **TRAILING}
_ANCESTRAL: Final = {"_class_name": "EulerAncestralDiscreteScheduler", **TRAILING}


@dataclass(frozen=True, slots=True)
class FewSteps:
    """How a model is drawn that was distilled to few steps.

    Attributes:
        title: As people call its kind.
        steps: Noise levels.
        why: What tells it, for people.
        guidance: Of classifier-free guidance; at 1 there is none.
        scheduler: What a U-Net of this kind alone wants of the scheduler of the checkpoint that it goes into.
    """

    title: str
    steps: int
    why: str
    guidance: float = 1.0
    scheduler: Mapping[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """What is said of it."""
        return (
            f"drawn in {self.steps} step{'s' if self.steps > 1 else ''} without guidance by default, as "
            f"{self.title}, for {self.why} (--default-steps and --default-guidance overrule it)"
        )


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a name says.

    Attributes:
        title: As people call it.
        words: What the name has.
        steps: Where it does not say how many; None where such a name says nothing.
        scheduler: See `FewSteps`.
    """

    title: str
    words: str
    steps: int | None
    scheduler: Mapping[str, Any] = field(default_factory=dict)


_KINDS: Final = (
    # Its U-Net for one step predicts the clean latents, and is named so.
    _Kind("SDXL Lightning", r"lightning.*x0", 1, {**_EULER, "prediction_type": "sample"}),
    _Kind("SDXL Lightning", r"(?<!pytorch.)(?<![a-z])lightning(?![a-z])", 4, _EULER),
    _Kind("Hyper-SD", r"(?<![a-z])hyper.?sd", None),
    _Kind("SD Turbo", r"(?<![a-z])sd.?turbo(?![a-z])", 4, _EULER),
    _Kind("SDXL Turbo", r"turbo(?![a-z])", 4, _ANCESTRAL),
)
_STEPS: Final = re.compile(r"(?<!\d)(\d{1,2})[ _-]?steps?(?![a-z])")


def few_steps(names: Iterable[str], scheduler: Mapping[str, Any]) -> FewSteps | None:
    """How a checkpoint is drawn, if something says that it was distilled to few steps.

    Args:
        names: Whatever the checkpoint is called, the clearest first.
        scheduler: Its ``scheduler_config.json``, with the class that reads it.
    """
    for name in names:
        text, counted = name.lower(), _STEPS.search(name.lower())
        for kind in _KINDS:
            steps = int(counted[1]) if counted else kind.steps
            if steps and re.search(kind.words, text):
                return FewSteps(kind.title, steps, f"it is called {name}", scheduler=kind.scheduler)
    if _ANCESTRAL.items() <= scheduler.items():
        why = "its scheduler is EulerAncestralDiscreteScheduler with trailing timesteps"
        return FewSteps("SDXL Turbo", 4, why, scheduler=_ANCESTRAL)
    return None


def unlike_few_steps(scheduler: Mapping[str, Any]) -> Iterator[str]:
    """A line where a scheduler is one that many few-step models have, and some others, and no name tells."""
    if _EULER.items() <= scheduler.items() and not scheduler.get("rescale_betas_zero_snr"):
        yield (
            "the scheduler has trailing timesteps, as that of models for a few steps: if this is one, export "
            "it with --default-steps 4 --default-guidance 1"
        )


def names_of(path: Path, source: str, configs: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Whatever a folder in diffusers' format is called.

    Args:
        path: The folder.
        source: What the user named.
        configs: Its ``model_index.json`` and configurations, of which some say what they were made from.
    """
    given = Path(source)
    cached = [part for part in path.parts if part.startswith("models--")]
    found = [given.resolve().name if given.exists() else source, *cached, _title(path)]
    found += [str(config.get("_name_or_path", ""))[-100:] for config in configs]
    return tuple(name for name in found if name)


def _title(path: Path) -> str:
    """The first heading of the model's card."""
    try:
        card = read_limited(path / "README.md", MAX_CONFIG_BYTES).decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return ""
    headings = (line for line in card.splitlines() if line.startswith("# "))
    return next(headings, "")[2:102].strip()
