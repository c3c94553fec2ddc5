"""What tests of the caches share: a component's files, and damage that a file's time does not show."""

from __future__ import annotations

import os
from pathlib import Path

from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.prepared_folder import Source


def source_of(bundle: Bundle, component: str = "unet") -> Source:
    """A component's files, taken as compared with the manifest."""
    part = bundle.component(component)
    return Source(bundle.path, part.model, part.files)


def replace_bytes(file: Path, content: bytes) -> None:
    """Write in place and give the file back both times that a program can set."""
    before = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_byte(file: Path, position: int) -> None:
    """Invert the bits of one byte, counted from either end, with `replace_bytes`."""
    content = bytearray(file.read_bytes())
    content[position] ^= 0xFF
    replace_bytes(file, bytes(content))
