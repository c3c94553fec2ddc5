"""``sd-run`` begins here; also ``python -m sdrt.runtime.cli``."""

from __future__ import annotations

from sdrt.runtime.console.enter import enter

TYPE_CHECKING = False  # see `enter`: nothing large is imported before it is called
if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> int:
    """Run ``sd-run`` and return its exit status."""

    def load() -> Callable[[], int]:
        from sdrt.runtime.cli.main import main

        return main

    return enter("sd-run", load)


if __name__ == "__main__":
    raise SystemExit(main())
