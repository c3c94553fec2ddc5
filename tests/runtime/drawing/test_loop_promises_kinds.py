"""What the loop promises of a GPU for every kind of step, by counts: a U-Net of NumPy on a recording driver.

The kernels run in their host build, so every number must be that of the host device, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.fakes.recording import RecordedExecutor, RecordingDriver, recording_device
from support.runs.loop_runs import EVEN_SIZE, IMAGES, MORE_SIZES, SIZE, TOKENS, FakeUNet, new_blend, normal

from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.devices.arena import ALIGNMENT
from sdrt.runtime.devices.device import Device
from sdrt.runtime.devices.gpu.device import CudaDevice
from sdrt.runtime.devices.host import HostDevice
from sdrt.runtime.drawing.loop import DenoiseLoop, StepKind
from sdrt.runtime.errors import BackendError
from sdrt.runtime.samplers.registry import make_table
from sdrt.runtime.samplers.schedule import NoiseSchedule

STEPS = 6
TABLE = make_table("ddim", NoiseSchedule(), STEPS, eta=1.0)
GUIDANCE = np.linspace(5, 2, STEPS)
KINDS = [StepKind(*choice) for choice in product([False, True], repeat=5) if choice[0] or not choice[2]]
MIXED = [
    StepKind(guided=False, draws_noise=True, blends=True),
    StepKind(guided=True, draws_noise=True, blends=True, rescales=True),
    StepKind(guided=True, draws_noise=True, blends=True, rescales=True, keeps_denoised=True),
] * (STEPS // 3)


class Aligned(RecordedExecutor):
    """As TensorRT: refuses an address that is not aligned."""

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Callable[[], None]:
        for name, buffer in {**inputs, **outputs}.items():
            if buffer.address % ALIGNMENT:
                raise BackendError(f"TensorRT refuses the address of {name}")
        return super().bind(inputs, outputs)


class Uncapturable(Aligned):
    """As ONNX Runtime's CUDA provider."""

    def __init__(self, executor: Executor, device: CudaDevice, driver: RecordingDriver) -> None:
        super().__init__(executor, device, driver)
        self.capturable = False


@pytest.fixture
def driver() -> Iterator[RecordingDriver]:
    """In the end nothing was done that a driver would not bear, and nothing is left."""
    result = RecordingDriver()
    yield result
    assert result.faults == []


@pytest.fixture
def device(driver: RecordingDriver) -> Iterator[CudaDevice]:
    with recording_device(driver) as opened:
        yield opened


def new_loop(device: Device, unet: Executor, size: tuple[int, int] = EVEN_SIZE) -> DenoiseLoop:
    """SDXL's inputs and every other; its texts written."""
    loop = DenoiseLoop(device, unet, IMAGES, size, guided=True, context=TOKENS)
    for name, rows in loop.conditioning.items():
        for number, row in enumerate(rows):
            device.upload(normal(*row.shape, seed=number + len(name)), row)
    return loop


def start(loop: DenoiseLoop) -> None:
    height, width = loop.noise.shape[2:]
    shapes = {"timestep_cond": (7,), "inpainting": (5, height, width), "time_ids": (6,)}
    inputs = {name: normal(2 * IMAGES, *shape, seed=len(name)) for name, shape in shapes.items()}
    blend = vars(new_blend((height, width)))
    loop.start(TABLE, GUIDANCE, seeds=[3, 4], guidance_rescale=0.7, inputs=inputs, **blend)


def fake() -> FakeUNet:
    return FakeUNet("sdxl", MORE_SIZES)


def on_the_host(kinds: Sequence[StepKind], size: tuple[int, int]) -> list[NDArray[np.float32]]:
    """Latents and the guess after a run on the host device."""
    loop = new_loop(HostDevice(), fake(), size)
    loop.prepare(kinds)
    start(loop)
    for kind in kinds:
        loop.step(kind)
    return [loop.latents(), loop.denoised()]


def assert_as_on_the_host(loop: DenoiseLoop, kinds: Sequence[StepKind], size: tuple[int, int]) -> None:
    for found, wanted in zip([loop.latents(), loop.denoised()], on_the_host(kinds, size), strict=True):
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("size", [EVEN_SIZE, SIZE], ids=["views", "apart"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_step_of_every_kind_is_one_graph_launch(
    driver: RecordingDriver, device: CudaDevice, kind: StepKind, size: tuple[int, int]
) -> None:
    loop = new_loop(device, Aligned(fake(), device, driver), size)
    loop.prepare([kind])
    start(loop)
    before = driver.counts.copy()
    for _ in range(STEPS):
        loop.step(kind)
    assert driver.counts - before == {"graph_launches": STEPS}
    assert_as_on_the_host(loop, [kind] * STEPS, size)
    copies = 1 if size == SIZE and not kind.guided else 0  # of a sample that has no view
    kernels = 1 + kind.draws_noise + kind.rescales
    recorded = {"executor_calls": 1, "kernel_launches": kernels, "device_copies": copies}
    for name, count in recorded.items():
        assert driver.counts[f"recorded_{name}"] == count, name


@pytest.mark.parametrize("size", [EVEN_SIZE, SIZE], ids=["views", "apart"])
def test_kinds_that_were_prepared_cost_nothing_more(
    driver: RecordingDriver, device: CudaDevice, size: tuple[int, int]
) -> None:
    """A graph for each, and then a run of all of them in turn, another of one, and the first again."""
    loop = new_loop(device, Aligned(fake(), device, driver), size)
    loop.prepare([*MIXED, StepKind(guided=True)])
    assert driver.counts["captures"] == 4
    start(loop)  # the staging memory of its uploads
    device.synchronize()
    before = driver.counts.copy()
    for kinds in (MIXED, [StepKind(guided=True)] * STEPS, MIXED):
        loop.prepare(kinds)
        start(loop)
        at_start = driver.counts.copy()
        for kind in kinds:
            loop.step(kind)
        assert driver.counts - at_start == {"graph_launches": STEPS}
    added = driver.counts - before
    for what in ("allocations", "pinned_allocations", "captures", "modules_loaded", "frees", "waits"):
        assert added[what] == 0, what
    assert added["fills"] == 3  # each run begins with an empty history
    assert added["uploads"] == 3 * 5  # the numbers; the picture to fill; a mask, two latents
    assert_as_on_the_host(loop, MIXED, size)


def test_without_graphs_the_work_is_the_same(driver: RecordingDriver, device: CudaDevice) -> None:
    loop = new_loop(device, Uncapturable(fake(), device, driver))
    loop.prepare(MIXED)
    start(loop)
    for kind in MIXED:  # kernels are loaded when they are first used
        loop.step(kind)
    start(loop)
    before = driver.counts.copy()
    for kind in MIXED:
        loop.step(kind)
    kernels = sum(1 + kind.draws_noise + kind.rescales for kind in MIXED)
    assert driver.counts - before == {"executor_calls": STEPS, "kernel_launches": kernels}
    assert_as_on_the_host(loop, MIXED, EVEN_SIZE)


def test_half_a_loop_takes_no_memory_but_for_what_has_no_view(
    driver: RecordingDriver, device: CudaDevice
) -> None:
    loop = new_loop(device, Aligned(fake(), device, driver))
    loop.prepare([StepKind(guided=True)])
    before = driver.used
    loop.prepare([StepKind(guided=False)])
    # The conditional rows of the inputs whose rows are a few numbers, each at an address of its own.
    own = {"encoder_hidden_states": TOKENS * 6, "text_embeds": 3, "timestep_cond": 7, "time_ids": 6}
    assert 0 < driver.used - before <= len(own) * ALIGNMENT
    assert all(IMAGES * 4 * elements % ALIGNMENT for elements in own.values())
