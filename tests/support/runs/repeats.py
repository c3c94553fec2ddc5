"""Whether a backend's numbers repeat from run to run."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.export.parity.components import compare

# GroupNorm of ONNX Runtime's CUDA provider adds its blocks' sums with atomics, in the order they end in.
UNORDERED = frozenset({"onnxruntime-cuda"})


def assert_repeats(backend: str, found: NDArray[Any], expected: NDArray[Any], bound: float) -> None:
    """Bit for bit; for a backend that adds in no fixed order, within ``bound``: its rounding's tolerance."""
    if backend not in UNORDERED:
        np.testing.assert_array_equal(found, expected)
        return
    assert np.isfinite(found).all()
    error, _ = compare(found, expected)
    assert error <= bound
