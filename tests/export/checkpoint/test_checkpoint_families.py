"""What only an export knows of a family is one table: it fits the records, and another one is read by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints.checkpoint_damage import configure
from torch import nn

from sdrt.export.checkpoint import families
from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.manifest import draft_manifest, tokenizer_files
from sdrt.export.options import AxisRange, ExportOptions
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.bundle.manifest import FileEntry, TokenizerFacts
from sdrt.runtime.bundle.manifest_json import from_json, to_json


@pytest.mark.parametrize("name", FAMILIES)
def test_every_component_of_a_family_has_a_network_and_a_module(name: str) -> None:
    family = families.CHECKPOINT_FAMILIES[name]
    assert family.record is FAMILIES[name]
    made = [component for network in family.networks for component in network.components]
    assert set(family.record.components) <= set(made)
    assert set(made) - set(family.record.components) <= {"vae_encoder"}  # with it a preview is fitted
    for network in family.networks:
        assert network.load_kind().__name__ == network.kind
        for component in network.components:
            assert issubclass(network.load_wrapper(component), nn.Module)
    for encoder in family.record.encoders:
        assert encoder.component in family.folders


def test_another_family_is_read(checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = replace(FAMILIES["sd"], name="other")
    other = replace(families.CHECKPOINT_FAMILIES["sd"], record=record, guidance=3.0)
    monkeypatch.setitem(FAMILIES, "other", record)
    monkeypatch.setitem(families.CHECKPOINT_FAMILIES, "other", other)
    monkeypatch.setitem(families.PIPELINES, "OtherPipeline", other)
    configure("model_index.json", _class_name="OtherPipeline")(checkpoint_copy)
    checkpoint = open_checkpoint(str(checkpoint_copy))
    assert (checkpoint.family, checkpoint.pipeline) == ("other", "OtherPipeline")
    side, one = AxisRange(16, 16), AxisRange(1, 1)
    options = ExportOptions("fp32", False, one, side, side, 1, 23)
    tokenizers = [
        TokenizerFacts(FileEntry(name, 0, "0" * 64), **tokenizer.ids)
        for name, tokenizer in zip(tokenizer_files(checkpoint), checkpoint.tokenizers, strict=True)
    ]
    manifest = from_json(to_json(draft_manifest(checkpoint, options, tokenizers)))
    assert (manifest.family, manifest.defaults.guidance_scale) == ("other", 3.0)
