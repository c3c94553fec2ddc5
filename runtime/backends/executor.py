"""Executors: each runs one compiled component on buffers that the caller owns.

`sdrt.runtime.backends.registry` says which backend makes one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from sdrt.runtime.bundle.families.record import ComponentSpec, TensorSpec
from sdrt.runtime.devices.device import Buffer, Device
from sdrt.runtime.errors import BackendError, BundleError, UsageError


class Executor(Protocol):
    """One compiled component, which runs on buffers that it is bound to once.

    Attributes:
        spec: The component's inputs and outputs.
        capturable: Whether a bound call may be recorded into a CUDA graph. It must have run once before, and
            only then is the answer final: a first run may turn it to False.
        generation: Another number after each change that graphs which were captured before do not have.
    """

    spec: ComponentSpec
    capturable: bool
    generation: int

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Callable[[], None]:
        """Bind buffers and return the call that evaluates the component on them.

        The call queues its work in the device's stream and does not wait (on the host it does the work). It
        reads and writes the buffers in place and allocates nothing; it keeps them alive.

        Args:
            inputs: A C-contiguous buffer of the executor's device for every input of ``spec``, of its dtype.
            outputs: A buffer of the same kind for every output that is wanted.

        Raises:
            UsageError: A buffer does not fit the spec, or an input is missing.
            BackendError: The backend refused or failed (also from the call).
        """
        ...

    def replace_weights(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Evaluate with other weights, as a LoRA asks for, until the next call.

        Calls that were bound before have them, too; none may run meanwhile. Without any the numbers are those
        of the first evaluation again, bit for bit.

        Args:
            weights: Initializer of the bundle's graph, as the weight map names it → an array of its shape and
                of its dtype, or of float32 where float16 is only how it is stored. Those that are not
                named are the graph's own, whatever was replaced before. Nobody may change the arrays
                afterwards: they may be read in place.

        Raises:
            BackendError: The backend cannot, or the graph has no such initializer; the message says what to
                do. The weights are as they were.
        """
        ...

    def close(self) -> None:
        """Keep what is worth keeping from run to run. Bound calls still work afterwards."""
        ...


class FixedWeights:
    """The part of an executor whose weights cannot be replaced."""

    generation = 0

    def replace_weights(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """See `Executor.replace_weights`.

        Raises:
            BackendError: There are any.
        """
        if weights:
            raise BackendError(
                "this backend cannot change weights, which a LoRA asks for: choose another one, or merge "
                "the LoRA when the model is exported (sd-export --lora)"
            )


def check_buffers(
    spec: ComponentSpec, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
) -> dict[str, int]:
    """Refuse buffers that do not fit a component: backends read them as raw memory.

    Returns:
        The size of every named axis.

    Raises:
        UsageError: A name that the component does not have, an input missing, a buffer of another dtype,
            rank or size, not C-contiguous, or two sizes for one named axis.
    """
    axes: dict[str, int] = {}
    for kind, entries, buffers in (("input", spec.inputs, inputs), ("output", spec.outputs, outputs)):
        specs = {entry.name: entry for entry in entries}
        if unknown := sorted(set(buffers) - set(specs)):
            raise UsageError(f"{spec.name} has no {kind} {', '.join(unknown)}, only {', '.join(specs)}")
        for name, buffer in buffers.items():
            check_buffer(spec.name, specs[name], buffer)
            for axis, size in zip(specs[name].shape, buffer.shape, strict=True):
                if isinstance(axis, str) and axes.setdefault(axis, size) != size:
                    raise UsageError(
                        f"{spec.name}.{name}: {axis} is {size}, another buffer of the call has {axes[axis]}"
                    )
    if missing := [entry.name for entry in spec.inputs if entry.name not in inputs]:
        raise UsageError(f"{spec.name} needs a buffer for its input {', '.join(missing)}")
    return axes


def check_buffer(component: str, spec: TensorSpec, buffer: Buffer) -> None:
    """Refuse a buffer whose dtype, rank, sizes or layout are not the spec's.

    Raises:
        UsageError: One of them is not.
    """
    if str(buffer.dtype) != spec.dtype or len(buffer.shape) != len(spec.shape):
        raise UsageError(
            f"{component}.{spec.name} is {spec.dtype}{list(spec.shape)}, "
            f"given {buffer.dtype}{list(buffer.shape)}"
        )
    for axis, (want, got) in enumerate(zip(spec.shape, buffer.shape, strict=True)):
        if isinstance(want, int) and want != got:
            raise UsageError(f"{component}.{spec.name}: axis {axis} is {want}, given {got}")
    flags = getattr(buffer, "flags", None)  # of a NumPy array; device buffers are always contiguous
    if flags is not None and not flags.c_contiguous:
        raise UsageError(f"{component}.{spec.name}: the buffer must be C-contiguous")


def check_weights(
    weights: Mapping[str, NDArray[Any]], own: Callable[[str], tuple[str, tuple[int, ...]] | None], where: str
) -> None:
    """Refuse weights that a graph does not have.

    Args:
        weights: See `Executor.replace_weights`.
        own: Gives the dtype and shape of an initializer of the graph; None where there is none.
        where: The graph, for messages.

    Raises:
        BackendError: A name that is not an initializer's, another shape or another dtype.
    """
    for name, array in weights.items():
        found = own(name)
        if found is None:
            raise BackendError(
                f"{where} has no initializer {name!r}; the bundle's weight map has their names"
            )
        dtype, shape = found
        allowed = {dtype, "float32"} if dtype == "float16" else {dtype}
        if array.shape != shape or str(array.dtype) not in allowed:
            raise BackendError(
                f"the initializer {name} of {where} is {dtype}{list(shape)}, "
                f"given {array.dtype}{list(array.shape)}"
            )


class GraphTensor(NamedTuple):
    """An input or output as an engine library found it in a graph.

    Attributes:
        name: The graph's name of it.
        dtype: A manifest's name of its dtype, or the library's where no manifest has such.
        shape: A size for each axis, or what the library calls one that is open.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


def check_tensors(
    inputs: Iterable[GraphTensor], outputs: Iterable[GraphTensor], spec: ComponentSpec, where: str
) -> None:
    """The graph must be the one that the manifest describes, or buffers would be of wrong sizes.

    Raises:
        BundleError: An input or output differs; ``where`` names the graph.
    """
    for found, wanted in ((inputs, spec.inputs), (outputs, spec.outputs)):
        tensors = {tensor.name: tensor for tensor in found}
        for entry in wanted:
            tensor = tensors.get(entry.name)
            if tensor is None or not _same_tensor(tensor, entry):
                has = f"{tensor.dtype}{list(tensor.shape)}" if tensor else f"only {', '.join(tensors)}"
                raise BundleError(
                    f"{where} is not the graph that the manifest describes: {entry.name} should be "
                    f"{entry.dtype}{list(entry.shape)}, the graph has {has}; export the bundle again"
                )


def _same_tensor(tensor: GraphTensor, spec: TensorSpec) -> bool:
    """Whether dtype, rank and every size that both know agree; a fixed export has sizes for named axes."""
    return (
        tensor.dtype == spec.dtype
        and len(tensor.shape) == len(spec.shape)
        and all(
            got == want
            for got, want in zip(tensor.shape, spec.shape, strict=True)
            if isinstance(got, int) and isinstance(want, int)
        )
    )


def first_line(error: Exception) -> str:
    """What a library's exception says, cut down to one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def usable_cores() -> int:
    """Cores that this process may use: by its affinity, and by a container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


def replayable(device: Device, work: Callable[[], None], executors: Sequence[Executor]) -> Callable[[], None]:
    """A call that queues ``work``: one launch of a graph if every executor in it can be captured.

    Otherwise ``work`` itself. To be captured it is run once, with whatever is in its buffers: TensorRT must
    have enqueued once after a change of shape, and kernels are loaded when they are first used.

    Where an executor's weights were replaced in a way that the graph does not have, the next call is ``work``
    itself, and the one after it records it anew.

    The call keeps ``work``: if that is a method of whoever keeps the call, the two keep each other, and
    memory is given back late. So it had better be a function of just what it needs.
    """
    if not all(executor.capturable for executor in executors):
        return work
    work()
    if not all(executor.capturable for executor in executors):  # TensorRT for RTX can tell only now
        return work
    return _Replayed(device, work, executors)


class _Replayed:
    """A captured graph of some work, as long as it is of the executors' generations."""

    def __init__(self, device: Device, work: Callable[[], None], executors: Sequence[Executor]) -> None:
        """``work`` has run."""
        self._device, self._work, self._executors = device, work, tuple(executors)
        self._ran_in = self._generations()
        self._graph: Callable[[], None] | None = device.capture(work)

    def _generations(self) -> list[int]:
        return [executor.generation for executor in self._executors]

    def __call__(self) -> None:
        generations = self._generations()
        if generations != self._ran_in:
            self._graph = None  # what it holds of the device is given back first
            self._work()  # an engine must have run once before it can be captured
            self._ran_in = generations
            return
        if self._graph is None:
            self._graph = self._device.capture(self._work)
        self._graph()
