"""The free memory of the GPU that sdrt uses, as nvidia-smi tells it.

Asking through CUDA would make a context, which takes memory of its own.
"""

from __future__ import annotations

import os
import subprocess
from typing import Final

from sdrt.benchmarks.harness.last_line import last_line
from sdrt.runtime.errors import BackendError

QUERY: Final = ("nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits")
_SECONDS: Final = 30.0


def free_gpu_memory() -> int:
    """Free bytes of the first GPU that programs see (``CUDA_VISIBLE_DEVICES``).

    Raises:
        BackendError: nvidia-smi is missing, fails, or does not know.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    try:
        done = subprocess.run(
            [*QUERY, *(["--id", first] if first else [])], capture_output=True, text=True, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"free GPU memory is not known: nvidia-smi: {error}") from error
    answer = done.stdout.split()
    if done.returncode or not answer or not answer[0].isdigit():
        said = last_line(done.stdout or done.stderr, "nothing")
        raise BackendError(f"free GPU memory is not known: nvidia-smi says {said!r}")
    return int(answer[0]) << 20
