"""PyTorch's CPU generator against torch itself."""

from __future__ import annotations

import math
import subprocess
import sys
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import tolerances
from sdrt.kernels.mt19937 import TorchCPUGenerator, torch_cpu_normal

SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32 + 5, 2**63 - 1, 2**64 - 1]
SHAPES = [
    (1,), (5,), (15,), (16,), (17,), (31,), (32,), (33,), (4, 8, 8), (3, 5, 7), (1, 4, 9, 11),
    (2, 4, 16, 16), (4, 64, 64), (0,), (2, 0), (),
]  # fmt: skip


def torch_generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def torch_draw(shape: tuple[int, ...], generator: torch.Generator) -> NDArray[np.float32]:
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
    return np.asarray(drawn.numpy(), np.float32)


def assert_equal_normals(got: NDArray[np.float32], want: NDArray[np.float32]) -> None:
    assert got.shape == want.shape
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    rtol, atol = tolerances.TORCH_CPU_NORMAL_SMALL, 0.0
    if got.size >= 16:
        rtol = tolerances.TORCH_CPU_NORMAL
        if torch.backends.cpu.get_cpu_capability() != "AVX2":
            atol = tolerances.TORCH_CPU_NORMAL_OTHER_BUILD
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_first_draw_equals_torch(shape: tuple[int, ...], seed: int) -> None:
    assert_equal_normals(torch_cpu_normal(shape, seed), torch_draw(shape, torch_generator(seed)))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**64 - 1),
    sizes=st.lists(st.integers(0, 200) | st.integers(0, 17), min_size=1, max_size=8),
)
def test_successive_draws_equal_torch(seed: int, sizes: list[int]) -> None:
    ours, theirs = TorchCPUGenerator(seed), torch_generator(seed)
    for size in sizes:
        assert_equal_normals(ours.normal((size,)), torch_draw((size,), theirs))


def test_three_draws_of_latents_equal_torch() -> None:
    ours, theirs = TorchCPUGenerator(1234), torch_generator(1234)
    for _ in range(3):
        assert_equal_normals(ours.normal((1, 4, 32, 32)), torch_draw((1, 4, 32, 32), theirs))


def test_the_second_of_a_pair_waits_through_large_draws() -> None:
    ours, theirs = TorchCPUGenerator(3), torch_generator(3)
    for size in (3, 64, 17, 2, 1, 1, 16, 1):
        assert_equal_normals(ours.normal((size,)), torch_draw((size,), theirs))


def test_the_high_word_of_a_seed_does_not_count_for_torch_nor_for_us() -> None:
    low, high = 5, 2**32 + 5
    first = torch_draw((20,), torch_generator(low))
    np.testing.assert_array_equal(first, torch_draw((20,), torch_generator(high)))
    np.testing.assert_array_equal(torch_cpu_normal((20,), low), torch_cpu_normal((20,), high))


def test_a_negative_seed_of_torch_is_that_seed_plus_2_to_the_64() -> None:
    want = torch_draw((64,), torch_generator(-3))
    assert_equal_normals(torch_cpu_normal((64,), 2**64 - 3), want)


def test_a_large_draw_is_within_its_tolerance_everywhere() -> None:
    assert_equal_normals(torch_cpu_normal((2**18,), 42), torch_draw((2**18,), torch_generator(42)))


def test_normal_is_the_same_on_every_host() -> None:
    """Frozen bits: each float32 step is correctly rounded, so they do not depend on the CPU."""
    got = torch_cpu_normal((16,), 0)[[0, 1, 8, 15]]
    want = "-0x1.20370ap+0 -0x1.270114p+0 0x1.4a0270p-2 -0x1.fa6cf6p-3"
    assert [float(x) for x in got] == [float.fromhex(word) for word in want.split()]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_numbers_are_normal(seed: int) -> None:
    n = 4096
    x = torch_cpu_normal((n,), seed).astype(np.float64)
    assert abs(x.mean()) * math.sqrt(n) < 6
    assert abs(x.var() - 1) * math.sqrt(n / 2) < 6
    cdf = np.array([NormalDist().cdf(value) for value in np.sort(x)])
    kolmogorov = max(np.abs(cdf - np.arange(n) / n).max(), np.abs(cdf - np.arange(1, n + 1) / n).max())
    assert kolmogorov * math.sqrt(n) < 2.5  # exceeded with probability 8e-6


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_beyond_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="at least 0 and below 2"):
        TorchCPUGenerator(seed)


@pytest.mark.parametrize("shape", [(-1,), (-4, -8)])
def test_a_negative_axis_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="negative"):
        torch_cpu_normal(shape, 0)


def test_importing_does_not_import_torch() -> None:
    code = "import sys, sdrt.kernels.mt19937; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
