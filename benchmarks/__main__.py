"""``sd-bench`` begins here; also ``python -m sdrt.benchmarks``."""

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


if __name__ == "__main__":
    raise SystemExit(main())
