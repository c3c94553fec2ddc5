"""What the loop promises of a GPU, by counts: the real CUDA device and pipeline on a recording driver.

The networks run in ONNX Runtime on the driver's memory, the kernels in their host build, so the pictures must
be those of the host device, bit for bit.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.fakes.recorded_pipeline import Counted, Network, Recorded, assert_equal, recording
from support.fakes.recording import RecordingDriver, as_numpy, recording_device

from sdrt.runtime import pipeline as pipeline_module
from sdrt.runtime.backends.executor import Executor, FixedWeights
from sdrt.runtime.backends.registry import Choice
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.devices.gpu.arrays import DeviceArray
from sdrt.runtime.devices.gpu.device import CudaDevice
from sdrt.runtime.devices.gpu.discovery import Gpu
from sdrt.runtime.drawing import loading, shapes
from sdrt.runtime.errors import BackendError, DeviceMemoryError, NumericsError, UsageError
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.request.output import PipelineOutput
from sdrt.runtime.samplers.registry import SAMPLERS, make_table
from sdrt.runtime.samplers.table import SamplerTable

STEPS = 5
SHORT: dict[str, Any] = {
    "num_inference_steps": STEPS,
    "guidance_scale": 3.0,
    "output_type": "numpy",
    "seed": 4,
}
RUNS: list[dict[str, Any]] = [
    {"sampler": sampler, **noise, "guidance_scale": scale}
    for sampler in SAMPLERS
    for noise in ({}, *([{"eta": 1.0}] if sampler == "ddim" else []))
    for scale in (1.0, 3.0)
]


class Uncapturable(Network):
    """As ONNX Runtime's CUDA provider: its work may not be recorded."""

    def __init__(self, executor: Executor, device: CudaDevice, driver: RecordingDriver) -> None:
        super().__init__(executor, device, driver)
        self.capturable = False


@pytest.fixture(scope="module")
def host(tiny_bundle: Path) -> Pipeline:
    return Pipeline.load(tiny_bundle, backend="onnxruntime-cpu")


@pytest.fixture
def recorded(host: Pipeline) -> Iterator[Recorded]:
    with recording(host) as result:
        yield result


def counted(pipeline: Recorded, **options: Any) -> tuple[PipelineOutput, list[Counter[str]]]:
    """Draw, and what each step cost the driver."""
    counts = Counted()
    output = pipeline(
        "a red apple",
        callback_on_step_end=counts,
        callback_on_step_end_tensor_inputs=(),
        **{**SHORT, **options},
    )
    return output, counts.steps


def table_of(pipeline: Pipeline, sampler: str, eta: float = 0.0, **_: Any) -> SamplerTable:
    return make_table(sampler, pipeline.bundle.manifest.schedule, STEPS, eta=eta)


# --- per step


@pytest.mark.parametrize("options", RUNS, ids=lambda options: " ".join(map(str, options.values())))
def test_a_step_is_one_graph_launch_and_nothing_else(
    host: Pipeline, recorded: Recorded, options: dict[str, Any]
) -> None:
    first, steps = counted(recorded, **options)
    again, more_steps = counted(recorded, **options)
    rows = len(table_of(recorded, **options).timesteps)
    assert steps == more_steps == [{"graph_launches": 1}] * (rows - 1)
    expected = host("a red apple", **{**SHORT, **options})
    assert_equal(first, expected)
    assert_equal(again, expected)


def test_after_a_change_of_shape_and_back(host: Pipeline, recorded: Recorded) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"height": 24, "width": 32},
        {"sampler": "ddim", "eta": 0.5},
        {"num_images_per_prompt": 2},
        {"guidance_scale": 1.0},
        {},
        {"height": 24, "width": 32, "sampler": "euler"},
        {"height": 20},  # the fifth shape: the one unused for longest makes room
        {"sampler": "ddim", "eta": 0.5},
        {"num_images_per_prompt": 2},
    ]
    for options in changes:
        output, steps = counted(recorded, **options)
        assert steps == [{"graph_launches": 1}] * (STEPS - 1)
        assert_equal(output, host("a red apple", **{**SHORT, **options}))


def test_a_shape_is_allocated_and_captured_once(recorded: Recorded) -> None:
    """A second call of a known shape allocates nothing, captures nothing and loads no kernel."""
    counted(recorded)
    counted(recorded, sampler="ddim", eta=1.0)
    before = recorded.driver.counts.copy()
    counted(recorded, sampler="euler", num_inference_steps=9)
    counted(recorded, sampler="ddim", eta=0.3, seed=77)
    added = recorded.driver.counts - before
    for what in ("allocations", "pinned_allocations", "captures", "modules_loaded", "frees", "fills"):
        allowed = 2 if what == "fills" else 0  # each run begins with an empty history
        assert added[what] == allowed, what


def test_one_upload_and_one_download_for_a_picture(recorded: Recorded) -> None:
    counted(recorded)
    before = recorded.driver.counts.copy()
    recorded("a red apple", **SHORT)
    added = recorded.driver.counts - before
    assert (added["uploads"], added["downloads"]) == (1, 1)
    assert added["graph_launches"] == STEPS + 1  # and the decoder's
    assert added["executor_calls"] == 0


@pytest.mark.parametrize("options", [{"sampler": "ddim", "eta": 1.0}, {"sampler": "dpm2_a"}], ids=str)
def test_noise_of_the_cpu_generator_is_uploaded_where_a_row_adds_it(
    host: Pipeline, recorded: Recorded, options: dict[str, Any]
) -> None:
    """Only the host can draw it; the step itself is the same graph, and nothing waits."""
    output, steps = counted(recorded, rng="cpu", **options)
    upload = {"uploads": 1, "event_records": 1}
    draws = table_of(recorded, **options).draws[1:]
    assert steps == [{"graph_launches": 1, **(upload if draw >= 0 else {})} for draw in draws]
    assert_equal(output, host("a red apple", rng="cpu", **{**SHORT, **options}))


def test_executor_that_cannot_be_captured(host: Pipeline) -> None:
    """The same work without a graph: the U-Net's call, and our kernels."""
    pipeline = Recorded(host, Uncapturable)
    output, steps = counted(pipeline)
    assert steps == [{"executor_calls": 1, "kernel_launches": 1}] * (STEPS - 1)
    assert pipeline.driver.counts["captures"] == 0
    noisy, steps = counted(pipeline, sampler="ddim", eta=1.0)
    assert steps == [{"executor_calls": 1, "kernel_launches": 2}] * (STEPS - 1)
    assert_equal(output, host("a red apple", **SHORT))
    assert_equal(noisy, host("a red apple", **{**SHORT, "sampler": "ddim", "eta": 1.0}))
    pipeline.close()
    assert pipeline.driver.live == {}


def test_several_batches_wait_once_each(host: Pipeline, recorded: Recorded) -> None:
    options = {**SHORT, "num_images_per_prompt": 5}
    expected = host("a red apple", **options)
    assert_equal(recorded("a red apple", **options), expected)
    before = recorded.driver.counts.copy()
    assert_equal(recorded("a red apple", **options), expected)
    assert (recorded.driver.counts - before)["downloads"] == 3


# --- prompts


def test_a_known_prompt_is_copied_on_the_device(host: Pipeline, recorded: Recorded) -> None:
    recorded(["a", "b"], negative_prompt="c", **SHORT)
    before = recorded.driver.counts.copy()
    output = recorded(["b", "c"], negative_prompt=["a", "b"], **SHORT)
    added = recorded.driver.counts - before
    assert (added["uploads"], added["downloads"], added["device_copies"]) == (
        1,
        1,
        8,
    )  # 4 rows, 4 fault words
    assert_equal(output, host(["b", "c"], negative_prompt=["a", "b"], **SHORT))


def test_a_new_prompt_costs_an_upload_and_a_launch(recorded: Recorded) -> None:
    recorded("a", **SHORT)
    before = recorded.driver.counts.copy()
    recorded("b", **SHORT)
    added = recorded.driver.counts - before
    assert (added["uploads"], added["downloads"]) == (2, 1)
    assert added["graph_launches"] == STEPS + 2


# --- callbacks


def test_callback_that_asks_for_latents_costs_a_download_a_step(host: Pipeline, recorded: Recorded) -> None:
    seen: list[NDArray[np.float32]] = []

    def note(_p: Pipeline, _step: int, _t: float, state: dict[str, Any]) -> None:
        seen.append(state["latents"])

    recorded("a", **SHORT)
    before = recorded.driver.counts.copy()
    output = recorded("a", callback_on_step_end=note, **SHORT)
    assert (recorded.driver.counts - before)["downloads"] == STEPS + 1
    assert np.array_equal(seen[-1], output.latents)
    assert_equal(output, host("a", **SHORT))


def test_callback_that_changes_latents(host: Pipeline, recorded: Recorded) -> None:
    def negate(_p: Pipeline, step: int, _t: float, state: dict[str, Any]) -> dict[str, Any] | None:
        return {"latents": -state["latents"]} if step == 2 else None

    outputs = [one("a", callback_on_step_end=negate, **SHORT) for one in (host, recorded)]
    assert_equal(*outputs)


# --- what goes in and comes out in the device's memory


def test_output_that_stays_on_the_device(host: Pipeline, recorded: Recorded) -> None:
    options = {**SHORT, "num_images_per_prompt": 3, "output_type": "device"}
    output = recorded("a", **options)
    before = recorded.driver.counts.copy()
    second = recorded("a", **{**options, "seed": 9})
    assert (recorded.driver.counts - before)["downloads"] == 2  # of two batches the fault words
    expected = host("a", **{**options, "output_type": "numpy"})
    for array, wanted in ((output.images, expected.images), (output.latents, expected.latents)):
        assert isinstance(array, DeviceArray)
        assert array.dtype == wanted.dtype
        assert np.array_equal(recorded.cuda.download(array), wanted)
    assert not np.array_equal(recorded.cuda.download(second.images), expected.images)
    assert_equal(host("a", **options), expected)  # on the host they are NumPy's


def test_latents_of_the_device(host: Pipeline, recorded: Recorded) -> None:
    """Three images in two batches, from an array that never leaves the device."""
    options = {**SHORT, "num_images_per_prompt": 3, "sampler": "euler"}
    latents = host.initial_latents([1, 2, 3])
    given = recorded.cuda.zeros(latents.shape, "float32")
    recorded.cuda.upload(latents, given)
    assert_equal(recorded("a", latents=given, **options), host("a", latents=latents, **options))
    as_numpy(given)[2, 0, 0, 0] = np.nan
    with pytest.raises(UsageError, match="latents hold NaN or infinity"):
        recorded("a", latents=given, **options)
    with pytest.raises(
        UsageError, match=r"latents are float32\[3, 4, 8, 8\]: float32\[2, 4, 8, 8\] is wanted"
    ):
        recorded("a", latents=given, **{**options, "num_images_per_prompt": 2})


def test_latents_of_a_device_for_a_pipeline_on_the_host(host: Pipeline, recorded: Recorded) -> None:
    given = recorded.cuda.zeros((1, 4, 8, 8), "float32")
    with pytest.raises(UsageError, match="draws on the host"):
        host("a", latents=given, **SHORT)


# --- faults


class Spoilt(FixedWeights):
    """An executor of NumPy arrays whose first output is NaN at one of its calls."""

    capturable = True

    def __init__(self, executor: Executor, call: int) -> None:
        self.spec = executor.spec
        self._executor, self._call = executor, call
        self.calls = -1  # the warm-up is no call

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Any:
        evaluate = self._executor.bind(inputs, outputs)

        def spoil() -> None:
            evaluate()
            if self.calls == self._call:
                next(iter(outputs.values())).reshape(-1)[0] = np.nan
            self.calls += 1

        return spoil

    def close(self) -> None:
        self._executor.close()


@pytest.mark.parametrize(
    ("component", "call", "words"),
    [
        ("text_encoder", 1, "the text_encoder gave NaN or infinity for the prompt 'a'"),
        ("unet", 2, r"the unet gave NaN or infinity at step 3 of 5 \(timestep"),
        ("vae_decoder", 0, "the vae_decoder gave NaN or infinity"),
    ],
)
def test_nan_is_told_with_the_result_and_the_next_call_works(
    host: Pipeline, component: str, call: int, words: str
) -> None:
    driver = RecordingDriver()
    device = recording_device(driver)
    executors: dict[str, Any] = dict(host._executors)
    executors[component] = Spoilt(executors[component], call)
    recorded = {name: Network(one, device, driver) for name, one in executors.items()}
    pipeline = Pipeline(host.bundle, recorded, device, "recording")
    with pytest.raises(NumericsError, match=words):
        pipeline("a", **SHORT)
    assert_equal(pipeline("a", **SHORT), host("a", **SHORT))
    pipeline.close()


def fail_at(pipeline: Recorded, monkeypatch: pytest.MonkeyPatch, allocation: int) -> None:
    """Let the n-th allocation from now on fail, and its second attempt."""
    real = RecordingDriver.allocate
    count = iter(range(10**6))

    def allocate(driver: RecordingDriver, nbytes: int, stream: int) -> int:
        if driver is pipeline.driver and next(count) in (allocation, allocation + 1):
            monkeypatch.setattr(driver, "_total", driver.used)
            try:
                return real(driver, nbytes, stream)
            finally:
                monkeypatch.setattr(driver, "_total", 1 << 30)
        return real(driver, nbytes, stream)

    monkeypatch.setattr(RecordingDriver, "allocate", allocate)


@pytest.mark.parametrize("allocation", [0, 1])
def test_out_of_memory_and_the_next_call_works(
    host: Pipeline, recorded: Recorded, monkeypatch: pytest.MonkeyPatch, allocation: int
) -> None:
    """The loop's memory is the first allocation of a new shape, the decoder's the second."""
    with monkeypatch.context() as patched:
        fail_at(recorded, patched, allocation)
        with pytest.raises(DeviceMemoryError, match=r"MiB more are needed, .* are free"):
            recorded("a", **SHORT)
    assert_equal(recorded("a", **SHORT), host("a", **SHORT))


def test_other_shapes_make_room_where_memory_is_short(host: Pipeline) -> None:
    """Memory for three shapes of this size, not for four: none of the calls fails."""
    probe = Recorded(host)
    idle = probe.driver.used
    probe("a", height=32, width=32, **SHORT)
    probe.cuda.synchronize()
    pipeline = Recorded(host, memory=idle + 3 * (probe.driver.used - idle) + 1)
    for scale, images in ((3.0, 1), (1.0, 1), (3.0, 2), (1.0, 2), (3.0, 1)):
        options = {
            **SHORT,
            "guidance_scale": scale,
            "num_images_per_prompt": images,
            "height": 32,
            "width": 32,
        }
        assert_equal(pipeline("a", **options), host("a", **options))
    assert len(pipeline._parts.shapes) < shapes.MAX_CACHED_SHAPES
    for one in (probe, pipeline):
        one.close()
        assert one.driver.live == {}


class Picky(Network):
    """An engine whose profile admits one image only."""

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Any:
        if next(iter(outputs.values())).shape[0] > 1:
            raise BackendError("this engine admits batch 1; build another: sd-export BUNDLE --engine …")
        return super().bind(inputs, outputs)


@pytest.mark.parametrize("component", ["unet", "vae_decoder"])
@pytest.mark.parametrize("images", [2, 3])
def test_size_that_an_engine_does_not_admit(host: Pipeline, component: str, images: int) -> None:
    """Refused before anything is drawn, also where only the last batch does not fit; the next call works."""
    pipeline = Recorded(host)
    unguided = {**SHORT, "guidance_scale": 1.0}
    executor = host._executors[component]
    pipeline._executors[component] = Picky(executor, pipeline.cuda, pipeline.driver)
    pipeline.driver.counts.clear()
    with pytest.raises(BackendError, match="this engine admits batch 1"):
        pipeline("new", num_images_per_prompt=images, **unguided)
    assert pipeline.driver.counts["uploads"] == 0
    assert_equal(pipeline("a", **unguided), host("a", **unguided))
    pipeline.close()
    assert pipeline.driver.live == {}


def test_exception_in_the_callback_leaves_the_pipeline_usable(host: Pipeline, recorded: Recorded) -> None:
    def stop(_p: Pipeline, step: int, _t: float, _state: dict[str, Any]) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorded("b", callback_on_step_end=stop, **SHORT)
    assert_equal(recorded("a", **SHORT), host("a", **SHORT))


# --- lives


GPU = Choice("onnxruntime-cuda", ("for a test",), Gpu(0, "Recording GPU", (9, 0)))


@pytest.fixture
def gpu(host: Pipeline, monkeypatch: pytest.MonkeyPatch) -> RecordingDriver:
    """A GPU that `Pipeline.load` finds: the recording driver's."""
    driver = RecordingDriver()

    def load(bundle: Bundle, name: str, *, device: CudaDevice, **_: Any) -> Network:
        return Network(host._executors[name], device, driver)

    monkeypatch.setattr(pipeline_module, "choose_backend", lambda *_, device: GPU)
    monkeypatch.setattr(
        pipeline_module, "open_device", lambda _, stream: recording_device(driver, stream=stream)
    )
    monkeypatch.setattr(loading, "load_executor", load)
    return driver


def test_load_opens_the_device_and_close_gives_it_back(host: Pipeline, gpu: RecordingDriver) -> None:
    with Pipeline.load(host.bundle) as pipeline:
        assert (pipeline.backend, pipeline.backend_reasons) == (GPU.name, GPU.reasons)
        assert_equal(pipeline("a", **SHORT), host("a", **SHORT))
        executors = list(pipeline._executors.values())
    assert all(executor.closed for executor in executors if isinstance(executor, Network))
    assert gpu.live == {}


def test_load_in_a_callers_stream(host: Pipeline, gpu: RecordingDriver) -> None:
    caller = recording_device(gpu)
    stream = caller.stream
    with Pipeline.load(host.bundle, stream=stream) as pipeline:
        assert_equal(pipeline("a", **SHORT), host("a", **SHORT))
        assert pipeline._device.stream == stream  # type: ignore[attr-defined]
        with pytest.raises(UsageError, match="device and stream were both given"):
            Pipeline.load(host.bundle, stream=stream, device=0)
    assert gpu.live == {"streams": 1}  # the caller's
    caller.close()


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_component_that_cannot_be_loaded_leaves_nothing(
    host: Pipeline, gpu: RecordingDriver, monkeypatch: pytest.MonkeyPatch, component: str
) -> None:
    load = vars(loading)["load_executor"]  # the fixture's

    def fail(bundle: Bundle, name: str, **options: Any) -> Executor:
        if name == component:
            raise BackendError(f"no engine for {name}")
        executor: Executor = load(bundle, name, **options)
        return executor

    monkeypatch.setattr(loading, "load_executor", fail)
    with pytest.raises(BackendError, match=f"no engine for {component}"):
        Pipeline.load(host.bundle)
    gc.collect()
    assert gpu.live == {}


def test_bfloat16_is_refused(host: Pipeline, gpu: RecordingDriver) -> None:
    """Not even loaded: the kernels read half and single precision."""
    parts = host.bundle.manifest.components
    manifest = replace(
        host.bundle.manifest, components={**parts, "unet": replace(parts["unet"], precision="bf16")}
    )
    with pytest.raises(BackendError, match=r"unet is in bfloat16, .*--dtype fp16 or fp32"):
        Pipeline.load(Bundle(host.bundle.path, manifest))
    gc.collect()
    assert gpu.live == {}


def test_number_of_a_gpu(host: Pipeline, gpu: RecordingDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    opened: list[Choice] = []

    def choose(*_: object, device: int) -> Choice:
        asked.append(device)
        return replace(GPU, gpu=Gpu(device, "another", (8, 9)))

    def open_it(choice: Choice, stream: object) -> CudaDevice:
        opened.append(choice)
        return recording_device(gpu, stream=stream)

    monkeypatch.setattr(pipeline_module, "choose_backend", choose)
    monkeypatch.setattr(pipeline_module, "open_device", open_it)
    Pipeline.load(host.bundle, device=3).close()
    assert asked == [3]
    assert opened == [replace(GPU, gpu=Gpu(3, "another", (8, 9)))]


def test_two_pipelines_in_one_process(host: Pipeline, recorded: Recorded) -> None:
    other = Recorded(host)
    expected = {prompt: host(prompt, **SHORT) for prompt in ("a", "b")}
    for _ in range(2):
        assert_equal(recorded("a", **SHORT), expected["a"])
        assert_equal(other("b", **SHORT), expected["b"])
    other.close()
    assert_equal(recorded("b", **SHORT), expected["b"])


def test_no_growth_over_many_pictures(recorded: Recorded) -> None:
    """Shapes, samplers and prompts in turn: what is allocated after the first round stays."""
    used: list[int] = []
    for index in range(4):
        for options in ({}, {"height": 32}, {"sampler": "ddim", "eta": 1.0}, {"guidance_scale": 1.0}):
            recorded(f"prompt {index}", **{**SHORT, **options, "num_inference_steps": 2})
        recorded.cuda.synchronize()
        used.append(recorded.driver.used)
    assert used == used[:1] * 4


def test_what_was_drawn_outlives_the_pipeline(host: Pipeline) -> None:
    pipeline = Recorded(host)
    output = pipeline("a", **{**SHORT, "output_type": "device"})
    pipeline.driver.run_all()
    pipeline.close()
    assert pipeline.driver.live
    assert np.array_equal(as_numpy(output.images), host("a", **SHORT).images)
    del output
    assert pipeline.driver.live == {}


def test_closed_pipeline(host: Pipeline) -> None:
    with Recorded(host) as pipeline:
        pipeline("a", **SHORT)
    pipeline.close()  # again: nothing happens
    with pytest.raises(UsageError, match="the pipeline was closed: load it again"):
        pipeline("a", **SHORT)
    assert pipeline.driver.live == {}
