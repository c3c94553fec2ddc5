"""The virtual environments that peers run in, and how they are made.

The peers' dependencies conflict with ours and with each other's, so each has an environment of its own under
``peers`` in `sdrt.kernels.cache.cache_folder`. An environment's folder is named after everything that it is
made of, so that another version is another folder; it counts only when pip has come to its end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sdrt.benchmarks.peers.installed_size import closure, total_bytes
from sdrt.kernels.cache import cache_folder, mark_used, private_folder, usable_folder
from sdrt.runtime.errors import BackendError, UsageError
from sdrt.runtime.system.child_process import run_told
from sdrt.runtime.system.files import write_atomically, writing

# What keeps a peer from asking a hub, and OpenVINO from reporting: it leaves that in a continuous integration
# alone. (The variables of `sdrt.runtime.system.telemetry` are inherited.)
OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CI": "true"}

Progress = Callable[[str], None]

MARKER: Final = ".sdrt-bench"  # in what is made for benchmarks; its time says when it was used
COMPLETE: Final = "sdrt-environment.json"  # written last: what the environment was made of
KIND: Final = "peers"  # of cache
LAYOUT: Final = 1  # part of every key: raise it when environments are made in another way


@dataclass(frozen=True, slots=True)
class Environment:
    """What is installed in one virtual environment.

    Attributes:
        requirements: Exact, of the peer: what its users install. Of other packages pip takes the newest.
        for_worker: Exact, what else the worker needs; it does not count as the peer's size.
        removed: What pip brings along and that is in the way.
    """

    requirements: tuple[str, ...]
    for_worker: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


# PyTorch has one build for each kind of device; where the package index has the one for CUDA, it takes
# gigabytes more.
_TORCH: Final = "torch==2.13.0"
_CLASSIC: Final = (
    "diffusers==0.39.0",
    "transformers==4.57.6",
)  # optimum works with these, not with later ones
_NUMPY: Final = "numpy==2.4.6"
_PILLOW: Final = "pillow==13.0.0"

ENVIRONMENTS: Final[dict[str, Environment]] = {
    "diffusers": Environment(
        (_TORCH, "diffusers==0.42.1", "transformers==5.23.0", "accelerate==1.15.0", _NUMPY, _PILLOW)
    ),
    "optimum-onnx": Environment(
        (
            *("optimum-onnx==0.1.0", "optimum==2.1.0", *_CLASSIC, _TORCH, _NUMPY, _PILLOW),
            *("onnxruntime==1.32.0", "onnx==1.23.2"),
        )
    ),
    "openvino": Environment(
        ("openvino-genai==2026.4.1.0", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0", _NUMPY),
        (_PILLOW,),
    ),
    "stable-diffusion.cpp": Environment(("stable-diffusion-cpp-python==0.4.7", _PILLOW), (_NUMPY,)),
    # Makes OpenVINO's models; nothing is measured in it. torchvision comes for CUDA and does not import
    # beside PyTorch for the CPU.
    "openvino-export": Environment(
        (
            *("optimum-intel==2.2.0", "optimum==2.3.0", "nncf==3.4.0", *_CLASSIC, _TORCH, _NUMPY),
            *("openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0"),
        ),
        removed=("torchvision",),
    ),
}


@dataclass(frozen=True, slots=True)
class Installed:
    """An environment that is there whole.

    Attributes:
        folder: Of the environment.
        python: Its interpreter.
        site_packages: Where its distributions are.
        environment: What it was made of.
    """

    folder: Path
    python: Path
    site_packages: Path
    environment: Environment

    def size_bytes(self) -> int:
        """Files of the peer's distributions and of those that they need."""
        return total_bytes(closure(self.environment.requirements, self.site_packages))

    def versions(self) -> dict[str, str]:
        """Of the same distributions."""
        found = closure(self.environment.requirements, self.site_packages)
        return {name: distribution.version for name, distribution in sorted(found.items())}


def find(environment: str) -> Installed | None:
    """An environment that is there whole; None if it is not.

    Args:
        environment: A key of `ENVIRONMENTS`.

    Raises:
        UsageError: No such environment.
    """
    made_of = _environment(environment)
    folder = environment_folder(environment)
    # Programs are run there: not where others can put theirs.
    if usable_folder(KIND) is None or not (folder / COMPLETE).is_file():
        return None
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return Installed(folder, folder / "bin" / "python", folder / "lib" / version / "site-packages", made_of)


def environment_folder(environment: str) -> Path:
    """Where an environment is or would be: its name and the hash of all that it is made of.

    Raises:
        UsageError: No such environment.
    """
    return cache_folder(KIND) / f"{environment}-{environment_key(_environment(environment))}"


def environment_key(environment: Environment) -> str:
    """16 hex digits that are others for any other requirement, interpreter or kind of machine."""
    facts = {
        "layout": LAYOUT,
        "requirements": environment.requirements,
        "for_worker": environment.for_worker,
        "removed": environment.removed,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "machine": platform.machine(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def install(environment: str, progress: Progress = lambda _: None) -> Installed:
    """Make an environment, if it is not there: minutes, and up to gigabytes from the package index.

    Args:
        environment: A key of `ENVIRONMENTS`.
        progress: Told a line at a time what pip does.

    Raises:
        UsageError: No such environment.
        BackendError: pip failed; the message has its last words and names its log.
        OutputError: The cache folder cannot be written.
    """
    made_of, folder = _environment(environment), environment_folder(environment)
    with writing(folder):
        private_folder(KIND)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if (found := find(environment)) is not None:
            return found
        log = folder.with_name(f"{folder.name}.log")
        with writing(folder):
            # Not made under another name and renamed: the scripts in an environment hold its path.
            _delete(folder)
            log.unlink(missing_ok=True)
            progress(f"{environment}: making the environment {folder}")
            folder.mkdir()
            mark_used(folder / MARKER)
            venv.create(folder, with_pip=True, symlinks=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        wanted = [*made_of.requirements, *made_of.for_worker]
        run_logged([*pip, "install", *wanted], log, lambda line: progress(f"{environment}: {line}"))
        if made_of.removed:
            run_logged([*pip, "uninstall", "--yes", *made_of.removed], log, lambda _: None)
        document = {"requirements": wanted, "removed": made_of.removed}
        write_atomically(folder / COMPLETE, (json.dumps(document, indent=1) + "\n").encode())
    found = find(environment)
    assert found is not None
    return found


def remove(environment: str) -> None:
    """Delete an environment, and what is left of others of that name.

    Raises:
        UsageError: No such environment.
        OutputError: It cannot be deleted.
    """
    _environment(environment)
    prefix = f"{environment}-"
    parent = cache_folder(KIND)
    for found in sorted(parent.iterdir()) if parent.is_dir() else ():
        key, _, _ = found.name.removeprefix(prefix).partition(".")
        if found.name.startswith(prefix) and len(key) == 16 and set(key) <= set("0123456789abcdef"):
            with writing(found):
                _delete(found)


def _delete(found: Path) -> None:
    """An environment, its log or its lock; nothing where there is none.

    Raises:
        OSError: It cannot be deleted, or it is a folder that is no environment, or a link to one.
    """
    if not found.is_dir():
        found.unlink(missing_ok=True)
        return
    ours = any((found / name).is_file() for name in (MARKER, COMPLETE)) or not any(found.iterdir())
    if found.is_symlink() or not ours:
        raise FileExistsError(errno.EEXIST, "it is no environment that sd-bench made: remove it by hand")
    # The mark first: what is deleted by half must not count as whole.
    (found / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(found)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for; it ends with the process, however that ends.

    Raises:
        OutputError: The file cannot be made.
    """
    with writing(file):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def run_logged(
    command: Sequence[str], log: Path, progress: Progress, environment: Mapping[str, str] | None = None
) -> None:
    """Run a program, add what it prints to a log, and tell it a line at a time.

    Args:
        command: The program and its words.
        log: The file; its folder exists.
        progress: Told every line but warnings.
        environment: More variables for it.

    Raises:
        BackendError: It failed; the message has its last line and the log's path.
        OutputError: The log cannot be written.
    """
    told = ""

    def tell(line: str, _seconds: float) -> None:
        nonlocal told
        if line != told:
            told = line
            progress(line[:200])

    with writing(log), log.open("ab") as stream:
        stream.write(f"$ {' '.join(command)}\n".encode())
        stream.flush()
        every = {**os.environ, **(environment or {})}
        ended = run_told(command, tell, reads="both", log=stream, environment=every)
    if ended.status != 0:
        raise BackendError(
            f"{' '.join((Path(command[0]).name, *command[1:4]))} … failed with exit status "
            f"{ended.status}: {told[:400] or 'it printed nothing'}; its log is {log}"
        )


def _environment(name: str) -> Environment:
    if name not in ENVIRONMENTS:
        raise UsageError(f"the environment is {name!r}: one of {', '.join(ENVIRONMENTS)}")
    return ENVIRONMENTS[name]
