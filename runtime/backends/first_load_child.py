"""The process in which a stranger's components are loaded for the first time.

`sdrt.runtime.admission.first_load` starts it: ``python -m sdrt.runtime.backends.first_load_child JOB`` with
the job as JSON. Each line on standard output is an object: ``component`` before one is loaded; at the end
``done``, or ``error`` with the ``status`` of its kind.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Mapping
from typing import IO, Any, Final

from sdrt.runtime.backends.backend import RequestShape
from sdrt.runtime.backends.registry import find_backend
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.devices.host import HostDevice
from sdrt.runtime.errors import BundleError, SdrtError
from sdrt.runtime.system.c_library import c_library

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def main() -> None:
    """Do the job."""
    job = json.loads(sys.argv[1])
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        # Whatever the libraries print is not for the parent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _limit(job["memory"], job["seconds"])
        try:
            _load_all(job, answers)
            _say(answers, {"done": True})
        except SdrtError as error:
            _say(answers, {"error": str(error), "status": error.exit_status})
        except MemoryError:
            memory = f"{job['memory'] / 2**30:.0f} GiB"
            words = f"{job['bundle']} needs more than {memory} of memory to be loaded, which is the limit"
            _say(answers, {"error": words, "status": BundleError.exit_status})
        except Exception as error:
            words = f"{job['bundle']} cannot be loaded: {type(error).__name__}: {error}"
            _say(answers, {"error": words, "status": BundleError.exit_status})


def _limit(memory: int, seconds: float) -> None:
    """End with the parent; take no more than this. The parent looks at the clock, too."""
    with contextlib.suppress(OSError, AttributeError):
        c_library().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    cores = os.cpu_count() or 1
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, math.ceil(seconds) * cores),
        # Not RLIMIT_AS: files that are mapped are no memory.
        (resource.RLIMIT_DATA, memory),
    ):
        _, most = resource.getrlimit(kind)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def _load_all(job: Mapping[str, Any], answers: IO[str]) -> None:
    bundle = Bundle.open(job["bundle"], verify=False)
    limits, device, backend = bundle.manifest.limits, HostDevice(), find_backend(job["backend"])
    if backend.by_shape:  # few calls are as small as this one: it would keep gigabytes that nobody reads
        os.environ["SDRT_CACHE"] = os.devnull
    shape = RequestShape(limits.min_batch, limits.height.minimum, limits.width.minimum, guided=False)
    axes = shape.axes(bundle.manifest.latents.factor, bundle.manifest.tokens)
    for name in job["components"]:
        _say(answers, {"component": name})
        executor = backend.load(bundle, name, device, None, job["verify"])
        inputs, outputs = (
            {entry.name: device.zeros(entry.concrete(axes), entry.dtype) for entry in entries}
            for entries in (executor.spec.inputs, executor.spec.outputs)
        )
        executor.bind(inputs, outputs)()
        executor.close()


def _say(answers: IO[str], document: Mapping[str, Any]) -> None:
    answers.write(json.dumps(document) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
