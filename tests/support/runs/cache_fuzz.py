"""Flip single bytes in every kind of file of the cache, with times restored: what is drawn stays the same.

    PYTHONPATH=tests python -m support.runs.cache_fuzz [--count 50] [--seed 0] [KIND ...]

Each flip is followed by a load and a drawing of the embedded model, or by a compilation, compared bit for bit
with one without a cache. A flip that is still there afterwards was not noticed, and is an error too, but for
the key: any is as good, and what another one sealed is made anew.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
from support.runs.cache_runs import flip_byte

from sdrt.kernels.cache import read_kept, write_kept
from sdrt.kernels.compile import cubin
from sdrt.runtime.backends.trt.runtime_cache import KIND as RUNTIME_CACHES
from sdrt.runtime.bundle import verified_files
from sdrt.runtime.pipeline import Pipeline


class Kind(NamedTuple):
    """Files of the cache, and what is made with them.

    Attributes:
        files: A pattern in the cache's folder.
        make: What must stay the same.
        remade: Whether a flip must be gone then.
    """

    files: str
    make: Callable[[], bytes]
    remade: bool = True


def _draw(backend: str) -> Callable[[], bytes]:
    def draw() -> bytes:
        with Pipeline.load(backend=backend) as pipeline:
            output = pipeline("a red apple", seed=1, num_inference_steps=2, output_type="numpy")
        assert output.latents is not None
        return np.asarray(output.latents).tobytes() + np.asarray(output.images).tobytes()

    return draw


def _runtime_cache() -> bytes:
    """As `sdrt.runtime.backends.trt.runtime_cache` takes one, else compiles."""
    compiled = b"compiled kernels" * 1000
    kept = read_kept(RUNTIME_CACHES, "plan.cache", 1 << 20)
    if kept is None:
        write_kept(RUNTIME_CACHES, "plan.cache", compiled)
    return compiled if kept is None else kept


_ORT, _OPENVINO = _draw("onnxruntime-cpu"), _draw("openvino-cpu")
KINDS = {
    "prepared graph": Kind("onnxruntime-cpu/*/model.onnx", _ORT),
    "prepared weights": Kind("onnxruntime-cpu/*/model.onnx.data", _ORT),
    "prepared record": Kind("onnxruntime-cpu/*/record.json", _ORT),
    "compiled model": Kind("openvino-cpu/*/main.blob", _OPENVINO),
    "compiled part": Kind("openvino-cpu/*/part-*.blob", _OPENVINO),
    "compiled layout": Kind("openvino-cpu/*/layout.json", _OPENVINO),
    "compiled record": Kind("openvino-cpu/*/record.json", _OPENVINO),
    "verified files": Kind("verified/*.json", _ORT),
    "key": Kind("key", _ORT, remade=False),
    "cubin": Kind("kernels/*.cubin", lambda: cubin("check_finite", "sm_90")),
    "runtime cache": Kind(f"{RUNTIME_CACHES}/*.cache", _runtime_cache),
}


# Files that were just written are remembered at once: a flip must show in their time of change.
@patch.object(verified_files, "SETTLED_SECONDS", 0.0)
def fuzz(kind: Kind, count: int, generator: np.random.Generator) -> list[str]:
    """What went wrong of ``count`` flips; ``SDRT_CACHE`` is a folder that this may fill."""
    cache = Path(os.environ["SDRT_CACHE"])
    os.environ["SDRT_CACHE"] = os.devnull
    wanted = kind.make()
    os.environ["SDRT_CACHE"] = str(cache)
    wrong = [] if kind.make() == wanted else ["the first drawing with a cache differs"]
    for _ in range(count):
        kind.make()  # now everything there is known to be whole
        files = sorted(cache.glob(kind.files))
        file = files[generator.integers(len(files))]
        position = int(generator.integers(file.stat().st_size))
        flip_byte(file, position)
        flipped = file.read_bytes()
        where = f"{file.relative_to(cache)} at {position} of {len(flipped)}"
        if kind.make() != wanted:
            wrong.append(f"another result: {where}")
        if kind.remade and file.exists() and file.read_bytes() == flipped:
            wrong.append(f"not noticed: {where}")
    return wrong


def main() -> int:
    """Fuzz and print a line for each kind; the exit status says whether all was well."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    options.add_argument("--count", type=int, default=50)
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    failures = 0
    for name in arguments.kinds or KINDS:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="sdrt-fuzz-") as folder:
            os.environ["SDRT_CACHE"] = folder
            wrong = fuzz(KINDS[name], arguments.count, np.random.default_rng(arguments.seed))
        failures += len(wrong)
        seconds = time.perf_counter() - began
        print(f"{name}: {arguments.count} flips, {len(wrong)} wrong, {seconds:.0f} s", *wrong, sep="\n  ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
