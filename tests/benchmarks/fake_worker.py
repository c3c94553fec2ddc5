"""A worker of sd-bench that holds nothing: it answers at once, or misbehaves as it is told.

    python fake_worker.py NAME LOG [BEHAVIOUR@OP]

Each request leaves a line ``NAME OP`` in LOG.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def misbehave(behaviour: str, log: Path) -> None:
    """Do what no worker should."""
    if behaviour == "exit":
        print("the library says why", file=sys.stderr)
        sys.exit(3)
    if behaviour == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "crash":
        ctypes.string_at(0)
    if behaviour == "garbage":
        print("Downloading: 10%", flush=True)
    if behaviour in ("hang", "children"):
        if behaviour == "children":
            child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            log.write_text(str(child.pid))
        time.sleep(1000)


def save_npy(path: str, kind: str, shape: tuple[int, ...], element: bytes) -> None:
    """NumPy's format 1.0, one element again and again; importing NumPy takes longer than all the rest."""
    header = str({"descr": kind, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    body = element * math.prod(shape)
    Path(path).write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What a quick subject says."""
    op = request["op"]
    if op == "load":
        times = {"import_seconds": 0.01, "load_seconds": 0.02}
        return {**times, "versions": {"fake": "1.0"}, "stages": ["unet"], "notes": ["does nothing"]}
    if op == "draw":
        if request["image"]:
            Path(request["image"]).write_bytes(b"a picture")
        if request["pixels"]:
            shade, (height, width) = len(sys.argv[1]), (request["height"], request["width"])
            save_npy(request["pixels"], "|u1", (1, height, width, 3), bytes([shade]))
            save_npy(
                request["final_latents"], "<f4", (1, 4, height // 8, width // 8), struct.pack("<f", shade)
            )
        return {"seconds": 0.03, "save_seconds": 0.001, "step_seconds": [0.01] * (request["steps"] - 1)}
    if op == "profile":
        kernels = [{"name": "a_gemm<half>", "seconds": 0.0015, "launches": 4.0}]
        return {
            "seconds": 0.002,
            "launches": 5.0,
            "host": {"launches": 1.0, "waits": 0.0},
            "kernels": kernels,
        }
    return {"seconds": [0.2] * request["repeats"]} if op == "stage" else {}


def main() -> None:
    """Serve."""
    name, log, told = sys.argv[1], Path(sys.argv[2]), (sys.argv[3:] or ["@"])[0]
    behaviour, _, at = told.partition("@")
    if at == "start":
        misbehave(behaviour, log)
    print(json.dumps({"ok": True, "event": "started", "protocol": 1}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        with log.open("a") as stream:
            stream.write(f"{name} {request['op']}\n")
        if request["op"] == at and behaviour == "refuse":
            print(json.dumps({"ok": False, "error": "ValueError: not that"}), flush=True)
            continue
        if request["op"] == at:
            misbehave(behaviour, log)
        print(json.dumps({"ok": True, **answer(request)}), flush=True)


if __name__ == "__main__":
    main()
