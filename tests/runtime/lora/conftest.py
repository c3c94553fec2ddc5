"""Checkpoints of one and of two text encoders that LoRAs are read for."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints.tiny_sdxl import write_tiny_sdxl_checkpoint
from support.checkpoints.tiny_variants import write_model_index
from support.made_once import made_once


@pytest.fixture(scope="session")
def sdxl_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of the family sdxl; read only."""
    folder = tmp_path_factory.mktemp("sdxl_checkpoint") / "tiny-xl"
    return made_once("sdxl-checkpoint", folder, write_tiny_sdxl_checkpoint, write_model_index)
