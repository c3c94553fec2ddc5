"""What TensorRT for RTX compiled for this GPU, kept from run to run."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any, Final

from sdrt.kernels.cache import read_kept, write_kept
from sdrt.runtime.backends.trt.library import RTX

KIND: Final = RTX
_MAX_BYTES: Final = 1 << 30


def runtime_cache_name(plan_sha256: str, version: str, gpu: str) -> str:
    """One file for each plan, version of the library and kind of GPU.

    TensorRT for RTX itself refuses what another driver, GPU or version wrote, and compiles anew.
    """
    tag = hashlib.sha256(f"{plan_sha256} {version} {gpu}".encode()).hexdigest()[:24]
    return f"{tag}.cache"


class RuntimeCache:
    """The runtime configuration of one engine of TensorRT for RTX, and the cache that belongs to it.

    A cache that cannot be read or written is no error: kernels are compiled again.

    Attributes:
        config: The ``IRuntimeConfig`` for the engine's contexts.
    """

    def __init__(self, trt: Any, cuda_engine: Any, name: str) -> None:
        """Configure contexts with memory of our own, without the library's own graphs, and load the cache.

        Args:
            trt: The module.
            cuda_engine: The deserialised engine.
            name: The cache's name: see `runtime_cache_name`. It need not exist.
        """
        self._name = name
        self.config = cuda_engine.create_runtime_config()
        self.config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        self.config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        # Lazily compiled kernels would take the place of the fallback ones after a graph has baked those in.
        self.config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        self._cache = self.config.create_runtime_cache()
        self._saved = b""
        blob = read_kept(KIND, name, _MAX_BYTES)
        if blob is not None and self._cache.deserialize(blob):
            self._saved = hashlib.sha256(blob).digest()
        self.config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the cache if it has changed; all at once, so that two processes do no harm."""
        # A RuntimeError is the library's, such as after a fault on the GPU: nothing to keep then.
        with contextlib.suppress(RuntimeError):
            memory = self._cache.serialize()
            blob = b"" if memory is None else bytes(memory)
            digest = hashlib.sha256(blob).digest()
            if blob and digest != self._saved and write_kept(KIND, self._name, blob):
                self._saved = digest
