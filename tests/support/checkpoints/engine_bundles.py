"""Bundles with engines for tests that need no real plan: what is searched is only ``engine.json``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.engines import (
    ENGINE_NAME,
    ENGINES_FOLDER,
    AxisProfile,
    EngineKey,
    EngineManifest,
    Profile,
    component_sha256,
    engine_to_json,
)
from sdrt.runtime.bundle.manifest import FileEntry, Manifest

PLAN = b"a plan " * 100
Sizes = Mapping[str, tuple[int, int, int]]
UNET_SIZES: Sizes = {"rows": (1, 2, 4), "latent_height": (16, 16, 32), "latent_width": (16, 16, 32)}


def long_prompts(manifest: Manifest) -> Manifest:
    """The manifest with a U-Net that takes 1 to 4 chunks, whatever its own takes."""
    unet = manifest.components["unet"]
    inputs = tuple(
        replace(entry, shape=(entry.shape[0], "context", entry.shape[2]))
        if entry.name == "encoder_hidden_states"
        else entry
        for entry in unet.spec.inputs
    )
    components = {**manifest.components, "unet": replace(unet, spec=replace(unet.spec, inputs=inputs))}
    return replace(manifest, components=components, limits=replace(manifest.limits, max_chunks=4))


def profile(sizes: Sizes) -> Profile:
    return Profile({name: AxisProfile(*limits) for name, limits in sizes.items()})


def engine_key(bundle: Bundle, component: str = "unet", *sizes: Sizes, **changes: Any) -> EngineKey:
    """A key that fits the bundle, TensorRT for RTX 1.7.1.116 and a GPU of 8.9, with parts of it changed."""
    part = bundle.component(component)
    key = EngineKey(
        component=component,
        component_sha256=component_sha256(part),
        flavour="tensorrt-rtx",
        flavour_version="1.7.1.116",
        targets=("8.0", "8.6", "8.9", "12.0"),
        precision=part.precision,
        profiles=tuple(profile(each) for each in sizes or (UNET_SIZES,)),
    )
    return replace(key, **changes)


def add_engine(bundle: Bundle, key: EngineKey, plan: bytes = PLAN, plan_name: str = "model.plan") -> Path:
    """Write an engine into the bundle's folder and return the engine's."""
    folder = bundle.path / ENGINES_FOLDER / key.folder_name()
    folder.mkdir(parents=True)
    (folder / plan_name).write_bytes(plan)
    entry = FileEntry(plan_name, len(plan), hashlib.sha256(plan).hexdigest())
    (folder / ENGINE_NAME).write_text(engine_to_json(EngineManifest(key, (entry,))), encoding="utf-8")
    return folder
