"""The manifest: what is written is read back, and nothing else is taken for a manifest."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints.json_paths import KeyPath, key_paths
from support.checkpoints.manifests import (
    DOCUMENT,
    INPAINTING_SIZES,
    LCM_SIZES,
    SIZES,
    changed,
    components,
    entry,
    example,
    image_variations,
    refused,
    sdxl,
    without,
)

from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.families.record import DYNAMIC_AXES, PRECISIONS, Precision
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.bundle.manifest import (
    FORMAT_VERSION,
    Defaults,
    Manifest,
    SizeLimit,
)
from sdrt.runtime.bundle.manifest_json import from_json, to_json
from sdrt.runtime.errors import BundleError
from sdrt.runtime.samplers.edm import EdmScaling
from sdrt.runtime.samplers.schedule import NoiseSchedule
from sdrt.runtime.samplers.table import SamplerOptions

PATHS = list(key_paths(DOCUMENT))
CHECKPOINT_OPTIONS_GIVEN = SamplerOptions(
    sigma_schedule="karras", solver_order=3, lower_order_final=False, final_sigmas_type="sigma_min"
)


@pytest.mark.parametrize(
    "manifest",
    [
        example(),
        example(provenance={}, parity={}),
        example(schedule=NoiseSchedule(prediction_type="v_prediction", timestep_spacing="trailing")),
        example(
            schedule=NoiseSchedule(num_train_timesteps=3, trained_betas=(0.1, 0.2, 0.3)),
            defaults=Defaults(64, 64, 3, 7.5, "euler"),
        ),
        example(schedule=NoiseSchedule(timestep_spacing=None, set_alpha_to_one=None)),
        example(
            schedule=NoiseSchedule(edm=EdmScaling(sigma_max=120.0, sigma_schedule="exponential")),
            defaults=Defaults(64, 64, 20, 3.0, "dpmpp_2m", CHECKPOINT_OPTIONS_GIVEN),
        ),
        example(ranges={"unet": {"largest": 7.0}}),
        example(components=components("sd", INPAINTING_SIZES)),
        example(components=components("sd", LCM_SIZES)),
        sdxl(),
        sdxl(force_zeros_for_empty_prompt=False),
        image_variations(),
    ],
)
def test_round_trip(manifest: Manifest) -> None:
    again = from_json(to_json(manifest))
    assert again == manifest
    assert to_json(again) == to_json(manifest)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_round_trip_of_each_precision(precision: Precision) -> None:
    manifest = example(components=components("sd", SIZES, precision))
    assert from_json(to_json(manifest)) == manifest


def test_json_is_for_people_and_for_other_programs() -> None:
    text = to_json(example())
    assert text.endswith("}\n")
    assert "🍎" in text
    assert list(DOCUMENT)[:2] == ["format", "format_version"]
    assert DOCUMENT["components"]["unet"]["inputs"][0]["shape"] == [
        "rows",
        4,
        "latent_height",
        "latent_width",
    ]


def test_exported_manifest_is_read(tiny_bundle: Path) -> None:
    text = (tiny_bundle / "manifest.json").read_text(encoding="utf-8")
    manifest = from_json(text)
    assert to_json(manifest) == text
    assert {file.path for file in manifest.files()} | {"manifest.json"} == {
        file.relative_to(tiny_bundle).as_posix() for file in tiny_bundle.rglob("*") if file.is_file()
    }
    assert Bundle.open(tiny_bundle).manifest == manifest


EDM = json.loads(to_json(example(schedule=NoiseSchedule(edm=EdmScaling()))))


def test_what_a_checkpoint_does_not_say_is_not_written() -> None:
    assert DOCUMENT["defaults"]["sampler_options"] == {}
    assert "edm" not in DOCUMENT["schedule"]
    assert EDM["schedule"].keys() & {"beta_start", "beta_end", "beta_schedule"} == set()
    for name in ("timestep_spacing", "set_alpha_to_one"):
        schedule = from_json(json.dumps(without(("schedule", name)))).schedule
        assert getattr(schedule, name) is None


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (changed(("defaults", "sampler_options"), []), "defaults.sampler_options is '[]', not an object"),
        (changed(("defaults", "sampler_options"), {"eta": 0.5}), "allowed are sigma_schedule, solver_order"),
        (changed(("defaults", "sampler_options"), {"solver_order": 9}), "solver_order is 9"),
        (changed(("defaults", "sampler_options"), {"sigma_schedule": ["karras"]}), "sigma_schedule is"),
        (changed(("defaults", "sampler_options"), {"final_sigmas_type": None}), "final_sigmas_type is None"),
        (changed(("defaults", "sampler_options"), {"euler_at_final": 1}), "euler_at_final is 1"),
        (changed(("schedule", "timestep_spacing"), None), "timestep_spacing is None"),
        (changed(("schedule", "edm"), None), "edm is None"),
        (changed(("schedule", "edm"), {"sigma_min": 1.0}, EDM), "it must have just sigma_min, sigma_max"),
        (changed(("schedule", "edm", "sigma_data"), 0, EDM), "sigma_data is 0: allowed are numbers above 0"),
        (changed(("schedule", "edm", "sigma_data"), float("nan"), EDM), "NaN is no finite number"),
        (changed(("schedule", "edm", "sigma_max"), 1e9, EDM), "sigma_max is 1000000000"),
        (changed(("schedule", "edm", "rho"), "7", EDM), "rho is '7'"),
        (changed(("schedule", "prediction_type"), "sample", EDM), "allowed are epsilon, v_prediction"),
        (changed(("defaults", "sampler"), "ddim", EDM), "for EDM models one that can draw with them"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_scheduler_cannot_be_is_refused(document: dict[str, Any], words: str) -> None:
    assert words in refused(document)


def test_files_are_all_of_them_once() -> None:
    paths = [file.path for file in example().files()]
    components = [f"{name}/model.onnx" for name in FAMILIES["sd"].components]
    assert paths == [*components, "tokenizer.json", "weights.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("\x00\x01", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("9" * 10_000, "not valid JSON"),
        ("null", "does not say"),
        ("[]", "does not say"),
        ('"sdrt-bundle"', "does not say"),
        ('{"format": "safetensors"}', 'does not say "format": "sdrt-bundle"'),
        ('{"format": "sdrt-bundle"}', "format version None"),
    ],
)
def test_not_a_manifest(text: str, words: str) -> None:
    assert words in refused(text)


@pytest.mark.parametrize("version", [1, 2, 3, FORMAT_VERSION + 1, 10**30, 0, True, 4.0, "4", None])
def test_another_version_is_refused_before_anything_else_is_read(version: Any) -> None:
    message = refused({"format": "sdrt-bundle", "format_version": version, "components": "of another time"})
    newer = type(version) is int and version > FORMAT_VERSION
    assert message == (
        f"manifest.json has format version {version!r}, this sdrt reads version 4 alone: "
        f"{'upgrade sdrt' if newer else 'export the bundle again'}"
    )


OPTIONAL = {
    ("components", "vae_encoder"),
    ("schedule", "timestep_spacing"),
    ("schedule", "set_alpha_to_one"),
}


@pytest.mark.parametrize(
    "path", [path for path in PATHS if len(path) <= 3 and isinstance(path[-1], str)], ids=str
)
def test_missing_field(path: KeyPath) -> None:
    if path in OPTIONAL or (path[0] in ("provenance", "parity") and len(path) > 1):
        from_json(json.dumps(without(path)))
        return
    assert str(path[-1]).replace("format_", "format ") in refused(without(path))


@pytest.mark.parametrize("missing", ["text_encoder", "unet", "vae_decoder"])
def test_missing_component(missing: str) -> None:
    assert f"lacks the component {missing}" in refused(without(("components", missing)))


def nested(depth: int) -> dict[str, Any]:
    """An object in an object in an object …"""
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (
            ("components", "safety_checker"),
            DOCUMENT["components"]["unet"],
            "unknown component 'safety_checker'",
        ),
        (("components", "new"), {}, "components.new lacks the field 'model', 'files', 'precision'"),
        (("components", "unet", "precision"), "int3", "is 'int3', not one of fp32, fp16, bf16"),
        (("components", "unet", "precision"), "fp16", "sample is float32"),
        (("components", "unet", "model"), "unet/other.onnx", "not among its files"),
        (("components", "unet", "files"), [], "not among its files"),
        (("components", "unet", "inputs"), [], "are not sample, timestep, encoder_hidden_states"),
        (("components", "unet", "inputs", 0, "name"), "x", "are not sample"),
        (("components", "unet", "inputs", 0, "dtype"), "complex64", "complex64"),
        (("components", "unet", "inputs", 0, "shape"), ["rows", 4], "['rows', 4]"),
        (("components", "unet", "inputs", 0, "shape", 1), "unet_channels", "unet_channels"),
        (("components", "unet", "inputs", 0, "shape", 0), "height", "height"),
        (("components", "unet", "inputs", 0, "shape", 0), 2, "sample is float32[2, 4"),
        (("components", "text_encoder", "inputs", 0, "shape", 0), 1, "input_ids is int64[1, "),
        (("components", "unet", "inputs", 0, "shape", 1), 0, "sample"),
        (
            ("components", "unet", "inputs", 0, "shape", 1),
            4.0,
            "unet.inputs[0].shape[1] is '4.0', not a whole number or a text",
        ),
        (("components", "unet", "inputs", 0, "shape", 1), 9, "channels"),
        (("components", "unet", "inputs", 2, "shape", 2), 768, "output fits the unet"),
        (("components", "unet", "inputs", 1, "shape"), [1], "timestep is float32[1]"),
        (("components", "vae_decoder", "outputs", 0, "shape", 1), 4, "image"),
        (("latents", "factor"), "8", "latents.factor is '8', not a whole number"),
        (("latents", "factor"), 8.0, "not a whole number"),
        (("latents", "factor"), True, "not a whole number"),
        (("latents", "factor"), 0, "the factor is 1 to 256"),
        (("latents", "channels"), -4, "channels are 1 to 1024"),
        (("latents", "two\nlines"), 3, "unknown field 'two\\nlines'"),
        (("latents", "depth"), 3, "unknown field 'depth'"),
        (("latents",), [4, 8], "latents is '[4, 8]', not an object"),
        (("schedule", "beta_schedule"), "cosine!", "beta_schedule"),
        (("schedule",), None, "schedule is 'None', not an object"),
        (("tokenizers", 0, "max_length"), 0, "max_length is 2 to 4096"),
        (("tokenizers", 0, "bos"), None, "tokenizers[0].bos is 'None'"),
        (("text_output",), "penultimate_hidden_state", "text_output is what the unet reads"),
        (("text_output",), ["last_hidden_state"], "not a text"),
        (("defaults", "guidance_scale"), "strong", "not a finite number"),
        (("defaults", "guidance_scale"), float("nan"), "NaN is no finite number"),
        (("defaults", "guidance_scale"), float("inf"), "Infinity is no finite number"),
        (("defaults", "guidance_scale"), 10**400, "not a finite number"),
        (("family",), "sdxl", "text_embeds, time_ids"),
        (
            ("family",),
            "flux",
            f"family 'flux', this sdrt draws {', '.join(FAMILIES)}: upgrade",
        ),
        (("components", "text_encoder", "inputs", 1, "shape", 2), 24, "custom_embeddings are as wide"),
        (("components", "text_encoder", "inputs", 2, "dtype"), "int32", "clip_skip is int32[1]"),
        (
            ("components", "text_encoder", "inputs", 1, "name"),
            "input_ids",
            "the inputs of text_encoder are not",
        ),
        (
            ("components", "unet", "inputs", 2, "shape", 1),
            64,
            "encoder_hidden_states is float32['rows', 64, 16]",
        ),
        (("limits", "max_chunks"), 0, "max_chunks is 1 to 100"),
        (("limits", "max_chunks"), True, "limits.max_chunks is 'True', not a whole number"),
        (("limits", "max_clip_skip"), -1, "max_clip_skip is 0 to 100"),
        (("preview", "weights"), [[1, 2, 3]] * 3, "preview has a row for each channel"),
        (("preview", "weights", 0), [1, 2], "preview.weights[0] has 2 entries, not 3"),
        (("preview", "weights", 3, 0), None, "preview.weights[3][0] is 'None', not a finite number"),
        (("preview", "bias"), [0.0] * 4, "preview.bias has 4 entries, not 3"),
        (("preview", "bias", 0), float("nan"), "NaN is no finite number"),
        (("preview",), None, "preview is 'None', not an object"),
        (("ranges",), [1], "ranges is '[1]', not an object"),
        (("defaults", "sampler"), "new_one", "a known sampler"),
        (("defaults", "guidance_scale"), -3.0, "guidance_scale is not negative"),
        (("defaults", "num_inference_steps"), 1001, "1 to num_train_timesteps steps"),
        (("components", "text_encoder", "inputs", 0, "shape", 1), 64, "max_length fits the text encoder"),
        (("defaults", "num_inference_steps"), 0, "1 to num_train_timesteps steps"),
        (("defaults", "height"), 65, "default height is 65, the limits are multiples of 8 from 64 to 128"),
        (("defaults", "width"), 128, "default width is 128, the limits are 64"),
        (("limits", "min_batch"), 0, "min_batch"),
        (("limits", "max_batch"), 0, "max_batch"),
        (("limits", "height", "minimum"), 0, "minimum"),
        (("limits", "height", "maximum"), 8, "maximum"),
        (("limits", "height", "multiple"), 0, "multiple"),
        (("limits", "height", "multiple"), 4, "multiples of the factor"),
        (("limits", "width", "minimum"), 1e400, "Infinity is no finite number"),
        (("provenance",), "somewhere", "provenance is 'somewhere', not an object"),
        (("parity",), None, "parity is 'None', not an object"),
        (("tokenizers", 0, "file", "size"), "10", "size is '10', not a whole number"),
        (("tokenizers", 0, "file", "sha256"), 0, "sha256 is '0', not a text"),
        (("weights", "sha256"), "0" * 63, "not 64 hex digits"),
        (("tokenizers", 0, "file", "size"), -1, "has -1 bytes: 0 to 1099511627776 are allowed"),
        # What would take memory or time without end; the message says the limit.
        (("limits", "max_batch"), 10**6, "max_batch ≤ 256"),
        (("limits", "height", "maximum"), 65_536, "maximum ≤ 16384"),
        (("limits", "max_chunks"), 10**6, "max_chunks is 1 to 100"),
        (("limits", "max_clip_skip"), 10**6, "max_clip_skip is 0 to 100"),
        (("latents", "factor"), 2**20, "the factor is 1 to 256"),
        (("tokenizers", 0, "max_length"), 10**6, "max_length is 2 to 4096"),
        (("schedule", "num_train_timesteps"), 10**9, "num_train_timesteps"),
        (("components", "unet", "inputs", 2, "shape", 2), 2**40, "encoder_hidden_states is float32"),
        (("components", "unet", "files"), [asdict(entry("unet/x"))] * 257, "257 files, the limit is 256"),
        (
            ("components", "unet", "files"),
            [asdict(entry("unet/model.onnx"))] * 2,
            "each file of a component is listed once",
        ),
        (("family",), "x" * 10**6, "family 'xxx"),
        (("components", "unet", "precision"), "x" * 10**6, "precision is 'xxx"),
        (("x" * 10**6,), 1, "unknown field 'xxx"),
        (("components", "unet", "model"), "x" * 10**6, "its model 'xxx"),
        (("components", "unet", "inputs", 0, "dtype"), "x" * 10**6, "sample is xxx"),
        (("components", "unet", "files", 0, "path"), "/x" * 10**6, "'/x/x"),
        (("format_version",), "9" * 10**6, "format version '999"),
        (("provenance",), nested(100), "nested more than 64 deep"),
    ],
    ids=str,
)
def test_wrong_value(path: KeyPath, value: Any, words: str) -> None:
    assert words in refused(changed(path, value))


OUTSIDE = [
    "../x",
    "unet/../../x",
    "..",
    "/etc/passwd",
    "//server/share",
    "a\\..\\b",
    "C:\\windows",
    "",
    "a\0b",
    "a\nb",
    "\ud800",
]


@pytest.mark.parametrize("path", OUTSIDE, ids=ascii)
@pytest.mark.parametrize(
    "file", [("components", "unet", "files", 0), ("tokenizers", 0, "file"), ("weights",)], ids=str
)
def test_path_that_leaves_the_bundle(path: str, file: KeyPath) -> None:
    document = changed((*file, "path"), path)
    if file[0] == "components":
        document["components"]["unet"]["model"] = path
    message = refused(document)
    assert "outside the bundle" in message
    assert repr(path) in message


OTHER_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.sampled_from([0, 1, -1, 2**31, 2**63]),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)


def check_usable(manifest: Manifest) -> None:
    """What the pipeline relies on without looking again."""
    assert from_json(to_json(manifest)) == manifest
    assert manifest.limits.height.admits(manifest.defaults.height)
    for size in range(manifest.limits.width.minimum, manifest.limits.width.minimum + 99):
        assert not manifest.limits.width.admits(size) or size % manifest.latents.factor == 0
    axes = dict.fromkeys(DYNAMIC_AXES, 2)
    for part in manifest.components.values():
        for spec in (*part.spec.inputs, *part.spec.outputs):
            assert all(type(size) is int and size > 0 for size in spec.concrete(axes))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PATHS), OTHER_VALUES)
def test_any_replaced_value_is_refused_or_makes_a_manifest(path: KeyPath, value: Any) -> None:
    try:
        manifest = from_json(json.dumps(changed(path, value)))
    except BundleError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        check_usable(manifest)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_any_deleted_value_is_refused_or_makes_a_manifest(path: KeyPath) -> None:
    try:
        manifest = from_json(json.dumps(without(path)))
    except BundleError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        check_usable(manifest)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(to_json(example())) - 1), st.characters())
def test_any_damaged_text_is_refused_or_makes_a_manifest(position: int, character: str) -> None:
    text = to_json(example())
    try:
        manifest = from_json(text[:position] + character + text[position + 1 :])
    except BundleError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        check_usable(manifest)


def test_size_limit() -> None:
    limit = SizeLimit(16, 64, 8)
    assert [size for size in range(100) if limit.admits(size)] == [16, 24, 32, 40, 48, 56, 64]
    assert str(limit) == "multiples of 8 from 16 to 64"
    assert str(SizeLimit(64, 64, 1)) == "64"
