"""Animations: exact frames, their time, and the recipe inside, as Pillow reads them."""

from __future__ import annotations

import io
import json
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from sdrt.runtime.errors import UsageError
from sdrt.runtime.pictures.animation import (
    ANIMATION_SUFFIXES,
    animation_bytes,
    check_animation,
)
from sdrt.runtime.pictures.metadata import RECIPE_NAMESPACE, parameters_text

RECIPE: dict[str, Any] = {
    "prompt": "a red apple 🍎 <&> \x00\n\ufffe",
    "negative_prompt": "green",
    "seed": 2**64 - 1,
    "height": 17,
    "width": 23,
    "num_inference_steps": 20,
    "guidance_scale": 7.5,
    "sampler": "dpmpp_2m",
    "karras": True,
    "eta": None,
    "rng": "philox",
    "model": "emoji",
    "version": "0.1.0",
}


def frames(count: int = 6) -> NDArray[np.uint8]:
    """Noise of odd sides; two neighbours are equal, which writers like to join."""
    result = np.random.default_rng(0).integers(0, 256, (count, 17, 23, 3), dtype=np.uint8)
    result[2:4] = result[1:2]
    return result


def read(data: bytes) -> tuple[NDArray[np.uint8], list[float], int]:
    """Frames, milliseconds of each, and how often it is shown (0: for ever)."""
    image = Image.open(io.BytesIO(data))
    pictures, times = [], []
    for frame in ImageSequence.Iterator(image):
        pictures.append(np.asarray(frame.convert("RGB")))
        times.append(float(frame.info["duration"]))
    return np.stack(pictures), times, image.info["loop"]


@pytest.mark.parametrize("suffix", [*ANIMATION_SUFFIXES, ".PNG", ".WebP"])
@pytest.mark.parametrize("fps", [0.1, 1, 12, 24, 29.97, 60])
def test_frames_are_exact_and_in_time(suffix: str, fps: float) -> None:
    pictures, times, loop = read(animation_bytes(frames(), suffix, fps, RECIPE))
    assert np.array_equal(pictures, frames())
    assert loop == 0
    # A WebP counts whole milliseconds, an APNG fractions of a second with denominators up to 1000.
    step = 1 if suffix.lower() == ".webp" else 0.01
    assert max(abs(time - 1000 / fps) for time in times) < step
    assert abs(sum(times) - 6 * 1000 / fps) <= step


@pytest.mark.parametrize("suffix", ANIMATION_SUFFIXES)
def test_one_frame(suffix: str) -> None:
    image = Image.open(io.BytesIO(animation_bytes(frames()[:1], suffix, 12, RECIPE)))
    assert np.array_equal(np.asarray(image.convert("RGB")), frames()[0])


def test_other_frames_other_sizes() -> None:
    """Flat frames compress to chunks of odd lengths, which need padding."""
    flat = np.stack([np.full((8, 300, 3), level, np.uint8) for level in range(0, 250, 7)])
    for suffix in ANIMATION_SUFFIXES:
        assert np.array_equal(read(animation_bytes(flat, suffix, 12, RECIPE))[0], flat)


@pytest.mark.parametrize("prompt", ["a", "aa"])
def test_chunks_of_a_webp_are_padded(prompt: str) -> None:
    """RFC 9649, section 2.3: a chunk of odd length is followed by a byte that its length does not count."""
    data = animation_bytes(frames(), ".webp", 12, {**RECIPE, "prompt": prompt})
    assert (data[:4], data[8:12]) == (b"RIFF", b"WEBP")
    assert int.from_bytes(data[4:8], "little") + 8 == len(data)
    names, at = [], 12
    while at < len(data):
        names.append(data[at : at + 4].decode())
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + length + length % 2
    assert at == len(data)
    assert names == ["VP8X", "ANIM", *["ANMF"] * 6, "EXIF", "XMP "]


def test_recipe_in_a_png() -> None:
    recipe = {**RECIPE, "prompt": "a red apple 🍎"}
    image = Image.open(io.BytesIO(animation_bytes(frames(), ".png", 12, recipe)))
    image.load()
    assert json.loads(image.info["sdrt"]) == recipe
    assert image.info["parameters"] == parameters_text(recipe)


def test_recipe_in_a_webp() -> None:
    image = Image.open(io.BytesIO(animation_bytes(frames(), ".webp", 12, RECIPE)))
    element = ElementTree.fromstring(image.info["xmp"]).find(f".//{{{RECIPE_NAMESPACE}}}recipe")
    assert element is not None
    assert json.loads(element.text or "") == RECIPE
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == parameters_text(RECIPE)


@pytest.mark.parametrize("suffix", ANIMATION_SUFFIXES)
def test_same_frames_same_bytes(suffix: str) -> None:
    reordered = dict(reversed(RECIPE.items()))
    one, other = (animation_bytes(frames(), suffix, 12, recipe) for recipe in (RECIPE, reordered))
    assert one == other


@pytest.mark.parametrize(
    ("suffix", "fps", "words"),
    [
        (".gif", 12, "a GIF has 256 colours.*give a name that ends in .png or .webp"),
        (".GIF", 12, "a GIF has 256 colours"),
        (".mp4", 12, "cannot be written as '.mp4': a name that ends in .png or .webp"),
        ("", 12, "cannot be written as ''"),
        (".png", 0, "fps is 0: frames per second from 0.1 to 60"),
        (".png", -1, "fps is -1"),
        (".png", 61, "fps is 61"),
        (".webp", float("nan"), "fps is nan"),
        (".webp", float("inf"), "fps is inf"),
        (".webp", "12", "fps is '12'"),
        (".webp", True, "fps is True"),
        (".webp", None, "fps is None"),
    ],
)
def test_refused(suffix: str, fps: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_animation(suffix, fps)
    with pytest.raises(UsageError, match=words):
        animation_bytes(frames(), suffix, fps, RECIPE)


def test_side_that_no_webp_has() -> None:
    row = np.random.default_rng(0).integers(0, 256, (1, 1, 16384, 3), dtype=np.uint8)
    with pytest.raises(UsageError, match="16383 pixels a side: give a name that ends in"):
        animation_bytes(row, ".webp", 12, RECIPE)
    widest = row[:, :, :-1]
    assert np.array_equal(read(animation_bytes(widest, ".webp", 12, RECIPE))[0], widest)
