"""A pipeline whose networks run in ONNX Runtime on the memory of a recording driver."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
from support.fakes.recording import RecordedExecutor, RecordingDriver, recording_device

from sdrt.runtime.drawing.loading import executor_of
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.request.output import PipelineOutput


class Network(RecordedExecutor):
    """Notes that it was closed."""

    closed = False

    def close(self) -> None:
        super().close()
        self.closed = True


class Recorded(Pipeline):
    """A pipeline on a recording driver."""

    def __init__(self, host: Pipeline, kind: type[Network] = Network, **about: Any) -> None:
        """The networks of ``host``, another pipeline of the same bundle."""
        self.driver = RecordingDriver(**about)
        self.cuda = recording_device(self.driver)
        networks = host._executors.items()
        executors = {name: kind(one, self.cuda, self.driver) for name, one in networks}

        def load_more(name: str) -> Network:
            return kind(executor_of(host._executors, host._load_more, name), self.cuda, self.driver)

        super().__init__(host.bundle, executors, self.cuda, "recording", ["for a test"], load_more)


class Counted:
    """A callback that notes the driver's counts after each step, and asks for nothing."""

    def __init__(self) -> None:
        self.seen: list[Counter[str]] = []

    def __call__(self, pipeline: Pipeline, _step: int, _timestep: float, state: dict[str, Any]) -> None:
        assert isinstance(pipeline, Recorded)
        assert state == {}
        self.seen.append(pipeline.driver.counts.copy())

    @property
    def steps(self) -> list[Counter[str]]:
        """What each step but the first added: the first comes with what prepares the run."""
        return [after - before for before, after in pairwise(self.seen)]


@contextmanager
def recording(host: Pipeline) -> Iterator[Recorded]:
    """A pipeline whose driver must not have been used wrongly in the end, and be left with nothing."""
    result = Recorded(host)
    yield result
    driver = result.driver
    result.close()
    assert driver.faults == []
    assert driver.live == {}


def assert_equal(one: PipelineOutput, other: PipelineOutput) -> None:
    assert np.array_equal(one.latents, other.latents)
    assert np.array_equal(one.images, other.images)
