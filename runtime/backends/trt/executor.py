"""TensorRT and TensorRT for RTX: two libraries with one API, so one executor.

An engine is deserialised once and shared by its bindings. A binding is an execution context for one shape,
with every address set; its activations live in the device's scratch memory, which all contexts share, since
they run one after another in one stream.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from sdrt.runtime.backends.component_weights import ComponentWeights
from sdrt.runtime.backends.executor import check_buffers, first_line
from sdrt.runtime.backends.trt.engine import LoadedEngine
from sdrt.runtime.backends.trt.errors import ErrorLog
from sdrt.runtime.backends.trt.library import import_tensorrt
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.engine_search import Engine, find_engine
from sdrt.runtime.bundle.families.record import ComponentSpec
from sdrt.runtime.devices.device import Buffer
from sdrt.runtime.errors import BackendError

if TYPE_CHECKING:
    from sdrt.runtime.devices.gpu.device import CudaDevice


class TensorRTExecutor:
    """One component on TensorRT or TensorRT for RTX.

    Attributes:
        spec: The component's inputs and outputs.
        capturable: Whether bound calls may be recorded into a CUDA graph.
        generation: Changes with each refit: a graph that was captured before has to be captured again.
    """

    def __init__(
        self, bundle: Bundle, component: str, device: CudaDevice, flavour: str, *, verify: bool = True
    ) -> None:
        """Find and deserialise an engine, so that what is wrong with it is found now.

        Args:
            bundle: The bundle that holds the engines.
            component: The component's name.
            device: The CUDA device that everything runs on.
            flavour: ``tensorrt`` or ``tensorrt-rtx``.
            verify: Compare the plan's SHA-256 with its manifest; otherwise only the size.

        Raises:
            BackendError: The library is missing, no engine fits, or it refuses the engine.
            BundleError: The engine is damaged.
            DeviceMemoryError: The weights do not fit into the GPU's memory.
        """
        self.spec: ComponentSpec = bundle.component(component).spec
        self.capturable, self.generation = True, 0
        self._bundle, self._device, self._flavour, self._verify = bundle, device, flavour, verify
        self._trt = import_tensorrt(flavour)
        device.make_current()
        self._log = ErrorLog(self._trt)
        self._runtime = self._start()
        self._own = ComponentWeights(bundle, component)
        self._replaced: dict[str, NDArray[Any]] = {}
        # Bindings keep their engine; one that none of them uses any more gives its memory back.
        self._loaded: weakref.WeakValueDictionary[str, LoadedEngine] = weakref.WeakValueDictionary()
        self._latest = self._load(self._first_engine())

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Callable[[], None]:
        """See `Executor.bind`; buffers are device memory.

        Raises:
            UsageError: A buffer does not fit the spec.
            BackendError: No engine of the bundle admits the shape, or TensorRT refuses it.
            BundleError: The engine for the shape is damaged.
            DeviceMemoryError: The scratch memory, or another engine's weights, do not fit.
        """
        axes = check_buffers(self.spec, inputs, outputs)
        self._device.make_current()
        engine = self._find(axes)
        self._latest = self._loaded.get(engine.folder.name) or self._load(engine)
        return _Binding(self._latest, engine.profile_index(axes) or 0, inputs, outputs, self._note_capturable)

    def _note_capturable(self, capturable: bool) -> None:
        """What the library says of a binding after its first run."""
        self.capturable = self.capturable and capturable

    def replace_weights(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """See `Executor.replace_weights`: the engines are refitted, those too that are loaded later.

        Args:
            weights: The graph's initializer → an array of the engine's dtype and number of elements.

        Raises:
            BackendError: The engine was not built to be refitted, has no such weights, or TensorRT refuses.
            BundleError: The graph's own numbers, which are wanted again, cannot be read.
        """
        wanted = {name: self._own.read(name) for name in self._replaced if name not in weights} | {**weights}
        if not wanted:
            return
        self._device.make_current()
        refits = [loaded.prepare_refit(wanted, self._own) for loaded in list(self._loaded.values())]
        self.generation += 1
        self._replaced = wanted  # whichever refit fails: the next call gives all of these their numbers
        for refit in refits:
            refit()
        self._replaced = dict(weights)

    def close(self) -> None:
        """Keep what the library compiled for this GPU; engines are freed with their last binding."""
        for loaded in list(self._loaded.values()):
            loaded.save_cache()

    def _start(self) -> Any:
        try:
            runtime = self._trt.Runtime(self._log.logger)
        except (RuntimeError, TypeError) as error:  # pybind11's for a null pointer is the latter
            what = f"{self._flavour} {self._trt.__version__} does not start ({first_line(error)})"
            raise self._log.error(what) from error
        runtime.error_recorder = self._log.recorder
        return runtime

    def _first_engine(self) -> Engine:
        """The engine for the bundle's default size, which most runs draw; without one, any that fits."""
        defaults, factor = self._bundle.manifest.defaults, self._bundle.manifest.latents.factor
        axes = {
            "height": defaults.height,
            "width": defaults.width,
            "latent_height": defaults.height // factor,
            "latent_width": defaults.width // factor,
        }
        try:
            return self._find(axes)
        except BackendError:
            return self._find({})

    def _find(self, axes: Mapping[str, int]) -> Engine:
        capability = self._device.facts.compute_capability
        return find_engine(
            self._bundle, self.spec.name, self._flavour, self._trt.__version__, capability, axes
        )

    def _load(self, engine: Engine) -> LoadedEngine:
        loaded = LoadedEngine(self._trt, self._runtime, self._log, self._device, self.spec, engine)
        loaded.load(verify=self._verify)
        if self._replaced:
            loaded.prepare_refit(self._replaced, self._own)()
        self._loaded[engine.folder.name] = loaded
        return loaded


class _Binding:
    """One execution context for one shape. It keeps its buffers, its scratch memory and its engine alive."""

    def __init__(
        self,
        loaded: LoadedEngine,
        profile: int,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        note_capturable: Callable[[bool], None],
    ) -> None:
        self._loaded, self._log, self._stream = loaded, loaded.log, loaded.device.stream
        self._component = loaded.spec.name
        if unknown := sorted(set(outputs) - set(loaded.outputs)):
            raise BackendError(
                f"{loaded.where} does not give {', '.join(unknown)}, only {', '.join(loaded.outputs)}; "
                f"build it again: {loaded.engine.rebuild}"
            )
        self._context = loaded.create_context()
        self._set_shapes(profile, inputs)
        self._buffers = {**inputs, **outputs, **self._unwanted(outputs)}
        for name, buffer in self._buffers.items():
            self._check_shape(name, buffer)
            if not self._context.set_tensor_address(name, buffer.address):
                raise self._failed(f"TensorRT refuses the address of {name}")
        self._scratch_size = int(self._context.update_device_memory_size_for_shapes())
        self._scratch: Buffer | None = None
        if self._scratch_size:
            loaded.device.scratch(self._scratch_size)  # whether it fits is found now
        self._enqueue: Callable[[int], bool] = self._context.execute_async_v3
        self._note_capturable: Callable[[bool], None] | None = note_capturable  # until it has run once
        self._log.clear()  # what was said and did no harm is no reason for what may fail later

    def __call__(self) -> None:
        """Queue the component's work; see `Executor.bind`."""
        self._loaded.device.make_current()
        if self._scratch is None and self._scratch_size:
            self._give_scratch()
        if not self._enqueue(self._stream):
            raise self._failed(f"the {self._component} failed")
        if self._note_capturable is not None:
            # Only TensorRT for RTX can be asked; TensorRT's engines for these models can all be captured.
            ask = getattr(self._context, "is_stream_capturable", None)
            self._note_capturable(ask is None or bool(ask(self._stream)))
            self._note_capturable = None
            self._log.clear()
            self._loaded.save_cache()  # the first run is what compiles

    def _set_shapes(self, profile: int, inputs: Mapping[str, Buffer]) -> None:
        context = self._context
        if not context.set_optimization_profile_async(profile, self._stream):
            raise self._failed(f"TensorRT refuses the optimization profile {profile}")
        for name, buffer in inputs.items():
            if not context.set_input_shape(name, tuple(buffer.shape)):
                admitted = self._loaded.cuda_engine.get_tensor_profile_shape(name, profile)
                raise self._failed(
                    f"TensorRT refuses {name} of shape {list(buffer.shape)}; the engine admits "
                    f"{' to '.join(str(list(admitted[index])) for index in (0, 2))}"
                )
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise self._failed(f"TensorRT cannot infer the shapes ({first_line(error)})") from error
        if missing:
            raise self._failed(f"TensorRT wants a shape for {', '.join(missing)}")

    def _unwanted(self, outputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """Buffers for outputs that nobody asked for: TensorRT writes them all the same."""
        specs = {entry.name: entry for entry in self._loaded.spec.outputs}
        return {
            name: self._loaded.device.zeros(tuple(self._context.get_tensor_shape(name)), specs[name].dtype)
            for name in self._loaded.outputs
            if name not in outputs
        }

    def _check_shape(self, name: str, buffer: Buffer) -> None:
        shape = tuple(self._context.get_tensor_shape(name))
        if shape != tuple(buffer.shape):
            raise BackendError(
                f"{self._loaded.where}: {name} comes out as {list(shape)}, the buffer is {list(buffer.shape)}"
            )

    def _give_scratch(self) -> None:
        """At the first run, so that bindings made together have the memory of the largest in common."""
        self._scratch = self._loaded.device.scratch(self._scratch_size)
        self._context.set_device_memory(self._scratch.address, self._scratch_size)

    def _failed(self, what: str) -> BackendError:
        return self._log.error(f"{self._loaded.where}: {what}", free=self._loaded.free_memory())
