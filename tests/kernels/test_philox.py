"""Philox against Random123's vectors, and its normal numbers against those of real GPUs."""

from __future__ import annotations

import subprocess
import sys
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import tolerances
from sdrt.kernels.philox import _box_muller_sine, philox4x32, philox_normal

# Random123 1.x, examples/kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip

# What torch.cuda printed, as published: (seed, draws before, first element) -> values.
CUDA_FLOAT32 = {
    (0, 0, 0): [
        -0.9246624, -0.42534423, -2.6438458, 0.14518386, -0.1208664, -0.57972574, -0.622851,
        -0.3283869, -1.0745419, -0.36314395, -1.6710504, 2.2655048, 0.3116848, -0.1841891,
        1.2866427, 1.1819527,
    ],
    (42, 0, 0): [
        0.19401879608631134, 2.1613736152648926, -0.17205022275447845, 0.8490601181983948,
        -1.9243990182876587, 0.6529855132102966, -0.6494408249855042, -0.8175247311592102,
    ],
    (42, 0, 144): [
        -0.6325827240943909, 2.1106481552124023, -0.09474601596593857, 0.23587526381015778,
        -0.7300723195075989, -1.6857199668884277, 0.9114198088645935, 0.788545548915863,
    ],
    (42, 1, 0): [
        0.13913755118846893, -0.10821663588285446, -0.7174222469329834, 0.756648600101471,
        0.3714880645275116,
    ],
    (42, 2, 0): [
        -0.5187486410140991, 1.2267580032348633, 0.6254805326461792, -0.9116847515106201,
        0.568683385848999,
    ],
}  # fmt: skip

# pytorch/pytorch#158398 (RTX 3060: 43,008 elements) and #143086 (H100: 270,336), to four decimals.
CUDA_FOUR_DECIMALS = {
    (42, 0, 2045): [1.4540, -2.7733, -0.8932, -0.4574, 0.8063, 0.1580],
    (42, 0, 4093): [0.1124, 0.2769, -1.2535, 1.1346, -0.6329, -0.9147],
    (1, 0, 0): [-0.2963, 2.6764, -0.1408],
}


def words(text: str) -> NDArray[np.uint32]:
    return np.array([int(word, 16) for word in text.split()], np.uint32)


def normal_from_words(
    seed: int, offset: int, indices: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The documented formula in float64, word by word: (values, radii)."""
    low = 0xFFFFFFFF
    counter = np.array([[offset & low, offset >> 32, i & low, i >> 32] for i in indices], np.uint32)
    w = philox4x32(counter, np.array([seed & low, seed >> 32], np.uint32)).astype(np.float64)
    radius = np.sqrt(-2 * np.log(w[:, 0] * 2.0**-32 + 2.0**-33))
    return radius * np.sin((w[:, 1] + 0.5) * 2 * np.pi * 2.0**-32), radius


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_published_vectors(counter: str, key: str, result: str) -> None:
    np.testing.assert_array_equal(philox4x32(words(counter), words(key)), words(result))


def test_philox_broadcasts_counters_and_keys() -> None:
    counters = np.stack([words(counter) for counter, _, _ in KNOWN_ANSWERS])
    keys = np.stack([words(key) for _, key, _ in KNOWN_ANSWERS])
    table = philox4x32(counters[:, None], keys[None])
    assert table.shape == (3, 3, 4)
    assert table.dtype == np.uint32
    for i, (_, _, result) in enumerate(KNOWN_ANSWERS):
        np.testing.assert_array_equal(table[i, i], words(result))


@pytest.mark.parametrize(("counter", "key"), [((3,), (2,)), ((4,), (4,)), ((4, 1), (2,)), ((), (2,))])
def test_philox_refuses_other_widths(counter: tuple[int, ...], key: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must end in 4 and in 2"):
        philox4x32(np.zeros(counter, np.uint32), np.zeros(key, np.uint32))


@pytest.mark.parametrize("draw", CUDA_FLOAT32)
def test_normal_equals_torch_cuda(draw: tuple[int, int, int]) -> None:
    seed, offset, first = draw
    want = np.array(CUDA_FLOAT32[draw])
    indices = np.arange(first, first + want.size)
    got = philox_normal((first + want.size,), seed, offset)[first:]
    _, radius = normal_from_words(seed, offset, indices)
    assert np.all(np.abs(got - want) <= tolerances.PHILOX_CUDA * radius)


@pytest.mark.parametrize("draw", CUDA_FOUR_DECIMALS)
def test_normal_equals_torch_cuda_as_printed(draw: tuple[int, int, int]) -> None:
    seed, offset, first = draw
    want = np.array(CUDA_FOUR_DECIMALS[draw])
    got = philox_normal((first + want.size,), seed, offset)[first:]
    error = 0.5e-4 + tolerances.PHILOX_CUDA * tolerances.PHILOX_RADIUS
    np.testing.assert_allclose(got, want, rtol=0, atol=error)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**64 - 1), offset=st.integers(0, 2**64 - 1))
def test_normal_follows_its_formula_for_every_seed_and_offset(seed: int, offset: int) -> None:
    indices = np.r_[0:20, 8180:8200, 43_000:43_016]  # both sides of a chunk's and of a GPU's bound
    got = philox_normal((43_016,), seed, offset)[indices]
    want, radius = normal_from_words(seed, offset, indices)
    bound = tolerances.PHILOX_FLOAT64 * radius + tolerances.PHILOX_FLOAT64_NEAR_ONE / radius
    assert np.all(np.abs(got - want) <= tolerances.EPS32 * bound)


def test_normal_is_the_same_on_every_host() -> None:
    """Frozen bits: each float32 step is correctly rounded, so they do not depend on the CPU."""
    got = philox_normal((6,), 0)
    want = "-0x1.d96d5ap-1 -0x1.b38d5cp-2 -0x1.52698ap+1 0x1.295628p-3 -0x1.ef11c8p-4 -0x1.28d1d0p-1"
    assert [float(x) for x in got] == [float.fromhex(word) for word in want.split()]


def test_the_extreme_words_give_finite_numbers() -> None:
    w0 = np.array([0, 0, 2**32 - 1], np.uint64)
    w1 = np.array([2**30, 0, 2**30], np.uint64)  # a quarter of the circle, its start, a quarter
    radius = (66 * np.log(2)) ** 0.5  # u = 2**-33
    want = [radius, radius * np.pi * 2.0**-32, 0.0]
    got = _box_muller_sine(w0, w1)
    np.testing.assert_allclose(got, want, rtol=4 * tolerances.EPS32, atol=0)
    assert radius < tolerances.PHILOX_RADIUS


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,), (5,), (2, 4, 16, 16), (4, 64, 64)])
def test_normal_fills_any_shape_row_by_row(shape: tuple[int, ...]) -> None:
    got = philox_normal(shape, 7)
    assert got.shape == shape
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got.ravel(), philox_normal((16_384,), 7)[: got.size])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**64 - 2))
def test_normal_is_normal_and_neighbouring_seeds_are_independent(seed: int) -> None:
    n = 4096
    x = philox_normal((n,), seed).astype(np.float64)
    assert abs(x.mean()) * n**0.5 < 6
    assert abs(x.var() - 1) * (n / 2) ** 0.5 < 6
    cdf = np.array([NormalDist().cdf(value) for value in np.sort(x)])
    kolmogorov = max(np.abs(cdf - np.arange(n) / n).max(), np.abs(cdf - np.arange(1, n + 1) / n).max())
    assert kolmogorov * n**0.5 < 2.5  # exceeded with probability 8e-6
    for other in (philox_normal((n,), seed + 1), philox_normal((n,), seed, offset=1)):
        assert abs(np.mean(x * other)) * n**0.5 < 6


@pytest.mark.parametrize(("seed", "offset"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**64)])
def test_normal_refuses_seeds_and_offsets_beyond_64_bits(seed: int, offset: int) -> None:
    with pytest.raises(ValueError, match="at least 0 and below 2"):
        philox_normal((4,), seed, offset)


def test_normal_refuses_a_negative_axis() -> None:
    with pytest.raises(ValueError, match="negative"):
        philox_normal((-1,), 0)


def test_importing_does_not_import_torch() -> None:
    code = "import sys, sdrt.kernels.philox; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
