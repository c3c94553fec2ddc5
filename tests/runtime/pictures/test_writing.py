"""Pictures' files: the recipe inside, where they are written, and file names from prompts."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdrt.runtime.errors import OutputError, UsageError
from sdrt.runtime.pictures.metadata import parameters_text, read_recipe
from sdrt.runtime.pictures.writing import (
    FORMATS,
    RecipeLeftOutWarning,
    picture_bytes,
    png_bytes,
    save_image,
    save_png,
    slug,
)

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


def as_written(kind: str | None) -> Any:
    """The picture's pixels after a file of that format: a JPEG alone loses some."""
    stream = io.BytesIO()
    picture().save(stream, "JPEG" if kind == "JPEG" else "PNG", quality=95, subsampling=0)
    return np.asarray(Image.open(stream))


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


@pytest.mark.parametrize(
    ("prompt", "kind"), [("a cat", b"tEXt"), ("café", b"tEXt"), ("a — dash", b"iTXt"), ("苹果", b"iTXt")]
)
def test_text_chunks_are_those_that_others_read(prompt: str, kind: bytes) -> None:
    """tEXt where Latin-1 has all of it."""
    recipe = {**RECIPE, "prompt": prompt}
    png = png_bytes(picture(), recipe)
    assert png.count(kind + b"parameters\0") == png.count(kind + b"sdrt\0") == 1
    if kind == b"tEXt":
        assert b"tEXtparameters\0" + parameters_text(recipe).encode("latin-1") in png


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".JPG"])
@pytest.mark.parametrize("prompt", ["a red apple", 'ein Apfel — 🍎 <&> "]]>', "two\nlines\0", "x" * 20_000])
def test_every_format_holds_the_recipe(tmp_path: Path, suffix: str, prompt: str) -> None:
    recipe = {**RECIPE, "prompt": prompt}
    file = tmp_path / f"a{suffix}"
    save_image(picture(), file, recipe)
    assert read_recipe(file) == recipe
    with Image.open(file) as image:
        assert image.format == FORMATS[suffix.lower()]
        assert np.array_equal(np.asarray(image.convert("RGB")), as_written(image.format))
        text = image.info.get("parameters")
        if text is None:  # where A1111's web UI looks, in the type that EXIF has for it
            length = 8 + len(parameters_text(recipe).encode("utf-16-be"))
            assert struct.pack(">HHI", 0x9286, 7, length) in image.info["exif"]
            comment = image.getexif().get_ifd(0x8769)[0x9286]
            assert comment.startswith(b"UNICODE\0")
            text = comment[8:].decode("utf-16-be")
        assert text.replace("�", "\0") == parameters_text(recipe)


def test_quality(tmp_path: Path) -> None:
    sizes = [len(picture_bytes(picture(), ".jpg", RECIPE, quality=quality)) for quality in (20, None, 100)]
    assert sizes[0] < sizes[1] < sizes[2]
    lossy = Image.open(io.BytesIO(picture_bytes(picture(), ".webp", RECIPE, quality=50)))
    assert not np.array_equal(np.asarray(lossy), np.asarray(picture()))
    for quality in (0, 101, 5.5):
        with pytest.raises(UsageError, match="a whole number from 1 to 100"):
            picture_bytes(picture(), ".jpg", RECIPE, quality=quality)  # type: ignore[arg-type]


def test_a_recipe_that_a_jpeg_has_no_room_for(tmp_path: Path) -> None:
    recipe = {**RECIPE, "prompt": "x" * 70_000}
    with pytest.warns(RecipeLeftOutWarning, match="too long for a JPEG"):
        save_image(picture(), tmp_path / "a.jpg", recipe)
    assert Image.open(tmp_path / "a.jpg").size == (24, 16)
    save_image(picture(), tmp_path / "a.webp", recipe)
    assert read_recipe(tmp_path / "a.webp") == recipe


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "--from .*a.png does not exist"),
        (b"no picture", "is no picture"),
        ({}, "holds no recipe of sdrt"),
        ({"sdrt": "{"}, "the recipe in .*a.png is damaged"),
        ({"sdrt": "[1]"}, "it is no JSON object"),
        ({"sdrt": "[" * 1000 + "]" * 1000}, "nested more than"),
    ],
)
def test_a_file_without_a_recipe(tmp_path: Path, content: Any, words: str) -> None:
    file = tmp_path / "a.png"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        info = PngInfo()
        for key, text in content.items():
            info.add_text(key, text)
        picture().save(file, pnginfo=info)
    with pytest.raises(UsageError, match=words):
        read_recipe(file)


def test_save(tmp_path: Path) -> None:
    save_png(picture(), tmp_path / "a.png", RECIPE)
    assert (tmp_path / "a.png").read_bytes() == png_bytes(picture(), RECIPE)
    with pytest.raises(OutputError, match="folder does not exist"):
        save_png(picture(), tmp_path / "no" / "a.png", RECIPE)
    with pytest.raises(UsageError, match=r"a.jpg does not end in .png: save_image writes others"):
        save_png(picture(), tmp_path / "a.jpg", RECIPE)
    with pytest.raises(UsageError, match=r"'.gif': one of .png, .jpg, .jpeg, .webp"):
        save_image(picture(), tmp_path / "a.gif", RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_links_are_followed_and_what_is_read_only_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "a.png", tmp_path / "there" / "b.png"
    link.symlink_to(Path("there") / "b.png")
    for _ in range(2):  # to what is not there yet, and to what is
        save_png(picture(), link, RECIPE)
        assert link.is_symlink()
        assert target.read_bytes() == png_bytes(picture(), RECIPE)
    target.write_bytes(b"mine")
    target.chmod(0o444)
    for path in (link, target):
        with pytest.raises(OutputError, match=f"cannot write {path}: the file is read-only"):
            save_png(picture(), path, RECIPE)
    assert target.read_bytes() == b"mine"
    link.unlink()
    link.symlink_to("a.png")
    with pytest.raises(OutputError, match="links lead in a circle"):
        save_png(picture(), link, RECIPE)


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
        ("a <lora:pixel:0.8>cat", "a-cat"),
    ],
)
def test_slug(prompt: str, name: str) -> None:
    assert slug(prompt) == name
