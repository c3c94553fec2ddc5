"""The published JSON Schema of a manifest: it is what the dataclasses say, and tells good from broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.checkpoints.json_paths import KeyPath, removed, replaced
from support.checkpoints.manifests import INPAINTING, LCM_SIZES, SDXL, VARIATIONS, components, example

from sdrt.export.schema import PATH, schema_text
from sdrt.runtime.bundle.bundle import EMBEDDED
from sdrt.runtime.bundle.manifest_json import from_json, to_json
from sdrt.runtime.errors import BundleError
from sdrt.runtime.samplers.edm import EdmScaling
from sdrt.runtime.samplers.schedule import NoiseSchedule
from sdrt.runtime.samplers.table import SamplerOptions

ROOT = Path(__file__).parents[2]
SCHEMA: dict[str, Any] = json.loads((ROOT / PATH).read_text(encoding="utf-8"))
SHIPPED: dict[str, Any] = json.loads((EMBEDDED / "manifest.json").read_text(encoding="utf-8"))
EDM = example(schedule=NoiseSchedule(edm=EdmScaling()))
OPTIONS = example(defaults=type(EDM.defaults)(64, 64, 3, 7.5, "euler", SamplerOptions(solver_order=3)))


def is_valid(document: Any, schema: dict[str, Any] = SCHEMA) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(document))


def test_the_schema_is_what_the_dataclasses_say() -> None:
    assert (ROOT / PATH).read_text(encoding="utf-8") == schema_text(), "run `make schema`"
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    "document",
    [
        SHIPPED,
        SDXL,
        VARIATIONS,
        INPAINTING,
        *(
            json.loads(to_json(manifest))
            for manifest in (EDM, OPTIONS, example(components=components("sd", LCM_SIZES)))
        ),
    ],
    ids=["shipped", "sdxl", "image-variations", "inpainting", "edm", "options", "lcm"],
)
def test_it_takes_every_kind_of_manifest(document: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(document)


@pytest.mark.parametrize("bundle", ["tiny_bundle"])
def test_it_takes_what_is_exported(bundle: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(bundle)
    for name, schema in (
        ("manifest.json", SCHEMA),
        ("weights.json", {"$ref": "#/$defs/WeightMap", "$defs": SCHEMA["$defs"]}),
    ):
        document = json.loads((folder / name).read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator(schema).validate(document)


UNET: KeyPath = ("components", "unet")
BROKEN: list[tuple[KeyPath, Any]] = [
    (("format",), "safetensors"),
    (("format_version",), 3),
    (("family",), "flux"),
    (("weights",), None),
    (("weights", "sha256"), "0" * 63),
    (("weights", "path"), "../weights.json"),
    (("tokenizers",), []),
    (("tokenizers", 0, "max_length"), 1),
    (("tokenizers", 0, "file", "size"), -1),
    ((*UNET, "precision"), "int8"),
    ((*UNET, "files", 0, "path"), "/etc/passwd"),
    ((*UNET, "inputs", 1, "shape"), [True]),
    ((*UNET, "inputs", 1, "dtype"), "complex64"),
    (("components", "safety_checker"), SHIPPED["components"]["unet"]),
    (("latents", "factor"), 0),
    (("latents", "depth"), 3),
    (("schedule", "prediction_type"), "flow"),
    (("schedule", "edm"), {"sigma_min": 1.0}),
    (("preview", "bias"), [0.0] * 4),
    (("defaults", "guidance_scale"), "strong"),
    (("defaults", "sampler_options"), {"eta": 0.5}),
    (("limits", "max_batch"), 10**6),
    (("limits", "height", "multiple"), 0),
    (("surprise",), 1),
]


@pytest.mark.parametrize(("path", "value"), BROKEN, ids=str)
def test_it_refuses_what_the_runtime_refuses(path: KeyPath, value: Any) -> None:
    document = replaced(SHIPPED, path, value)
    assert not is_valid(document)
    with pytest.raises(BundleError):
        from_json(json.dumps(document))


@pytest.mark.parametrize("path", [("weights",), ("defaults", "sampler_options"), UNET, ("limits",)], ids=str)
def test_it_refuses_what_lacks_a_field(path: KeyPath) -> None:
    assert not is_valid(removed(SHIPPED, path))
