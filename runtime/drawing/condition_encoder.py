"""What turns prompts or pictures into conditioning, whatever the family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.drawing.faults import Faults
from sdrt.runtime.drawing.loop import DenoiseLoop
from sdrt.runtime.samplers.table import SamplerTable


class ConditionEncoder(Protocol):
    """Text encoders or an image encoder, with what they gave last."""

    def chunks(self, condition: Any) -> int:
        """How many times the tokens of one text a condition takes; nothing is computed."""
        ...

    def lend_embeddings(self, embeddings: Mapping[str, Sequence[NDArray[np.float32]]]) -> None:
        """Let words stand for embeddings of textual inversion until others are lent."""
        ...

    def forget(self) -> None:
        """Compute anew what is asked for: the weights are others."""
        ...

    def write(self, rows: Sequence[Any], loop: DenoiseLoop, chunks: int) -> None:
        """Put what each row of the U-Net's batch is drawn from into the loop's conditioning."""
        ...

    def raise_faults(self, faults: Faults, table: SamplerTable, rows: Sequence[Any]) -> None:
        """Raise what a run's fault words say."""
        ...
