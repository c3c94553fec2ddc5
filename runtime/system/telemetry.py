"""What libraries tell of their users, switched off by the variables that they read when they are imported.

Of its own accord ONNX Runtime (from 1.32 on) writes a device id and a queue of events below the home folder
and looks up its maker's event host; Hugging Face's libraries add facts of the machine to what they ask of the
hub. Who has set one of the variables himself keeps his choice.
"""

from __future__ import annotations

import os
from typing import Final

TELEMETRY_OFF: Final = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",
}


def switch_telemetry_off() -> None:
    """Set the variables of `TELEMETRY_OFF` that are not set; to be called before a library is imported."""
    for name, value in TELEMETRY_OFF.items():
        os.environ.setdefault(name, value)
