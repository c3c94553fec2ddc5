"""From the picture as given to what the model draws, and back."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from sdrt.runtime.bundle.manifest import ImageProcessorFacts, Limits, SizeLimit
from sdrt.runtime.errors import UsageError
from sdrt.runtime.pictures.canvas import (
    Canvas,
    clip_pixels,
    finish,
    fit,
    image_to_float,
    latent_mask,
    masked_image,
)
from tolerances import CLIP_PIXELS, MASKED_IMAGE

LIMITS = Limits(1, 8, SizeLimit(64, 128, 16), SizeLimit(64, 160, 32))
FIXED = Limits(1, 1, SizeLimit(64, 64, 8), SizeLimit(64, 64, 8))
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    """Red grows to the right and green downwards, so that a pixel says where it comes from."""
    red = np.linspace(0, 255, width)[np.newaxis].repeat(height, axis=0)
    green = np.linspace(0, 255, height)[:, np.newaxis].repeat(width, axis=1)
    return np.rint(np.stack([red, green, np.zeros_like(red)], axis=2)).astype(np.uint8)


def half(height: int, width: int) -> NDArray[np.float32]:
    """The left half is drawn."""
    mask = np.zeros((height, width), np.float32)
    mask[:, : width // 2] = 1
    return mask


# --- without a mask -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ((64, 64), (64, 64)),
        ((96, 128), (96, 128)),
        ((100, 140), (96, 128)),  # the nearest
        ((72, 80), (64, 64)),  # of two that are as near, the smaller
        ((88, 112), (80, 96)),
        ((73, 81), (80, 96)),
        ((500, 625), (128, 160)),  # too large: as large as may be, in its proportions
        ((500, 500), (128, 128)),
        ((300, 600), (80, 160)),
        ((600, 300), (128, 64)),
        ((16, 16), (64, 64)),  # too small: no larger than need be
        ((20, 40), (64, 128)),
        ((1, 1), (64, 64)),
        ((5000, 10), (128, 64)),  # longer than any proportions that are drawn
        ((10, 5000), (64, 160)),
    ],
)
def test_size_that_follows_from_the_picture(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    canvas = fit(smooth(*size), LIMITS)
    assert canvas.image.shape == (*drawn, 3)
    assert canvas.crop == drawn
    assert canvas.mask is None
    assert canvas.image.dtype == np.uint8


@pytest.mark.parametrize(
    ("asked", "drawn"),
    [
        ({"height": 64, "width": 160}, (64, 160)),
        ({"height": 128}, (128, 128)),
        ({"width": 64}, (64, 64)),
        ({"height": 64}, (64, 64)),
    ],
)
def test_size_that_is_given(asked: dict[str, Any], drawn: tuple[int, int]) -> None:
    assert fit(smooth(300, 300), LIMITS, **asked).image.shape == (*drawn, 3)


def test_one_side_given_the_other_follows_the_proportions() -> None:
    assert fit(smooth(300, 450), LIMITS, height=96).image.shape == (96, 128, 3)
    assert fit(smooth(300, 450), LIMITS, width=96).image.shape == (64, 96, 3)


def test_admitted_picture_is_not_touched() -> None:
    image = picture(80, 96)
    assert np.array_equal(fit(image, LIMITS).image, image)
    assert np.array_equal(fit(image, LIMITS, height=80, width=96).image, image)


def test_proportions_are_kept_and_the_middle_is_cut_out() -> None:
    drawn = fit(smooth(200, 400), LIMITS, height=128, width=128).image.astype(int)
    middle = drawn[64]
    # A square out of 400 by 200: from a quarter of the width to three quarters.
    assert abs(middle[0, 0] - 64) <= 1
    assert abs(middle[-1, 0] - 191) <= 1
    assert drawn[0, 64, 1] <= 1
    assert drawn[-1, 64, 1] >= 254


def test_resizing_is_lanczos() -> None:
    image = picture(160, 200)
    want = np.asarray(Image.fromarray(image).resize((160, 128), Image.Resampling.LANCZOS))
    assert np.array_equal(fit(image, LIMITS).image, want)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400))
def test_any_picture_fits(height: int, width: int) -> None:
    drawn = fit(np.zeros((height, width, 3), np.uint8), LIMITS).image
    assert LIMITS.height.admits(drawn.shape[0])
    assert LIMITS.width.admits(drawn.shape[1])
    assert np.array_equal(fit(drawn, LIMITS).image, drawn)


def test_without_a_mask_all_is_handed_back() -> None:
    canvas = fit(picture(64, 64), LIMITS)
    drawn = picture(64, 64, 1)[np.newaxis]
    assert np.array_equal(finish(drawn, canvas), drawn)


# --- with a mask or on a larger canvas ------------------------------------------------------------------


def test_small_picture_is_padded_with_its_edges_and_cut_back() -> None:
    image = picture(70, 50)
    canvas = fit(image, LIMITS, mask=half(70, 50))
    assert canvas.mask is not None
    assert canvas.image.shape == (80, 64, 3)
    assert canvas.crop == (70, 50)
    assert np.array_equal(canvas.image[:70, :50], image)
    assert (canvas.image[70:, :50] == image[-1:]).all()
    assert (canvas.image[:, 50:] == canvas.image[:, 49:50]).all()
    # What lies beside a drawn area is drawn with it, and is not held to what was there.
    assert np.array_equal(canvas.mask[:, 30:], np.zeros((80, 34)))
    assert canvas.mask[70:, :25].all()


def test_fixed_size_holds_any_smaller_picture() -> None:
    assert fit(picture(10, 20), FIXED, mask=half(10, 20)).image.shape == (64, 64, 3)


@st.composite
def requests(draw: st.DrawFn) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None, Any]:
    """A picture, a mask or none, an expansion or none, within the limits."""
    height, width = draw(st.integers(1, 128)), draw(st.integers(1, 160))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    mask = None
    if draw(st.booleans()):
        mask = rng.random((height, width), np.float32)
        mask[mask < draw(st.floats(0, 1))] = 0
        mask[mask > draw(st.floats(0, 1))] = 1
    expand = None
    if mask is None or draw(st.booleans()):
        left = draw(st.integers(0, 160 - width))
        top = draw(st.integers(0, 128 - height))
        expand = (
            left,
            top,
            draw(st.integers(0, 160 - width - left)),
            draw(st.integers(0, 128 - height - top)),
        )
        if not any(expand):
            expand = None
            mask = np.ones((height, width), np.float32) if mask is None else mask
    if expand is None and mask is not None:
        mask[0, 0] = 1  # something is drawn
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), mask, expand


@settings(max_examples=150, deadline=None)
@given(requests())
def test_given_pixels_survive_and_drawn_ones_are_drawn(
    request: tuple[NDArray[np.uint8], NDArray[np.float32] | None, Any],
) -> None:
    image, mask, expand = request
    canvas = fit(image, LIMITS, mask=mask, expand=expand)
    height, width = canvas.image.shape[:2]
    assert LIMITS.height.admits(height)
    assert LIMITS.width.admits(width)
    drawn = np.stack([picture(height, width, 1), picture(height, width, 2)])
    result = finish(drawn, canvas)
    left, top, right, bottom = expand or (0, 0, 0, 0)
    rows, columns = image.shape[:2]
    assert result.shape == (2, rows + top + bottom, columns + left + right, 3)
    inside = np.s_[:, top : top + rows, left : left + columns]
    kept = np.ones((rows, columns), bool) if mask is None else mask == 0
    new = np.zeros((rows, columns), bool) if mask is None else mask == 1
    assert (result[inside][:, kept] == image[kept]).all()
    assert (result[inside][:, new] == drawn[inside][:, new]).all()
    around = np.ones(result.shape[1:3], bool)
    around[inside[1:]] = False
    cut = drawn[:, : result.shape[1], : result.shape[2]]
    assert (result[:, around] == cut[:, around]).all()
    if mask is not None:  # between: the weighted mean
        low, high = np.minimum(cut[inside], image), np.maximum(cut[inside], image)
        assert (low <= result[inside]).all()
        assert (result[inside] <= high).all()


def test_blend_rounds_half_to_even_and_does_not_drift() -> None:
    mask = np.full((64, 64), 0.5, np.float32)
    image = np.zeros((64, 64, 3), np.uint8)
    canvas = Canvas(image, mask, (64, 64))
    drawn = (
        np.arange(64, dtype=np.uint8)[np.newaxis, np.newaxis, :, np.newaxis]
        .repeat(64, axis=1)
        .repeat(3, axis=3)
    )
    assert np.array_equal(finish(drawn, canvas)[0, 0, :, 0], np.rint(np.arange(64) / 2))
    same = Canvas(picture(64, 64), np.random.default_rng(0).random((64, 64), np.float32), (64, 64))
    assert np.array_equal(finish(same.image[np.newaxis], same)[0], same.image)


def test_what_is_thin_in_a_larger_mask_is_drawn() -> None:
    mask = np.zeros((256, 256), np.float32)
    mask[:, 101] = 1
    canvas = fit(picture(64, 64), LIMITS, mask=mask)
    assert canvas.mask is not None
    assert np.array_equal(np.flatnonzero(canvas.mask.any(axis=0)), [25])


def test_a_mask_that_is_cut_away_is_refused() -> None:
    mask = np.zeros((64, 128), np.float32)
    mask[:, 0] = 1
    with pytest.raises(UsageError, match="nothing would be drawn"):
        fit(picture(64, 128), LIMITS, mask=mask, height=64, width=64)


def test_a_picture_too_long_for_the_image_encoder_is_refused() -> None:
    facts = ImageProcessorFacts(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(UsageError, match="too long for an encoder"):
        clip_pixels(np.zeros((1, 60_000, 3), np.uint8), facts)


def test_all_white_mask_draws_everything() -> None:
    canvas = fit(picture(64, 64), LIMITS, mask=np.ones((64, 64), np.float32))
    drawn = picture(64, 64, 1)[np.newaxis]
    assert np.array_equal(finish(drawn, canvas), drawn)


def test_larger_canvas() -> None:
    image = picture(64, 64)
    canvas = fit(image, LIMITS, expand=(10, 3, 6, 20))
    assert canvas.mask is not None
    assert canvas.crop == (87, 80)
    assert canvas.image.shape == (96, 96, 3)
    want = np.ones((96, 96))
    want[3:67, 10:74] = 0
    assert np.array_equal(canvas.mask, want)
    assert np.array_equal(canvas.image[3:67, 10:74], image)


def test_new_area_continues_the_edges_without_a_jump() -> None:
    """At the seam the new area is the picture's edge, further out a blur of it; nothing is far from both."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32] = 40
    image[:, 32:] = 200
    image[20:40, 20:40] = 255  # in the middle, of which nothing may shine through
    filled = fit(image, LIMITS, expand=(32, 32, 32, 32)).image.astype(int)
    assert np.abs(filled[32:96, 31] - filled[32:96, 32]).max() <= 160 // 16
    assert np.abs(filled[31, 32:96] - filled[32, 32:96]).max() <= 160 // 16
    assert filled[0].min() >= 40
    filled[32:96, 32:96] = 0
    assert filled.max() <= 200
    assert np.abs(np.diff(filled[0], axis=0)).max() < 8  # the step of 160 is smoothed


def test_flat_picture_continues_flat() -> None:
    image = np.full((64, 64, 3), 77, np.uint8)
    assert (fit(image, LIMITS, expand=(16, 16, 16, 16)).image == 77).all()


def test_expansion_and_mask_are_drawn_both() -> None:
    mask = np.zeros((64, 64), np.float32)
    mask[5, 6] = 0.5
    canvas = fit(picture(64, 64), LIMITS, mask=mask, expand=(0, 0, 32, 0))
    want = np.zeros((64, 96))
    want[:, 64:] = 1
    want[5, 6] = 0.5
    assert canvas.mask is not None
    assert np.array_equal(canvas.mask, want)


def test_size_with_a_mask_resizes_both_first() -> None:
    image = smooth(400, 800)
    mask = half(400, 800)
    canvas = fit(image, LIMITS, mask=mask, height=128, width=128)
    assert canvas.mask is not None
    assert np.array_equal(canvas.image, fit(image, LIMITS, height=128, width=128).image)
    assert np.array_equal(canvas.mask, half(128, 128))
    larger = fit(image, LIMITS, expand=(0, 0, 16, 0), height=64)
    assert larger.crop == (64, 144)


@pytest.mark.parametrize("size", [(32, 48), (128, 192), (64, 96), (7, 10), (7, 11)])
def test_mask_of_another_size_but_the_same_proportions(size: tuple[int, int]) -> None:
    canvas = fit(picture(64, 96), LIMITS, mask=half(*size))
    assert canvas.mask is not None
    assert canvas.mask.shape == (64, 96)
    assert set(np.unique(canvas.mask)) == {0, 1}  # no value that was not there
    edge = size[1] // 2 / size[1] * 96
    assert np.abs(canvas.mask.sum(axis=1) - edge).max() <= 1


REFUSED: dict[str, tuple[tuple[int, int], dict[str, Any], str]] = {
    "mask of other proportions": (
        (64, 96),
        {"mask": half(64, 64)},
        r"the mask is 64x64 pixels and the picture 96x64 \(width x height\)",
    ),
    "mask that is two pixels too wide": ((64, 96), {"mask": half(64, 98)}, "the mask is 98x64 pixels"),
    "mask that is turned": ((64, 96), {"mask": half(96, 64)}, "the mask is 64x96 pixels"),
    "expand by nothing": ((64, 64), {"expand": (0, 0, 0, 0)}, "expand is 0 on all four sides"),
    "expand by less than nothing": (
        (64, 64),
        {"expand": (8, -1, 0, 0)},
        r"expand is \(8, -1, 0, 0\): a side",
    ),
    "expand by three": ((64, 64), {"expand": (8, 8, 8)}, "four whole numbers of pixels, left, top, right"),
    "expand by one": ((64, 64), {"expand": 8}, "expand is 8: four whole numbers"),
    "expand by halves": ((64, 64), {"expand": (8, 0.5, 0, 0)}, "four whole numbers"),
    "expand too wide": (
        (64, 64),
        {"expand": (60, 0, 60, 0)},
        "adds 120 pixels at left and right to a picture that is 64 wide: .* to 160, so at most 96 together",
    ),
    "expand too high": (
        (64, 64),
        {"expand": (0, 65, 0, 0)},
        "adds 65 pixels at top and bottom to a picture that is 64 high: .* up to 128, so at most 64 together",
    ),
    "expand by a lot": ((64, 64), {"expand": (10**30, 0, 0, 0)}, "at most 96 together"),
    "picture too large for its mask": (
        (400, 600),
        {"mask": half(400, 600)},
        r"the picture is 600x400 pixels \(width x height\), .* draws up to 160x128: .* give height and width",
    ),
    "picture too large to expand": ((400, 600), {"expand": (8, 0, 0, 0)}, "the picture is 600x400 pixels"),
    "height that is not drawn": ((64, 64), {"height": 70}, "height is 70: this bundle draws multiples of 16"),
    "width that is not drawn": (
        (64, 64),
        {"width": 1024, "mask": half(64, 64)},
        "width is 1024: this bundle draws multiples of 32 from 64 to 160 pixels",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    size, options, words = REFUSED[name]
    with pytest.raises(UsageError) as error:
        fit(picture(*size), LIMITS, **options)
    assert re.search(words, str(error.value)), str(error.value)


def test_nothing_can_be_added_where_one_size_is_drawn() -> None:
    with pytest.raises(UsageError, match="up to 64, so at most 0 together"):
        fit(picture(64, 64), FIXED, expand=(1, 0, 0, 0))
    assert fit(picture(40, 64), FIXED, expand=(0, 0, 0, 24)).crop == (64, 64)


# --- what the networks read -----------------------------------------------------------------------------


def test_latent_is_drawn_as_far_as_any_of_its_pixels() -> None:
    mask = np.zeros((8, 12), np.float32)
    mask[3, 4], mask[7, 11], mask[6, 10] = 0.25, 0.5, 1
    want = np.zeros((1, 1, 2, 3))
    want[0, 0, 0, 1], want[0, 0, 1, 2] = 0.25, 1
    result = latent_mask(mask, 4)
    assert result.dtype == np.float32
    assert np.array_equal(result, want)


def test_image_to_float_is_exact_at_its_ends() -> None:
    values = image_to_float(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2))
    assert values.dtype == np.float32
    assert values.shape == (1, 3, 16, 16)
    assert values.flags.c_contiguous
    assert values[0, 0].ravel()[[0, 255]].tolist() == [-1, 1]
    assert np.array_equal(np.rint((values[0, 1].ravel() + 1) * 127.5), np.arange(256))


def test_masked_image_is_that_of_diffusers() -> None:
    from diffusers.image_processor import VaeImageProcessor

    image = picture(64, 48)
    mask = np.random.default_rng(0).random((64, 48), np.float32)
    mask[0, :3] = 0.5, 0.49, 1
    binarised = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    condition = binarised.preprocess(mask[np.newaxis]).numpy()
    want = VaeImageProcessor().preprocess(Image.fromarray(image)).numpy() * (condition < 0.5)
    result = masked_image(image, mask)
    assert result.shape == (1, 3, 64, 48)
    assert np.array_equal(result == 0, want == 0)
    assert np.abs(result - want).max() <= MASKED_IMAGE


@pytest.mark.parametrize(
    "size", [(224, 224), (300, 200), (200, 300), (64, 64), (225, 224), (33, 517), (1000, 777), (1, 1), (3, 2)]
)
@pytest.mark.parametrize("side", [32, 224])
def test_clip_pixels_are_those_of_transformers(size: tuple[int, int], side: int) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = picture(*size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    want = np.asarray(processor(Image.fromarray(image))["pixel_values"][0])
    facts = ImageProcessorFacts(side, CLIP_MEAN, CLIP_STD)
    result = clip_pixels(image, facts)
    assert result.dtype == np.float32
    assert result.shape == (1, 3, side, side)
    assert np.abs(result[0] - want).max() <= CLIP_PIXELS
