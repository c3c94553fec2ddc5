"""The embedded checkpoint and its bundle: of one origin, small enough, and equal to diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tolerances
from sdrt.benchmarks.measure_fidelity import psnr
from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.fingerprint import fingerprint
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.parity.reference import reference_pipeline
from sdrt.runtime import Bundle, Pipeline
from sdrt.runtime.bundle.bundle import EMBEDDED

CHECKPOINT = EMBEDDED.parent
PARTS = ("text_encoder", "tokenizer", "unet", "vae", "scheduler")
MAX_BYTES = 16_000_000


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(str(CHECKPOINT))


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load()


def test_the_bundle_was_exported_from_the_checkpoint_beside_it(checkpoint: Checkpoint) -> None:
    """If this fails, the model was trained anew: `make bundle`."""
    assert Bundle.open().manifest.provenance["source_sha256"] == fingerprint(checkpoint)


def test_the_checkpoint_is_safetensors_in_fp16_and_small() -> None:
    import torch
    from safetensors.torch import load_file

    files = [file for part in PARTS for file in (CHECKPOINT / part).iterdir()]
    assert {file.suffix for file in files} <= {".json", ".txt", ".safetensors"}
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES
    for file in files:
        if file.suffix == ".safetensors":
            assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}


def test_it_draws_what_diffusers_draws(checkpoint: Checkpoint, pipeline: Pipeline) -> None:
    import torch

    latents = pipeline.initial_latents(0)
    factor = pipeline.bundle.manifest.latents.factor
    options: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 7.5}
    sides = {"height": latents.shape[2] * factor, "width": latents.shape[3] * factor}
    ours = pipeline("a red apple", sampler="ddim", latents=latents, output_type="numpy", **options).images[0]
    theirs = reference_pipeline(checkpoint)(
        "a red apple", latents=torch.from_numpy(latents), **sides, **options
    ).images[0]
    assert psnr(ours, np.asarray(theirs)) >= tolerances.EMBEDDED_PSNR_DB


def test_a_red_apple_is_red_and_another_seed_draws_another(pipeline: Pipeline) -> None:
    apple = pipeline(["a red apple", "a green apple"], seed=[3, 3], output_type="numpy").images
    red, green = apple[..., 0].astype(int), apple[..., 1].astype(int)
    inside = (apple.min(axis=-1) < 128).astype(int)  # not the white ground
    redness = ((red - green) * inside).sum(axis=(1, 2)) / inside.sum(axis=(1, 2))
    assert redness[0] > 50
    assert redness[1] < 0
    other = pipeline("a red apple", seed=4, output_type="numpy").images[0]
    assert not np.array_equal(apple[0], other)
