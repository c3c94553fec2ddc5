"""diffusers' own pipelines of each task on a tiny checkpoint's networks, and the picture they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support.references.solver_reference import diffusers_scheduler
from support.runs.pipeline_spies import OpenPipeline

from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.parity.reference import reference_pipeline
from sdrt.runtime.pipeline import Pipeline

SIDE = 16  # pixels


def picture(side: int = SIDE) -> NDArray[np.uint8]:
    """Coloured slopes, uint8 [side, side, 3]."""
    rows, columns = np.mgrid[0:side, 0:side] * 255 // (side - 1)
    return np.stack([rows, columns, 255 - rows], axis=-1).astype(np.uint8)


def mask_image() -> NDArray[np.uint8]:
    """White on whole latents, so that any way of making it smaller gives the same; uint8 [SIDE, SIDE]."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[4:12, 2:10] = 255
    return mask


def loaded_reference(checkpoint: Path) -> Any:
    return reference_pipeline(open_checkpoint(str(checkpoint)))


def opened(bundle: Path) -> OpenPipeline:
    pipeline = OpenPipeline.load(bundle, backend="onnxruntime-cpu", verify=False)
    assert isinstance(pipeline, OpenPipeline)
    return pipeline


def as_task(reference: Any, kind: Any, pipeline: Pipeline, sampler: str = "ddim") -> Any:
    """diffusers' pipeline of another kind from the same networks, with our sampler's scheduler."""
    parts = {
        **reference.components,
        "scheduler": diffusers_scheduler(sampler, pipeline.bundle.manifest.schedule),
    }
    takes = kind.__init__.__annotations__
    safety = {"requires_safety_checker": False} if "requires_safety_checker" in takes else {}
    task = kind(**parts, **safety)
    task.set_progress_bar_config(disable=True)
    return task
