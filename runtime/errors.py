"""Every error that sdrt raises on purpose, and the exit status each gives a command.

::

    SdrtError                 1   something failed while running
    ├── UsageError            2   an argument is wrong: nothing was started (also a ValueError)
    ├── BundleError           3   a bundle is missing, damaged, of another format, or unsafe
    ├── CheckpointError       4   a checkpoint is missing, incomplete, of wrong shapes, or a pickle
    ├── ParityError           5   an exported component differs from the PyTorch reference
    ├── NumericsError         6   a component gave NaN or infinity
    ├── BackendError          7   an engine library or a device is missing or cannot run this
    │   └── DeviceMemoryError 7   the device has too little free memory; it stays usable
    ├── OutputError           8   a result could not be written
    └── CancelledError      130   the caller ended the call

A message says what was given, what is allowed, and what to do.
"""

from __future__ import annotations

EXIT_INTERRUPTED = 130  # what a shell reports for SIGINT


class SdrtError(Exception):
    """Base of all errors raised on purpose; ``exit_status`` is what a command returns for it."""

    exit_status = 1


class UsageError(SdrtError, ValueError):
    """An argument is out of its range or does not fit the others."""

    exit_status = 2


class BundleError(SdrtError):
    """A bundle cannot be used: missing, altered or truncated file, another format, unsafe path."""

    exit_status = 3


class CheckpointError(SdrtError):
    """A checkpoint cannot be exported: missing component, wrong shape, pickle, unreachable hub."""

    exit_status = 4


class ParityError(SdrtError):
    """An exported component is further from the PyTorch reference than its tolerance."""

    exit_status = 5


class NumericsError(SdrtError):
    """A component's output holds NaN or infinity; the message names the component and the step."""

    exit_status = 6


class BackendError(SdrtError):
    """A backend that was asked for is not installed or cannot run this bundle."""

    exit_status = 7


class DeviceMemoryError(BackendError):
    """The device has too little free memory; the message says how much was needed and how much is free."""


class OutputError(SdrtError):
    """A result could not be written; nothing unfinished was left behind."""

    exit_status = 8


class CancelledError(SdrtError):
    """`Pipeline.cancel` was called while a picture was drawn; the pipeline is as usable as before."""

    exit_status = EXIT_INTERRUPTED
