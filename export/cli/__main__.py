"""``sd-export`` begins here; also ``python -m sdrt.export.cli``."""

from __future__ import annotations

from sdrt.runtime.console.enter import enter

TYPE_CHECKING = False  # see `enter`: nothing large is imported before it is called
if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> int:
    """Run ``sd-export`` and return its exit status."""

    def load() -> Callable[[], int]:
        from sdrt.export.cli.main import main

        return main

    return enter("sd-export", load)


if __name__ == "__main__":
    raise SystemExit(main())
