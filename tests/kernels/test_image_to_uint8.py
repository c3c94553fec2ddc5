"""Decoder output to bytes: against the formula, number by number, and against diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from sdrt.kernels.image_to_uint8 import image_to_uint8


def byte(value: float) -> int:
    """``round(255 · clamp(x / 2 + 1/2, 0, 1))`` in float32, halves to even."""
    scaled = np.float32(value) * np.float32(0.5) + np.float32(0.5)
    if np.isnan(scaled):
        return 0
    clamped = min(max(scaled, np.float32(0)), np.float32(1))
    return round(float(clamped * np.float32(255)))


def through_kernel(values: np.ndarray) -> list[int]:
    """The bytes of a row of numbers."""
    image = np.broadcast_to(values, (1, 3, 1, len(values)))
    return [int(value) for value in image_to_uint8(image)[0, 0, :, 1]]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NaNs that signal, as NumPy says
def test_every_number_of_half_precision() -> None:
    """All 65,536 of them: negative zero, subnormals, infinities and NaN included."""
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    assert through_kernel(values) == [byte(float(value)) for value in values]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (-1.0, 0),
        (1.0, 255),
        (0.0, 128),  # 127.5: the even neighbour
        (np.nan, 0),
        (np.inf, 255),
        (-np.inf, 0),
        (3.4e38, 255),
        (-7.0, 0),
    ],
)
def test_ends_and_beyond(value: float, expected: int) -> None:
    assert through_kernel(np.array([value], np.float32)) == [expected]


def test_halves_go_to_the_even_neighbour() -> None:
    """float32 numbers whose product with 255 is exactly a half, on both sides of even and odd."""
    near = np.array([(2 * k + 1) / 255 - 1 for k in range(255)], np.float32)
    candidates = np.concatenate([near, np.nextafter(near, 2), np.nextafter(near, -2)]).astype(np.float32)
    scaled = (candidates * np.float32(0.5) + np.float32(0.5)) * np.float32(255)
    halves = candidates[scaled % 1 == 0.5]
    floors = np.floor(scaled[scaled % 1 == 0.5])
    assert {0.0, 1.0} <= set(floors % 2)
    assert through_kernel(halves) == [int(floor + floor % 2) for floor in floors]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_shape_order_and_input_are_kept(dtype: type[np.floating]) -> None:
    image = np.random.default_rng(0).uniform(-1.2, 1.2, (2, 3, 4, 5)).astype(dtype)
    before = image.copy()
    result = image_to_uint8(image)
    assert result.shape == (2, 4, 5, 3)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert np.array_equal(image, before)
    for index in np.ndindex(2, 3, 4, 5):
        n, c, h, w = index
        assert result[n, h, w, c] == byte(float(image[index]))


def test_equals_diffusers() -> None:
    image = np.random.default_rng(1).uniform(-1.3, 1.3, (3, 3, 64, 48)).astype(np.float32)
    processor = VaeImageProcessor()
    expected = processor.postprocess(torch.from_numpy(image), output_type="pil")
    for picture, wanted in zip(image_to_uint8(image), expected, strict=True):
        assert np.array_equal(picture, np.asarray(wanted))
