"""An engine's manifest: what is written is read back, and nothing else is taken for one."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from support.checkpoints.json_paths import KeyPath, key_paths, removed, replaced

from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.engines import (
    AxisProfile,
    EngineKey,
    EngineManifest,
    Profile,
    component_sha256,
    engine_from_json,
    engine_to_json,
)
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.bundle.manifest import Component, FileEntry
from sdrt.runtime.errors import BundleError

KEY = EngineKey(
    component="unet",
    component_sha256="0123456789abcdef" * 4,
    flavour="tensorrt-rtx",
    flavour_version="1.7.1.116",
    targets=("8.6", "8.9"),
    precision="fp16",
    profiles=(
        Profile({"rows": AxisProfile(1, 2, 8), "latent_height": AxisProfile(64, 64, 64)}),
        Profile({"rows": AxisProfile(1, 1, 1), "latent_height": AxisProfile(32, 64, 128)}),
    ),
    options={"optimization_level": 3, "islands": ["a", "b"]},
)
MANIFEST = EngineManifest(
    KEY,
    (FileEntry("model.plan", 7, "a" * 64), FileEntry("layers.json", 3, "b" * 64)),
    {"build_seconds": 22.5, "attention": {"fused": 32}},
)
DOCUMENT: dict[str, Any] = json.loads(engine_to_json(MANIFEST))


def changed(path: KeyPath, value: Any) -> dict[str, Any]:
    return replaced(DOCUMENT, path, value)


def without(path: KeyPath) -> dict[str, Any]:
    return removed(DOCUMENT, path)


def free(path: KeyPath) -> bool:
    """Whether anything may stand there: options and facts are not read."""
    return (path[:2] == ("key", "options") and len(path) > 2) or (path[0] == "facts" and len(path) > 1)


STRICT_PATHS = [path for path in key_paths(DOCUMENT) if not free(path)]
FIELDS = [path for path in STRICT_PATHS if isinstance(path[-1], str) and path[-2:-1] != ("axes",)]


def refused(document: Any) -> str:
    """The message with which a document is refused; it is one line that names the file."""
    text = document if isinstance(document, str) else json.dumps(document)
    with pytest.raises(BundleError) as caught:
        engine_from_json(text, "engines/x/engine.json")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("engines/x/engine.json")
    return message


@pytest.mark.parametrize(
    "manifest",
    [
        MANIFEST,
        replace(MANIFEST, key=replace(KEY, targets=()), facts={}),
        replace(MANIFEST, key=replace(KEY, targets=("8.0+",), flavour="tensorrt", options={})),
        replace(MANIFEST, key=replace(KEY, profiles=(Profile({}),))),
    ],
)
def test_round_trip(manifest: EngineManifest) -> None:
    text = engine_to_json(manifest)
    assert engine_from_json(text) == manifest
    assert text.endswith("}\n")


@pytest.mark.parametrize("path", FIELDS, ids=str)
def test_missing_field(path: KeyPath) -> None:
    refused(without(path))


@pytest.mark.parametrize("path", STRICT_PATHS, ids=str)
@pytest.mark.parametrize("value", [None, True, 1.5, "🍎", -1, [], {}, [[]], {"x": 1}], ids=repr)
def test_value_of_another_kind(path: KeyPath, value: Any) -> None:
    allowed = (
        (path in (("facts",), ("key", "options")) and isinstance(value, dict))
        or (path == ("key", "targets") and value == [])
        or (path[-1] == "path" and value == "🍎")
    )
    if not allowed:
        refused(changed(path, value))


@pytest.mark.parametrize("holder", [(), ("key",), ("key", "profiles", 0), ("files", 0)], ids=str)
def test_unknown_field(holder: KeyPath) -> None:
    message = refused(changed((*holder, "surprise"), 1))
    assert "unknown field 'surprise'" in message


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("format",), "sdrt-bundle", '"format": "sdrt-engine"'),
        (("format_version",), 2, "reads version 1 alone: upgrade sdrt"),
        (("format_version",), 0, "format version 0"),
        (("key", "flavour"), "openvino", "flavour is one of tensorrt, tensorrt-rtx, onnxruntime-cuda"),
        (("key", "component"), "../unet", "component is a name"),
        (("key", "flavour_version"), "1.7/../..", "flavour_version is a version"),
        (("key", "targets"), ["sm_86"], "targets are compute capabilities such as 8.6 or 8.0+"),
        (("key", "precision"), "fp8", "precision is one of fp32, fp16, bf16"),
        (("key", "component_sha256"), "a" * 63, "component_sha256 is 64 hex digits"),
        (("key", "profiles"), [], "there is a profile"),
        (("key", "profiles", 1, "axes"), {}, "all profiles have the same axes"),
        (("key", "profiles", 0, "axes", "rows", "minimum"), 3, "1 ≤ minimum ≤ optimum ≤ maximum"),
        (("key", "profiles", 0, "axes", "rows", "maximum"), 1, "1 ≤ minimum ≤ optimum ≤ maximum"),
        (("key", "profiles", 0, "axes", "rows", "minimum"), 0, "1 ≤ minimum ≤ optimum ≤ maximum"),
        (("files",), [], "there is a plan"),
        (("files", 0, "sha256"), "a" * 63, "not 64 hex digits"),
        (("files", 1, "path"), "model.plan", "each file is listed once"),
        (("key", "profiles"), [{"axes": {}}] * 65, "1 to 64 profiles"),
        (("files", 0, "size"), -1, "has -1 bytes"),
        (("files", 0, "path"), "../../unet/model.onnx", "lies outside the engine's folder: refused"),
        (("files", 0, "path"), "/etc/passwd", "lies outside the engine's folder: refused"),
        (("files", 1, "path"), "a\\..\\b", "lies outside the engine's folder: refused"),
        (("files", 1, "path"), "", "lies outside the engine's folder: refused"),
    ],
)
def test_value_out_of_range(path: KeyPath, value: Any, words: str) -> None:
    assert words in refused(changed(path, value))


def test_profile_of_an_axis_that_no_component_has() -> None:
    document = copy.deepcopy(DOCUMENT)
    for each in document["key"]["profiles"]:
        each["axes"]["depth"] = {"minimum": 1, "optimum": 1, "maximum": 1}
    assert "'depth', which is no axis" in refused(document)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"sdrt-engine"', "[" * 100_000, '{"format": 1}'])
def test_no_engine_manifest_at_all(text: str) -> None:
    refused(text)


def test_folder_name() -> None:
    name = KEY.folder_name()
    assert name == f"tensorrt-rtx-1.7.1.116-sm86_sm89-unet-1to8x64-{KEY.hash8()}"
    assert len(KEY.hash8()) == 8
    portable = replace(KEY, targets=(), profiles=(Profile({}),)).folder_name()
    assert portable.startswith("tensorrt-rtx-1.7.1.116-portable-unet-fixed-")
    assert "-sm80plus-" in replace(KEY, targets=("8.0+",)).folder_name()


@pytest.mark.parametrize(
    "change",
    [
        {"component_sha256": "f" * 64},
        {"options": {"optimization_level": 4}},
        {"profiles": (KEY.profiles[0],)},
        {"precision": "fp32"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_engines_that_differ_in_anything_live_side_by_side(change: dict[str, Any]) -> None:
    assert replace(KEY, **change).folder_name() != KEY.folder_name()


def test_key_hash_does_not_depend_on_the_order_of_options() -> None:
    forwards, backwards = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    assert replace(KEY, options=forwards).hash8() == replace(KEY, options=backwards).hash8()


def test_component_hash_covers_every_file_and_no_order() -> None:
    files = (FileEntry("unet/model.onnx", 1, "a" * 64), FileEntry("unet/model.onnx.data", 2, "b" * 64))
    part = Component("unet/model.onnx", files, "fp16", FAMILIES["sd"].components["unet"])
    here = component_sha256(part)
    assert here == component_sha256(replace(part, files=files[::-1]))
    for other in (
        files[:1],
        (files[0], replace(files[1], sha256="c" * 64)),
        (files[0], replace(files[1], path="unet/other.data")),
    ):
        assert component_sha256(replace(part, files=other)) != here


def test_component_hash_is_what_it_is() -> None:
    """The hash is in every engine's key: another way to compute it would orphan all of them."""
    files = (FileEntry("unet/model.onnx", 1, "a" * 64),)
    part = Component("unet/model.onnx", files, "fp16", FAMILIES["sd"].components["unet"])
    # printf 'unet/model.onnx aa…a\n' | sha256sum
    assert component_sha256(part) == "e3d969a06d12890388506e0dfa8183ef5ae4cf6e616cc713a5e7d16fd8e180b8"


def test_profile() -> None:
    shape = {"rows": 2, "latent_height": 64, "latent_width": 64}
    assert KEY.profiles[0].admits(shape)
    assert not KEY.profiles[1].admits(shape)
    assert KEY.profiles[0].distance(shape) == 0
    assert KEY.profiles[0].distance({**shape, "rows": 4}) == pytest.approx(0.6931, abs=1e-4)  # ln 2
    assert str(KEY.profiles[0]) == "rows 1..8, latent_height 64"


def test_bundle_with_engines_opens(bundle_copy: Any) -> None:
    """The bundle's own check neither reads the engines nor trips over them, damaged ones included."""
    folder = bundle_copy / "engines" / KEY.folder_name()
    folder.mkdir(parents=True)
    (folder / "engine.json").write_text("no JSON")
    (folder / "model.plan").write_bytes(b"x")
    (bundle_copy / "engines" / ".half-written").mkdir()
    Bundle.open(bundle_copy).verify()
