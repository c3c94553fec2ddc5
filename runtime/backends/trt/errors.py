"""What TensorRT says goes into our errors, and not onto the user's terminal."""

from __future__ import annotations

import re
from typing import Any, Final

from sdrt.runtime.errors import BackendError, DeviceMemoryError

_MAX_KEPT: Final = 32  # texts; a library in trouble may repeat itself
_CUDA: Final = re.compile(r"\(cudaError (\d+): ([^()]+)\)")
_WHERE: Final = re.compile(r"[,.]?\s*\bIn \S+ at \S+:\d+")  # function, source file and line of the library
_PREFIX: Final = re.compile(r"^(\[[^\]]*\]|[\w:]+:) Error Code \d+: ")
_OUT_OF_MEMORY: Final = re.compile(
    r"out of memory|OutOfMemory|MemoryAllocation|insufficient (gpu )?memory|cudaError 2:", re.IGNORECASE
)


class ErrorLog:
    """Collects the errors of one TensorRT runtime and of all that it makes.

    Attributes:
        logger: The logger for ``trt.Runtime``; warnings and chatter are dropped.
        recorder: The recorder for its ``error_recorder``; with one, most errors go there, not to the logger.
    """

    def __init__(self, trt: Any) -> None:
        """Make logger and recorder of a flavour's module."""
        self._texts: list[str] = []
        self._out_of_memory = False
        self.logger = _logger(trt, self._keep)
        self.recorder = _recorder(trt, self._record)

    def _keep(self, text: str) -> None:
        if len(self._texts) < _MAX_KEPT:
            self._texts.append(text)

    def _record(self, text: str, *, allocation: bool) -> None:
        self._out_of_memory |= allocation
        self._keep(text)

    def clear(self) -> None:
        """Forget what was said, before something new is tried."""
        self._texts.clear()
        self._out_of_memory = False

    def error(
        self, what: str, *, advice: str = "", needed: int | None = None, free: int | None = None
    ) -> BackendError:
        """An error of one line that says what failed and TensorRT's own reason.

        Args:
            what: The thing that failed, as in ``the unet failed``.
            advice: A sentence on what to do about it.
            needed: The bytes that were asked of the GPU, if that may have been the reason.
            free: The bytes that are free there.
        """
        # The first is the cause; what follows comes of it.
        reason = explain(self._texts[0]) if self._texts else "TensorRT gives no reason"
        memory = self._out_of_memory or any(map(_OUT_OF_MEMORY.search, self._texts))
        self.clear()
        if not memory:
            return BackendError(f"{what}: {reason}" + (f"; {advice}" if advice else ""))
        sizes = [
            f"{size / 2**20:,.0f} MiB {word}"
            for size, word in ((needed, "are needed"), (free, "are free"))
            if size is not None
        ]
        return DeviceMemoryError(
            f"{what}: the GPU's memory is too small ({', '.join([*sizes, reason])}); draw fewer or smaller "
            "pictures at once, or end other programs on the GPU"
        )


def explain(text: str) -> str:
    """TensorRT's message without its source files: the CUDA error in it if there is one, else its words."""
    if found := _CUDA.search(text):
        return f"{found[2]} (cudaError {found[1]})"
    return " ".join(_WHERE.sub("", _PREFIX.sub("", text)).split())


def _logger(trt: Any, keep: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 wants it by name

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                keep(text)

    return Logger()


def _recorder(trt: Any, record: Any) -> Any:
    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]
        """TensorRT only ever writes to it; what it could read stays empty."""

        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)

        def report_error(self, code: Any, text: str) -> bool:
            record(text, allocation=code == trt.ErrorCodeTRT.FAILED_ALLOCATION)
            return False  # not fatal to the process: what failed returns null or false

        def num_errors(self) -> int:
            return 0

        def get_error_code(self, _index: int) -> Any:
            return trt.ErrorCodeTRT.SUCCESS

        def get_error_desc(self, _index: int) -> str:
            return ""

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> bool:
            return True

    return Recorder()
