"""Export a checkpoint or an architecture into the cache of ``sd-bench``, unless it is there.

    python -m sdrt.benchmarks.export_model MODEL --batch N --height MIN..MAX --width MIN..MAX

It prints the bundle's folder, and on standard error what ``sd-export`` does. A process of its own, so that
PyTorch's memory is gone when measuring begins.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from sdrt.benchmarks.told_process import Tell, run_told
from sdrt.kernels.cache import cache_folder, mark_used, private_folder, remove_unused
from sdrt.runtime.bundle.manifest import MANIFEST_NAME
from sdrt.runtime.errors import SdrtError
from sdrt.runtime.system.files import writing

KIND: Final = "bench/bundles"  # of cache
NAMES: Final = re.compile(r".+-[0-9a-f]{16}", re.DOTALL)  # of the folders there, as of those with engines
MARKER: Final = ".sdrt-bench"  # in what is made for benchmarks; its time says when it was used
# Of the runtime what says which inputs a graph has and what a manifest holds.
RUNTIME_SOURCES: Final = (
    "bundle/families/*.py",
    "bundle/manifest.py",
    "bundle/manifest_json.py",
    "bundle/manifest_rules.py",
    "samplers/edm.py",
    "samplers/guidance.py",
    "samplers/schedule.py",
    "samplers/table.py",
)
# Whose versions change the graphs that PyTorch's exporter and the passes give.
LIBRARIES: Final = ("diffusers", "onnx", "onnx-ir", "onnxscript", "torch", "transformers")


def main(argv: Sequence[str] | None = None) -> int:
    """Export and print the folder; the exit status is that of ``sd-export``."""
    commands = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands.add_argument("model", help="a diffusers folder, a hub id, or the name of an architecture")
    commands.add_argument("options", nargs=argparse.REMAINDER, help="of sd-export")
    arguments = commands.parse_args(argv)
    from sdrt.export.checkpoint.architectures import open_architecture
    from sdrt.export.checkpoint.fingerprint import fingerprint
    from sdrt.export.checkpoint.reader import open_checkpoint
    from sdrt.export.cli import main as cli
    from sdrt.export.cli.options import ARCHITECTURES
    from sdrt.runtime.console.run_command import say

    is_architecture = arguments.model in ARCHITECTURES
    try:
        checkpoint = (open_architecture if is_architecture else open_checkpoint)(arguments.model)
        key = f"{fingerprint(checkpoint)} {' '.join(arguments.options)} {exporter_key()}"
        with writing(cache_folder(KIND)):
            parent = private_folder(KIND)
    except SdrtError as error:
        say("sd-bench", str(error))
        return error.exit_status
    name = checkpoint.path.name if Path(arguments.model).is_dir() else arguments.model.replace("/", "--")
    out = parent / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not (out / MANIFEST_NAME).is_file():
        remove_unused(parent, NAMES, MARKER)  # of other checkpoints, and of exporters that are no more
        source = ["--architecture", arguments.model, "--random-weights"]
        words = source if is_architecture else [arguments.model]
        with contextlib.redirect_stdout(sys.stderr):  # what it shows of its progress
            status = cli.main([*words, str(out), *arguments.options])
        if status:
            return status
    mark_used(out / MARKER)
    print(out)
    return 0


def exporter_key() -> str:
    """Changes when the exporter here would write another bundle: version, format, and `exporter_digest`."""
    from sdrt import __version__
    from sdrt.runtime.bundle.manifest import FORMAT_VERSION

    return f"sdrt {__version__} format {FORMAT_VERSION} exporter {exporter_digest(package_root())}"


def package_root() -> Path:
    """The folder that holds ``export`` and ``runtime``, in a checkout and installed."""
    import sdrt.export

    return Path(sdrt.export.__file__).resolve().parent.parent


def exporter_digest(root: Path) -> str:
    """SHA-256 of what decides a bundle beside the checkpoint: sources by their names, and library versions.

    Args:
        root: See `package_root`.
    """
    sources = [*(root / "export").rglob("*.py"), *(root / "export" / "data").rglob("*")]
    sources += [file for name in RUNTIME_SOURCES for file in (root / "runtime").glob(name)]
    digest = hashlib.sha256()
    for file in sorted(file for file in sources if file.is_file() and "__pycache__" not in file.parts):
        digest.update(f"{file.relative_to(root).as_posix()} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            digest.update(f"{name} {version(name)}\n".encode())
    return digest.hexdigest()[:16]


def exported(model: str, options: Sequence[str], tell: Tell = lambda _line, _seconds: None) -> Path:
    """The bundle of a checkpoint or an architecture, exported by a process of its own if need be.

    Args:
        model: A diffusers folder, a hub id, or the name of an architecture.
        options: Of ``sd-export``.
        tell: Told what goes on: the last line of ``sd-export``, and the seconds since the start.

    Raises:
        SdrtError: The export failed; with the exit status of ``sd-export`` and its last line.
    """
    done = run_told([sys.executable, "-m", "sdrt.benchmarks.export_model", model, *options], tell)
    done.check(f"{model} was not exported", "sd-bench")
    return Path(done.output.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
