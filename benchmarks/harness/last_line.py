"""What a program said last, which is most often why it ended."""

from __future__ import annotations


def last_line(text: str, otherwise: str = "") -> str:
    """The last line of a program's output that is not blank, without the blanks around it.

    Args:
        text: Its output.
        otherwise: What is returned where it said nothing.
    """
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), otherwise)
