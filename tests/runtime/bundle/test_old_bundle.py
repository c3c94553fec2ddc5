"""Bundles of an older format are drawn as before; what they lack is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints.old_bundle import make_old

from sdrt.runtime.backends.onnxruntime_cpu.executor import OnnxRuntimeExecutor
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.devices.host import HostDevice
from sdrt.runtime.drawing.text_conditioning import PromptEncoder, PromptTruncatedWarning
from sdrt.runtime.drawing.text_encoders import open_tokenizers, text_encoders
from sdrt.runtime.errors import UsageError
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.text.chunks import Prompt

OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "output_type": "latents"}


@pytest.fixture(scope="module")
def old(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_old(tiny_bundle, tmp_path_factory.mktemp("old") / "bundle")


def test_same_picture(old: Path, tiny_bundle: Path) -> None:
    drawn = []
    for folder in (old, tiny_bundle):
        with Pipeline.load(folder, backend="onnxruntime-cpu") as pipeline:
            drawn.append(pipeline("a (red:1.2) apple", negative_prompt="x", **OPTIONS).latents)
    assert np.array_equal(*drawn)


def test_limits_are_those_of_one_chunk(old: Path) -> None:
    bundle = Bundle.open(old)
    limits = bundle.manifest.limits
    assert (limits.max_chunks, limits.max_clip_skip) == (1, 0)
    part = bundle.component("text_encoder")
    executor = OnnxRuntimeExecutor(old / part.model, part.spec)
    encoder = PromptEncoder(
        text_encoders(bundle, {"text_encoder": executor}, open_tokenizers(bundle)),
        HostDevice(),
        batch=1,
        most_texts=2,
    )
    assert encoder.chunks(Prompt("word " * 200)) == 1
    with pytest.raises(UsageError, match="clip_skip is 1, and of this bundle it always runs all layers"):
        encoder.chunks(Prompt("a", clip_skip=1))
    with pytest.raises(UsageError, match="take no embeddings of textual inversion, since an older"):
        encoder.add_embedding("toy", [np.zeros((1, 16), np.float32)])


def test_long_prompts_are_cut(old: Path) -> None:
    with (
        Pipeline.load(old, backend="onnxruntime-cpu") as pipeline,
        pytest.warns(PromptTruncatedWarning, match="the prompt is over 75 tokens; this end of it is"),
    ):
        pipeline("word " * 200, **OPTIONS)
