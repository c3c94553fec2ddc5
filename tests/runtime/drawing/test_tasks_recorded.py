"""Every task on the CUDA device with a recording driver: the host's pictures, and one launch a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fakes.recorded_pipeline import Counted, Recorded, assert_equal, recording
from support.runs.task_calls import SHORT, TASKS

from sdrt.runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def host(tiny_bundle: Path) -> Pipeline:
    return Pipeline.load(tiny_bundle, backend="onnxruntime-cpu")


@pytest.fixture
def recorded(host: Pipeline) -> Iterator[Recorded]:
    with recording(host) as result:
        yield result


@pytest.mark.parametrize("name", TASKS)
def test_a_task_gives_the_hosts_picture_with_one_launch_a_step(
    host: Pipeline, recorded: Recorded, name: str
) -> None:
    options = {**SHORT, **TASKS[name]}
    watch: dict[str, Any] = {"callback_on_step_end_tensor_inputs": ()}
    recorded(**options)  # graphs are made
    counts = Counted()
    output = recorded(**options, callback_on_step_end=counts, **watch)
    assert_equal(output, host(**options))
    # Steps of one batch; between two batches there is the next one's start.
    usual = [Counter({"graph_launches": 1})]
    steps = [step for step in counts.steps if step["uploads"] == 0]
    assert steps
    assert all(step in usual for step in steps), steps


def test_frames_between_prompts_and_seeds(host: Pipeline, recorded: Recorded) -> None:
    options: dict[str, Any] = {**SHORT, "frames": 3, "to_seed": 9}
    drawn = [one.interpolate("a cat", "a (dog:1.3)", **options) for one in (recorded, host)]
    assert_equal(*drawn)
