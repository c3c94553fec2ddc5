"""The machine's ceilings: their units, and the sizes they are measured with."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from sdrt.benchmarks.document.machine import probe_seconds
from sdrt.benchmarks.harness.ceilings import (
    array_bytes,
    best_seconds,
    last_level_cache,
    memory_bandwidth,
    numpy_flop_per_s,
    onnxruntime_flop_per_s,
)

MIB = 1 << 20


def test_a_products_speed_is_its_operations_over_its_time() -> None:
    side = 512
    a = np.ones((side, side), np.float32)
    seconds = best_seconds(lambda: a @ a)
    assert numpy_flop_per_s(side) == pytest.approx(2 * side**3 / seconds, rel=0.9)
    assert 1e9 < onnxruntime_flop_per_s(256, 1) < 1e13


def test_bandwidth_is_in_bytes_a_second() -> None:
    speed, kind = memory_bandwidth(16 * MIB, 2)
    assert kind in ("copying", "adding")
    assert 1e8 < speed < 1e13


def test_the_best_time_does_not_count_the_first() -> None:
    seconds = iter([0.2, *[0.01] * 10])
    assert 0.009 < best_seconds(lambda: time.sleep(next(seconds))) < 0.1


@pytest.mark.parametrize(
    ("cache", "available", "expected"),
    [
        (300 * MIB, 64 << 30, 600 * MIB),  # together four caches
        (2 * MIB, 64 << 30, 64 * MIB),  # never too small to be timed
        (4 << 30, 64 << 30, 2048 * MIB),
        (300 * MIB, 1 << 30, 128 * MIB),  # an eighth of what is free
    ],
)
def test_arrays_are_beyond_the_cache_and_leave_memory_free(cache: int, available: int, expected: int) -> None:
    assert array_bytes(cache, available) == expected


def test_the_last_cache_is_read_from_the_system(tmp_path: Path) -> None:
    for index, size in enumerate(["48K", "2048K", "300M"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert last_level_cache(tmp_path) == 300 * MIB
    assert last_level_cache(tmp_path / "none") == 32 * MIB


def test_the_noise_probe_is_short() -> None:
    assert 0.001 < min(probe_seconds() for _ in range(3)) < 0.5
