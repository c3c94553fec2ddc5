"""PNG files: the recipe inside, and file names from prompts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdrt.runtime.errors import OutputError
from sdrt.runtime.images import png_bytes, save_png, slug
from sdrt.runtime.recipe_metadata import parameters_text

RECIPE: dict[str, Any] = {
    "prompt": "a red apple",
    "negative_prompt": "green, leaves",
    "seed": 2**64 - 1,
    "height": 16,
    "width": 24,
    "num_inference_steps": 20,
    "guidance_scale": 7.5,
    "sampler": "dpmpp_2m",
    "karras": True,
    "eta": None,
    "rng": "philox",
    "backend": "onnxruntime-cpu",
    "model": "emoji",
    "model_sha256": "ab" * 32,
    "version": "0.1.0",
}


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))


def reopened(recipe: dict[str, Any]) -> Image.Image:
    image = Image.open(io.BytesIO(png_bytes(picture(), recipe)))
    image.load()
    return image


def test_pixels_are_kept() -> None:
    assert np.array_equal(np.asarray(reopened(RECIPE)), np.asarray(picture()))


def test_recipe_as_json() -> None:
    assert json.loads(reopened(RECIPE).info["sdrt"]) == RECIPE


def test_parameters_as_the_web_ui_writes_them() -> None:
    assert reopened(RECIPE).info["parameters"] == (
        "a red apple\n"
        "Negative prompt: green, leaves\n"
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 18446744073709551615, Size: 24x16, "
        "RNG: NV, Model: emoji, Version: sdrt 0.1.0"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": "ddim", "karras": False}, "Sampler: DDIM,"),
        ({"sampler": "euler", "karras": False}, "Sampler: Euler,"),
        ({"sampler": "euler"}, "Sampler: Euler Karras,"),
        ({"sampler": "new_one", "karras": False}, "Sampler: new_one,"),
        ({"rng": "cpu"}, "RNG: CPU,"),
        ({"eta": 0.5}, "Eta: 0.5,"),
        ({"model": "one, two"}, 'Model: "one, two",'),
    ],
)
def test_parameters_of_other_choices(changes: dict[str, Any], words: str) -> None:
    assert words in parameters_text({**RECIPE, **changes})


def test_no_negative_prompt_no_line() -> None:
    assert "Negative prompt" not in parameters_text({**RECIPE, "negative_prompt": ""})


@pytest.mark.parametrize("prompt", ["", "ein Apfel — 🍎", "תפוח", "two\nlines", 'quotes " \\ {}', "x" * 5000])
def test_any_prompt_is_kept(prompt: str) -> None:
    info = reopened({**RECIPE, "prompt": prompt}).info
    assert json.loads(info["sdrt"])["prompt"] == prompt
    assert info["parameters"].startswith(prompt)


def test_same_picture_and_recipe_same_bytes() -> None:
    reordered = dict(reversed(RECIPE.items()))
    assert png_bytes(picture(), RECIPE) == png_bytes(picture(), reordered)


def test_save(tmp_path: Path) -> None:
    save_png(picture(), tmp_path / "a.png", RECIPE)
    assert (tmp_path / "a.png").read_bytes() == png_bytes(picture(), RECIPE)
    with pytest.raises(OutputError, match="folder does not exist"):
        save_png(picture(), tmp_path / "no" / "a.png", RECIPE)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a red apple", "a-red-apple"),
        ("  A Red, Apple!! ", "a-red-apple"),
        ("Ein schöner Apfel", "ein-schöner-apfel"),
        ("🍎", "picture"),
        ("苹果", "苹果"),
        ("דג", "דג"),
        ("", "picture"),
        ("../../etc/passwd", "etc-passwd"),
        ("-rf", "rf"),
        ("a" * 100, "a" * 40),
        ("a" * 39 + " b", "a" * 39),
        ("ﬁre²", "fire2"),
    ],
)
def test_slug(prompt: str, name: str) -> None:
    assert slug(prompt) == name
