"""The memory that is free for what is measured: the machine's and the GPU's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

from sdrt.runtime.errors import BackendError
from sdrt.runtime.system.child_process import last_line

_CGROUP: Final = Path("/sys/fs/cgroup")
# Asking through CUDA would make a context, which takes memory of its own.
_QUERY: Final = ("nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits")
_SECONDS: Final = 30.0


def available_memory() -> int:
    """Bytes that new processes can have: of the machine, or of the control group where that is less."""
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    line = next(line for line in meminfo.splitlines() if line.startswith("MemAvailable"))
    return min(int(line.split()[1]) * 1024, _group_headroom())


def _group_headroom() -> int:
    """What the control group has left; its page cache can be had too."""
    unlimited = 1 << 62
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return unlimited
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = dict(
            line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        )
        return int(limit) - used + int(stat.get("file", 0))
    except (OSError, ValueError):  # version 1, or no control groups at all
        return unlimited


def free_gpu_memory() -> int:
    """Free bytes of the first GPU that programs see (``CUDA_VISIBLE_DEVICES``), as nvidia-smi tells it.

    Raises:
        BackendError: nvidia-smi is missing, fails, or does not know.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    try:
        done = subprocess.run(
            [*_QUERY, *(["--id", first] if first else [])], capture_output=True, text=True, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"free GPU memory is not known: nvidia-smi: {error}") from error
    answer = done.stdout.split()
    if done.returncode or not answer or not answer[0].isdigit():
        said = last_line(done.stdout or done.stderr, "nothing")
        raise BackendError(f"free GPU memory is not known: nvidia-smi says {said!r}")
    return int(answer[0]) << 20
