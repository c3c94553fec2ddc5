"""A bundle on disk: opened only if it is whole, unaltered and lies within its folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints.manifests import edit_manifest

from sdrt.runtime.bundle.bundle import EMBEDDED, Bundle, sha256
from sdrt.runtime.bundle.manifest import FORMAT_VERSION, FileEntry
from sdrt.runtime.errors import BundleError

WEIGHTS = "unet/model.onnx.data"


def refused(path: str | Path, *, verify: bool = True) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(path, verify=verify)
    message = str(caught.value)
    assert "\n" not in message
    return message


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("verify", [True, False])
def test_whole_bundle_opens(tiny_bundle: Path, verify: bool) -> None:
    bundle = Bundle.open(tiny_bundle, verify=verify)
    assert bundle.path == tiny_bundle
    for entry in bundle.manifest.files():
        assert bundle.file(entry).stat().st_size == entry.size
        assert sha256(bundle.file(entry)) == entry.sha256
    assert Bundle.open(str(tiny_bundle)).manifest == bundle.manifest
    assert bundle.component("unet") is bundle.manifest.components["unet"]


def test_unknown_component_names_those_there_are(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="has no safety_checker, only text_encoder, unet"):
        Bundle.open(tiny_bundle).component("safety_checker")


def test_default_is_the_embedded_bundle(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    assert EMBEDDED.parts[-4:] == ("sdrt", "models", "emoji", "bundle")
    monkeypatch.setattr("sdrt.runtime.bundle.bundle.EMBEDDED", tiny_bundle)
    assert Bundle.open().path == tiny_bundle


def test_moved_bundle_opens(bundle_copy: Path) -> None:
    moved = bundle_copy.rename(bundle_copy.with_name("a folder, moved"))
    Bundle.open(moved)


def test_linked_bundle_opens(bundle_copy: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(bundle_copy)
    Bundle.open(link)


@pytest.mark.parametrize(
    "name", ["nowhere", "", "file", "x" * 300, "a\0b"], ids=["none", "empty", "file", "long", "nul"]
)
def test_no_bundle_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    message = refused(tmp_path / name)
    assert str(tmp_path / name) in message
    assert ("sd-export MODEL OUT" in message) or ("too long" in message)


def test_manifest_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    assert "no bundle" in refused(tmp_path)


def test_manifest_that_is_not_text(bundle_copy: Path) -> None:
    (bundle_copy / "manifest.json").write_bytes(b"\xff\xfe\x00")
    assert "not valid JSON" in refused(bundle_copy)


def test_manifest_of_gigabytes_is_not_read(bundle_copy: Path) -> None:
    with (bundle_copy / "manifest.json").open("r+b") as stream:
        stream.truncate(10 << 30)  # sparse: takes no room on the disk
    assert "more than 16777216 bytes, which is the limit" in refused(bundle_copy)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_truncated_manifest(bundle_copy: Path, cut: int) -> None:
    file = bundle_copy / "manifest.json"
    data = file.read_bytes().rstrip()
    file.write_bytes(data[:cut])
    assert "not valid JSON" in refused(bundle_copy)


@pytest.mark.parametrize(
    ("version", "remedy"),
    [(FORMAT_VERSION - 1, "export the bundle again"), (FORMAT_VERSION + 1, "upgrade sdrt")],
)
def test_another_format(bundle_copy: Path, version: int, remedy: str) -> None:
    edit_manifest(bundle_copy, lambda document: document.update(format_version=version))
    message = refused(bundle_copy)
    assert f"format version {version}" in message
    assert remedy in message


ALL_FILES = [
    f"{part}/model.onnx{end}"
    for part in ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    for end in ("", ".data")
] + ["tokenizer.json", "weights.json"]


@pytest.mark.parametrize("name", ALL_FILES)
def test_every_file_is_checked(bundle_copy: Path, name: str) -> None:
    file = bundle_copy / name
    whole = file.read_bytes()

    flip_bit(file)
    message = refused(bundle_copy)
    assert name in message
    assert "SHA-256" in message
    assert "export the bundle again" in message
    Bundle.open(bundle_copy, verify=False)  # what it is for: no hashing

    file.write_bytes(whole[:-1])
    for verify in (True, False):
        message = refused(bundle_copy, verify=verify)
        assert f"{name} has {len(whole) - 1} bytes, the manifest says {len(whole)}" in message
        assert "truncated" in message

    file.write_bytes(whole + b"\0")
    assert f"{name} has {len(whole) + 1} bytes" in refused(bundle_copy, verify=False)

    file.unlink()
    for verify in (True, False):
        assert f"{name} is missing" in refused(bundle_copy, verify=verify)

    file.mkdir()
    assert f"{name} is missing" in refused(bundle_copy)


def test_hash_in_the_manifest_is_compared_whole(bundle_copy: Path) -> None:
    def shorten(document: dict[str, Any]) -> None:
        entry = document["components"]["unet"]["files"][1]
        entry["sha256"] = entry["sha256"][:10]

    edit_manifest(bundle_copy, shorten)
    assert WEIGHTS in refused(bundle_copy)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "unet/../../secret"])
def test_path_in_the_manifest_that_points_outside(bundle_copy: Path, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_text("secret")

    def point(document: dict[str, Any]) -> None:
        document["tokenizers"][0]["file"]["path"] = path

    edit_manifest(bundle_copy, point)
    for verify in (True, False):
        message = refused(bundle_copy, verify=verify)
        assert repr(path) in message
        assert "outside the bundle" in message


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("link_folder", [True, False])
def test_link_out_of_the_bundle_is_refused(
    bundle_copy: Path, tmp_path: Path, verify: bool, link_folder: bool
) -> None:
    """Even if what it leads to has the right size and hash."""
    target = bundle_copy / ("unet" if link_folder else WEIGHTS)
    target.rename(tmp_path / "elsewhere")
    target.symlink_to(tmp_path / "elsewhere")
    message = refused(bundle_copy, verify=verify)
    assert "unet/model.onnx" in message
    assert "outside the bundle" in message


def test_link_inside_the_bundle_is_followed(bundle_copy: Path) -> None:
    real = bundle_copy / "real.data"
    (bundle_copy / WEIGHTS).rename(real)
    (bundle_copy / WEIGHTS).symlink_to("../real.data")
    Bundle.open(bundle_copy)


def test_link_to_a_neighbour_whose_name_begins_alike_is_refused(bundle_copy: Path) -> None:
    neighbour = bundle_copy.with_name(bundle_copy.name + "-2")
    shutil.copytree(bundle_copy, neighbour)
    (bundle_copy / WEIGHTS).unlink()
    (bundle_copy / WEIGHTS).symlink_to(neighbour / WEIGHTS)
    assert "outside the bundle" in refused(bundle_copy)


def test_links_in_a_circle(bundle_copy: Path) -> None:
    file = bundle_copy / WEIGHTS
    file.unlink()
    file.symlink_to(file.name)
    assert WEIGHTS in refused(bundle_copy)


def test_path_too_long_for_the_system(bundle_copy: Path) -> None:
    def lengthen(document: dict[str, Any]) -> None:
        document["tokenizers"][0]["file"]["path"] = "x" * 5000

    edit_manifest(bundle_copy, lengthen)
    assert "cannot be read" in refused(bundle_copy)


def test_file_that_cannot_be_read(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a disk fault would have it; permissions do not stop root, who may be running this."""

    def fail(_stream: object) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("sdrt.runtime.bundle.bundle.hashed", fail)
    message = refused(bundle_copy)
    assert "text_encoder/model.onnx" in message
    assert "Input/output error" in message


def test_check_of_a_file_that_the_manifest_does_not_name(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    for path in ("../x", "/etc/passwd"):
        with pytest.raises(BundleError, match="leads outside"):
            bundle.check(FileEntry(path, 0, ""))
