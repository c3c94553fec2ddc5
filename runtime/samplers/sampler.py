"""What a sampler is, and the decorator that makes one of the function beside which its facts stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from sdrt.runtime.samplers.schedule import NoiseSchedule
from sdrt.runtime.samplers.table import SamplerOptions, SamplerTable

# Options of the samplers that go from one noise level to another, whatever the levels are.
LEVELS: Final = "spacing sigma_schedule timesteps sigmas"

# From schedule, num_inference_steps, options and start, all of them checked.
Solver = Callable[[NoiseSchedule, int, SamplerOptions, int], SamplerTable]


@dataclass(frozen=True)
class Sampler:
    """What users choose by name: the solver that makes its table, its options, and how it reads a checkpoint.

    What it does with a checkpoint's configuration is what diffusers' class does that it equals, so that
    choosing it is ``Class.from_config(pipe.scheduler.config)``.

    * ``name``: ours;
    * ``solver``: makes the table of a run;
    * ``other_names``: A1111's, which our pictures hold, then what others say, diffusers' class first;
    * ``options``: names of `SamplerOptions` that mean something to it;
    * ``inherits``: those of them whose defaults a bundle may set;
    * ``max_order``: the highest ``solver_order``;
    * ``timestep_spacing``, ``set_alpha_to_one``: where the checkpoint does not say its own;
    * ``zero_snr``: whether it knows ``rescale_betas_zero_snr``, which it leaves out if not.
    """

    name: str
    solver: Solver
    other_names: tuple[str, ...] = ()
    options: frozenset[str] = frozenset()
    inherits: frozenset[str] = frozenset()
    max_order: int = 1
    timestep_spacing: str = "linspace"
    set_alpha_to_one: bool = True
    zero_snr: bool = False

    @property
    def edm(self) -> bool:
        """Whether it can draw with an EDM model, which has sigmas in place of training timesteps."""
        return "sigmas" in self.options

    @property
    def distilled(self) -> bool:
        """Whether it is for models that draw in a few steps, and in a few steps only."""
        return "original_inference_steps" in self.options

    def reads(self, schedule: NoiseSchedule) -> NoiseSchedule:
        """The schedule with this sampler's defaults, and without what it does not know."""
        if schedule.rescale_betas_zero_snr and not self.zero_snr:
            schedule = replace(schedule, rescale_betas_zero_snr=False)
        return schedule.with_defaults(
            timestep_spacing=self.timestep_spacing, set_alpha_to_one=self.set_alpha_to_one
        )

    def inherited(self, defaults: SamplerOptions) -> dict[str, Any]:
        """Those of a bundle's defaults that are this sampler's, by name."""
        return {name: value for name, value in defaults.to_dict().items() if name in self.inherits}


def sampler(*, options: str = "", inherits: str = "", **facts: Any) -> Callable[[Solver], Sampler]:
    """A decorator: the `Sampler` that has the decorated function's name and the function as its solver.

    Args:
        options: Names with spaces between them, beside those that it inherits.
        inherits: Names of those that it takes from a checkpoint's scheduler, with spaces between them.
        **facts: The other fields of `Sampler` that are not as they are by default.
    """
    own = frozenset(inherits.split())
    names = frozenset(options.split()) | own

    def decorated(solver: Solver) -> Sampler:
        return Sampler(solver.__name__, solver, options=names, inherits=own, **facts)

    return decorated
