"""Work that is queued again and again: as a graph where all of it can be captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sdrt.runtime.devices import Device
from sdrt.runtime.executors import Executor


def replayable(device: Device, work: Callable[[], None], executors: Sequence[Executor]) -> Callable[[], None]:
    """A call that queues ``work``: one launch of a graph if every executor in it can be captured.

    Otherwise ``work`` itself. To be captured it is run once, with whatever is in its buffers: TensorRT must
    have enqueued once after a change of shape, and kernels are loaded when they are first used.

    The call keeps ``work``: if that is a method of whoever keeps the call, the two keep each other, and
    memory is given back late. So it had better be a function of just what it needs.
    """
    if not all(executor.capturable for executor in executors):
        return work
    work()
    if not all(executor.capturable for executor in executors):  # TensorRT for RTX can tell only now
        return work
    return device.capture(work)
