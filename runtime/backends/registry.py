"""The backends by name: which one is taken, why, and what it loads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any, Final

from sdrt.runtime.backends.backend import BACKENDS, Backend, RequestShape
from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.bundle.bundle import Bundle, Verify
from sdrt.runtime.devices.device import Device
from sdrt.runtime.devices.gpu import discovery
from sdrt.runtime.devices.gpu.discovery import Gpu
from sdrt.runtime.errors import BackendError, UsageError

AUTO: Final = "auto"


def find_backend(name: str) -> Backend:
    """A backend by its name in `BACKENDS`. Its module is imported; its library is not.

    Raises:
        UsageError: No backend of that name.
    """
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}; there is {', '.join(BACKENDS)}")
    module, _, attribute = BACKENDS[name].partition(":")
    backend: Backend = getattr(import_module(module), attribute)
    return backend


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that was taken.

    Attributes:
        name: A name in `BACKENDS`.
        reasons: What speaks for it, and before that what speaks against each backend that comes before it.
        gpu: The GPU it runs on; None on the CPU.
    """

    name: str
    reasons: tuple[str, ...]
    gpu: Gpu | None = None


def choose_backend(
    bundle: Bundle, name: str = AUTO, request_shape: RequestShape | None = None, *, device: int = 0
) -> Choice:
    """The backend to use: the one that was asked for, or the first of `BACKENDS` that can run the bundle.

    Args:
        bundle: The bundle, opened.
        name: A name in `BACKENDS`, or ``auto``.
        request_shape: What will be asked for; engines must admit it. By default any engine will do.
        device: The number of the GPU.

    Raises:
        UsageError: No backend of that name.
        BackendError: It cannot run here (with ``auto``: none can); the message says why and what to do.
    """
    if name != AUTO and name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}; there is {AUTO}, {', '.join(BACKENDS)}")
    search_gpu = cache(partial(_search_gpu, device))
    without_gpu: list[str] = []
    against: list[tuple[list[str], str]] = []  # names, and what speaks against them
    for entry in list(BACKENDS) if name == AUTO else [name]:
        backend = find_backend(entry)
        gpu, no_gpu = search_gpu() if backend.needs_gpu else (None, "")
        if no_gpu:
            if not without_gpu:
                against.append((without_gpu, no_gpu))  # said once, of all of them
            without_gpu.append(entry)
            continue
        try:
            reason = backend.probe(bundle, gpu, request_shape)
        except BackendError as error:
            against.append(([entry], str(error)))
        else:
            return Choice(entry, (*_lines(against), f"{entry}: {reason}"), gpu)
    if name != AUTO:
        raise BackendError(f"the backend {name} cannot run here: {against[0][1]}")
    raise BackendError(f"no backend can run this bundle here: {' | '.join(_lines(against))}")


def _search_gpu(index: int) -> tuple[Gpu | None, str]:
    """The GPU, or why there is none."""
    try:
        return discovery.find_gpu(index), ""
    except BackendError as error:
        return None, str(error)


def _lines(against: list[tuple[list[str], str]]) -> list[str]:
    return [f"{', '.join(names)}: {reason}" for names, reason in against]


def open_device(choice: Choice, stream: Any = None) -> Device:
    """The device that a backend's executors run on.

    Args:
        choice: The result of `choose_backend`.
        stream: A caller's CUDA stream to work in: an object with ``__cuda_stream__``, or a handle; by default
            a private one.

    Raises:
        UsageError: A stream for a backend that runs on the CPU.
        BackendError: The GPU cannot be used.
    """
    if choice.gpu is None:
        if stream is not None:
            raise UsageError(f"the backend {choice.name} runs on the CPU and takes no CUDA stream")
        from sdrt.runtime.devices.host import HostDevice

        return HostDevice()
    from sdrt.runtime.devices.gpu.device import CudaDevice

    return CudaDevice(choice.gpu.index if stream is None else None, stream=stream)


def load_executor(
    bundle: Bundle,
    component: str,
    *,
    backend: str,
    device: Device,
    threads: int | None = None,
    verify: Verify = True,
) -> Executor:
    """Load one component of a bundle on a backend.

    Args:
        bundle: The bundle, opened.
        component: The component's name.
        backend: A name in `BACKENDS`, as `choose_backend` gives it.
        device: The result of `open_device`.
        threads: On the CPU, threads that work at once; by default one per usable core.
        verify: Compare the SHA-256 of an engine's plan with its manifest; otherwise only the size. The
            bundle's own files must have been compared by the caller then. ``"always"``: also what was
            prepared of them, where that was compared before.

    Raises:
        UsageError: No backend of that name.
        BackendError: It is not installed, or cannot run this component.
        BundleError: An engine that was chosen is damaged.
    """
    chosen = find_backend(backend)
    if not (chosen.needs_gpu or bundle.embedded):
        from sdrt.runtime.admission.records import admit  # what sdrt ships need not wait for it

        admit(bundle, [component], backend, verify=bool(verify))
    return chosen.load(bundle, component, device, threads, verify)
