"""Attention weights: what they do to the hidden states that a text encoder gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.prompt_syntax import MAX_WEIGHT

MIN_MEAN: Final = 1e-3  # of hidden states whose mean is restored, as a share of their size


def weighted(states: NDArray[Any], weights: Sequence[float]) -> NDArray[np.float64]:
    """Hidden states times the tokens' weights, as stable-diffusion-webui does it, in float64.

    ``z' = z · w · mean(z) / mean(z · w)``: each token's state is multiplied, then all of them, so that their
    mean is what it was (``process_tokens`` of its ``modules/sd_hijack_clip.py``). Where a mean is below
    `MIN_MEAN` of the numbers' root mean square, or the two are more than `MAX_WEIGHT` times apart or of
    different sign, they say nothing of the size of the states, and the quotient would blow them up or turn
    them round: there is no second factor then.

    Args:
        states: [1, tokens, width], of one encoder and one chunk.
        weights: One per token.
    """
    exact = states.astype(np.float64)
    product: NDArray[np.float64] = exact * np.array(weights)[:, None]
    before, after = float(exact.mean()), float(product.mean())
    small = [abs(array.mean()) <= MIN_MEAN * math.sqrt(np.mean(array**2)) for array in (exact, product)]
    if not any(small) and 1 / MAX_WEIGHT <= before / after <= MAX_WEIGHT:
        product *= before / after
    return product
