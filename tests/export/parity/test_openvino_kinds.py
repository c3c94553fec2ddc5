"""The kinds of U-Nets on OpenVINO: what is cut out of each, and that a change of any input is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs.openvino_runs import assert_close, buffers, expected, openvino

from sdrt.runtime.bundle.bundle import Bundle
from tolerances import FP16_IN_FLOAT32

KINDS = {
    "sdxl_bundle": {"encoder_hidden_states", "text_embeds", "time_ids", "timestep"},
    "lcm_bundle": {"encoder_hidden_states", "timestep", "timestep_cond"},
    "inpainting_bundle": {"encoder_hidden_states", "timestep"},
}


def own_size(bundle: Bundle) -> dict[str, Any]:
    """Some of these bundles have one size."""
    size, factor = bundle.manifest.defaults, bundle.manifest.latents.factor
    pixels = {"height": size.height, "width": size.width}
    return {**pixels, **{f"latent_{name}": value // factor for name, value in pixels.items()}}


@pytest.mark.parametrize("kind", KINDS)
def test_unet(kind: str, request: pytest.FixtureRequest) -> None:
    bundle = Bundle.open(request.getfixturevalue(kind), verify=False)
    inputs, outputs = buffers(bundle, **own_size(bundle))
    others, _ = buffers(bundle, seed=1, **own_size(bundle))
    evaluate: Any = openvino(bundle, threads=2).bind(inputs, outputs)
    evaluate()
    assert_close(outputs, expected(bundle, inputs, outputs))
    for name in inputs:
        before = outputs["noise_pred"].copy()
        inputs[name][...] = others[name]
        evaluate()
        assert not np.array_equal(outputs["noise_pred"], before), name
        assert_close(outputs, expected(bundle, inputs, outputs))
    cut_out = {name for part in evaluate._streams[0]._parts for name in part._part.inputs}
    assert cut_out == KINDS[kind]


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_fp16_is_computed_in_float32(fp16_bundle: Path, component: str) -> None:
    bundle = Bundle.open(fp16_bundle, verify=False)
    inputs, outputs = buffers(bundle, component, **own_size(bundle))
    openvino(bundle, component, threads=2).bind(inputs, outputs)()
    assert_close(outputs, expected(bundle, inputs, outputs, component), FP16_IN_FLOAT32)
