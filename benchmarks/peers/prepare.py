"""Bring a checkpoint into a peer's form, in a process of its own: PyTorch's memory is gone when it ends.

    python -m sdrt.benchmarks.peers.prepare PEER MODEL

It prints one line of JSON, ``{"folder": …}`` or ``{"error": …}``, and on standard error what it does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sdrt.runtime.errors import EXIT_INTERRUPTED, SdrtError
from sdrt.runtime.system.child_process import Tell, run_told


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare and print; the exit status is 0 in both cases."""
    commands = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands.add_argument("peer")
    commands.add_argument("model", help="a diffusers folder, a hub id, or the name of an architecture")
    arguments = commands.parse_args(argv)
    from sdrt.benchmarks.peers.models import prepare

    try:
        folder = prepare(arguments.peer, arguments.model, lambda line: print(line, file=sys.stderr))
        answer = {"folder": str(folder)}
    except SdrtError as error:
        answer = {"error": str(error)}
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    print(json.dumps(answer))
    return 0


def prepared(peer: str, model: str, tell: Tell = lambda _line, _seconds: None) -> Path:
    """A peer's form of a model, made if need be.

    Args:
        peer: A key of `sdrt.benchmarks.peers.registry.PEERS`.
        model: A diffusers folder, a hub id, or the name of an architecture.
        tell: Told what goes on: the stage or the exporter's last line, and the seconds since the start.

    Raises:
        SdrtError: It cannot be made.
    """
    done = run_told([sys.executable, "-m", "sdrt.benchmarks.peers.prepare", peer, model], tell)
    if done.status == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if done.status:
        raise SdrtError(f"exit status {done.status}: {done.last_line or 'it gave no reason'}")
    answer = json.loads(done.output.splitlines()[-1])
    if "error" in answer:
        raise SdrtError(answer["error"])
    return Path(answer["folder"])


if __name__ == "__main__":
    sys.exit(main())
