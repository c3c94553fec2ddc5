"""Single files through the whole of ``sd-export``: the pictures are those of the folder, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints.ldm_names import SD1, SDXL, write_single_file
from support.made_once import exported_once

from sdrt.export import writer as bundle_writer
from sdrt.export.cli import main as cli
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.families.record import ComponentSpec
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


def graphs_of(bundle: Path, folder: Path) -> Any:
    """In place of the tracer's half a minute: the bundle's graphs, once the networks are the folder's own."""
    import onnx_ir as ir
    import torch

    from sdrt.export.checkpoint.reader import open_checkpoint
    from sdrt.export.graphs.networks import wrapped

    def load(module: torch.nn.Module, _args: object, spec: ComponentSpec, *_rest: object) -> ir.Model:
        reference = wrapped(open_checkpoint(str(folder)), spec.name)
        assert repr(module) == repr(reference)
        given, wanted = module.state_dict(), reference.state_dict()
        assert given.keys() == wanted.keys()
        assert all(torch.equal(given[name], wanted[name]) for name in wanted)
        return ir.load(bundle / spec.name / "model.onnx")

    return load


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_draws_as_its_folder(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    checkpoint, bundle, prefixes, open_clip, options, line = KINDS[kind]
    folder, wanted = request.getfixturevalue(checkpoint), request.getfixturevalue(bundle)

    def export(out: Path) -> None:
        file = write_single_file(tmp_path / "model.safetensors", folder, prefixes, open_clip)
        with pytest.MonkeyPatch.context() as patch:
            if kind == "sdxl":
                patch.setattr(bundle_writer, "onnx_from_module", graphs_of(wanted, folder))
            assert cli.main([str(file), str(out), "--config", str(folder), "--quiet", *options]) == 0

    made_of = (folder, wanted, write_single_file)
    given = exported_once(f"single-{kind}", tmp_path / "bundle", export, *made_of)
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
