"""The configurations of popular checkpoints: each is read, and drawn as diffusers' own pipeline draws it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints.published import CONFIGS, write_published_checkpoint
from support.runs.reading import compare_reading, is_equal

from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.checkpoint.weights import check_architectures

# The side in pixels that each draws by default.
SIZES = {
    "sd-1.4": 512,
    "sd-1.5-inpainting": 512,
    "sd-2-inpainting": 512,
    "sd-2.1-768": 768,
    "sd-image-variations": 512,
    "sdxl-base": 1024,
    "sdxl-turbo-variants": 512,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_configuration_is_drawn_as_diffusers_draws_it(tmp_path: Path, name: str) -> None:
    write_published_checkpoint(tmp_path, name)
    checkpoint = open_checkpoint(str(tmp_path))
    check_architectures(checkpoint)
    assert checkpoint.native_size == SIZES[name]
    report = compare_reading(tmp_path)
    assert is_equal(report)
    assert report.left_out == []
