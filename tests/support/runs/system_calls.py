"""A program watched with strace, in a fresh home: whom it asks, and which files it leaves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Calls by which anything reaches another machine, the resolver of names included. (A socket that is only made
# reaches none: urllib3 makes one to see whether the system has IPv6.)
_CALLS = "connect,sendto,sendmsg,sendmmsg"
_ELSEWHERE = re.compile(r"\bsin6?_addr\b")


@dataclass(frozen=True)
class Watched:
    """What a program did.

    Attributes:
        status: That it exited with.
        output: Of stdout.
        errors: Of stderr.
        network: The system calls of all its processes that name an address of the internet's protocols.
        left: Files that it left below the home and the temporary folder, relative to them.
    """

    status: int
    output: str
    errors: str
    network: list[str]
    left: list[str]


def missing_strace() -> str:
    """Why programs cannot be watched here; empty where they can be."""
    if shutil.which("strace") is None:
        return "strace is not installed (Debian: apt-get install strace)"
    tried = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"strace may not trace here: {tried.stderr.strip()[:200]}"


def watched(
    command: Sequence[str | Path], folder: Path, environment: Mapping[str, str] | None = None
) -> Watched:
    """Run a program as a user who has never run anything: in a fresh home, with no variable but the path.

    Args:
        command: Its words; the first is a script of this environment, such as ``sd-run``, or ``python``.
        folder: To run in, and to make the home in; an empty one.
        environment: Variables that it has besides.
    """
    home, temporary, log = folder / "home", folder / "temporary", folder / "calls"
    for place in (home, temporary):
        place.mkdir()
    program, *words = map(str, command)
    result = subprocess.run(
        [
            *(
                "strace",
                "--follow-forks",
                "--seccomp-bpf",
                "-qq",
                "-e",
                f"trace={_CALLS}",
                "-e",
                "signal=none",
            ),
            *("-o", str(log), str(Path(sys.executable).parent / program), *words),
        ],
        env={"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(temporary), **(environment or {})},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    calls = log.read_text(errors="replace").splitlines()
    left = [
        str(file.relative_to(folder))
        for place in (home, temporary)
        for file in sorted(place.rglob("*"))
        if not file.is_dir()
    ]
    return Watched(
        result.returncode,
        result.stdout,
        result.stderr,
        [call for call in calls if _ELSEWHERE.search(call)],
        left,
    )
