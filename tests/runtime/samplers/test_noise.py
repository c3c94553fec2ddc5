"""The sampler's noise: per-image streams, in both kinds."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tolerances
from sdrt.kernels.mt19937 import TorchCPUGenerator
from sdrt.kernels.philox import philox_normal
from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers import noise

SHAPE = (4, 8, 8)
both = pytest.mark.parametrize("rng", noise.RNGS)


def test_the_kinds_are_philox_and_cpu() -> None:
    assert noise.RNGS == ("philox", "cpu")
    assert noise.DEFAULT_RNG == "philox"


@both
@pytest.mark.parametrize("shape", [SHAPE, (4, 3, 5), (4, 1, 1)])
def test_noise_is_one_float32_array_per_image(rng: noise.Rng, shape: tuple[int, ...]) -> None:
    source = noise.noise_source(rng, [1, 2, 3])
    assert source.seeds == (1, 2, 3)
    for drawn in (source.draw(0, list(shape)), source.draw(1, shape)):
        assert drawn.shape == (3, *shape)
        assert drawn.dtype == np.float32
        assert drawn.flags.c_contiguous


def test_philox_noise_is_that_of_torch_cuda_draw_by_draw() -> None:
    source = noise.noise_source("philox", [5, 2**63])
    for n, seed in enumerate(source.seeds):
        for number in (0, 1, 7):
            drawn = source.draw(number, SHAPE)[n]
            np.testing.assert_array_equal(drawn, philox_normal(SHAPE, seed, number))


@pytest.mark.parametrize("shape", [SHAPE, (3, 5, 7), (3,)])  # 3 leaves a cached value behind
def test_cpu_noise_is_that_of_successive_draws(shape: tuple[int, ...]) -> None:
    source = noise.noise_source("cpu", [5, 9])
    drawn = [source.draw(number, shape) for number in range(4)]
    for n, seed in enumerate(source.seeds):
        generator = TorchCPUGenerator(seed)
        for array in drawn:
            np.testing.assert_array_equal(array[n], generator.normal(shape))


def test_cpu_noise_is_that_of_a_diffusers_list_of_generators() -> None:
    seeds = [0, 2**32 + 5]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    source = noise.noise_source("cpu", seeds)
    for array in (source.draw(0, SHAPE), source.draw(1, SHAPE)):
        want = torch.cat([torch.randn((1, *SHAPE), generator=g) for g in generators]).numpy()
        exact_angle = torch.backends.cpu.get_cpu_capability() == "AVX2"
        atol = 0.0 if exact_angle else tolerances.TORCH_CPU_NORMAL_OTHER_BUILD
        np.testing.assert_allclose(array, want, rtol=tolerances.TORCH_CPU_NORMAL, atol=atol)


@both
def test_an_image_is_the_same_in_any_batch(rng: noise.Rng) -> None:
    batch = noise.noise_source(rng, [10, 11, 12, 10])
    alone = noise.noise_source(rng, [11])
    for number in range(4):
        drawn = batch.draw(number, SHAPE)
        np.testing.assert_array_equal(drawn[1], alone.draw(number, SHAPE)[0])
        np.testing.assert_array_equal(drawn[0], drawn[3])
        assert not np.array_equal(drawn[0], drawn[1])


@both
@settings(derandomize=True, deadline=None, max_examples=30)
@given(draws=st.lists(st.tuples(st.integers(0, 4), st.sampled_from([SHAPE, (3,)])), max_size=8))
def test_a_draw_depends_on_its_number_and_shape_alone(
    rng: noise.Rng, draws: list[tuple[int, tuple[int, ...]]]
) -> None:
    used = noise.noise_source(rng, [77])
    for number, shape in draws:
        fresh = noise.noise_source(rng, [77])
        np.testing.assert_array_equal(used.draw(number, shape), fresh.draw(number, shape))


@both
def test_no_two_draws_are_alike(rng: noise.Rng) -> None:
    source = noise.noise_source(rng, [0, 1])
    drawn = np.concatenate([source.draw(number, SHAPE) for number in range(5)])
    correlation = np.corrcoef(drawn.reshape(len(drawn), -1))
    assert np.abs(correlation - np.eye(len(drawn))).max() < 6 / np.prod(SHAPE) ** 0.5


@both
def test_a_drawn_array_is_the_callers_own(rng: noise.Rng) -> None:
    source = noise.noise_source(rng, [3])
    first = source.draw(0, SHAPE)
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(source.draw(0, SHAPE), kept)


@pytest.mark.parametrize("rng", ["gpu", "", "Philox"])
def test_an_unknown_kind_is_refused(rng: str) -> None:
    with pytest.raises(UsageError, match=f"rng is {rng!r}; choose one of philox, cpu"):
        noise.noise_source(rng, [0])


@both
def test_no_seed_is_refused(rng: noise.Rng) -> None:
    with pytest.raises(UsageError, match="no seed"):
        noise.noise_source(rng, [])


@both
@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", None, True])
def test_a_bad_seed_is_refused_wherever_it_stands(rng: noise.Rng, seed: Any) -> None:
    with pytest.raises(UsageError, match="seed is"):
        noise.noise_source(rng, [0, seed])


@both
def test_a_negative_draw_is_refused(rng: noise.Rng) -> None:
    with pytest.raises(UsageError, match="draw -1"):
        noise.noise_source(rng, [0]).draw(-1, SHAPE)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1, np.int64(7), np.uint64(2**64 - 1)])
def test_a_valid_seed_comes_back_as_int(seed: Any) -> None:
    valid = noise.validate_seed(seed)
    assert type(valid) is int
    assert valid == int(seed)


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (-1, r"seed is -1; .* below 2\*\*64"),
        (2**64, rf"seed is {2**64}; .* below 2\*\*64"),
        (0.0, "seed is 0.0; it must be an integer"),
        ("7", "seed is '7'; it must be an integer"),
        (False, "seed is False; it must be an integer"),
    ],
)
def test_a_message_names_the_seed_and_what_is_allowed(seed: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        noise.validate_seed(seed)


def test_importing_does_not_import_torch() -> None:
    code = "import sys, sdrt.runtime.samplers.noise; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
