"""A bundle on disk: found, read and checked before anything in it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

import sdrt
from sdrt.runtime.bundle.limits import MAX_MANIFEST_BYTES
from sdrt.runtime.bundle.manifest import MANIFEST_NAME, Component, FileEntry, Manifest
from sdrt.runtime.bundle.manifest_json import from_json
from sdrt.runtime.bundle.verified_files import FileState, VerifiedFiles, hashed
from sdrt.runtime.errors import BundleError
from sdrt.runtime.system.side_by_side import SideBySide
from sdrt.runtime.system.untrusted import open_regular, read_limited

# `sdrt/models` is package data in a wheel and a symbolic link in a checkout: one path serves both.
EMBEDDED: Final = Path(sdrt.__file__).parent / "models" / "emoji" / "bundle"
# Whether files are compared with their SHA-256: never; unless that was done and they were not touched since;
# or all of them anew, and what was prepared of them too.
ALWAYS: Final = "always"
Verify = bool | Literal["always"]


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
            manifest = from_json(read_limited(manifest_path, MAX_MANIFEST_BYTES))
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(
                f"no bundle at {folder}: it has no {MANIFEST_NAME}; make one with `sd-export MODEL OUT`"
            ) from None
        except ValueError as error:
            raise BundleError(
                f"no bundle at {folder}: {error}; make one with `sd-export MODEL OUT`"
            ) from None
        except OSError as error:
            raise BundleError(f"{manifest_path} cannot be read: {error.strerror}") from error
        bundle = cls(folder, manifest)
        for entry in manifest.files():
            bundle.check(entry, verify=verify)
        bundle._refuse_unlisted()
        return bundle

    @property
    def embedded(self) -> bool:
        """Whether it is the one that sdrt ships, in its place: as safe to load as sdrt itself."""
        return self.path == EMBEDDED

    def verify(self, *, again: bool = True) -> None:
        """Compare the SHA-256 of every file with the manifest.

        Args:
            again: Also of files that were compared before and have not been touched since
                (`sdrt.runtime.bundle.verified_files`).

        Raises:
            BundleError: A file is missing, altered or damaged.
        """
        known = VerifiedFiles(self.path)

        def check(entry: FileEntry) -> None:
            known.remember(entry.path, entry.sha256, self.check(entry))

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

    def check(self, entry: FileEntry, *, verify: bool = True) -> FileState | None:
        """Raise BundleError unless the file is inside the bundle with the recorded size and hash.

        Returns:
            What `VerifiedFiles.remember` wants to know of the file that was hashed.
        """
        with self._reading(entry):
            return self._check(self.file(entry), entry, verify=verify)

    def sha256(self, entry: FileEntry) -> str:
        """The SHA-256 that a file has by now, which need not be the recorded one.

        Raises:
            BundleError: It cannot be read any more.
        """
        with self._reading(entry):
            return sha256(self.file(entry))

    @contextlib.contextmanager
    def _reading(self, entry: FileEntry) -> Iterator[None]:
        """Inside, a file that cannot be read, or is none, is a BundleError that names it."""
        try:
            yield
        except ValueError as error:
            raise BundleError(f"{entry.path} in {self.path} cannot be read: {error}") from None
        except OSError as error:
            raise BundleError(f"{entry.path} in {self.path} cannot be read: {error.strerror}") from error

    def _check(self, file: Path, entry: FileEntry, *, verify: bool) -> FileState | None:
        if not file.is_file():
            raise BundleError(f"{entry.path} is missing from {self.path}; export the bundle again")
        size = file.stat().st_size
        if size != entry.size:
            raise BundleError(
                f"{entry.path} has {size} bytes, the manifest says {entry.size}: "
                "truncated or altered; export the bundle again"
            )
        if not verify:
            return None
        with open_regular(file) as stream:
            found, state = hashed(stream)
        if found != entry.sha256:
            raise BundleError(
                f"{entry.path} does not have the SHA-256 that the manifest records: "
                "altered or damaged; export the bundle again"
            )
        return state

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
    with open_regular(file) as stream:
        return hashed(stream)[0]
