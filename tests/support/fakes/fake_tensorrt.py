"""A TensorRT that runs where there is no GPU: the parts of its API that the executor uses, and no more.

A plan is JSON that describes the tensors; an enqueued engine reads and writes memory of the recording driver.
Whatever is called has to exist here, and tests/runtime/backends/test_trt.py compares every name and
number of arguments with the real module, so that a slip of the pen cannot hide behind the fake.

``module.faults`` maps the name of a method to TensorRT's words for why it fails. ``module.log`` holds what
was called, with the arguments.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx.numpy_helper
import onnxruntime
from numpy.typing import NDArray
from support.fakes.recording import RecordingDriver

from sdrt.runtime.backends.executor import usable_cores
from sdrt.runtime.bundle.families.record import ComponentSpec

VERSION = "1.7.1.116"
_DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}

Compute = Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]


def fake_plan(spec: ComponentSpec, *, model: Path | None = None, factor: int = 1, **facts: Any) -> bytes:
    """The plan of an engine of a component.

    Args:
        spec: The component.
        model: Its ONNX file, for an engine that really computes (on the CPU); otherwise outputs are the sum
            of the inputs' elements.
        factor: Pixels per latent, for outputs in pixels.
        facts: ``profiles`` (number), ``memory`` (bytes of scratch), ``refittable``, ``weights`` (name →
            their number, or their type and number; float32 by default), ``together`` (pairs of names), and
            ``tensors`` (name → fields that differ).
    """
    tensors = {
        entry.name: {
            "mode": mode,
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "format": "LINEAR",
            "location": "DEVICE",
            **facts.get("tensors", {}).get(entry.name, {}),
        }
        for mode, entries in (("INPUT", spec.inputs), ("OUTPUT", spec.outputs))
        for entry in entries
    }
    document = {
        "profiles": 1,
        "memory": 4096,
        "refittable": False,
        "weights": {},
        "together": [],
        "model": str(model) if model else None,
        "factor": factor,
        **facts,
        "tensors": {name: tensor for name, tensor in tensors.items() if tensor["mode"]},
    }
    return json.dumps(document).encode()


def fake_tensorrt(driver: RecordingDriver, *, rtx: bool = True) -> Any:
    """A module to put in the place of ``tensorrt_rtx_bindings``, or of ``tensorrt`` without ``rtx``."""
    module: Any = ModuleType("tensorrt_rtx_bindings" if rtx else "tensorrt")
    module.__version__ = VERSION
    module.driver = driver
    module.faults = {}
    module.log = []
    module.capturable = True
    module.cache = b"compiled kernels"
    module.diagnosis = 0
    for name, members in _ENUMS.items():
        setattr(module, name, enum.IntEnum(name, members))
    module.DataType = DataType
    module.nptype = lambda dtype: {"FLOAT": np.float32, "HALF": np.float16}[dtype.name]
    module.Weights = Weights
    module.ILogger = ILogger
    module.IErrorRecorder = IErrorRecorder
    module.Runtime = type("Runtime", (RtxRuntime if rtx else Runtime,), {"module": module})
    module.Refitter = type("Refitter", (Refitter,), {"module": module})
    module.rtx = rtx
    return module


_ENUMS = {
    "ErrorCodeTRT": {"SUCCESS": 0, "UNSPECIFIED_ERROR": 1, "FAILED_ALLOCATION": 5},
    "TensorIOMode": {"NONE": 0, "INPUT": 1, "OUTPUT": 2},
    "TensorLocation": {"DEVICE": 0, "HOST": 1},
    "TensorFormat": {"LINEAR": 0, "CHW32": 5},
    "ExecutionContextAllocationStrategy": {"STATIC": 0, "ON_PROFILE_CHANGE": 1, "USER_MANAGED": 2},
    "CudaGraphStrategy": {"DISABLED": 0, "WHOLE_GRAPH_CAPTURE": 1},
    "DynamicShapesKernelSpecializationStrategy": {"LAZY": 0, "EAGER": 1, "NONE": 2},
    "EngineInvalidityDiagnostics": {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2, "OLD_CUDA_DRIVER": 4},
}


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT32, INT64 = 0, 1, 7, 3, 8


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

    def log(self, severity: int, text: str) -> None:
        raise NotImplementedError


class IErrorRecorder:
    pass


class Weights:
    """Numbers in host memory that are read when they are used."""

    def __init__(self, dtype: DataType, address: int, size: int) -> None:
        self.dtype, self.address, self.size = dtype, address, size

    @property
    def array(self) -> NDArray[Any]:
        dtype = np.dtype({"FLOAT": "float32", "HALF": "float16", "BF16": "uint16"}[self.dtype.name])
        raw = (ctypes.c_uint8 * (self.size * dtype.itemsize)).from_address(self.address)
        array: NDArray[Any] = np.frombuffer(memoryview(raw).cast("B"), dtype).copy()
        return array


class _Part:
    """Something of a module; its methods can be told to fail."""

    module: Any

    def _calls(self, name: str, *arguments: Any) -> bool:
        """Note a call; False, with words in the log of errors, if it is to fail."""
        self.module.log.append((name, *arguments))
        if name not in self.module.faults:
            return True
        words, code = self.module.faults[name], self.module.ErrorCodeTRT.UNSPECIFIED_ERROR
        if isinstance(words, Exception):
            raise words
        if isinstance(words, tuple):
            words, code = words[0], self.module.ErrorCodeTRT[words[1]]
        if words:
            self.error_recorder.report_error(code, words)  # type: ignore[attr-defined]
        return False


class Runtime(_Part):
    error_recorder: Any = None

    def __init__(self, logger: Any) -> None:
        assert isinstance(logger, ILogger)
        self.logger = logger
        if words := self.module.faults.get("Runtime"):
            logger.log(ILogger.ERROR, words)
            raise TypeError("pybind11::init(): factory function returned nullptr")
        logger.log(ILogger.WARNING, "a warning that nobody wants to see")

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        if not self._calls("deserialize_cuda_engine"):
            return None
        kind = RtxEngine if self.module.rtx else ICudaEngine
        return kind(self.module, self.error_recorder, json.loads(plan))


class RtxRuntime(Runtime):
    engine_header_size = 64

    def get_engine_validity(self, plan: bytes) -> tuple[Any, int]:
        self.logger.log(ILogger.INTERNAL_ERROR, "said while the plan was examined")
        return None, self.module.diagnosis


class ICudaEngine(_Part):
    def __init__(self, module: Any, recorder: Any, plan: dict[str, Any]) -> None:
        self.module, self.error_recorder, self.plan = module, recorder, plan
        self.num_io_tensors = len(plan["tensors"])
        self.num_optimization_profiles = plan["profiles"]
        self.refittable = plan["refittable"]
        self._refitted: dict[str, NDArray[Any]] = {}
        self._refit({})

    def _refit(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Compute with these weights, too."""
        self._refitted |= weights
        if not self.plan["model"]:
            return
        model = onnx.load(self.plan["model"])
        for tensor in model.graph.initializer:
            if tensor.name in self._refitted:
                array = self._refitted[tensor.name].reshape(tuple(tensor.dims))
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = usable_cores()  # as the CPU executor: sums in the same order
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), sess_options=options, providers=["CPUExecutionProvider"]
        )

    def get_tensor_name(self, index: int) -> str:
        names: list[str] = list(self.plan["tensors"])
        return names[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.module.TensorIOMode[self.plan["tensors"][name]["mode"]]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.module.DataType[self.plan["tensors"][name]["dtype"]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else -1 for axis in self.plan["tensors"][name]["shape"])

    def get_tensor_format(self, name: str) -> Any:
        return self.module.TensorFormat[self.plan["tensors"][name]["format"]]

    def get_tensor_location(self, name: str) -> Any:
        return self.module.TensorLocation[self.plan["tensors"][name]["location"]]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        shape = self.plan["tensors"][name]["shape"]
        return [tuple(axis if isinstance(axis, int) else size for axis in shape) for size in (1, 2, 4)]

    def create_execution_context(self, how: Any) -> Any:
        if not self._calls("create_execution_context", how):
            return None
        return (RtxContext if self.module.rtx else IExecutionContext)(self)


class RtxEngine(ICudaEngine):
    def create_runtime_config(self) -> Any:
        return IRuntimeConfig(self.module)


class IRuntimeConfig(_Part):
    def __init__(self, module: Any) -> None:
        self.module = module
        self.cuda_graph_strategy: Any = None
        self.dynamic_shapes_kernel_specialization_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._calls("set_execution_context_allocation_strategy", strategy)

    def create_runtime_cache(self) -> Any:
        return IRuntimeCache(self.module)

    def set_runtime_cache(self, cache: Any) -> bool:
        return self._calls("set_runtime_cache", cache)


class IRuntimeCache(_Part):
    def __init__(self, module: Any) -> None:
        self.module = module

    def deserialize(self, blob: bytes) -> bool:
        return self._calls("deserialize", blob)

    def serialize(self) -> Any:
        return memoryview(self.module.cache) if self._calls("serialize") else None


class IExecutionContext(_Part):
    def __init__(self, engine: ICudaEngine) -> None:
        self.module, self.error_recorder, self._engine = engine.module, engine.error_recorder, engine
        self._axes: dict[str, int] = {}
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert 0 <= profile < self._engine.num_optimization_profiles
        return self._calls("set_optimization_profile_async", profile, stream)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        for axis, size in zip(self._engine.plan["tensors"][name]["shape"], shape, strict=True):
            if isinstance(axis, str):
                self._axes[axis] = size
        return self._calls("set_input_shape", name, shape)

    def infer_shapes(self) -> list[str]:
        words = self.module.faults.get("infer_shapes")
        if isinstance(words, RuntimeError):
            raise words
        return words or []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        factor = self._engine.plan["factor"]
        axes = {
            "height": self._axes.get("latent_height", 0) * factor,
            "width": self._axes.get("latent_width", 0) * factor,
            "latent_height": self._axes.get("height", 0) // factor,
            "latent_width": self._axes.get("width", 0) // factor,
            **self._axes,
        }
        shape = self._engine.plan["tensors"][name]["shape"]
        return tuple(axis if isinstance(axis, int) else axes[axis] for axis in shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0
        self._addresses[name] = address
        return self._calls("set_tensor_address", name, address)

    def update_device_memory_size_for_shapes(self) -> int:
        size: int = self._engine.plan["memory"]
        return size * self._axes.get("rows", 1)

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        self._memory = (address, size)
        self._calls("set_device_memory", address, size)

    def execute_async_v3(self, stream: int) -> bool:
        missing = set(self._engine.plan["tensors"]) - set(self._addresses)
        assert not missing, f"no address for {missing}"
        assert self._memory[1] >= self.update_device_memory_size_for_shapes()
        if not self._calls("execute_async_v3", stream):
            return False
        self.module.driver.enqueue(stream, self._compute)
        return True

    def _compute(self) -> None:
        """Runs when the stream does: on what the memory holds then."""
        scratch, size = self._memory
        if size:
            self.module.driver._holds(scratch, size)
            ctypes.memset(scratch, 0xAB, size)  # what another context had there is gone
        plan = self._engine.plan
        arrays = {name: self._array(name) for name in plan["tensors"]}
        inputs = {name: array for name, array in arrays.items() if plan["tensors"][name]["mode"] == "INPUT"}
        outputs = [name for name in arrays if name not in inputs]
        if plan["model"] is None:
            total = sum(float(array.sum()) for array in inputs.values())
            for name in outputs:
                arrays[name].fill(total)
            return
        for name, value in zip(outputs, self._engine._session.run(outputs, inputs), strict=True):
            np.copyto(arrays[name], value)

    def _array(self, name: str) -> NDArray[Any]:
        dtypes = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64"}
        dtype = np.dtype(dtypes[self._engine.plan["tensors"][name]["dtype"]])
        shape = self.get_tensor_shape(name)
        address, nbytes = self._addresses[name], math.prod(shape) * dtype.itemsize
        self.module.driver._holds(address, nbytes)
        raw = (ctypes.c_uint8 * nbytes).from_address(address)
        array: NDArray[Any] = np.frombuffer(memoryview(raw).cast("B"), dtype).reshape(shape)
        return array


class RtxContext(IExecutionContext):
    def is_stream_capturable(self, stream: int) -> bool:
        return bool(self.module.capturable)


class Refitter(_Part):
    error_recorder: Any = None

    def __init__(self, engine: ICudaEngine, logger: Any) -> None:
        assert isinstance(logger, ILogger)
        self._engine = engine
        self._given: dict[str, Weights] = {}

    def get_all_weights(self) -> list[str]:
        return list(self._engine.plan["weights"])

    def get_weights_prototype(self, name: str) -> Any:
        entry = self._engine.plan["weights"][name]
        kind, size = entry if isinstance(entry, list) else ("FLOAT", entry)
        return Weights(self.module.DataType[kind], 0, size)

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        self._given[name] = weights
        return self._calls("set_named_weights", name, weights.array)

    def get_missing_weights(self) -> list[str]:
        pairs = self._engine.plan["together"]
        return [two for one, two in pairs if one in self._given and two not in self._given]

    def refit_cuda_engine_async(self, stream: int) -> bool:
        if not self._calls("refit_cuda_engine_async", stream):
            return False
        self._engine._refit({name: weights.array for name, weights in self._given.items()})
        return True
