"""optimum-onnx (ONNX Runtime under diffusers' pipeline) as a worker of ``sd-bench``.

Its model is a folder of ONNX files that its own exporter wrote.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdrt.benchmarks.peer_workers.worker import STAGES, serve
    from sdrt.benchmarks.peer_workers.worker_diffusers import DiffusersPipeline, ddim
else:
    from worker import STAGES, serve
    from worker_diffusers import DiffusersPipeline, ddim


class Optimum(DiffusersPipeline):
    """``ORTStableDiffusionPipeline`` on ONNX Runtime's CPU provider."""

    packages: Sequence[str] = (
        "optimum-onnx",
        "optimum",
        "onnxruntime",
        "diffusers",
        "transformers",
        "torch",
        "numpy",
    )
    stages: Sequence[str] = STAGES
    notes: Sequence[str] = ()

    def import_packages(self) -> None:
        """See `Subject.import_packages`."""
        import torch  # noqa: F401

        self._ort: Any = import_module("onnxruntime")
        self._pipeline_class: Any = import_module("optimum.onnxruntime").ORTStableDiffusionPipeline

    def load(self, model: Path, threads: int) -> None:
        """See `Subject.load`."""
        import torch

        torch.set_num_threads(threads)
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._pipe = ddim(
            self._pipeline_class.from_pretrained(
                model, provider="CPUExecutionProvider", session_options=options, local_files_only=True
            )
        )


if __name__ == "__main__":
    sys.exit(serve(Optimum()))
