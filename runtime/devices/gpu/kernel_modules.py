"""The kernels of our own, compiled and loaded for a GPU."""

from __future__ import annotations

from collections.abc import Callable

from sdrt.runtime.devices.gpu.stream import Owned, Stream
from sdrt.runtime.errors import BackendError


class KernelModules:
    """The kernels of our own for one GPU, each module compiled and loaded when it is first asked for."""

    def __init__(self, stream: Stream, compiler: Callable[[str, str], bytes]) -> None:
        """``compiler`` gives the cubin of a module for an architecture (`sdrt.kernels.compile.cubin`)."""
        self._stream = stream
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
            driver = self._stream.driver
            function = driver.function(self._load(module).handle, entry)
            self._functions[entry] = function
        return function

    def _load(self, module: str) -> Owned:
        loaded = self._modules.get(module)
        if loaded is None:
            facts = self._stream.driver.facts
            try:
                image = self._compiler(module, architecture(facts.compute_capability))
            except RuntimeError as error:  # KernelError; the host device need not import the compiler
                raise BackendError(
                    f"the kernel {module} is not to be had for {facts.name}: {error}"
                ) from error
            handle = self._stream.driver.load_module(image)
            loaded = Owned(self._stream, handle, self._stream.driver.unload_module)
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
