"""What samplers are called elsewhere: by A1111's web UI, by diffusers, by ComfyUI and k-diffusion.

One table for everything that takes a sampler's name. Case, spaces, dashes and underscores say nothing, ``++``
is ``pp``, and a name may end in that of a schedule, as in ``DPM++ 2M Karras``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sdrt.runtime.checks import did_you_mean
from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers.registry import SAMPLERS

# Our name → A1111's, which our pictures hold, then what others say, diffusers' class first. Only what draws
# the same: names of samplers that we do not have ("DPM++ 2S a", "Restart") must stay unknown.
NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "ddim": ("DDIM", "DDIMScheduler", "DDIMParallelScheduler"),
    "ddpm": ("DDPM", "DDPMScheduler", "DDPMParallelScheduler"),
    "deis": ("DEIS", "DEISMultistepScheduler"),
    "dpm2": ("DPM2", "KDPM2DiscreteScheduler", "KDPM2", "k_dpm_2"),
    "dpm2_a": ("DPM2 a", "KDPM2AncestralDiscreteScheduler", "dpm_2_ancestral", "k_dpm_2_a", "KDPM2 a"),
    "dpmpp_2m": ("DPM++ 2M", "DPMSolverMultistepScheduler", "k_dpmpp_2m"),
    "dpmpp_2m_sde": ("DPM++ 2M SDE", "k_dpmpp_2m_sde"),
    "dpmpp_3m_sde": ("DPM++ 3M SDE", "k_dpmpp_3m_sde"),
    "dpmpp_sde": ("DPM++ SDE", "DPMSolverSDEScheduler", "k_dpmpp_sde"),
    "euler": ("Euler", "EulerDiscreteScheduler", "k_euler"),
    "euler_a": ("Euler a", "EulerAncestralDiscreteScheduler", "euler_ancestral", "k_euler_a"),
    "heun": ("Heun", "HeunDiscreteScheduler", "k_heun"),
    "lcm": ("LCM", "LCMScheduler"),
    "lms": ("LMS", "LMSDiscreteScheduler", "k_lms"),
    "pndm": ("PLMS", "PNDMScheduler"),
    "tcd": ("TCD", "TCDScheduler"),
    "unipc": ("UniPC", "UniPCMultistepScheduler", "uni_pc"),
}
# What may follow a sampler's name, in A1111's words → the option that it is here.
SCHEDULES: Final[Mapping[str, Mapping[str, str]]] = {
    "Karras": {"sigma_schedule": "karras"},
    "Exponential": {"sigma_schedule": "exponential"},
    "Beta": {"sigma_schedule": "beta"},
    "SGM Uniform": {"spacing": "sgm_uniform"},
}


def find_sampler(name: object) -> tuple[str, Mapping[str, str]]:
    """Our name for a sampler, and the options that its name implies.

    Args:
        name: Ours, or one in `NAMES`, with one in `SCHEDULES` after it or not.

    Raises:
        UsageError: No text, or no sampler of that name; the message has the nearest and all of ours.
    """
    if not isinstance(name, str):
        raise UsageError(f"sampler is {name!r}: a name is wanted, one of {', '.join(SAMPLERS)}")
    key = _key(name)
    for schedule, implied in {"": {}, **SCHEDULES}.items():
        ending = _key(schedule)
        sampler = _OURS.get(key.removesuffix(ending)) if key.endswith(ending) else None
        if sampler is not None:
            return sampler, implied
    raise UsageError(unknown_sampler(name))


def a1111_name(sampler: str, options: Mapping[str, Any]) -> str:
    """A1111's name of one of our samplers with its schedule; ours where it has none.

    Args:
        sampler: Our name.
        options: Of the recipe: ``karras``, ``sigma_schedule`` and ``spacing`` are read.
    """
    asked = {"sigma_schedule": "karras" if options.get("karras") else options.get("sigma_schedule")}
    asked["spacing"] = "sgm_uniform" if options.get("spacing") == "trailing" else options.get("spacing")
    ending = next((word for word, implied in SCHEDULES.items() if implied.items() <= asked.items()), "")
    return f"{NAMES[sampler][0] if sampler in NAMES else sampler} {ending}".strip()


def _key(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold().replace("++", "pp")))


_OURS: Final = {_key(name): ours for ours, names in NAMES.items() for name in (ours, *names)}


def unknown_sampler(name: str) -> str:
    """What is said of a name that is no sampler of ours: the nearest that there is, and all of ours."""
    question = did_you_mean(_key(name), _OURS)
    hint = f" {question}" if question else ""
    return f"unknown sampler {name[:100]!r}:{hint} allowed are {', '.join(sorted(SAMPLERS))}"
