"""A request is checked once, and drawn as it is any number of times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs.pipeline_spies import assert_equal
from support.runs.task_calls import MASK, PICTURE, SHORT, TASKS

from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.errors import UsageError
from sdrt.runtime.pictures import canvas, reading
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.request import build


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Pipeline:
    return Pipeline.load(tiny_bundle, verify=False)


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """What a function was called with, from now on."""
    calls, function = [], getattr(module, name)

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, call)
    return calls


@pytest.mark.parametrize("task", ["image", "mask, less", "variation", "chunks"])
def test_a_request_draws_what_a_call_draws(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    expected = pipeline(**{**SHORT, **TASKS[task]})
    request = pipeline.request(**{**SHORT, **TASKS[task]})
    for module, name in ((build, "check_names"), (build, "build_sampling"), (reading, "read_image")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("checked again"))
    for _ in range(2):
        output = pipeline.draw(request)
        assert_equal(output, expected)
        assert output.recipes == expected.recipes


def test_a_request_holds_the_seeds_that_were_left_to_us(pipeline: Pipeline) -> None:
    request = pipeline.request("x", num_inference_steps=1, num_images_per_prompt=2)
    first, second = request.seeds
    assert second == first + 1
    assert [recipe["seed"] for recipe in pipeline.draw(request).recipes] == request.seeds


def test_another_pipeline_of_the_bundle_draws_it(pipeline: Pipeline, tiny_bundle: Path) -> None:
    request = pipeline.request("x", **SHORT)
    with Pipeline.load(tiny_bundle, verify=False) as other:
        assert_equal(other.draw(request), pipeline.draw(request))
    manifest = replace(pipeline.bundle.manifest, force_zeros_for_empty_prompt=True)
    strange = Pipeline(Bundle(tiny_bundle, manifest), pipeline._executors, pipeline._device, "host")
    with pytest.raises(UsageError, match="of another bundle"):
        strange.draw(request)


def test_functions_are_given_to_a_request_that_is_there(pipeline: Pipeline) -> None:
    seen: list[Any] = []
    request = pipeline.request("x", callback_on_step_end=lambda *_: pytest.fail("still called"), **SHORT)
    batch_end = request.with_callbacks(callback_on_batch_end=lambda _, batch: seen.append(batch.numbers))
    pipeline.draw(batch_end)
    assert seen == [(0,)]
    with pytest.raises(UsageError, match="callback_on_step_end is int: a function is wanted"):
        request.with_callbacks(callback_on_step_end=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("ends", [{"to_prompt": "y"}, {"to_seed": 9}])
def test_both_ends_of_frames_share_a_picture(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, ends: dict[str, Any]
) -> None:
    pictures, masks = (counted(monkeypatch, reading, name) for name in ("read_image", "read_mask"))
    pipeline.interpolate("x", frames=3, image=PICTURE, mask_image=MASK, **SHORT, **ends)
    assert (len(pictures), len(masks)) == (1, 1)


def test_kept_pixels_are_put_back_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the pictures are handed out twice: of each batch, and of the call."""
    finished = counted(monkeypatch, canvas, "finish")
    batches: list[Any] = []
    task: dict[str, Any] = {**SHORT, **TASKS["expand"]}
    output = pipeline(**task, callback_on_batch_end=lambda _, batch: batches.append(batch.images))
    assert sum(len(pixels) for pixels, _ in finished) == len(output.images) == 3
    assert np.array_equal(np.concatenate(batches), output.images)
