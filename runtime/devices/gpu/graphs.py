"""Recorded work and timings of the `cuda` device."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

from sdrt.runtime.devices.gpu.arrays import Owned, Session
from sdrt.runtime.devices.gpu.staging import new_event
from sdrt.runtime.errors import BackendError, UsageError


class Graph:
    """Recorded work: calling it queues all of it with one launch."""

    def __init__(self, session: Session, work: Callable[[], None], *, check: Callable[[], object]) -> None:
        """Record.

        Args:
            session: Its stream records.
            work: What is recorded; kept, since addresses of its buffers are in the graph.
            check: Called before each launch; raises if the device was closed.

        Raises:
            BackendError: Something in ``work`` cannot be captured. The stream is usable again, also after any
                error that ``work`` raises itself.
        """
        if session.capturing:
            raise UsageError("a capture was asked for while another one runs: record one after the other")
        self._session = session
        self._work = work
        self._check = check
        with _no_collection():
            session.begin_capture()
            try:
                try:
                    work()
                except BaseException:
                    session.driver.abandon_capture(session.stream)
                    raise
                graph = session.driver.end_capture(session.stream)
            finally:
                session.capture_ended()
        self._graph = Owned(session, graph, session.driver.destroy_graph)

    def __call__(self) -> None:
        """Queue the recorded work."""
        self._check()
        self._session.driver.launch_graph(self._graph.handle, self._session.stream)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Put the garbage collector off.

    It may find another library's memory, such as an execution context of TensorRT: what that calls to give it
    back (cudaFree) would end the capture. What is ours waits in any case: `Session.give_back`.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class CudaTimer:
    """Seconds on the GPU between events in the stream (`sdrt.runtime.devices.device.Timer`)."""

    def __init__(self, session: Session) -> None:
        """Start now, in the order of the stream."""
        self._session = session
        self._marks: list[tuple[str, Owned]] = []
        self._record("")

    def _record(self, name: str) -> None:
        if self._session.capturing:
            raise UsageError(
                "a timer was used in work that is recorded: set the marks around the graph's calls"
            )
        event = new_event(self._session, timing=True)
        self._session.driver.record_event(event.handle, self._session.stream)
        self._marks.append((name, event))

    def mark(self, name: str) -> None:
        """See `Timer.mark`."""
        self._session.driver.make_current()
        self._record(name)

    def seconds(self) -> dict[str, float]:
        """See `Timer.seconds`."""
        driver = self._session.driver
        driver.make_current()
        driver.synchronize_event(self._marks[-1][1].handle)
        seconds: dict[str, float] = {}
        for (_, before), (name, event) in zip(self._marks, self._marks[1:], strict=False):
            elapsed = driver.elapsed(before.handle, event.handle)
            seconds[name] = seconds.get(name, 0.0) + elapsed
        return seconds


class KernelModules:
    """The kernels of our own for one GPU, each module compiled and loaded when it is first asked for."""

    def __init__(self, session: Session, compiler: Callable[[str, str], bytes]) -> None:
        """``compiler`` gives the cubin of a module for an architecture (`sdrt.kernels.compile.cubin`)."""
        self._session = session
        self._compiler = compiler
        self._modules: dict[str, Owned] = {}
        self._functions: dict[str, int] = {}

    def function(self, module: str, entry: str) -> int:
        """The driver's handle of a kernel.

        Raises:
            BackendError: It cannot be compiled for this GPU, or the driver refuses it.
        """
        function = self._functions.get(entry)
        if function is None:
            driver = self._session.driver
            function = driver.function(self._load(module).handle, entry)
            self._functions[entry] = function
        return function

    def _load(self, module: str) -> Owned:
        loaded = self._modules.get(module)
        if loaded is None:
            facts = self._session.driver.facts
            try:
                image = self._compiler(module, architecture(facts.compute_capability))
            except RuntimeError as error:  # KernelError; the host device need not import the compiler
                raise BackendError(
                    f"the kernel {module} is not to be had for {facts.name}: {error}"
                ) from error
            handle = self._session.driver.load_module(image)
            loaded = Owned(self._session, handle, self._session.driver.unload_module)
            self._modules[module] = loaded
        return loaded


def architecture(compute_capability: tuple[int, int]) -> str:
    """What to compile for: the newest tested architecture that this GPU runs, ``sm_86`` for (8, 7).

    Machine code runs on later GPUs of the same major version. Where there is none, the GPU's own, which the
    compiler may know.
    """
    from sdrt.kernels.compile import ARCHITECTURES

    major, minor = compute_capability
    tested = [divmod(int(arch.removeprefix("sm_")), 10) for arch in ARCHITECTURES]
    fitting = [this for this in tested if this[0] == major and this[1] <= minor]
    return "sm_{}{}".format(*max(fitting, default=compute_capability))
