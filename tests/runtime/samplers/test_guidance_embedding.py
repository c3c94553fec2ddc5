"""The guidance embedding of latent consistency models against diffusers'."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

import tolerances
from sdrt.runtime.samplers.guidance import guidance_embedding


@pytest.mark.parametrize("width", [4, 8, 9, 256, 257])
@pytest.mark.parametrize("w", [0.0, 0.001, 0.5, 7.5, 13.0])
def test_equals_that_of_diffusers(w: float, width: int) -> None:
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.tensor([w]), embedding_dim=width
    )
    ours = guidance_embedding(w, width)
    assert ours.dtype == np.float32
    assert ours.shape == (width,)
    bound = tolerances.GUIDANCE_EMBEDDING * 1000 * w + 2 * tolerances.EPS32
    np.testing.assert_allclose(ours, expected[0].numpy(), rtol=0, atol=bound)


def test_no_guidance_is_sines_of_0_and_cosines_of_0() -> None:
    assert guidance_embedding(0.0, 5).tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]


def test_other_guidance_is_another_embedding() -> None:
    assert np.abs(guidance_embedding(7.5, 256) - guidance_embedding(7.0, 256)).max() > 0.5
