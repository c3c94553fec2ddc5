"""A worker of ``sd-bench`` as a child process that a test speaks the protocol with."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import sdrt.benchmarks.peer_workers

WORKERS = Path(sdrt.benchmarks.peer_workers.__file__).parent


class Child:
    """A worker and the pipes to it."""

    def __init__(self, command: list[str | Path], log: Path, extra: Mapping[str, str] | None = None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        environment |= extra or {}
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=environment,
                text=True,
            )
        self.started = self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the worker ended: {self.log.read_text()}"
        return dict(json.loads(line))

    def send(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> int:
        """Close its input; the exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(60)

    def __call__(self, op: str, **fields: Any) -> dict[str, Any]:
        return self.send(json.dumps({"op": op, **{key: _plain(value) for key, value in fields.items()}}))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def child(command: list[str | Path], log: Path, extra: Mapping[str, str] | None = None) -> Iterator[Child]:
    """A worker that is gone at the end; ``extra`` is more for its environment."""
    running = Child(command, log, extra)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def drawing(folder: Path, images: int = 1, side: int = 8, **changes: Any) -> dict[str, Any]:
    """The fields of a request to draw; the latents are saved in ``folder``."""
    np.save(folder / "latents.npy", np.zeros((images, 4, side, side), np.float32))
    request = {
        "prompt": "x",
        "latents": str(folder / "latents.npy"),
        "seed": 7,
        "steps": 3,
        "guidance_scale": 7.5,
        "sampler": "ddim",
        "height": side,
        "width": side,
    }
    return {**request, **changes}
