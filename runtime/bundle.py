"""A bundle on disk: found, read and checked before anything in it is used."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import sdrt
from sdrt.runtime.errors import BundleError
from sdrt.runtime.manifest import MANIFEST_NAME, Component, FileEntry, Manifest
from sdrt.runtime.manifest_json import from_json
from sdrt.runtime.side_by_side import SideBySide
from sdrt.runtime.verified_files import VerifiedFiles

# `sdrt/models` is package data in a wheel and a symbolic link in a checkout: one path serves both.
EMBEDDED: Final = Path(sdrt.__file__).parent / "models" / "emoji" / "bundle"
_MAX_MANIFEST_BYTES: Final = 16 << 20  # a manifest is some 20 kB; never read gigabytes by mistake


class Bundle:
    """A bundle whose manifest has been read and whose files have been checked.

    Attributes:
        path: The folder.
        manifest: Its parsed manifest.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path | None = None, *, verify: bool = True) -> Bundle:
        """Open the bundle in the folder ``path``; without one, the bundle that sdrt ships.

        Args:
            path: The folder that holds ``manifest.json``.
            verify: Compare the SHA-256 of every file with the manifest. Without it only the sizes are
                compared, which still finds a truncated file.

        Raises:
            BundleError: No bundle there, a file missing, truncated, altered, or outside the bundle.
        """
        folder = EMBEDDED if path is None else Path(path)
        manifest_path = folder / MANIFEST_NAME
        try:
            if not manifest_path.is_file():
                raise BundleError(
                    f"no bundle at {folder}: it has no {MANIFEST_NAME}; make one with `sd-export MODEL OUT`"
                )
            if manifest_path.stat().st_size > _MAX_MANIFEST_BYTES:
                raise BundleError(f"{manifest_path} is larger than any manifest: not a bundle")
            manifest = from_json(manifest_path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise BundleError(f"{manifest_path} cannot be read: {error}") from error
        except OSError as error:
            raise BundleError(f"{manifest_path} cannot be read: {error.strerror}") from error
        bundle = cls(folder, manifest)
        for entry in manifest.files():
            bundle.check(entry, verify=verify)
        bundle._refuse_unlisted()
        return bundle

    def verify(self, *, again: bool = True) -> None:
        """Compare the SHA-256 of every file with the manifest.

        Args:
            again: Also of files that were compared before and have not been touched since
                (`sdrt.runtime.verified_files`).

        Raises:
            BundleError: A file is missing, altered or damaged.
        """
        known = VerifiedFiles(self.path)

        def check(entry: FileEntry) -> None:
            began = time.time()
            self.check(entry)
            known.remember(entry.path, entry.sha256, began)

        entries = [
            entry
            for entry in sorted(self.manifest.files(), key=lambda entry: -entry.size)
            if again or known.sha256(entry.path) != entry.sha256
        ]
        if not entries:
            return
        with SideBySide(check, entries, 2) as hashing:
            hashing.results()
        known.save()

    def is_verified(self, entries: Sequence[FileEntry]) -> bool:
        """Whether all of these files were compared with the manifest, and have not been touched since."""
        known = VerifiedFiles(self.path)
        return all(known.sha256(entry.path) == entry.sha256 for entry in entries)

    def _refuse_unlisted(self) -> None:
        """A file beside a graph that the manifest does not name would be used unchecked, as its weights."""
        listed = {self.path / entry.path for entry in self.manifest.files()}
        for folder in {file.parent for file in listed} - {self.path}:
            for found in sorted(folder.iterdir()):
                if found not in listed and not found.is_dir():
                    raise BundleError(
                        f"{found.relative_to(self.path)} is not in the manifest of {self.path}: "
                        "remove it, or export the bundle again"
                    )

    def check(self, entry: FileEntry, *, verify: bool = True) -> None:
        """Raise BundleError unless the file is inside the bundle with the recorded size and hash."""
        try:
            self._check(self.file(entry), entry, verify=verify)
        except OSError as error:
            raise BundleError(f"{entry.path} in {self.path} cannot be read: {error.strerror}") from error

    def _check(self, file: Path, entry: FileEntry, *, verify: bool) -> None:
        if not file.is_file():
            raise BundleError(f"{entry.path} is missing from {self.path}; export the bundle again")
        size = file.stat().st_size
        if size != entry.size:
            raise BundleError(
                f"{entry.path} has {size} bytes, the manifest says {entry.size}: "
                "truncated or altered; export the bundle again"
            )
        if verify and sha256(file) != entry.sha256:
            raise BundleError(
                f"{entry.path} does not have the SHA-256 that the manifest records: "
                "altered or damaged; export the bundle again"
            )

    def file(self, entry: FileEntry) -> Path:
        """The path of one file; a symbolic link that leads out of the bundle is refused."""
        file = self.path / entry.path
        try:
            inside = file.resolve().is_relative_to(self.path.resolve())
        except RuntimeError:  # what Python 3.11 and 3.12 raise for links in a circle
            inside = False
        if not inside:
            raise BundleError(f"{entry.path} leads outside the bundle {self.path}: refused")
        return file

    def component(self, name: str) -> Component:
        """The manifest's entry of one component.

        Raises:
            BundleError: The bundle has no such component.
        """
        try:
            return self.manifest.components[name]
        except KeyError:
            have = ", ".join(self.manifest.components)
            raise BundleError(f"the bundle {self.path} has no {name}, only {have}") from None


def sha256(file: Path) -> str:
    """SHA-256 of a file in hex."""
    import hashlib  # OpenSSL, 3 ms: files that were compared before are not hashed again

    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
