"""Where names of LoRAs lead, which are active, and what is said where there is none."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.checkpoints.synthetic_loras import write_kohya_lora

from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.weight_map import read_weight_map
from sdrt.runtime.errors import UsageError
from sdrt.runtime.lora import library as module
from sdrt.runtime.lora.library import LoraLibrary
from sdrt.runtime.lora.weights import LoraWeights, checked_weights
from sdrt.runtime.request.loras import LoraSet, LoraUse


@pytest.fixture(scope="module")
def folder(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRAs as they lie on disks: in folders, with a name twice, with links, beside other things."""
    root = tmp_path_factory.mktemp("loras")
    for way in ("styles", "people/old", "people/new"):
        (root / way).mkdir(parents=True)
    for seed, way in enumerate(("pixel", "styles/ink", "people/old/anna", "people/new/anna", "v1.5 é")):
        write_kohya_lora(root / f"{way}.safetensors", tiny_bundle, seed)
    (root / "notes.txt").write_text("no LoRA")
    (root / "styles/up").symlink_to(root, target_is_directory=True)
    (root / "linked.safetensors").symlink_to(root / "styles/ink.safetensors")
    return root


@pytest.fixture
def library(folder: Path, tiny_bundle: Path) -> LoraLibrary:
    return LoraLibrary(Bundle.open(tiny_bundle, verify=False), folder)


def test_a_name_leads_to_a_file(library: LoraLibrary, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's into the folder alone; a call's may be a path, too, which is looked for by its name then."""
    for name, way in (
        ("pixel", "pixel"),
        ("ink", "styles/ink"),
        ("styles/ink", "styles/ink"),
        ("people/old/anna", "people/old/anna"),
        ("v1.5 é", "v1.5 é"),
        ("linked", "linked"),
    ):
        found = library.find_tagged(name)
        assert found is not None
        assert found.file.path == folder / f"{way}.safetensors"
        assert library.find(name).file.sha256 == found.file.sha256
    monkeypatch.chdir(folder / "styles")
    assert library.find("ink.safetensors").file.path == Path("ink.safetensors")
    assert library.find(str(folder / "pixel.safetensors")).file.path == folder / "pixel.safetensors"
    assert library.find("gone/pixel.safetensors").file.path == folder / "pixel.safetensors"


def test_what_stable_diffusion_webui_knows_a_file_by(library: LoraLibrary, folder: Path) -> None:
    """The hash of what follows the header, which other words in the header leave as it is."""
    content = (folder / "pixel.safetensors").read_bytes()
    behind = content[8 + int.from_bytes(content[:8], "little") :]
    found = library.find("pixel")
    assert found.a1111_hash == hashlib.sha256(behind).hexdigest()[:12]
    assert found.file.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "pixl",
            r"the LoRA 'pixl' is not in .*loras\d*: did you mean pixel\? there is anna, ink, linked, people",
        ),
        (
            "nothing like it",
            r"is not in .*: there is anna, .*; or give its file \(--lora FILE, load_lora_weights",
        ),
        ("anna", r"the LoRA 'anna' is in .* as people/new/anna and people/old/anna: write which"),
        ("../loras/pixel", "is not in"),
        ("/etc/passwd", "is not in"),
        ("", "the LoRA '' is not in"),
        ("x" * 5000, f"the LoRA '{'x' * 200}' is not in"),
    ],
)
def test_a_name_that_leads_nowhere(library: LoraLibrary, name: str, words: str) -> None:
    """And no name in a prompt leads out of the folder."""
    with pytest.raises(UsageError, match=words) as caught:
        library.find_tagged(name)
    assert "\n" not in str(caught.value)


def test_without_a_folder(tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(tiny_bundle, verify=False)
    library = LoraLibrary(bundle)
    assert library.find_tagged("pixel") is None  # which is warned of, not refused
    for name in ("pixel", "gone.safetensors"):
        with pytest.raises(
            UsageError, match=r"neither loaded nor a file here: give its file .*--lora-dir DIR"
        ):
            library.find(name)
    for wrong in (folder / "pixel.safetensors", "gone"):
        with pytest.raises(UsageError, match=r"the folder of LoRAs .*does not exist, or is none"):
            LoraLibrary(bundle, wrong)
    monkeypatch.setattr(module, "MAX_FILES", 3)
    with pytest.raises(UsageError, match="holds more than 3 files: give a folder of LoRAs alone"):
        LoraLibrary(bundle, folder).find("pixel")


def test_adapters_as_diffusers_has_them(library: LoraLibrary, folder: Path) -> None:
    """What was loaded last is active; others must be said. Loaded again nothing changes but that."""
    assert library.load(folder / "pixel.safetensors", None, partial=False) == "pixel"
    assert library.load(folder / "styles/ink.safetensors", "i", partial=False) == "i"
    assert library.active == {"i": (1, 1)}
    library.activate(["pixel", "i"], [0.5, {"unet": 0.2}])
    assert library.active == {"pixel": (0.5, 0.5), "i": (1, 0.2)}
    library.activate(["pixel", "i"], 0.3)
    assert library.active == {"pixel": (0.3, 0.3), "i": (0.3, 0.3)}
    library.activate("i", None)
    assert library.active == {"i": (1, 1)}
    assert library.find("i").file.path == folder / "styles/ink.safetensors"
    library.load(folder / "pixel.safetensors", "pixel", partial=False)
    assert (list(library.adapters), library.active) == (["pixel", "i"], {"pixel": (1, 1)})
    library.unload("pixel")
    assert (list(library.adapters), library.active) == (["i"], {})
    library.unload(None)
    assert library.adapters == {}


def test_what_is_refused_of_adapters(library: LoraLibrary, folder: Path) -> None:
    library.load(folder / "pixel.safetensors", None, partial=False)
    before = (dict(library.adapters), dict(library.active))
    calls: list[tuple[Any, str]] = [
        (lambda: library.activate("pixle", None), "the LoRA 'pixle' is not loaded: did you mean pixel"),
        (lambda: library.activate(["pixel", "pixel"], None), "pixel, pixel: one is given twice"),
        (lambda: library.activate(["pixel"], [1, 2]), "one for all, or one for each of 1 names"),
        (lambda: library.activate("pixel", "1"), "the weights are '1'"),
        (lambda: library.activate("pixel", 1000), "the weight of the LoRA 'pixel' is 1000: -100 to 100"),
        (lambda: library.unload("ink"), "the LoRA 'ink' is not loaded"),
        (
            lambda: library.load(folder / "styles/ink.safetensors", "pixel", partial=False),
            "the name 'pixel' is taken by .*pixel.safetensors: give .*ink.safetensors another adapter_name",
        ),
        (lambda: library.load(folder / "pixel.safetensors", " ", partial=False), "adapter_name is ' '"),
        (lambda: library.load({}, None, partial=False), "the LoRA is dict: the path of"),  # type: ignore[arg-type]
        (lambda: library.load(folder / "gone.safetensors", None, partial=False), "gone.safetensors"),
        (lambda: library.load(folder / "notes.txt", None, partial=False), "notes.txt"),
    ]
    for call, words in calls:
        with pytest.raises(UsageError, match=words):
            call()
        assert (library.adapters, library.active) == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("0.5", "the weight of the LoRA 'x' is '0.5': a number is wanted"),
        (True, "is True"),
        (float("inf"), "is inf: a finite number"),
        ({"te": 1}, "the weight of the LoRA 'x' has te: one number, or a table of text_encoder and unet"),
        ({"unet": None}, "the weight of the LoRA 'x', unet, is None"),
        ([1, 2], "is \\[1, 2\\]"),
    ],
)
def test_what_is_no_weight(given: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        checked_weights("x", given)
    assert checked_weights("x", np.float32(0.5)) == (0.5, 0.5)


def test_a_file_that_changed_is_read_anew(tiny_bundle: Path, tmp_path: Path) -> None:
    """And at most `MAX_KEPT` of them are kept."""
    library = LoraLibrary(Bundle.open(tiny_bundle, verify=False), tmp_path)
    first = library.find(str(write_kohya_lora(tmp_path / "a.safetensors", tiny_bundle, 1)))
    assert library.find("a") is first
    (tmp_path / "a.safetensors").unlink()
    second = library.find(str(write_kohya_lora(tmp_path / "a.safetensors", tiny_bundle, 2)))
    assert first.file.sha256 != second.file.sha256
    for number in range(module.MAX_KEPT):
        library.find(str(write_kohya_lora(tmp_path / f"{number}.safetensors", tiny_bundle, number)))
    assert len(library._kept) == module.MAX_KEPT


def test_another_alpha_beside_a_file_makes_another_lora_of_it(tiny_bundle: Path, tmp_path: Path) -> None:
    """Its bytes are the same, and PEFT keeps alpha in the folder."""
    layer = "base_model.model.mid_block.attentions.0.proj_in"
    width = (
        read_weight_map(Bundle.open(tiny_bundle, verify=False))
        .tensors["unet"]["mid_block.attentions.0.proj_in.weight"]
        .shape[0]
    )
    factor = np.ones((2, width), np.float32)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file({f"{layer}.lora_A.weight": factor, f"{layer}.lora_B.weight": factor.T.copy()}, file)
    library = LoraLibrary(Bundle.open(tiny_bundle, verify=False))
    uses: list[LoraUse] = []
    for alpha in (2, 4, 2):
        config.write_text(json.dumps({"lora_alpha": alpha, "r": 2, "written": len(uses)}))
        uses.append(LoraUse("x", library.find(str(file)), LoraWeights()))
    first, second, third = (LoraSet.of([use]) for use in uses)
    assert first == third != second
    (one,), (two,) = (use.lora.file.changes.values() for use in uses[:2])
    base = np.zeros((width, width), np.float32)
    np.testing.assert_array_equal(two.added(base, 1.0), 2 * one.added(base, 1.0))
