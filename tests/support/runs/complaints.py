"""What an export of the tiny checkpoint says on standard error, without what it always says."""

from __future__ import annotations


def complaints(printed: str) -> list[str]:
    """The lines of standard error but for the remark on the tiny checkpoint's scheduler."""
    return [line for line in printed.splitlines() if "PNDMScheduler is the checkpoint's" not in line]
