"""What a run's figures were taken on: the machine, and the version of sdrt."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Final

import sdrt
from sdrt.benchmarks.document.document import Machine
from sdrt.runtime.backends.executor import usable_cores

_PROBE_BYTES: Final = bytes(1 << 20)  # stays in a core's own cache
_PROBE_REPEATS: Final = 40  # some 30 ms


def probe_seconds() -> float:
    """Seconds of a fixed piece of work in one thread: SHA-256 of 40 MiB."""
    started = time.perf_counter()
    digest = hashlib.sha256()
    for _ in range(_PROBE_REPEATS):
        digest.update(_PROBE_BYTES)
    return time.perf_counter() - started


def this_machine() -> Machine:
    """What this runs on."""
    return Machine(
        cpu=_cpu(),
        cores=usable_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.release()}, {_distribution()}",
        python=platform.python_version(),
        gpus=_gpus(),
    )


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return "unknown distribution"


def _gpus() -> tuple[str, ...]:
    from sdrt.runtime.devices.gpu.discovery import find_gpu
    from sdrt.runtime.errors import BackendError

    found: list[str] = []
    while len(found) < 64:
        try:
            found.append(str(find_gpu(len(found))))
        except BackendError:
            break
    return tuple(found)


def sdrt_version() -> str:
    """The version, and the commit where this is a checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    # `ls-files`: an installed sdrt may lie inside somebody else's repository.
    tracked = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
    describe = [*git, "describe", "--always", "--dirty", "--exclude=*"]
    try:
        subprocess.run(tracked, check=True, capture_output=True)
        commit = subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return sdrt.__version__
    return f"{sdrt.__version__} ({commit})"
