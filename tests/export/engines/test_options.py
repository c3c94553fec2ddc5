"""What may be asked of an engine: sizes, profiles, targets; and what each component makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from support.checkpoints.engine_bundles import long_prompts

from sdrt.export.engines.options import (
    Extent,
    component_profile,
    input_shapes,
    parse_bytes,
    parse_extent,
    parse_profile,
    parse_profiles,
    parse_targets,
    sizes_of_profile,
)
from sdrt.runtime.bundle.bundle import EMBEDDED, Bundle
from sdrt.runtime.bundle.engines import AxisProfile
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.errors import UsageError


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """The embedded bundle's: factor 4, batches of 1 to 8, sides of 64 to 128 in steps of 16.

    Its U-Net takes 1 to 4 chunks here.
    """
    return long_prompts(Bundle.open(EMBEDDED, verify=False).manifest)


@pytest.mark.parametrize(
    ("text", "extent"),
    [
        ("512", Extent(512, None, 512)),
        (" 256..768 ", Extent(256, None, 768)),
        ("256..512..768", Extent(256, 512, 768)),
        ("1..1..1", Extent(1, 1, 1)),
    ],
)
def test_sizes_are_a_number_or_a_range_with_or_without_an_optimum(text: str, extent: Extent) -> None:
    assert parse_extent("--height", text) == extent


@pytest.mark.parametrize(
    "text", ["", "x", "1.5", "-1", "0", "2..1", "1..3..2", "3..2..5", "1..2..3..4", "1...2"]
)
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--height is '"):
        parse_extent("--height", text)


def test_a_profile_names_its_axes() -> None:
    assert parse_profile("batch=1, height=512,width=256..512..768") == {
        "batch": Extent(1, None, 1),
        "height": Extent(512, None, 512),
        "width": Extent(256, 512, 768),
    }


@pytest.mark.parametrize("text", ["", "batch", "depth=3", "batch=1,batch=2", "batch=0", "batch=1;height=2"])
def test_other_profiles_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--profile"):
        parse_profile(text)


def test_what_a_profile_leaves_out_is_shared() -> None:
    shared = {"height": Extent(64, None, 64), "batch": Extent(1, None, 4)}
    assert parse_profiles(["batch=1", "batch=2,width=96"], shared) == (
        {"height": Extent(64, None, 64), "batch": Extent(1, None, 1)},
        {"height": Extent(64, None, 64), "batch": Extent(2, None, 2), "width": Extent(96, None, 96)},
    )
    assert parse_profiles([], shared) == (shared,)


def test_profiles_are_few_and_different() -> None:
    with pytest.raises(UsageError, match="9 times: at most 8"):
        parse_profiles([f"batch={n}" for n in range(1, 10)], {})
    with pytest.raises(UsageError, match="twice with the same sizes"):
        parse_profiles(["batch=1", "batch=1..1"], {})


def test_memory_needs_a_unit() -> None:
    assert parse_bytes("--workspace", "512MiB") == 512 << 20
    assert parse_bytes("--workspace", "4 gib") == 4 << 30
    for text in ("512", "4GB", "0MiB", "-1GiB", "1.5GiB", ""):
        with pytest.raises(UsageError, match="--workspace is"):
            parse_bytes("--workspace", text)


def test_targets_are_sorted_as_numbers() -> None:
    assert parse_targets(["12.0", "8.9", "8.6", "8.9"]) == ("8.6", "8.9", "12.0")
    assert parse_targets(["current"]) == ("current",)
    for wrong in (["sm86"], ["8"], ["8.6", "current"], ["8.6+"]):
        with pytest.raises(UsageError, match="--compute-capability"):
            parse_targets(wrong)


# --- what a bundle makes of them ---


def test_without_sizes_a_profile_is_all_that_the_bundle_admits(manifest: Manifest) -> None:
    assert sizes_of_profile(manifest, {}) == {
        "batch": AxisProfile(1, 1, 8),
        "chunks": AxisProfile(1, 1, 1),
        "rows": AxisProfile(1, 2, 16),
        "height": AxisProfile(64, manifest.defaults.height, 128),
        "width": AxisProfile(64, manifest.defaults.width, 128),
    }


def test_rows_follow_the_batch_unless_they_are_given(manifest: Manifest) -> None:
    two = sizes_of_profile(manifest, {"batch": Extent(2, 3, 4)})
    assert two["rows"] == AxisProfile(2, 6, 8)
    guided_only = sizes_of_profile(manifest, {"batch": Extent(1, None, 1), "rows": Extent(2, None, 2)})
    assert guided_only["rows"] == AxisProfile(2, 2, 2)


def test_an_optimum_outside_the_range_is_brought_inside(manifest: Manifest) -> None:
    assert sizes_of_profile(manifest, {"height": Extent(96, None, 128)})["height"] == AxisProfile(96, 96, 128)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"height": Extent(72, None, 72)},
            "height 72: the bundle's graphs admit multiples of 16 from 64 to 128",
        ),
        ({"width": Extent(64, None, 256)}, "width 64..256: .*, not 256; .* with a wider --width"),
        ({"width": Extent(64, 72, 128)}, "not 72"),
        ({"batch": Extent(1, None, 9)}, "batch 1..9: the bundle's graphs admit 1 to 8 images"),
        ({"rows": Extent(1, None, 17)}, "rows 1..17: .* 1 to 16 rows"),
        ({"chunks": Extent(2, None, 5)}, "chunks 2..5: .* prompts of 1 to 4 chunks; give fewer, or export"),
    ],
)
def test_sizes_that_the_graphs_do_not_admit_are_refused(
    manifest: Manifest, given: Mapping[str, Extent], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        sizes_of_profile(manifest, given)


def test_the_smallest_batch_of_the_bundle_is_a_limit_too(manifest: Manifest) -> None:
    narrow = replace(manifest, limits=replace(manifest.limits, min_batch=2))
    with pytest.raises(UsageError, match="2 to 8 images"):
        sizes_of_profile(narrow, {"batch": Extent(1, None, 2)})


def test_every_component_gets_its_own_axes_in_its_own_units(manifest: Manifest) -> None:
    given = {"batch": Extent(1, None, 2), "height": Extent(64, None, 64), "width": Extent(64, 96, 128)}
    given["chunks"] = Extent(1, 2, 4)
    sizes = sizes_of_profile(manifest, given)
    axes = {
        name: component_profile(part.spec, sizes, manifest.latents.factor, 77).axes
        for name, part in manifest.components.items()
    }
    latents = {"latent_height": AxisProfile(16, 16, 16), "latent_width": AxisProfile(16, 24, 32)}
    assert axes == {
        "text_encoder": {"batch": AxisProfile(1, 1, 2)},
        "unet": {"rows": AxisProfile(1, 2, 4), "context": AxisProfile(77, 154, 308), **latents},
        "vae_decoder": {"batch": AxisProfile(1, 1, 2), **latents},
        "vae_encoder": {
            "batch": AxisProfile(1, 1, 2),
            "height": AxisProfile(64, 64, 64),
            "width": AxisProfile(64, 96, 128),
        },
    }


def test_input_shapes_are_the_corners_of_the_profile(manifest: Manifest) -> None:
    unet = manifest.components["unet"].spec
    profile = component_profile(unet, sizes_of_profile(manifest, {}), manifest.latents.factor, 77)
    shapes = input_shapes(unet, profile)
    side = manifest.defaults.height // manifest.latents.factor
    assert shapes["sample"] == ((1, 4, 16, 16), (2, 4, side, side), (16, 4, 32, 32))
    assert shapes["timestep"] == ((1,), (2,), (16,))
    assert [shape[:2] for shape in shapes["encoder_hidden_states"]] == [(1, 77), (2, 77), (16, 77)]
