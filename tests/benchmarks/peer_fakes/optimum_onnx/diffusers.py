"""diffusers as far as the worker of optimum-onnx knows it."""

from __future__ import annotations

from typing import Any

from support.fakes.fake_record import note


class DDIMScheduler:
    @classmethod
    def from_config(cls, config: dict[str, Any], **changes: Any) -> DDIMScheduler:
        note("DDIMScheduler", config=config, changes=changes)
        return cls()
