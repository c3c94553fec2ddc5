"""Export a checkpoint or an architecture into the cache of ``sd-bench``, unless it is there.

    python -m sdrt.benchmarks.export_model MODEL --batch N --height MIN..MAX --width MIN..MAX

It prints the bundle's folder. A process of its own, so that PyTorch's memory is gone when measuring begins.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sdrt.kernels.cache import cache_folder
from sdrt.runtime.errors import EXIT_INTERRUPTED, SdrtError
from sdrt.runtime.manifest import MANIFEST_NAME


def main(argv: Sequence[str] | None = None) -> int:
    """Export and print the folder; the exit status is that of ``sd-export``."""
    commands = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands.add_argument("model", help="a diffusers folder, a hub id, or the name of an architecture")
    commands.add_argument("options", nargs=argparse.REMAINDER, help="of sd-export")
    arguments = commands.parse_args(argv)
    from sdrt.export import cli
    from sdrt.export.architectures import open_architecture
    from sdrt.export.checkpoint import fingerprint, open_checkpoint
    from sdrt.export.cli_options import ARCHITECTURES
    from sdrt.runtime.command import say

    is_architecture = arguments.model in ARCHITECTURES
    try:
        checkpoint = (open_architecture if is_architecture else open_checkpoint)(arguments.model)
        key = f"{fingerprint(checkpoint)} {' '.join(arguments.options)} {sdrt_export_key()}"
    except SdrtError as error:
        say("sd-bench", str(error))
        return error.exit_status
    name = checkpoint.path.name if Path(arguments.model).is_dir() else arguments.model.replace("/", "--")
    out = cache_folder("bench") / "bundles" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not (out / MANIFEST_NAME).is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        source = ["--architecture", arguments.model, "--random-weights"]
        words = source if is_architecture else [arguments.model]
        if status := cli.main([*words, str(out), "--quiet", *arguments.options]):
            return status
    print(out)
    return 0


def sdrt_export_key() -> str:
    """Changes when a newer exporter would write another bundle."""
    from sdrt import __version__
    from sdrt.runtime.manifest import FORMAT_VERSION

    return f"sdrt {__version__} format {FORMAT_VERSION}"


def exported(model: str, options: Sequence[str]) -> Path:
    """The bundle of a checkpoint or an architecture, exported by a process of its own if need be.

    Args:
        model: A diffusers folder, a hub id, or the name of an architecture.
        options: Of ``sd-export``.

    Raises:
        SdrtError: The export failed; with the exit status of ``sd-export``, which has said why.
    """
    words = [sys.executable, "-m", "sdrt.benchmarks.export_model", model, *options]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if done.returncode:
        failure = SdrtError(f"{model} was not exported")
        failure.exit_status = done.returncode
        raise failure
    return Path(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
