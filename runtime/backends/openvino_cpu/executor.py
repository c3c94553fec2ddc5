"""OpenVINO on the CPU: static shapes, two streams for an even batch, and nothing computed twice.

Inputs and outputs are NumPy memory that OpenVINO reads and writes in place.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from weakref import WeakSet, WeakValueDictionary

import numpy as np

from sdrt.runtime.backends.batch_parts import Array, Arrays, batch_parts, parts_of
from sdrt.runtime.backends.executor import check_buffers, usable_cores
from sdrt.runtime.backends.openvino_cpu.library import import_openvino
from sdrt.runtime.backends.openvino_cpu.models import (
    Compiled,
    CompileTarget,
    ModelFile,
    Part,
    name_of,
    reason,
)
from sdrt.runtime.bundle.families.record import ComponentSpec
from sdrt.runtime.bundle.prepared_folder import Source
from sdrt.runtime.devices.arena import Arena
from sdrt.runtime.devices.host import HostDevice
from sdrt.runtime.errors import BackendError

SETS_KEPT: Final = 4  # of weights that were replaced before
BATCH_AXES: Final = ("rows", "batch")  # along these nothing depends on its neighbours


class OpenVinoExecutor:
    """A component on OpenVINO's CPU plugin, compiled for each shape that is bound."""

    capturable = False
    generation = 0

    def __init__(
        self,
        model: Path,
        spec: ComponentSpec,
        *,
        threads: int | None = None,
        source: Source | None = None,
    ) -> None:
        """Check the graph; it is compiled by `bind`, for the sizes of the buffers.

        Args:
            model: The ONNX file.
            spec: The component's inputs and outputs.
            threads: The threads that work at the same time, all together; by default one per usable core.
            source: The bundle's files that the graph consists of, if they were compared. With them compiled
                models are kept from run to run (`sdrt.runtime.backends.openvino_cpu.models`), and the graph
                is only read where there is none yet.

        Raises:
            BackendError: openvino is not installed, or it refuses the graph.
            BundleError: It is not the graph that the manifest describes.
        """
        self.spec = spec
        self._ov = import_openvino()
        self._threads = threads or usable_cores()
        self._file = ModelFile(self._ov, model, spec, source)
        if source is None:
            self._file.read()
        # As long as something is bound to them: bindings of one shape share the weights.
        self._compiled: WeakValueDictionary[CompileTarget, Compiled] = WeakValueDictionary()
        self._weights: Mapping[str, Array] = {}
        self._bound: WeakSet[_BoundStreams] = WeakSet()
        # What was compiled with the last sets of weights, by `_name_of_set`; the latest comes last.
        self._before: OrderedDict[bytes, dict[CompileTarget, Compiled]] = OrderedDict()

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """See `Executor.bind`."""
        axes = check_buffers(self.spec, inputs, outputs)
        axis = self.spec.inputs[0].shape[0]
        batch = axes[axis] if isinstance(axis, str) and axis in BATCH_AXES else 1
        streams = parts_of(batch, self._threads)
        parts = batch_parts(self.spec, inputs, outputs, BATCH_AXES, streams)
        sizes = tuple((name, array.shape) for name, array in parts[0][0].items())
        target = CompileTarget(sizes, streams, self._threads)
        compiled = self._compiled.get(target)
        if compiled is None:
            compiled = self._compiled[target] = self._file.compiled(target, self._weights)
        bound = _BoundStreams(self._ov, compiled, target, parts, self.spec.name)
        self._bound.add(bound)
        return bound

    def replace_weights(self, weights: Mapping[str, Array]) -> None:
        """See `Executor.replace_weights`.

        Whatever is bound is compiled anew, with other constants; of small models the last sets are kept.
        """
        self._file.check(weights)
        bindings = list(self._bound)
        found = self._before.get(_name_of_set(weights), {}) if self._file.is_small else {}
        compiled = {
            target: found.get(target) or self._file.compiled(target, weights)
            for target in {bound.target for bound in bindings}
        }
        if self._file.is_small:
            self._keep(self._weights, dict(self._compiled))
        self._weights, self._compiled = dict(weights), WeakValueDictionary(compiled)
        for bound in bindings:
            bound.use(compiled[bound.target])

    def _keep(self, weights: Mapping[str, Array], compiled: dict[CompileTarget, Compiled]) -> None:
        name = _name_of_set(weights)
        self._before[name] = compiled
        self._before.move_to_end(name)
        if len(self._before) > SETS_KEPT:
            self._before.popitem(last=False)

    def close(self) -> None:
        """See `Executor.close`; there is nothing to keep."""


def _name_of_set(weights: Mapping[str, Array]) -> bytes:
    """Another one for each set of weights."""
    import hashlib

    digest = hashlib.sha256()
    for name, array in sorted(weights.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


class _BoundStreams:
    """The streams' calls, side by side."""

    def __init__(
        self,
        ov: Any,
        compiled: Compiled,
        target: CompileTarget,
        parts: Sequence[tuple[Arrays, Arrays]],
        component: str,
    ) -> None:
        self._ov, self._parts, self._component = ov, tuple(parts), component
        self.target = target
        self.use(compiled)

    def use(self, compiled: Compiled) -> None:
        """Run this from now on; it was compiled for ``target``."""
        self._streams = [_BoundStream(self._ov, compiled, *part) for part in self._parts]

    def __call__(self) -> None:
        started = []
        try:
            for stream in self._streams:
                stream.update()
                started.append(stream.request)
                stream.request.start_async()
        except RuntimeError as error:
            raise BackendError(f"{self._component} failed: {reason(error)}") from error
        finally:
            self._wait(started)

    def _wait(self, started: Sequence[Any]) -> None:
        """For all of them, whatever happened: until it has ended, each writes into the buffers."""
        failures = []
        waiting = list(started)
        try:
            while waiting:
                try:
                    waiting[0].wait()
                except RuntimeError as error:
                    failures.append(error)
                waiting.pop(0)
        finally:  # an interrupt may come between two of them
            for request in waiting:
                with contextlib.suppress(RuntimeError):
                    request.wait()
        if failures:
            raise BackendError(f"{self._component} failed: {reason(failures[0])}") from failures[0]


class _BoundStream:
    """One request on some entries of the batch; it keeps the arrays alive, whose memory OpenVINO uses.

    Attributes:
        request: An ``openvino.InferRequest`` of what runs at every call.
    """

    def __init__(
        self, ov: Any, compiled: Compiled, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> None:
        self._parts = [_BoundPart(ov, part, inputs) for part in compiled.parts]
        results = {name: array for part in self._parts for name, array in part.results.items()}
        self._arrays = {**inputs, **results, **outputs}
        self._compiled = compiled  # the executor knows it as long as something is bound to it
        self.request = _bound_request(ov, compiled.main, self._arrays)

    def update(self) -> None:
        """Have the parts evaluated whose inputs have changed."""
        for part in self._parts:
            part.update()


class _BoundPart:
    """A part that runs when its inputs are no longer what they were.

    Attributes:
        results: The arrays that the rest reads, by name.
    """

    def __init__(self, ov: Any, part: Part, inputs: Mapping[str, Array]) -> None:
        self._part = part
        self._given = [inputs[name] for name in part.inputs]
        self._evaluated: bytes | None = None  # the inputs of what is in `results`
        ports = part.compiled.outputs
        arena = Arena(
            HostDevice(),
            {
                name: (tuple(port.get_shape()), port.get_element_type().to_dtype().name)
                for name, port in zip(part.results, ports, strict=True)
            },
        )
        self.results: dict[str, Array] = {name: arena[name] for name in part.results}
        self._all: Array = arena.span(part.results[0], part.results[-1]).buffer
        self._request = part.compiled.create_infer_request()
        for port in part.compiled.inputs:
            array = inputs[name_of(port, inputs)]
            self._request.set_tensor(port, ov.Tensor(array, shared_memory=True))
        for port, array in zip(ports, self.results.values(), strict=True):
            self._request.set_tensor(port, ov.Tensor(array, shared_memory=True))

    def update(self) -> None:
        """Bring ``results`` up to date."""
        # As bytes: compared in no time, and NaN equals itself.
        key = b"".join([array.tobytes() for array in self._given])
        if key == self._evaluated:
            return
        self._evaluated = None  # whatever happens now, they are not what they were
        found = self._part.kept.get(key)
        if found is not None:
            np.copyto(self._all, found)
        else:
            self._request.start_async()
            self._request.wait()
            self._part.kept.put(key, self._all)
        self._evaluated = key


def _bound_request(ov: Any, compiled: Any, arrays: Mapping[str, Array]) -> Any:
    request = compiled.create_infer_request()
    for port in compiled.inputs:
        request.set_tensor(port, ov.Tensor(arrays[name_of(port, arrays)], shared_memory=True))
    for port in compiled.outputs:
        if port.get_names() & arrays.keys():  # what nobody wants goes to memory of OpenVINO's own
            request.set_tensor(port, ov.Tensor(arrays[name_of(port, arrays)], shared_memory=True))
    return request
