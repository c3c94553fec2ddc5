"""Published architectures without their weights: a checkpoint of the real shapes that needs no download.

The configurations under ``data/architectures`` are those that the models were published with. The weights
are random and seeded; speed and memory do not depend on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.fit import check_fit
from sdrt.export.checkpoint.reader import read_checkpoint
from sdrt.runtime.errors import UsageError

# Configurations of published models, in diffusers' format without weights and vocabularies.
FOLDER: Final = Path(__file__).parents[1] / "data" / "architectures"
# Stable Diffusion 1.5; 2.1 for 768 pixels, which predicts v; SDXL base 1.0.
ARCHITECTURES: Final = ("sd15", "sd21", "sdxl")


def open_architecture(name: str, *, seed: int = 0) -> Checkpoint:
    """A checkpoint of a published architecture with random weights, which are made when they are loaded.

    Args:
        name: ``sd15``, ``sd21`` or ``sdxl``.
        seed: Of the weights.

    Raises:
        UsageError: No such architecture, or a negative seed.
    """
    if name not in ARCHITECTURES:
        raise UsageError(f"the architecture is {name!r}: one of {', '.join(ARCHITECTURES)}")
    if seed < 0:
        raise UsageError(f"the seed of the weights is {seed}: a whole number of 0 or more")
    checkpoint = read_checkpoint(FOLDER / name, f"{name} with random weights, seed {seed}", seed)
    check_fit(checkpoint)
    return checkpoint
