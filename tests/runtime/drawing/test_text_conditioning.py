"""Prompts on the device: one encoder or SDXL's two, the cache, and texts that were not given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.fakes.recording import RecordedExecutor, RecordingDriver, as_numpy, recording_device

from sdrt.runtime.backends.executor import Executor, FixedWeights
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.devices.device import Device
from sdrt.runtime.devices.host import HostDevice
from sdrt.runtime.drawing.loop import DenoiseLoop, StepKind
from sdrt.runtime.drawing.text_conditioning import PromptEncoder, PromptTruncatedWarning
from sdrt.runtime.drawing.text_encoders import TextEncoder, weighted
from sdrt.runtime.errors import NumericsError, UsageError
from sdrt.runtime.samplers.registry import make_table
from sdrt.runtime.samplers.schedule import NoiseSchedule
from sdrt.runtime.text.chunks import Blend, Prompt
from sdrt.runtime.text.tokenizer import Tokenizer

SIZES = {
    **{"tokens": 77, "text_width": 3, "text_width_2": 5, "cross_width": 8, "projection_width": 4},
    **{"unet_channels": 4, "latent_channels": 4, "skips": 1},
}
TABLE = make_table("euler", NoiseSchedule(), 2)
GUIDANCE = np.full(len(TABLE), 5.0)
Array = NDArray[Any]


class FakeText(FixedWeights):
    """Every output is a number of its own, of the ids and of the place in the output."""

    capturable = True

    def __init__(self, name: str) -> None:
        self.spec = FAMILIES["sdxl"].components[name].resolve(SIZES, "fp32")
        self.evaluations = 0
        self.nan_in: str | None = None
        self.skipped = 0

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        ids = inputs["input_ids"]

        def evaluate() -> None:
            self.evaluations += 1
            self.skipped = int(inputs["clip_skip"][0])
            for output, array in outputs.items():
                array[...] = given_by(self.spec.name, output, ids[0], array.shape[1:])
                if output == self.nan_in:
                    array[0].reshape(-1)[-1] = np.nan

        return evaluate

    def close(self) -> None:
        """There is nothing to give back."""


def given_by(component: str, output: str, ids: Array, shape: tuple[int, ...]) -> Array:
    """What a fake gives for a text: no two places, outputs, encoders or texts have the same numbers."""
    base = 1000.0 * len(component) + 100.0 * len(output) + float(ids.sum() % 97)
    return (base + np.arange(np.prod(shape)).reshape(shape) / 7).astype(np.float32)


class FakeUNet(FixedWeights):
    """SDXL's inputs; it does nothing."""

    capturable = True

    def __init__(self) -> None:
        self.spec = FAMILIES["sdxl"].components["unet"].resolve(SIZES, "fp32")

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        assert set(inputs) == {"sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"}
        return lambda: None

    def close(self) -> None:
        """There is nothing to give back."""


class Scene:
    """Two encoders and a guided loop of two images, on a device."""

    def __init__(self, tokenizers: list[Tokenizer], device: Device, wrap: Callable[[Any], Executor]) -> None:
        self.device = device
        self.tokenizers = tokenizers
        self.texts = [FakeText("text_encoder"), FakeText("text_encoder_2")]
        encoders = [
            TextEncoder(tokenizer, wrap(text), encoder.gives)
            for tokenizer, text, encoder in zip(
                tokenizers, self.texts, FAMILIES["sdxl"].encoders, strict=True
            )
        ]
        self.encoder = PromptEncoder(encoders, device, batch=2, most_texts=4)
        self.loop = DenoiseLoop(device, wrap(FakeUNet()), 2, (2, 3), guided=True, encoders=2)
        self.loop.prepare([StepKind(guided=True)])
        device.synchronize()
        for text in self.texts:
            text.evaluations = 0  # the warm-up's

    def write(self, texts: Sequence[str | None]) -> None:
        self.encoder.write([Prompt(text) for text in texts], self.loop)

    def rows(self, name: str) -> Array:
        return np.concatenate([self.device.download(row) for row in self.loop.conditioning[name]])

    def expected(self, text: str) -> tuple[Array, Array]:
        """Both hidden states side by side, and the pooled one."""
        ids = [np.asarray(tokenizer.encode(text).ids) for tokenizer in self.tokenizers]
        states = [
            given_by(fake.spec.name, "penultimate_hidden_state", own, (77, width))
            for fake, own, width in zip(self.texts, ids, (3, 5), strict=True)
        ]
        pooled = given_by("text_encoder_2", "text_embeds", ids[1], (4,))
        return np.concatenate(states, axis=1), pooled


@pytest.fixture(scope="module")
def tokenizers(tiny_bundle: Path) -> list[Tokenizer]:
    """As SDXL's: the second pads with another token."""
    bundle = Bundle.open(tiny_bundle)
    (facts,) = bundle.manifest.tokenizers
    return [
        Tokenizer.from_file(bundle.file(facts.file), max_length=77, bos=facts.bos, eos=facts.eos, pad=pad)
        for pad in (facts.pad, 0)
    ]


@pytest.fixture(params=["host", "recording"])
def scene(request: pytest.FixtureRequest, tokenizers: list[Tokenizer]) -> Scene:
    if request.param == "host":
        return Scene(tokenizers, HostDevice(), lambda executor: executor)
    driver = RecordingDriver()
    device = recording_device(driver)
    return Scene(tokenizers, device, lambda executor: RecordedExecutor(executor, device, driver))


def test_two_encoders_side_by_side(scene: Scene) -> None:
    texts = ["a", "b", "a red apple", "a"]
    scene.write(texts)
    hidden, pooled = scene.rows("encoder_hidden_states"), scene.rows("text_embeds")
    for row, text in enumerate(texts):
        want_hidden, want_pooled = scene.expected(text)
        assert np.array_equal(hidden[row], want_hidden)
        assert np.array_equal(pooled[row], want_pooled)
    assert [fake.evaluations for fake in scene.texts] == [3, 3]
    assert not scene.loop.faults().texts.any()


def test_text_that_was_not_given_is_zeros(scene: Scene) -> None:
    """As diffusers' ``force_zeros_for_empty_prompt``; an empty text is another matter."""
    scene.write(["x", "y", "x", "y"])
    scene.write([None, "", "a", "a"])
    hidden, pooled = scene.rows("encoder_hidden_states"), scene.rows("text_embeds")
    assert not hidden[0].any()
    assert not pooled[0].any()
    for row, text in ((1, ""), (2, "a")):
        assert np.array_equal(hidden[row], scene.expected(text)[0])
        assert np.array_equal(pooled[row], scene.expected(text)[1])
    assert [fake.evaluations for fake in scene.texts] == [4, 4]


def test_slots_go_round(scene: Scene) -> None:
    """More texts than slots: what makes room is encoded again, and never a text of the same call."""
    names = [f"text {index}" for index in range(70)]
    for start in range(0, 68, 2):
        texts = [*names[start : start + 3], names[0]]
        scene.write(texts)
        hidden = scene.rows("encoder_hidden_states")
        for row, text in enumerate(texts):
            assert np.array_equal(hidden[row], scene.expected(text)[0])
    assert scene.texts[0].evaluations == 69  # the first one is used each time and stays
    scene.write([names[1]] * 4)
    assert np.array_equal(scene.rows("encoder_hidden_states")[3], scene.expected(names[1])[0])
    assert scene.texts[0].evaluations == 70


@pytest.mark.parametrize(
    ("encoder", "output"),
    [(0, "penultimate_hidden_state"), (1, "penultimate_hidden_state"), (1, "text_embeds")],
)
def test_nan_names_encoder_and_text_and_is_not_kept(scene: Scene, encoder: int, output: str) -> None:
    scene.write(["good"] * 4)
    scene.device.synchronize()
    scene.texts[encoder].nan_in = output
    texts = ["good", "bad", "good", "good"]
    scene.write(texts)
    scene.device.synchronize()
    scene.texts[encoder].nan_in = None
    scene.write(texts)  # from the cache: still known to be bad
    name = scene.texts[encoder].spec.name
    scene.loop.start(TABLE, GUIDANCE, seeds=[1, 2], inputs={"time_ids": np.zeros((4, 6))})
    with pytest.raises(NumericsError, match=f"the {name} gave NaN or infinity for the prompt 'bad'"):
        scene.encoder.raise_faults(scene.loop.faults(), TABLE, list(map(Prompt, texts)))
    scene.write(texts)  # encoded anew
    scene.encoder.raise_faults(scene.loop.faults(), TABLE, list(map(Prompt, texts)))
    assert np.array_equal(scene.rows("encoder_hidden_states")[1], scene.expected("bad")[0])


def test_time_ids_reach_the_unet(scene: Scene) -> None:
    sizes = np.arange(24, dtype=np.float32).reshape(4, 6)
    scene.loop.start(TABLE, GUIDANCE, seeds=[1, 2], inputs={"time_ids": sizes})
    assert np.array_equal(scene.device.download(scene.loop.arena["time_ids"]), sizes)


def test_nothing_waits(tokenizers: list[Tokenizer]) -> None:
    """New texts and known ones: two uploads for two new texts, and copies on the device."""
    driver = RecordingDriver()
    device = recording_device(driver)
    scene = Scene(tokenizers, device, lambda executor: RecordedExecutor(executor, device, driver))
    before = driver.counts.copy()
    scene.write(["a", "b", "a", "b"])
    added = driver.counts - before
    assert (added["uploads"], added["graph_launches"], added["waits"], added["downloads"]) == (2, 2, 0, 0)
    assert added["device_copies"] == 2 + 4 * 3  # a record each; per row two tensors and the fault words
    device.synchronize()
    row = scene.loop.conditioning["text_embeds"][0]
    assert np.array_equal(as_numpy(row)[0], scene.expected("a")[1])


class Long(Scene):
    """The same with room for two chunks."""

    def __init__(self, tokenizers: list[Tokenizer], device: Device, wrap: Callable[[Any], Executor]) -> None:
        super().__init__(tokenizers, device, wrap)
        encoders = self.encoder._encoders
        self.encoder = PromptEncoder(encoders, device, batch=2, most_texts=4, max_chunks=2, max_clip_skip=1)
        self.loop = DenoiseLoop(device, wrap(FakeUNet()), 2, (2, 3), guided=True, context=2 * 77, encoders=2)
        device.synchronize()
        for text in self.texts:
            text.evaluations = 0

    def put(self, *prompts: Prompt | Blend) -> Array:
        """Write four rows and give their embeddings."""
        self.encoder.write([*prompts, *[prompts[-1]] * (4 - len(prompts))], self.loop, 2)
        self.device.synchronize()
        return self.rows("encoder_hidden_states")


@pytest.fixture
def recorded(tokenizers: list[Tokenizer]) -> tuple[Long, RecordingDriver]:
    driver = RecordingDriver()
    device = recording_device(driver)
    return Long(tokenizers, device, lambda executor: RecordedExecutor(executor, device, driver)), driver


@pytest.fixture(params=["host", "recording"])
def long(request: pytest.FixtureRequest, tokenizers: list[Tokenizer]) -> Long:
    if request.param == "host":
        return Long(tokenizers, HostDevice(), lambda executor: executor)
    driver = RecordingDriver()
    device = recording_device(driver)
    return Long(tokenizers, device, lambda executor: RecordedExecutor(executor, device, driver))


def test_chunks_lie_one_behind_the_other(long: Long) -> None:
    rows = long.put(Prompt("a BREAK b"), Prompt("b"), Prompt(None), Prompt("b BREAK a"))
    a, b, empty = (long.expected(text)[0] for text in ("a", "b", ""))
    for row, (first, second) in zip(rows, [(a, b), (b, empty), (0 * a, 0 * a), (b, a)], strict=True):
        assert np.array_equal(row, np.concatenate([first, second]))
    pooled = long.rows("text_embeds")
    for row, text in ((0, "a"), (1, "b"), (3, "b")):
        assert np.array_equal(pooled[row], long.expected(text)[1])
    assert not pooled[2].any()
    assert [fake.evaluations for fake in long.texts] == [3, 3]  # a chunk of two prompts is encoded once


def test_long_prompts_wait_for_nothing(recorded: tuple[Long, RecordingDriver]) -> None:
    long, driver = recorded
    before = driver.counts.copy()
    prompts = [Prompt("a BREAK b"), Prompt("c"), Prompt("a BREAK b", clip_skip=1), Prompt("c", plain=True)]
    long.encoder.write(prompts, long.loop, 2)
    added = driver.counts - before
    assert (added["uploads"], added["graph_launches"], added["waits"], added["downloads"]) == (6, 6, 0, 0)


def test_weights_cost_one_download_and_are_kept(recorded: tuple[Long, RecordingDriver]) -> None:
    long, driver = recorded
    long.encoder.write([Prompt("")] * 4, long.loop, 2)
    for expected in ((1, 1), (0, 0)):
        before = driver.counts.copy()
        long.encoder.write([Prompt("(a:1.5)")] * 4, long.loop, 2)
        added = driver.counts - before
        assert (added["downloads"], added["graph_launches"]) == expected
    rows = long.rows("encoder_hidden_states")
    states, column = long.expected("a")[0].astype(np.float64), 0
    for width in (3, 5):
        part = states[:, column : column + width]
        weighted = part * np.where(np.arange(77) == 1, 1.5, 1.0)[:, None]
        np.testing.assert_array_equal(
            rows[0, :77, column : column + width],
            (weighted * (part.mean() / weighted.mean())).astype(np.float32),
        )
        column += width


def test_a_mean_of_nearly_nothing_is_not_restored() -> None:
    states = np.array([[[1.0, -1.0], [2.0, -2.0 + 1e-9]]])
    assert np.array_equal(weighted(states, [1, 3]), states * [[1], [3]])
    # Nor one of another sign: all weights of −1 would turn everything round again.
    assert np.array_equal(weighted(np.ones((1, 2, 2)), [-1, -1]), -np.ones((1, 2, 2)))
    assert np.array_equal(weighted(np.ones((1, 2, 2)), [2, 2]), np.ones((1, 2, 2)))
    assert not np.isnan(weighted(np.zeros((1, 2, 2)), [2, 1])).any()


def test_blend_lies_between(long: Long) -> None:
    one, other = Prompt("a BREAK b"), Prompt("(c:2)")
    rows = long.put(one, Blend(one, other, 0.25), other)
    assert np.array_equal(rows[1], (0.75 * rows[0].astype(float) + 0.25 * rows[2]).astype(np.float32))
    pooled = long.rows("text_embeds")
    assert np.array_equal(pooled[1], (0.75 * pooled[0].astype(float) + 0.25 * pooled[2]).astype(np.float32))


@pytest.mark.parametrize("encoder", [0, 1])
@pytest.mark.parametrize(
    ("prompt", "bad"),
    [
        (Prompt("a BREAK bad"), "'a BREAK bad'"),
        (Prompt("(bad:1.2)"), r"'\(bad:1.2\)'"),
        (Blend(Prompt("a"), Prompt("bad"), 0.5), "'a … bad'"),
    ],
)
def test_nan_in_any_chunk_is_found_and_not_kept(
    long: Long, prompt: Prompt | Blend, bad: str, encoder: int
) -> None:
    good, filler = Prompt("a"), Prompt("")
    long.put(good, filler)  # what is right is encoded before
    fake = long.texts[encoder]
    fake.nan_in = "penultimate_hidden_state"
    with np.errstate(all="ignore"):
        long.put(prompt, good)
    fake.nan_in = None
    prompts = [prompt, good, good, good]
    with pytest.raises(
        NumericsError, match=f"the {fake.spec.name} gave NaN or infinity for the prompt {bad}"
    ):
        long.encoder.raise_faults(long.loop.faults(), TABLE, prompts)
    assert np.isfinite(long.put(*prompts)).all()
    assert not long.loop.faults().texts.any()


def test_prompts_longer_than_the_loop_are_refused(long: Long) -> None:
    with pytest.raises(UsageError, match="a prompt of 2 chunks was given where there is room for 1"):
        long.encoder.write([Prompt("a BREAK b")] * 4, long.loop, 1)


def test_what_is_cut_off_is_quoted(long: Long) -> None:
    assert long.encoder.chunks(Prompt("a BREAK b BREAK c (d:2)")) == 2
    with pytest.warns(
        PromptTruncatedWarning, match="the prompt is over 2 chunks of 75 tokens; this end of it .*: 'c d'"
    ):
        long.put(Prompt("a BREAK b BREAK c (d:2)"))


def test_embeddings_reach_the_encoders(long: Long) -> None:
    """A text that names one is encoded anew when another takes its place, others are not."""
    before = long.put(Prompt("a toy"), Prompt("b"))
    count = long.texts[0].evaluations
    for number in (1.0, 2.0):
        vectors = [np.full((2, width), number * width, np.float32) for width in long.encoder.widths]
        long.encoder.add_embedding("Toy", vectors)
        rows = long.put(Prompt("a toy"), Prompt("b"))
        assert np.array_equal(rows[1], before[1])
        assert not np.array_equal(rows[0], before[0])
        count += 1
        assert long.texts[0].evaluations == count
        for index in range(2):
            own = np.asarray(long.device.download(long.encoder._arena[f"input {index} custom_embeddings"]))
            assert set(own[:, 2:4].flat) == {number * own.shape[2]}
            assert not own[:, [1, *range(4, 77)]].any()


@pytest.mark.parametrize(
    "shapes", [[(1, 3)], [(1, 3), (1, 3)], [(1, 3), (2, 5)], [(0, 3), (0, 5)], [(76, 3), (76, 5)]]
)
def test_embeddings_of_another_shape_are_refused(long: Long, shapes: list[tuple[int, int]]) -> None:
    with pytest.raises(UsageError, match="take 1 to 75 vectors of 3 and 5 numbers"):
        long.encoder.add_embedding("toy", [np.zeros(shape, np.float32) for shape in shapes])


def test_skipped_layers_reach_the_encoders(long: Long) -> None:
    long.put(Prompt("a", clip_skip=1))
    assert [fake.skipped for fake in long.texts] == [1, 1]
    long.put(Prompt("b"))
    assert [fake.skipped for fake in long.texts] == [0, 0]
