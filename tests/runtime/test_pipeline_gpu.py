"""Whole pictures on a GPU, for every backend that this machine has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.runs.repeats import assert_repeats
from support.runs.task_calls import SHORT, TASKS

from sdrt.export.checkpoint.reader import open_checkpoint
from sdrt.export.engines.compare import random_inputs, tolerance
from sdrt.export.graphs.networks import wrapped
from sdrt.export.parity.components import compare
from sdrt.export.parity.sampling import SAMPLING_FACTOR
from sdrt.kernels.philox import philox_normal
from sdrt.runtime import Bundle, Pipeline
from sdrt.runtime.backends.registry import choose_backend, load_executor, open_device
from sdrt.runtime.devices.gpu.device import CudaDevice
from sdrt.runtime.drawing import loop as denoise
from sdrt.runtime.drawing import text_conditioning as prompts
from sdrt.runtime.drawing import vae as decode
from tolerances import PHILOX_CUDA, PHILOX_RADIUS

pytestmark = pytest.mark.gpu

OPTIONS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "numpy"}


def test_every_component_gives_what_pytorch_gives_on_this_gpu(
    gpu_backend: str, engine_bundle: Bundle, tiny_checkpoint: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    device = open_device(choose_backend(engine_bundle, gpu_backend))
    assert isinstance(device, CudaDevice)
    sizes = {"rows": 2, "batch": 2, "height": 32, "width": 16, "latent_height": 16, "latent_width": 8}
    sizes["context"] = 77
    with device, torch.no_grad():
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        for component in ("text_encoder", "unet", "vae_decoder"):
            reference = wrapped(checkpoint, component).cuda()
            feeds = random_inputs(engine_bundle, component, sizes)
            executor = load_executor(engine_bundle, component, backend=gpu_backend, device=device)
            inputs = {name: device.zeros(array.shape, array.dtype) for name, array in feeds.items()}
            outputs = {
                spec.name: device.zeros(spec.concrete(sizes), spec.dtype) for spec in executor.spec.outputs
            }
            for name, array in feeds.items():
                device.upload(array, inputs[name])
            executor.bind(inputs, outputs)()
            wanted = reference(*(torch.from_numpy(feeds[spec.name]).cuda() for spec in executor.spec.inputs))
            wanted = wanted if isinstance(wanted, tuple) else (wanted,)
            for spec, want in zip(executor.spec.outputs, wanted, strict=True):
                error, _ = compare(device.download(outputs[spec.name]), want.cpu().numpy())
                assert error <= tolerance(engine_bundle, component), (component, spec.name)


def test_same_seed_gives_the_same_picture_as_on_the_cpu(gpu_backend: str, engine_bundle: Bundle) -> None:
    with (
        Pipeline.load(engine_bundle, backend=gpu_backend) as pipeline,
        Pipeline.load(engine_bundle, backend="onnxruntime-cpu") as cpu,
    ):
        for sampler in ("ddim", "euler", "dpmpp_2m"):
            found, expected = (one("a", seed=5, sampler=sampler, **OPTIONS) for one in (pipeline, cpu))
            error, _ = compare(found.latents, expected.latents)
            assert error <= SAMPLING_FACTOR * tolerance(engine_bundle, "unet")
            assert np.abs(found.images.astype(int) - expected.images).max() <= 1


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"chunks"}))  # the engines are built for one chunk
def test_a_task_gives_the_same_picture_as_on_the_cpu(
    gpu_backend: str, engine_bundle: Bundle, name: str
) -> None:
    options = {**SHORT, **TASKS[name]}
    with (
        Pipeline.load(engine_bundle, backend=gpu_backend) as pipeline,
        Pipeline.load(engine_bundle, backend="onnxruntime-cpu") as cpu,
    ):
        found, expected = pipeline(**options), cpu(**options)
    error, _ = compare(found.latents, expected.latents)
    assert error <= SAMPLING_FACTOR * tolerance(engine_bundle, "unet")
    assert np.abs(found.images.astype(int) - expected.images).max() <= 1


def test_graphs_give_what_separate_launches_give(
    gpu_backend: str, engine_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pipeline.load(engine_bundle, backend=gpu_backend) as pipeline:
        replayed = pipeline("a", seed=1, eta=1.0, sampler="ddim", **OPTIONS)

    def eager(_device: object, work: Callable[[], None], _executors: object) -> Callable[[], None]:
        return work

    for module in (denoise, decode, prompts):
        monkeypatch.setattr(module, "replayable", eager)
    with Pipeline.load(engine_bundle, backend=gpu_backend) as pipeline:
        launched = pipeline("a", seed=1, eta=1.0, sampler="ddim", **OPTIONS)
    bound = SAMPLING_FACTOR * tolerance(engine_bundle, "unet")
    assert_repeats(gpu_backend, replayed.latents, launched.latents, bound)
    assert np.abs(replayed.images.astype(int) - launched.images).max() <= (gpu_backend == "onnxruntime-cuda")


def test_changes_of_shape_and_back(gpu_backend: str, engine_bundle: Bundle) -> None:
    """More shapes than are kept, so that graphs are thrown away and captured again."""
    shapes = [(16, 16, 1), (32, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 2), (24, 24, 1)]
    with Pipeline.load(engine_bundle, backend=gpu_backend) as pipeline:

        def draw(height: int, width: int, images: int) -> Any:
            return pipeline("a", seed=2, height=height, width=width, num_images_per_prompt=images, **OPTIONS)

        first = [draw(*shape).latents for shape in shapes]
        again = [draw(*shape).latents for shape in reversed(shapes)]
    bound = SAMPLING_FACTOR * tolerance(engine_bundle, "unet")
    for before, after in zip(first, reversed(again), strict=True):
        assert_repeats(gpu_backend, before, after, bound)


def test_two_pipelines_in_one_process(gpu_backend: str, engine_bundle: Bundle) -> None:
    with Pipeline.load(engine_bundle, backend=gpu_backend) as alone:
        expected = [alone("a", seed=seed, **OPTIONS).latents for seed in range(4)]
    with (
        Pipeline.load(engine_bundle, backend=gpu_backend) as one,
        Pipeline.load(engine_bundle, backend=gpu_backend) as other,
    ):
        bound = SAMPLING_FACTOR * tolerance(engine_bundle, "unet")
        for seed in range(4):
            for pipeline in (one, other):
                found = pipeline("a", seed=seed, **OPTIONS).latents
                assert_repeats(gpu_backend, found, expected[seed], bound)


def test_two_hundred_pictures_take_no_more_memory_than_ten(gpu_backend: str, engine_bundle: Bundle) -> None:
    with Pipeline.load(engine_bundle, backend=gpu_backend) as pipeline:
        sizes = [(16, 16), (32, 32), (16, 32)]

        def draw(count: int) -> int:
            for index in range(count):
                height, width = sizes[index % len(sizes)]
                pipeline(f"picture {index}", seed=index, height=height, width=width, **OPTIONS)
            device = pipeline._device
            assert isinstance(device, CudaDevice)
            device.synchronize()
            return device.memory_info()[0]

        free = draw(10)
        assert draw(200) >= free


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_noise_is_that_of_the_cuda_generator(seed: int) -> None:
    """Of a draw that PyTorch's kernel makes in one pass; so are SD 1.5's and SDXL's latents."""
    shape = (1, 4, 64, 64)
    for draw in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        for _ in range(draw + 1):
            theirs = torch.randn(shape, generator=generator, device="cuda").cpu().numpy()
        ours = philox_normal(shape, seed, offset=draw)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=PHILOX_CUDA * PHILOX_RADIUS)
