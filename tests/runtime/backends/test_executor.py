"""What the executors have in common."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdrt.runtime.backends.cpu_backends import CpuExecutor
from sdrt.runtime.backends.executor import usable_cores
from sdrt.runtime.backends.onnxruntime_cpu.executor import OnnxRuntimeExecutor
from sdrt.runtime.backends.openvino_cpu.executor import OpenVinoExecutor
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.errors import BundleError


@pytest.mark.parametrize("executor", [OnnxRuntimeExecutor, OpenVinoExecutor])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "latents"}, "latents should be .* the graph has only sample, timestep"),
        ({"dtype": "float16"}, r"sample should be float16\[.*\], the graph has float32\["),
        ({"shape": ("rows", 9, "latent_height", "latent_width")}, "sample should be"),
        ({"shape": ("rows", 4)}, "sample should be"),
    ],
)
def test_graph_of_something_else(
    tiny_bundle: Path, executor: CpuExecutor, change: dict[str, Any], words: str
) -> None:
    tiny = Bundle.open(tiny_bundle, verify=False)
    spec = tiny.component("unet").spec
    other = replace(spec, inputs=(replace(spec.inputs[0], **change), *spec.inputs[1:]))
    with pytest.raises(BundleError, match=words):
        executor(tiny.path / "unet/model.onnx", other)


def test_usable_cores() -> None:
    assert 1 <= usable_cores() <= 4096
