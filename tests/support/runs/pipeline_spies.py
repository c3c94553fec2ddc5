"""A pipeline whose executors are looked over the shoulder, and how its results are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tolerances
from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.devices.device import Device
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.request.output import PipelineOutput
from sdrt.runtime.text.tokenizer import Tokenizer

Array = NDArray[Any]


class OpenPipeline(Pipeline):
    """A pipeline whose executors can be exchanged."""

    def __init__(
        self,
        bundle: Bundle,
        executors: Mapping[str, Executor],
        device: Device,
        backend: str,
        reasons: Sequence[str] = (),
        load_more: Callable[[str], Executor] | None = None,
        tokenizers: Sequence[Tokenizer] | None = None,
        lora_dir: str | Path | None = None,
    ) -> None:
        self.executors = dict(executors)
        super().__init__(bundle, self.executors, device, backend, reasons, load_more, tokenizers, lora_dir)

    def exchange(self, component: str, executor: Executor) -> None:
        """Use another executor, and forget every buffer and cache."""
        executors = {**self.executors, component: executor}
        OpenPipeline.__init__(self, self.bundle, executors, self._device, self.backend)


class Spy:
    """An executor that notes what is bound and evaluated, and may change the outputs afterwards."""

    capturable = False
    generation = 0

    def __init__(self, executor: Executor, spoil: Callable[[int, Array], None] | None = None) -> None:
        self.spec = executor.spec
        self.bound: list[dict[str, tuple[int, ...]]] = []
        self.evaluations = 0
        self._executor = executor
        self._spoil = spoil

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        evaluate = self._executor.bind(inputs, outputs)
        self.bound.append({name: array.shape for name, array in {**inputs, **outputs}.items()})

        def evaluate_and_note() -> None:
            evaluate()
            if self._spoil is not None:
                self._spoil(self.evaluations, next(iter(outputs.values())))
            self.evaluations += 1

        return evaluate_and_note

    def replace_weights(self, weights: Mapping[str, Array]) -> None:
        self._executor.replace_weights(weights)

    def close(self) -> None:
        self._executor.close()


def spy(pipeline: OpenPipeline, component: str, spoil: Callable[[int, Array], None] | None = None) -> Spy:
    """Put a spy in a component's place."""
    result = Spy(pipeline.executors[component], spoil)
    pipeline.exchange(component, result)
    return result


def assert_equal(one: PipelineOutput, other: PipelineOutput) -> None:
    """Bit for bit."""
    assert np.array_equal(one.latents, other.latents)
    assert np.array_equal(np.asarray(one.images), np.asarray(other.images))


def assert_close(latents: Array, expected: Array) -> None:
    """Within what another order of summation does."""
    error = np.max(np.abs(latents - expected))
    assert error <= tolerances.OTHER_BATCH * np.max(np.abs(expected))


def assert_differ(one: Array, other: Array) -> None:
    """By far more than another order of summation does. (The tiny U-Net is random: its text does little.)"""
    assert np.max(np.abs(one - other)) > 100 * tolerances.OTHER_BATCH * np.max(np.abs(one))
