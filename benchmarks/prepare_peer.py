"""Bring a checkpoint into a peer's form, in a process of its own: PyTorch's memory is gone when it ends.

    python -m sdrt.benchmarks.prepare_peer PEER MODEL

It prints one line of JSON: ``{"folder": …}`` or ``{"error": …}``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sdrt.benchmarks.last_line import last_line
from sdrt.runtime.errors import EXIT_INTERRUPTED, SdrtError


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare and print; the exit status is 0 in both cases."""
    commands = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands.add_argument("peer")
    commands.add_argument("model", help="a diffusers folder, a hub id, or the name of an architecture")
    arguments = commands.parse_args(argv)
    from sdrt.benchmarks.peer_models import prepare

    try:
        folder = prepare(arguments.peer, arguments.model)
        answer = {"folder": str(folder)}
    except SdrtError as error:
        answer = {"error": str(error)}
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    print(json.dumps(answer))
    return 0


def prepared(peer: str, model: str) -> Path:
    """A peer's form of a model, made if need be.

    Raises:
        SdrtError: It cannot be made.
    """
    words = [sys.executable, "-m", "sdrt.benchmarks.prepare_peer", peer, model]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if done.returncode:
        last = last_line(done.stderr, "it gave no reason")
        raise SdrtError(f"exit status {done.returncode}: {last}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise SdrtError(answer["error"])
    return Path(answer["folder"])


if __name__ == "__main__":
    sys.exit(main())
