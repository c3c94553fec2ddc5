"""A new backend is one file and one line in `BACKENDS`; everything else finds it by its name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints.synthetic_loras import write_kohya_lora

from sdrt.runtime.backends.backend import BACKENDS
from sdrt.runtime.backends.registry import choose_backend
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.cli.main import main
from sdrt.runtime.errors import BackendError
from sdrt.runtime.pipeline import Pipeline

# The whole of it. What it computes with is ONNX Runtime, without bound memory and one thread at a time.
TOY = """
from pathlib import Path

from sdrt.runtime.backends.backend import Backend
from sdrt.runtime.backends.cpu_backends import load_on_cpu, probe_on_cpu
from sdrt.runtime.backends.executor import FixedWeights, check_buffers
from sdrt.runtime.backends.libraries import import_library


class ToyExecutor(FixedWeights):
    capturable = False

    def __init__(self, model, spec, *, threads=None, source=None):
        self.spec = spec
        self._session = import_library("onnxruntime", "toy", "toy").InferenceSession(str(model))

    def bind(self, inputs, outputs):
        check_buffers(self.spec, inputs, outputs)

        def call():
            for buffer, result in zip(outputs.values(), self._session.run(list(outputs), inputs)):
                buffer[...] = result

        return call

    def close(self):
        Path(__file__).with_name("closed").touch()


def probe(bundle, gpu, shape):
    return probe_on_cpu(bundle, PACKAGE, "toy")


def load(bundle, component, device, threads, verify):
    return load_on_cpu(ToyExecutor, bundle, component, threads, verify)


PACKAGE = "onnxruntime"
BACKEND = Backend("Toy", "toy", needs_gpu=False, probe=probe, load=load)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the new backend, which has its line in `BACKENDS`."""
    file = tmp_path / "toy_backend.py"
    file.write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_backend", raising=False)
    monkeypatch.setitem(BACKENDS, "toy", "toy_backend:BACKEND")
    return file


def test_new_backend_draws_the_tiny_bundle(toy: Path, tiny_bundle: Path) -> None:
    options: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "output_type": "numpy"}
    pictures = {}
    for name in ("toy", "onnxruntime-cpu"):
        with Pipeline.load(tiny_bundle, backend=name) as pipeline:
            pictures[name] = pipeline("a cat", negative_prompt="x", **options).images
            assert pipeline.backend_reasons == (f"{name}: onnxruntime is installed",)
    np.testing.assert_array_equal(pictures["toy"], pictures["onnxruntime-cpu"])
    assert toy.with_name("closed").exists()


def test_new_backend_that_takes_no_loras(toy: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    lora = write_kohya_lora(tmp_path / "a.safetensors", tiny_bundle, 1)
    with Pipeline.load(tiny_bundle, backend="toy") as pipeline:
        pipeline.load_lora_weights(lora)
        with pytest.raises(BackendError, match="this backend cannot change weights, which a LoRA asks for"):
            pipeline("a cat", num_inference_steps=1)


def test_new_backend_is_named_where_backends_are(
    toy: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a.png"
    words = ["a cat", "--bundle", str(tiny_bundle), "--steps", "1", "--output", str(picture), "--quiet"]
    assert main([*words, "--backend", "toys"]) == 2
    assert "openvino-cpu, toy" in capsys.readouterr().err
    assert main([*words, "--backend", "toy"]) == 0
    assert picture.exists()


def test_new_backend_whose_library_is_missing(toy: Path, tiny_bundle: Path) -> None:
    toy.write_text(toy.read_text().replace('PACKAGE = "onnxruntime"', 'PACKAGE = "no_such_library"'))
    with pytest.raises(BackendError, match=r"the backend toy cannot run here: .* pip install 'sdrt\[toy\]'"):
        choose_backend(Bundle.open(tiny_bundle, verify=False), "toy")
