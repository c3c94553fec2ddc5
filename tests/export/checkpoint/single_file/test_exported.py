"""Single files through the whole of ``sd-export``: the pictures are those of the folder, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints.ldm_names import SD1, SDXL, write_single_file
from support.made_once import exported_once

from sdrt.export.cli import main as cli
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.pipeline import Pipeline

# Fixtures of a checkpoint and its bundle, where its networks lie in a file, the bundle's options, a line.
KINDS: dict[str, tuple[str, str, dict[str, str], tuple[str, ...], Sequence[str], str]] = {
    "sd": (
        "tiny_checkpoint",
        "tiny_bundle",
        SD1,
        (),
        ["--fp16-weights", "--height", "16..32", "--width", "16..32", "--batch", "1..2"],
        "model.safetensors is Stable Diffusion by --config tiny, predicts epsilon, scheduled by "
        "PNDMScheduler, fp16",
    ),
    "sdxl": (
        "sdxl_checkpoint",
        "sdxl_bundle",
        SDXL,
        ("text_encoder_2",),
        ["--height", "16", "--width", "16", "--batch", "1..2"],
        "model.safetensors is SDXL by --config tiny-xl, predicts epsilon, scheduled by "
        "EulerDiscreteScheduler, fp16",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_draws_as_its_folder(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    checkpoint, bundle, prefixes, open_clip, options, line = KINDS[kind]
    folder, wanted = request.getfixturevalue(checkpoint), request.getfixturevalue(bundle)

    def export(out: Path) -> None:
        file = write_single_file(tmp_path / "model.safetensors", folder, prefixes, open_clip)
        assert cli.main([str(file), str(out), "--config", str(folder), "--quiet", *options]) == 0

    given = exported_once(f"single-{kind}", tmp_path / "bundle", export, folder, write_single_file)
    manifests = [Bundle.open(place).manifest for place in (given, wanted)]
    assert manifests[0].components == manifests[1].components  # the same files, by their SHA-256
    assert manifests[0].provenance["read_as"] == line
    assert manifests[0].provenance["source"] == "model.safetensors"
    pictures = []
    for place in (given, wanted):
        with Pipeline.load(place, backend="onnxruntime-cpu") as pipeline:
            drawn = pipeline("a cat", num_inference_steps=3, seed=7, output_type="numpy")
            pictures.append(np.asarray(drawn.images))
    assert np.array_equal(pictures[0], pictures[1])
