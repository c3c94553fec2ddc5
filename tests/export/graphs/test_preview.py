"""The preview map: near the decoder at the latents' size, on pictures that it was not fitted to."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import tolerances
from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.graphs import preview
from sdrt.export.graphs.networks import VaeDecoder
from sdrt.export.graphs.preview import fit_preview, sample_pictures, small_picture
from sdrt.runtime.bundle.bundle import EMBEDDED
from sdrt.runtime.bundle.manifest import Preview
from sdrt.runtime.errors import NumericsError
from sdrt.runtime.pipeline import Pipeline

PROMPTS = ("a red apple", "a smiling cat", "a blue car", "a green tree")


@pytest.fixture(scope="module")
def emoji() -> Checkpoint:
    return open_checkpoint(str(EMBEDDED.parent))


def applied(fitted: Preview, latents: NDArray[np.float32]) -> NDArray[np.float64]:
    """The preview of latents [N, C, h, w] as the runtime shows it: [N, h, w, 3], clipped to [-1, 1]."""
    rgb = np.moveaxis(latents, 1, -1) @ np.array(fitted.weights) + np.array(fitted.bias)
    return np.asarray(rgb.clip(-1, 1))


def test_it_shows_the_pictures_that_the_embedded_model_draws(emoji: Checkpoint) -> None:
    """Of the sampler's own latents, which are not those that the fit saw."""
    fitted = fit_preview(emoji)
    latents, pictures = [], []
    pipeline = Pipeline.load(backend="onnxruntime-cpu")
    for seed, prompt in enumerate(PROMPTS):
        drawn = pipeline(prompt, num_inference_steps=10, seed=seed, output_type="latents")
        latents.append(drawn.latents)
        picture = np.asarray(pipeline(prompt, num_inference_steps=10, seed=seed).images[0], np.float32)
        pictures.append(torch.from_numpy(picture / 127.5 - 1).movedim(-1, 0)[None])
    pipeline.close()
    wanted = small_picture(torch.cat(pictures), emoji.factor).movedim(1, -1).numpy()
    error = np.mean((applied(fitted, np.concatenate(latents)) - wanted) ** 2)
    explained = 1 - error / np.mean(np.var(wanted, axis=(0, 1, 2)))
    assert explained >= tolerances.PREVIEW_EXPLAINED


def test_the_fit_is_repeatable_and_plain_numbers(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    fitted = fit_preview(checkpoint)
    assert fit_preview(checkpoint) == fitted
    assert len(fitted.weights) == 4
    assert {len(row) for row in fitted.weights} == {3}
    assert {type(number) for row in (*fitted.weights, fitted.bias) for number in row} == {float}


def test_no_affine_map_is_nearer_on_its_own_pictures(
    emoji: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Least squares: a decoder that is affine is found exactly."""

    class Affine(VaeDecoder):
        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            image = torch.stack(
                [latents[:, 0] - 0.5, 2 * latents[:, 3], latents[:, 1] + latents[:, 2]], dim=1
            )
            return image.repeat_interleave(emoji.factor, -1).repeat_interleave(emoji.factor, -2)

    monkeypatch.setattr("sdrt.export.graphs.networks.VaeDecoder", Affine)
    fitted = fit_preview(emoji)
    expected = [[1, 0, 0], [0, 0, 1], [0, 0, 1], [0, 2, 0]]
    np.testing.assert_allclose(fitted.weights, expected, atol=2.0**-20)  # float32 pictures, averaged
    np.testing.assert_allclose(fitted.bias, [-0.5, 0, 0], atol=2.0**-20)


def test_a_vae_that_gives_nan_is_named(emoji: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    class Faulty(VaeDecoder):
        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            return torch.full((1, 3, 64, 64), math.nan)

    monkeypatch.setattr("sdrt.export.graphs.networks.VaeDecoder", Faulty)
    with pytest.raises(NumericsError, match="the VAE gives NaN or infinity"):
        fit_preview(emoji)


def test_the_pictures_cover_the_range_of_colours() -> None:
    pictures = sample_pictures(preview.PICTURES, 64)
    assert pictures.shape == (preview.PICTURES, 3, 64, 64)
    assert pictures.dtype == np.float32
    assert np.abs(pictures).max() == 1
    assert (pictures.std(axis=(0, 2, 3)) > 0.3).all()
    flat = pictures.transpose(1, 0, 2, 3).reshape(3, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(3)).max() < 0.7  # else two colours could not be told apart
