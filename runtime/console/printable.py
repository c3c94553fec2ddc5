"""Text as anybody may have written it, fit for a terminal."""

from __future__ import annotations

import re
from typing import Final

# What moves the cursor, changes colours or the title, rings, ends a line, or turns the order of characters
# around: C0, DEL, C1, the separators of lines and paragraphs, and Unicode's bidirectional controls (UAX 9).
_CONTROLS: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""The text with each control character as ``\u`` and four hex digits, which JSON reads back."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str) -> str:
    """A message as `printable`, its lines and runs of spaces joined."""
    return printable(" ".join(text.split()))
