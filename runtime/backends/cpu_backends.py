"""What the backends of the CPU have in common: they run the bundle's graphs as they were exported."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.bundle.bundle import ALWAYS, Bundle, Verify
from sdrt.runtime.bundle.prepared_folder import Source
from sdrt.runtime.errors import BackendError

CpuExecutor = Callable[..., Executor]  # ``(model, spec, *, threads, source) → executor``


def probe_on_cpu(bundle: Bundle, package: str, extra: str) -> str:
    """Whether a library is installed and can run a bundle's graphs; it is not imported.

    Args:
        bundle: The bundle, opened.
        package: The library's Python package.
        extra: The extra of sdrt that installs it.

    Returns:
        The reason for the backend.

    Raises:
        BackendError: It is not installed, or the bundle is in bfloat16.
    """
    if find_spec(package) is None:
        raise BackendError(f"the package {package} is not installed: pip install 'sdrt[{extra}]'")
    for name in bundle.manifest.record.required:
        _refuse_bfloat16(bundle, name)
    return f"{package} is installed"


def load_on_cpu(
    executor: CpuExecutor, bundle: Bundle, component: str, threads: int | None, verify: Verify
) -> Executor:
    """A component's graph on an executor of the CPU; arguments and errors as `registry.load_executor`."""
    _refuse_bfloat16(bundle, component)
    part = bundle.component(component)
    model = bundle.file(part.model_entry)
    # What was prepared of unaltered files must not stand in for altered ones.
    compared = verify or bundle.is_verified(part.files)
    source = Source(bundle.path, part.model, part.files, verify == ALWAYS) if compared else None
    return executor(model, part.spec, threads=threads, source=source)


def _refuse_bfloat16(bundle: Bundle, component: str) -> None:
    if bundle.component(component).precision == "bf16":
        raise BackendError(
            "sdrt has no bfloat16 arithmetic on the CPU; export with --dtype fp32 to draw here"
        )
