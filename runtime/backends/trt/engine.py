"""A deserialised engine: checked against the component it is said to be, and refitted with new weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.backends.component_weights import ComponentWeights
from sdrt.runtime.backends.trt.errors import ErrorLog
from sdrt.runtime.backends.trt.library import RTX
from sdrt.runtime.backends.trt.runtime_cache import RuntimeCache, runtime_cache_name
from sdrt.runtime.bundle.engine_search import Engine
from sdrt.runtime.bundle.families.record import ComponentSpec, TensorSpec
from sdrt.runtime.errors import BackendError

if TYPE_CHECKING:
    from sdrt.runtime.devices.gpu.device import CudaDevice

# dtypes of a manifest → names in TensorRT's DataType.
DATA_TYPES: Final = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}
_MAX_LISTED: Final = 4  # weights that one message names


def invalid_because(trt: Any, runtime: Any, plan: bytes) -> list[str]:
    """What TensorRT for RTX finds wrong with a plan for the current GPU, such as ``UNSUPPORTED_CC``.

    Args:
        trt: The flavour's module.
        runtime: The module's ``Runtime``.
        plan: The plan, or its first ``Runtime.engine_header_size`` bytes.

    Returns:
        Names of ``EngineInvalidityDiagnostics``; none for the full TensorRT, which cannot be asked.
    """
    validity = getattr(runtime, "get_engine_validity", None)
    if validity is None:
        return []
    _, flags = validity(plan)
    members = trt.EngineInvalidityDiagnostics.__members__.items()
    return [name for name, flag in members if int(flags) & int(flag)]


class LoadedEngine:
    """One engine on the GPU, shared by its bindings; its memory is given back with the last of them.

    Attributes:
        engine: The engine as it was found in the bundle.
        cuda_engine: TensorRT's ``ICudaEngine``.
        outputs: The names of the tensors that it writes.
    """

    def __init__(
        self, trt: Any, runtime: Any, log: ErrorLog, device: CudaDevice, spec: ComponentSpec, engine: Engine
    ) -> None:
        """Deserialise nothing yet: see `load`."""
        self.engine, self.spec, self.device, self.log = engine, spec, device, log
        self._trt, self._runtime = trt, runtime
        self.cuda_engine: Any = None
        self.outputs: tuple[str, ...] = ()
        self._cache: RuntimeCache | None = None
        # A buffer keeps the GPU's context. It is released after what stands above, which needs the context.
        self._context_holder = device.zeros((1,), "uint8")

    @property
    def where(self) -> str:
        """The engine's folder, for messages."""
        return f"engines/{self.engine.folder.name}"

    def load(self, *, verify: bool) -> None:
        """Read the plan, deserialise it, and check that it is the component's.

        Raises:
            BundleError: The plan is damaged.
            BackendError: TensorRT refuses it, or it is another component's.
            DeviceMemoryError: The weights do not fit.
        """
        plan = self.engine.read_plan(verify=verify)
        self.log.clear()
        self.cuda_engine = self._runtime.deserialize_cuda_engine(plan)
        if self.cuda_engine is None:
            raise self.log.error(
                f"{self.engine.manifest.key.flavour} {self._trt.__version__} refuses {self.where} on "
                f"{self._gpu()}{self._diagnosis(plan)}",
                advice=f"build it again: {self.engine.rebuild}",
                needed=len(plan),
                free=self.free_memory(),
            )
        self._check_tensors()
        if self.engine.manifest.key.flavour == RTX:
            name = runtime_cache_name(
                self.engine.manifest.files[0].sha256, self._trt.__version__, self.device.facts.name
            )
            self._cache = RuntimeCache(self._trt, self.cuda_engine, name)
            weakref.finalize(self, self._cache.save)

    def free_memory(self) -> int | None:
        """Bytes free on the GPU, for messages; None where even that cannot be asked any more."""
        try:
            return self.device.memory_info()[0]
        except BackendError:
            return None

    def _gpu(self) -> str:
        major, minor = self.device.facts.compute_capability
        return f"{self.device.facts.name} (compute capability {major}.{minor})"

    def _diagnosis(self, plan: bytes) -> str:
        """What TensorRT for RTX finds wrong with a plan by its header, such as UNSUPPORTED_CC."""
        names = invalid_because(self._trt, self._runtime, plan)
        return f" [{', '.join(names)}]" if names else ""

    def _check_tensors(self) -> None:
        """Names, dtypes, ranks, fixed sizes and layout: a tensor of another dtype gives NaN, not an error."""
        trt, engine = self._trt, self.cuda_engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = tuple(name for name in names if name not in inputs)
        specs = {entry.name: entry for entry in (*self.spec.inputs, *self.spec.outputs)}
        wanted = {entry.name for entry in self.spec.inputs}
        if set(inputs) != wanted or not set(self.outputs) <= set(specs) - wanted:
            raise self._not_ours(f"has the inputs {', '.join(inputs)} and outputs {', '.join(self.outputs)}")
        for name in names:
            self._check_tensor(name, specs[name])
        if engine.num_optimization_profiles != len(self.engine.manifest.key.profiles):
            raise self._not_ours(f"has {engine.num_optimization_profiles} optimization profiles")

    def _check_tensor(self, name: str, spec: TensorSpec) -> None:
        trt, engine = self._trt, self.cuda_engine
        dtype, shape = engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name))
        fits = (
            dtype == getattr(trt.DataType, DATA_TYPES[spec.dtype])
            and len(shape) == len(spec.shape)
            and all(
                got in (want, -1) if isinstance(want, int) else True
                for got, want in zip(shape, spec.shape, strict=True)
            )
        )
        if not fits:
            raise self._not_ours(
                f"has {name} as {dtype.name}{list(shape)}, the component's is {spec.dtype}{list(spec.shape)}"
            )
        if engine.get_tensor_format(name) != trt.TensorFormat.LINEAR:
            raise self._not_ours(f"wants {name} in the layout {engine.get_tensor_format(name).name}")
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise self._not_ours(f"wants {name} in host memory")

    def _not_ours(self, has: str) -> BackendError:
        return BackendError(
            f"{self.where} is no engine of this {self.spec.name}: it {has}; "
            f"remove it and build it again: {self.engine.rebuild}"
        )

    def create_context(self) -> Any:
        """An execution context whose activations are in memory that it is given.

        Raises:
            BackendError: TensorRT gives none.
        """
        self.log.clear()
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.cuda_engine.create_execution_context(self._cache.config if self._cache else strategy)
        if context is None:
            raise self.log.error(f"no execution context for {self.where}", free=self.device.memory_info()[0])
        return context

    def save_cache(self) -> None:
        """Keep what was compiled for this GPU, where the flavour compiles at all."""
        if self._cache is not None:
            self._cache.save()

    def prepare_refit(self, weights: Mapping[str, NDArray[Any]], own: ComponentWeights) -> Callable[[], None]:
        """Hand over weights to be used later: see `Executor.replace_weights`.

        Args:
            weights: Those that change.
            own: The graph's, for what TensorRT replaces only together with these.

        Returns:
            The call that has the engine use them; it waits until it does.

        Raises:
            BackendError: The engine was not built to be refitted, has no such weights, or TensorRT refuses.
                Its weights are as they were.
        """
        if not self.cuda_engine.refittable:
            raise BackendError(
                f"{self.where} cannot be given new weights: it was not built for that. Build one that can, "
                f"which may be slower: {self.engine.rebuild} --refit"
            )
        self.log.clear()
        refitter = self._trt.Refitter(self.cuda_engine, self.log.logger)
        refitter.error_recorder = self.log.recorder
        known = set(refitter.get_all_weights())
        if unknown := sorted(set(weights) - known):
            raise BackendError(
                f"{self.where} has no weights {_some(unknown)}; there are {len(known)}, "
                f"such as {_some(sorted(known))}"
            )
        held = [self._hand_over(refitter, name, array) for name, array in weights.items()]
        as_they_are = [name for name in refitter.get_missing_weights() if own.find(name) is not None]
        held += [self._hand_over(refitter, name, own.read(name)) for name in as_they_are]
        if missing := refitter.get_missing_weights():
            raise BackendError(
                f"{self.where}: TensorRT replaces some weights only together with {_some(sorted(missing))}, "
                "which the bundle's graph does not name"
            )

        def refit() -> None:
            self.log.clear()
            if not refitter.refit_cuda_engine_async(self.device.stream):
                raise self.log.error(f"{self.where} could not be given new weights")
            self.device.synchronize()
            held.clear()  # until now they were read in place

        return refit

    def _hand_over(self, refitter: Any, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Tell the refitter of new weights; it reads what is returned in place."""
        prototype = refitter.get_weights_prototype(name)
        brain_float = prototype.dtype == self._trt.DataType.BF16  # which NumPy lacks: as its bits
        dtype = np.dtype(np.uint16 if brain_float else self._trt.nptype(prototype.dtype))
        if array.size != prototype.size or array.dtype != dtype:
            narrow = array.dtype == np.float32 and dtype == np.float16
            raise BackendError(
                f"{self.where}: the weights {name} are {prototype.size} of {dtype}, "
                f"given {array.size} of {array.dtype}"
                + ("; export the bundle with --fp16 to change them here" if narrow else "")
            )
        array = np.ascontiguousarray(array)
        weights = self._trt.Weights(prototype.dtype, array.ctypes.data, array.size)
        if not refitter.set_named_weights(name, weights):
            raise self.log.error(f"{self.where} refuses new weights for {name}")
        return array


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
