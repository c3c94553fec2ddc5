"""The peers of ``sd-bench``, and ``sd-bench peers``, which installs and removes them."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from sdrt.benchmarks.peers import environments as peer_environments
from sdrt.benchmarks.peers.environments import Installed, Progress
from sdrt.runtime.errors import BackendError, UsageError

WORKERS: Final = Path(__file__).resolve().parents[1] / "peer_workers"
ALL: Final = "all"


@dataclass(frozen=True, slots=True)
class Peer:
    """One peer.

    Attributes:
        name: On the command line.
        label: For people.
        environment: A key of `ENVIRONMENTS`; empty for one that runs in this interpreter, with its PyTorch.
        worker: The script in `peer_workers` that holds it, and words for it.
        form: What its model is, see `sdrt.benchmarks.peers.models`.
        converter: The environment that makes it; empty where none is needed.
        device: What it draws on: ``cpu`` or ``cuda``.
    """

    name: str
    label: str
    environment: str
    worker: tuple[str, ...]
    form: str
    converter: str = ""
    device: str = "cpu"


_DIFFUSERS: Final = "worker_diffusers.py"
_OPTIMUM: Final = "worker_optimum.py"
_OPENVINO: Final = "worker_openvino.py"
_CPP: Final = "worker_stable_diffusion_cpp.py"
_TABLE: Final = (
    Peer("diffusers", "diffusers", "diffusers", (_DIFFUSERS,), "diffusers"),
    Peer("torch-compile", "diffusers, torch.compile", "diffusers", (_DIFFUSERS, "--compile"), "diffusers"),
    Peer("optimum-onnx", "optimum-onnx", "optimum-onnx", (_OPTIMUM,), "optimum-onnx", "optimum-onnx"),
    Peer("openvino", "OpenVINO GenAI", "openvino", (_OPENVINO,), "openvino", "openvino-export"),
    Peer(
        "stable-diffusion.cpp", "stable-diffusion.cpp", "stable-diffusion.cpp", (_CPP,), "diffusers-classic"
    ),
    Peer(
        *("diffusers-cuda", "diffusers (GPU, fp16)", "", (_DIFFUSERS, "--device", "cuda"), "diffusers"),
        device="cuda",
    ),
    Peer(
        *("torch-compile-cuda", "diffusers, torch.compile (GPU, fp16)", ""),
        *((_DIFFUSERS, "--device", "cuda", "--compile"), "diffusers"),
        device="cuda",
    ),
)
PEERS: Final[dict[str, Peer]] = {peer.name: peer for peer in _TABLE}


def find(name: str) -> Installed | None:
    """A peer's environment; None if it is not there whole, or if the peer has none of its own.

    Raises:
        UsageError: No such peer.
    """
    environment = get(name).environment
    return peer_environments.find(environment) if environment else None


def importable() -> bool:
    """Whether this interpreter has what draws with diffusers."""
    return all(find_spec(package) for package in ("diffusers", "torch", "transformers"))


def is_installed(name: str) -> bool:
    """Whether a peer can be run; errors as `find`."""
    return find(name) is not None or (not get(name).environment and importable())


def check_installed(name: str) -> None:
    """Say what is missing.

    Raises:
        UsageError: No such peer.
        BackendError: It is not installed.
    """
    if not is_installed(name):
        how = f"`sd-bench peers install {name}`" if get(name).environment else "pip install 'sdrt[export]'"
        raise BackendError(f"the peer {name} is not installed: {how}")


def install(name: str, progress: Progress = lambda _: None) -> None:
    """Make a peer's environment, and the one that makes its models, where they are not there.

    Raises:
        UsageError: No such peer.
        BackendError: It cannot be installed here.
        OutputError: The cache folder cannot be written.
    """
    peer = get(name)
    for environment in filter(None, (peer.converter, peer.environment)):
        peer_environments.install(environment, progress)


def remove(name: str) -> None:
    """Delete a peer's environments, which other peers may run in too.

    Raises:
        UsageError: No such peer.
        OutputError: They cannot be deleted.
    """
    peer = get(name)
    for environment in {peer.environment, peer.converter} - {""}:
        peer_environments.remove(environment)


def worker_command(name: str) -> list[str]:
    """The words that start a peer's worker; errors as `check_installed`."""
    check_installed(name)
    script, *words = get(name).worker
    found = find(name)
    return [sys.executable if found is None else str(found.python), str(WORKERS / script), *words]


def installed_bytes(name: str) -> int | None:
    """What a peer's distributions, and those that they need, take on the disk; None where they are ours."""
    found = find(name)
    return None if found is None else found.size_bytes()


def get(name: str) -> Peer:
    """A peer by its name.

    Raises:
        UsageError: No such peer.
    """
    if name not in PEERS:
        raise UsageError(f"unknown peer {name!r}; there is {', '.join(PEERS)}")
    return PEERS[name]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of ``sd-bench peers``."""
    parser.add_argument("action", choices=("list", "install", "remove"), help="what to do")
    parser.add_argument(
        "names", nargs="*", metavar="PEER", help=f"{', '.join(PEERS)}, or {ALL} (for list the default)"
    )


def run(arguments: argparse.Namespace) -> None:
    """``sd-bench peers``: each peer that fails is told, and the others are done.

    Raises:
        UsageError: No such peer, or none was named.
        BackendError: One of them cannot be installed here.
    """
    names = arguments.names or ([ALL] if arguments.action == "list" else [])
    if not names:
        raise UsageError(f"name the peers to {arguments.action}: {', '.join(PEERS)}, or {ALL}")
    wanted = list(PEERS) if ALL in names else [get(name).name for name in names]
    failed = []
    for name in wanted:
        try:
            _act(arguments.action, name)
        except BackendError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
    if failed:
        raise BackendError(f"not installed: {', '.join(failed)}; the reasons are above")


def _act(action: str, name: str) -> None:
    if action == "install":
        install(name, lambda line: print(line, file=sys.stderr))
    elif action == "remove":
        remove(name)
    found = find(name)
    if found is None:
        own = not get(name).environment and importable()
        print(f"{name:22} {'runs with the PyTorch of this Python' if own else 'not installed'}")
    else:
        print(f"{name:22} {found.size_bytes() / 1e6:6.0f} MB  {', '.join(found.environment.requirements)}")
