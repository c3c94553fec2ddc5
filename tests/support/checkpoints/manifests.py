"""Manifests of every family as examples, their JSON, and how a damaged one is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints.json_paths import KeyPath, removed, replaced

from sdrt.runtime.bundle.families.record import Precision
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.bundle.manifest import (
    Component,
    Defaults,
    FileEntry,
    ImageProcessorFacts,
    LatentGeometry,
    Limits,
    Manifest,
    Preview,
    SizeLimit,
    TokenizerFacts,
)
from sdrt.runtime.bundle.manifest_json import from_json, to_json
from sdrt.runtime.errors import BundleError
from sdrt.runtime.samplers.schedule import NoiseSchedule

SIZES = {
    "tokens": 77,
    "skips": 1,
    "text_width": 16,
    "cross_width": 16,
    "unet_channels": 4,
    "latent_channels": 4,
}
SDXL_SIZES = {**SIZES, "text_width_2": 24, "cross_width": 40, "projection_width": 12}
INPAINTING_SIZES = {**SIZES, "inpainting_channels": 5}
LCM_SIZES = {**SIZES, "guidance_width": 32}
IMAGE_SIZES = {"cross_width": 16, "encoder_size": 32, "unet_channels": 4, "latent_channels": 4}
PREVIEW = Preview(((0.1, 0.2, 0.3), (0.0, -0.5, 1.0), (1.0, 2.0, 3.0), (-1.0, 0.0, 0.25)), (0.5, -0.5, 0.0))


def entry(path: str) -> FileEntry:
    return FileEntry(path, 10, "0" * 64)


def components(family: str, sizes: dict[str, int], precision: Precision = "fp32") -> dict[str, Component]:
    """The family's table with a file for each component."""
    return {
        name: Component(
            f"{name}/model.onnx", (entry(f"{name}/model.onnx"),), precision, spec.resolve(sizes, precision)
        )
        for name, spec in FAMILIES[family].components.items()
    }


def example(**changes: Any) -> Manifest:
    manifest = Manifest(
        family="sd",
        components=components("sd", SIZES),
        latents=LatentGeometry(4, 8),
        schedule=NoiseSchedule(),
        weights=entry("weights.json"),
        tokenizers=(TokenizerFacts(entry("tokenizer.json"), 77, 1, 2, 2),),
        text_output="last_hidden_state",
        defaults=Defaults(64, 64, 20, 7.5, "dpmpp_2m"),
        limits=Limits(1, 4, SizeLimit(64, 128, 8), SizeLimit(64, 64, 1), max_chunks=3, max_clip_skip=2),
        preview=PREVIEW,
        provenance={"source": "ein Bild — 🍎"},
        parity={"figures": []},
    )
    return replace(manifest, **changes)


def sdxl(**changes: Any) -> Manifest:
    """The example's counterpart with two text encoders."""
    manifest = example(
        family="sdxl",
        components=components("sdxl", SDXL_SIZES, "fp16"),
        text_output="penultimate_hidden_state",
        tokenizers=(
            TokenizerFacts(entry("tokenizer.json"), 77, 1, 2, 2),
            TokenizerFacts(entry("tokenizer_2.json"), 77, 1, 2, 0),
        ),
        force_zeros_for_empty_prompt=True,
        ranges={"vae_decoder": {"largest": 1e5}},
    )
    return replace(manifest, **changes)


def image_variations(**changes: Any) -> Manifest:
    """The example's counterpart without text."""
    manifest = example(
        family="image-variations",
        components=components("image-variations", IMAGE_SIZES),
        tokenizers=(),
        text_output="",
        image_processor=ImageProcessorFacts(32, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)),
        limits=Limits(1, 4, SizeLimit(64, 128, 8), SizeLimit(64, 64, 1)),
    )
    return replace(manifest, **changes)


DOCUMENT: dict[str, Any] = json.loads(to_json(example()))
SDXL: dict[str, Any] = json.loads(to_json(sdxl()))
VARIATIONS: dict[str, Any] = json.loads(to_json(image_variations()))
INPAINTING: dict[str, Any] = json.loads(to_json(example(components=components("sd", INPAINTING_SIZES))))


def changed(path: KeyPath, value: Any, document: dict[str, Any] = DOCUMENT) -> dict[str, Any]:
    """A document, by default the example's, with the value at ``path`` replaced."""
    return replaced(document, path, value)


def without(path: KeyPath, document: dict[str, Any] = DOCUMENT) -> dict[str, Any]:
    """A document, by default the example's, without what is at ``path``."""
    return removed(document, path)


def refused(document: Any) -> str:
    """The message with which a document is refused; it is one line that names the file or a part."""
    with pytest.raises(BundleError) as caught:
        from_json(document if isinstance(document, str) else json.dumps(document))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a bundle's manifest in place."""
    file = bundle / "manifest.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    change(document)
    file.write_text(json.dumps(document), encoding="utf-8")
