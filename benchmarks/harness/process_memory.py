"""What Linux says about memory: of a process, and what is left for new ones."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_CGROUP: Final = Path("/sys/fs/cgroup")


def process_memory(pid: int) -> dict[str, int]:
    """``VmHWM``, ``VmRSS`` and ``RssAnon`` of a process in bytes; empty if it has gone.

    VmHWM is the most that it ever held; it and VmRSS count pages of mapped files, RssAnon does not.
    """
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    wanted = ("VmHWM", "VmRSS", "RssAnon")
    pairs = (line.split(":", 1) for line in text.splitlines() if line.startswith(wanted))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


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


def descendants(pid: int) -> dict[int, int]:
    """Children of a process, their children and so on: number → start time, which tells reused numbers."""
    parents: dict[int, tuple[int, int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (found := _parent_and_start(int(entry.name))):
            parents[int(entry.name)] = found
    below: dict[int, int] = {}
    frontier = {pid}
    while frontier:
        frontier = {child for child, (parent, _) in parents.items() if parent in frontier} - set(below)
        below |= {child: parents[child][1] for child in frontier}
    return below


def start_time(pid: int) -> int | None:
    """When a process began, in the kernel's ticks; None if it has gone."""
    found = _parent_and_start(pid)
    return None if found is None else found[1]


def _parent_and_start(pid: int) -> tuple[int, int] | None:
    try:
        # The name, in brackets, may hold spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), int(fields[19])
