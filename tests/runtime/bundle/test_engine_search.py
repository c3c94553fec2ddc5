"""Which engine is taken, and what is said where none fits or one is damaged."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints.engine_bundles import PLAN, UNET_SIZES, add_engine, engine_key, long_prompts

from sdrt.export.cli.options import parse
from sdrt.export.engines.options import component_profile, sizes_of_profile
from sdrt.runtime.bundle.bundle import EMBEDDED, Bundle
from sdrt.runtime.bundle.engine_search import (
    Engine,
    build_command,
    find_engine,
    list_engines,
    rebuild_command,
)
from sdrt.runtime.bundle.engines import AxisProfile
from sdrt.runtime.errors import BackendError, BundleError

ADA = (8, 9)
HERE = {"rows": 2, "latent_height": 16, "latent_width": 16}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """The shipped bundle's manifest in a folder of its own: engines are searched without its graphs."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    return Bundle(folder, long_prompts(Bundle.open(EMBEDDED, verify=False).manifest))


def find(bundle: Bundle, component: str = "unet", **changes: Any) -> Engine:
    asked: dict[str, Any] = {
        "flavour": "tensorrt-rtx",
        "version": "1.7.1.116",
        "capability": ADA,
        "axes": HERE,
        **changes,
    }
    return find_engine(bundle, component, **asked)


def refused(bundle: Bundle, **changes: Any) -> str:
    with pytest.raises(BackendError) as caught:
        find(bundle, **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_status == 7
    return message


def test_engine_that_fits_is_found(bundle: Bundle) -> None:
    key = engine_key(bundle)
    folder = add_engine(bundle, key)
    engine = find(bundle)
    assert (engine.folder, engine.manifest.key) == (folder, key)
    assert engine.read_plan() == PLAN
    assert find(bundle, axes=None) == engine
    assert find(bundle, capability=None) == engine


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"component_sha256": "ab" * 32},
            r"it was built from another unet \(SHA-256 abababab…, the bundle's is [0-9a-f]{8}…\)",
        ),
        ({"flavour_version": "1.6.0.10"}, r"it is for tensorrt-rtx 1\.6\.0\.10, 1\.7\.1\.116 is installed"),
        (
            {"targets": ("8.0", "12.0")},
            r"it runs on compute capability 8\.0, 12\.0, this GPU has 8\.9",
        ),
        ({"targets": ("9.0+",)}, r"it runs on compute capability 9\.0\+, this GPU has 8\.9"),
        ({"precision": "bf16"}, r"its precision is bf16, the unet's is fp"),
    ],
    ids=["component", "version", "capability", "newer capability", "precision"],
)
def test_part_of_the_key_differs(bundle: Bundle, change: dict[str, Any], words: str) -> None:
    key = engine_key(bundle, **change)
    add_engine(bundle, key)
    message = refused(bundle)
    assert re.search(words, message)
    assert f"engines/{key.folder_name()}: " in message
    assert message.count("; ") == 1  # only that part differs, then the command
    assert message.startswith("no tensorrt-rtx engine of the unet fits: ")


def test_sizes_that_are_not_admitted_are_named_in_pixels(bundle: Bundle) -> None:
    factor = bundle.manifest.latents.factor
    add_engine(bundle, engine_key(bundle))
    message = refused(bundle, axes={"rows": 8, "latent_height": 16, "latent_width": 48})
    assert (
        f"it admits rows 1..4 (two per image under guidance), height {16 * factor}..{32 * factor}, "
        f"width {16 * factor}..{32 * factor}; asked for is rows 8 (two per image under guidance), "
        f"height {16 * factor}, width {48 * factor}"
    ) in message
    command = f"sd-export {bundle.path} --engine tensorrt-rtx --batch 4"
    assert message.endswith(f"; build one: {command} --height {16 * factor} --width {48 * factor}")


def test_several_profiles_are_all_named(bundle: Bundle) -> None:
    small = {**UNET_SIZES, "rows": (2, 2, 2)}
    large = {**UNET_SIZES, "rows": (8, 8, 8)}
    add_engine(bundle, engine_key(bundle, "unet", small, large))
    message = refused(bundle, axes={**HERE, "rows": 4})
    assert re.search(r"it admits rows 2 .* or rows 8 .*; asked for is rows 4", message)


def test_everything_that_differs_is_said_at_once(bundle: Bundle) -> None:
    add_engine(bundle, engine_key(bundle, targets=("8.0",), flavour_version="1.0"))
    message = refused(bundle)
    assert "it is for tensorrt-rtx 1.0" in message
    assert "this GPU has 8.9" in message


@pytest.mark.parametrize(
    ("present", "component"),
    [(None, "unet"), ("vae_decoder", "unet"), ("unet", "text_encoder")],
)
def test_no_engine_of_the_component(bundle: Bundle, present: str | None, component: str) -> None:
    if present:
        add_engine(bundle, engine_key(bundle, present))
    message = refused(bundle, component=component)
    assert message.startswith(
        f"the bundle has no tensorrt-rtx engine of its {component}; build one: sd-export "
    )


def test_engine_of_another_flavour_is_no_candidate(bundle: Bundle) -> None:
    add_engine(bundle, engine_key(bundle, flavour="tensorrt", flavour_version="1.7.1.116"))
    assert "the bundle has no tensorrt-rtx engine of its unet" in refused(bundle)


def test_unknown_component(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="has no safety_checker"):
        find(bundle, component="safety_checker")


def test_nearest_optimum_is_taken(bundle: Bundle) -> None:
    for optimum in (1, 2, 8):
        add_engine(bundle, engine_key(bundle, "unet", {**UNET_SIZES, "rows": (1, optimum, 8)}))
    for rows, optimum in ((1, 1), (2, 2), (3, 2), (5, 8), (8, 8)):
        key = find(bundle, axes={**HERE, "rows": rows}).manifest.key
        assert key.profiles[0].axes["rows"].optimum == optimum


def test_one_that_does_not_admit_the_size_never_wins(bundle: Bundle) -> None:
    add_engine(bundle, engine_key(bundle, "unet", {**UNET_SIZES, "rows": (2, 2, 2)}))
    wide = add_engine(bundle, engine_key(bundle, "unet", {**UNET_SIZES, "rows": (1, 8, 8)}))
    assert find(bundle, axes={**HERE, "rows": 3}).folder == wide


def test_profile_of_several_with_the_nearest_optimum(bundle: Bundle) -> None:
    sizes = [{**UNET_SIZES, "rows": (1, optimum, 8)} for optimum in (8, 1, 3)]
    add_engine(bundle, engine_key(bundle, "unet", *sizes))
    engine = find(bundle)
    assert [engine.profile_index({**HERE, "rows": rows}) for rows in (1, 2, 8)] == [1, 2, 0]
    assert engine.profile_index({**HERE, "rows": 9}) is None


@pytest.mark.parametrize(
    ("targets", "fits"),
    [
        ((), True),
        (("8.9",), True),
        (("8.0+",), True),
        (("8.9+",), True),
        (("8.0",), False),
        (("9.0+",), False),
        (("8.0", "12.0+"), False),
    ],
    ids=str,
)
def test_targets(bundle: Bundle, targets: tuple[str, ...], fits: bool) -> None:
    add_engine(bundle, engine_key(bundle, targets=targets))
    if fits:
        find(bundle)
    else:
        refused(bundle)


@pytest.mark.parametrize(
    ("flavour", "built", "installed", "fits"),
    [
        ("tensorrt", "11.0.0.1", "11.0.0.1", True),
        ("tensorrt", "11.0.0.1", "11.0.0.2", False),
        ("tensorrt-rtx", "1.7.1.116", "1.8.0.1", False),
        ("onnxruntime-cuda", "1.32.0", "1.32.0", True),
        ("onnxruntime-cuda", "1.32.0", "1.33.1", True),
        ("onnxruntime-cuda", "1.32.0", "1.9.0", False),
    ],
)
def test_versions(bundle: Bundle, flavour: str, built: str, installed: str, fits: bool) -> None:
    add_engine(bundle, engine_key(bundle, flavour=flavour, flavour_version=built))
    if fits:
        find(bundle, flavour=flavour, version=installed)
    else:
        assert f"it is for {flavour} {built}, {installed} is" in refused(
            bundle, flavour=flavour, version=installed
        )


def test_command_for_a_gpu_that_the_engines_leave_out(bundle: Bundle) -> None:
    add_engine(bundle, engine_key(bundle))
    assert refused(bundle, capability=(8, 7)).endswith(" --compute-capability 8.7")
    # Where the capability is not what is wrong, the builder's own list of targets will do.
    assert "--compute-capability" not in refused(bundle, version="9.9")
    # TensorRT builds for the GPU that it runs on.
    add_engine(bundle, engine_key(bundle, flavour="tensorrt", targets=("8.0",)))
    assert "--compute-capability" not in refused(bundle, flavour="tensorrt")


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        ({}, ""),
        ({"rows": 1}, " --batch 1"),
        ({"rows": 2}, " --batch 1"),
        ({"rows": 3}, " --batch 2"),
        ({"batch": 3}, " --batch 3"),
        ({"batch": 1, "height": 64, "width": 128}, " --batch 1 --height 64 --width 128"),
    ],
    ids=str,
)
def test_command(bundle: Bundle, axes: dict[str, int], options: str) -> None:
    assert build_command(bundle, "tensorrt", axes) == f"sd-export {bundle.path} --engine tensorrt{options}"


def test_command_can_be_pasted(tmp_path: Path, bundle: Bundle) -> None:
    odd = Bundle(tmp_path / "my 'odd' bundle", bundle.manifest)
    command = build_command(odd, "tensorrt")
    words = os.popen(f"printf '%s\\n' {command.removeprefix('sd-export ')}").read().splitlines()
    assert words == [str(odd.path), "--engine", "tensorrt"]


Damage = Callable[[Path], None]


def _cut(folder: Path) -> None:
    (folder / "model.plan").write_bytes(PLAN[:-1])


def _flip(folder: Path) -> None:
    data = bytearray(PLAN)
    data[len(data) // 2] ^= 1
    (folder / "model.plan").write_bytes(data)


def _grow(folder: Path) -> None:
    (folder / "model.plan").write_bytes(PLAN + b"x")


def _lose(folder: Path) -> None:
    (folder / "model.plan").unlink()


def _lead_out(folder: Path) -> None:
    outside = folder.parents[2] / "outside"
    outside.write_bytes(PLAN)
    (folder / "model.plan").unlink()
    (folder / "model.plan").symlink_to(outside)


def _circle(folder: Path) -> None:
    (folder / "model.plan").unlink()
    (folder / "model.plan").symlink_to("model.plan")


def _folder(folder: Path) -> None:
    (folder / "model.plan").unlink()
    (folder / "model.plan").mkdir()


@pytest.mark.parametrize(
    ("damage", "words", "without_hashing"),
    [
        (_cut, f"has {len(PLAN) - 1} bytes, engine.json says {len(PLAN)}: cut short or altered", True),
        (_grow, f"has {len(PLAN) + 1} bytes, engine.json says {len(PLAN)}", True),
        (_flip, "does not have the SHA-256 that engine.json records: altered or damaged", False),
        (_lose, "cannot be read: No such file or directory", True),
        (_lead_out, "leads outside its folder: refused", True),
        (_circle, r"refused|cannot be read", True),
        (_folder, r"bytes, engine.json says|cannot be read", True),
    ],
    ids=["cut short", "grown", "one bit", "missing", "link out", "link in a circle", "folder"],
)
def test_damaged_plan(bundle: Bundle, damage: Damage, words: str, without_hashing: bool) -> None:
    folder = add_engine(bundle, engine_key(bundle))
    engine = find(bundle)
    damage(folder)
    for verify in (True, False) if without_hashing else (True,):
        with pytest.raises(BundleError, match=words) as caught:
            engine.read_plan(verify=verify)
        message = str(caught.value)
        assert message.startswith(f"engines/{folder.name}/model.plan ")
        assert "\n" not in message
        if "refused" not in message:
            assert message.endswith(f"remove that folder and build it again: {engine.rebuild}")


def test_command_that_rebuilds_has_everything_of_the_key(bundle: Bundle) -> None:
    factor = bundle.manifest.latents.factor
    one = {"rows": (2, 2, 2), "latent_height": (16, 16, 32), "latent_width": (16, 24, 32)}
    two = {"rows": (1, 4, 8), "latent_height": (16, 16, 16), "latent_width": (16, 16, 16)}
    one, two = {**one, "context": (77, 77, 77)}, {**two, "context": (77, 154, 308)}
    key = engine_key(bundle, "unet", one, two, options={"refit": True, "level": 3})
    side = 16 * factor
    command = rebuild_command(bundle, key)
    assert command == (
        f"sd-export {bundle.path} --engine tensorrt-rtx "
        f"--profile rows=2,height={side}..{side}..{2 * side},width={side}..{side * 3 // 2}..{2 * side},"
        "chunks=1 "
        f"--profile rows=1..4..8,height={side},width={side},chunks=1..2..4 "
        "--compute-capability 8.0 8.6 8.9 12.0 --refit"
    )
    (bundle.path / "manifest.json").touch()
    (options,) = parse(shlex.split(command)[1:]).engines  # sd-export takes it
    spec, manifest = bundle.component("unet").spec, bundle.manifest
    assert key.profiles == tuple(
        component_profile(spec, sizes_of_profile(manifest, sizes), factor, manifest.tokens)
        for sizes in options.profiles
    )
    assert (options.flavour, options.targets, options.refit) == ("tensorrt-rtx", key.targets, True)
    fixed = engine_key(bundle, "text_encoder", {"batch": (1, 1, 1)}, targets=("8.0+",), flavour="tensorrt")
    assert rebuild_command(bundle, fixed) == (f"sd-export {bundle.path} --engine tensorrt --profile batch=1")


def test_long_prompts_need_an_engine_for_their_chunks(bundle: Bundle) -> None:
    """The message and both commands speak of chunks; `sd-export` takes the commands."""
    manifest = bundle.manifest
    tokens, factor = manifest.tokens, manifest.latents.factor
    key = engine_key(bundle, "unet", {**UNET_SIZES, "context": (tokens, 2 * tokens, 3 * tokens)})
    folder = add_engine(bundle, key)
    assert find(bundle, axes={"rows": 2, "context": 3 * tokens}).folder == folder
    message = refused(bundle, axes={"rows": 2, "context": 4 * tokens})
    assert ", chunks 1..3; asked for is rows 2 (two per image under guidance), chunks 4; " in message
    command = f"sd-export {bundle.path} --engine tensorrt-rtx --batch 1 --chunks 4"
    assert message.endswith(f"build one: {command}")
    assert "--chunks" not in build_command(bundle, "tensorrt-rtx", {"context": tokens})
    (bundle.path / "manifest.json").touch()
    for words, want in ((command, (4, 4, 4)), (rebuild_command(bundle, key), (1, 2, 3))):
        (options,) = parse(shlex.split(words)[1:]).engines
        sizes = sizes_of_profile(manifest, options.profiles[0])
        profile = component_profile(bundle.component("unet").spec, sizes, factor, tokens)
        assert profile.axes["context"] == AxisProfile(*(tokens * chunks for chunks in want))


def test_flipped_bit_is_found_only_by_hashing(bundle: Bundle) -> None:
    folder = add_engine(bundle, engine_key(bundle))
    _flip(folder)
    assert find(bundle).read_plan(verify=False) != PLAN


def _not_json(folder: Path) -> None:
    (folder / "engine.json").write_text("{")


def _not_text(folder: Path) -> None:
    (folder / "engine.json").write_bytes(b"\xff\xfe")


def _no_manifest(folder: Path) -> None:
    (folder / "engine.json").unlink()


def _huge_manifest(folder: Path) -> None:
    (folder / "engine.json").write_bytes(b" " * (5 << 20))


def _newer(folder: Path) -> None:
    document = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps({**document, "format_version": 2}))


def _manifest_outside(folder: Path) -> None:
    shutil.move(folder / "engine.json", folder.parents[2] / "elsewhere.json")
    (folder / "engine.json").symlink_to(folder.parents[2] / "elsewhere.json")


def _file_in_its_place(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_not_json, "is not valid JSON"),
        (_not_text, "is not valid JSON"),
        (_no_manifest, "is no engine: it has no engine.json"),
        (_huge_manifest, "cannot be read: .* has more than 4194304 bytes"),
        (_newer, "has format version 2, this sdrt reads version 1 alone: upgrade sdrt"),
        (_manifest_outside, "leads outside the bundle"),
        (_file_in_its_place, "cannot be read: Not a directory|is no engine"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damaged_manifest_is_said_and_does_not_hide_others(
    bundle: Bundle, damage: Damage, words: str
) -> None:
    folder = add_engine(bundle, engine_key(bundle))
    damage(folder)
    assert re.search(rf"engines/{re.escape(folder.name)}[/ ].*({words})", refused(bundle))
    whole = add_engine(bundle, engine_key(bundle, options={"another": 1}))
    assert find(bundle).folder == whole


def test_engines_folder_that_leads_out_of_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    folder = add_engine(bundle, engine_key(bundle))
    shutil.move(folder.parent, tmp_path / "elsewhere")
    (bundle.path / "engines").symlink_to(tmp_path / "elsewhere")
    assert "leads outside the bundle" in refused(bundle)


def test_half_written_engines_are_passed_over(bundle: Bundle) -> None:
    (bundle.path / "engines" / ".part-123").mkdir(parents=True)
    assert list_engines(bundle) == ([], [])


def test_message_stays_short_with_many_engines(bundle: Bundle) -> None:
    for number in range(12):
        add_engine(bundle, engine_key(bundle, options={"number": number}))
    message = refused(bundle, version="2.0")
    assert message.count("it is for tensorrt-rtx") == 4
    assert "(and 8 more)" in message
