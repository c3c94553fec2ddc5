"""Every task on the CUDA device with a recording driver: the host's pictures, and one launch a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_pipeline import Counted, Recorded, assert_equal

from sdrt.runtime.pipeline import Pipeline

PICTURE = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
MASK = np.zeros((16, 16), bool)
MASK[4:12, 8:] = True
SHORT: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "numpy", "seed": 4}
TASKS: dict[str, dict[str, Any]] = {
    "image": {"prompt": "a cat", "image": PICTURE, "strength": 0.7},
    "image, all of it": {"prompt": "a cat", "image": PICTURE, "strength": 1.0, "sampler": "euler_a"},
    "mask": {"prompt": "a cat", "image": PICTURE, "mask_image": MASK},
    "mask, less": {"prompt": "a cat", "image": PICTURE, "mask_image": MASK, "strength": 0.6},
    "expand": {"prompt": "a cat", "image": PICTURE, "expand": (4, 0, 6, 2), "num_images_per_prompt": 3},
    "variation": {"image": PICTURE, "variation": 0.4, "sampler": "euler"},
    "weights": {"prompt": "a (red:1.4) [apple]", "negative_prompt": "(blue)"},
    "chunks": {"prompt": ["a", "a BREAK b", "c"], "negative_prompt": ["", "", "d BREAK e BREAK f"]},
    "clip skip": {"prompt": "a cat", "clip_skip": 1},
    "interval": {"prompt": "a cat", "guidance_interval": (0.3, 0.7), "guidance_rescale": 0.5},
    "schedule": {"prompt": "a cat", "guidance_scale": [5.0, 4.0, 1.0, 2.0, 1.0, 1.0]},
    "one half": {"prompt": "a cat", "guidance_scale": 1.0},
}


@pytest.fixture(scope="module")
def host(tiny_bundle: Path) -> Pipeline:
    return Pipeline.load(tiny_bundle, backend="onnxruntime-cpu")


@pytest.fixture
def recorded(host: Pipeline) -> Iterator[Recorded]:
    result = Recorded(host)
    yield result
    driver = result.driver
    result.close()
    assert driver.faults == []
    assert driver.live == {}


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
