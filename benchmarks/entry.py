"""``sd-bench`` begins here: it can be interrupted before anything large is imported."""

from __future__ import annotations

from sdrt.runtime.console.enter import enter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> int:
    """Run ``sd-bench`` and return its exit status."""

    def load() -> Callable[[], int]:
        from sdrt.benchmarks.cli import main

        return main

    return enter("sd-bench", load)
