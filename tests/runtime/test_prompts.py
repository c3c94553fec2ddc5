"""Prompts on the device: one encoder or SDXL's two, the cache, and texts that were not given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from recording import RecordedExecutor, RecordingDriver, as_numpy, recording_device

from sdrt.runtime.bundle import Bundle
from sdrt.runtime.components import components_of
from sdrt.runtime.denoise import DenoiseLoop
from sdrt.runtime.devices import Device, HostDevice
from sdrt.runtime.errors import NumericsError
from sdrt.runtime.executors import Executor
from sdrt.runtime.prompt_chunks import Prompt
from sdrt.runtime.prompts import PromptEncoder
from sdrt.runtime.schedule import NoiseSchedule
from sdrt.runtime.solvers import make_table
from sdrt.runtime.text_encoders import TextEncoder
from sdrt.runtime.tokenizer import Tokenizer

SIZES = {
    **{"tokens": 77, "text_width": 3, "text_width_2": 5, "cross_width": 8, "projection_width": 4},
    **{"unet_channels": 4, "latent_channels": 4, "skips": 1},
}
TABLE = make_table("euler", NoiseSchedule(), 2)
Array = NDArray[Any]


class FakeText:
    """Every output is a number of its own, of the ids and of the place in the output."""

    capturable = True

    def __init__(self, name: str) -> None:
        self.spec = components_of("sdxl")[name].resolve(SIZES, "fp32")
        self.evaluations = 0
        self.nan_in: str | None = None

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        ids = inputs["input_ids"]

        def evaluate() -> None:
            self.evaluations += 1
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


class FakeUNet:
    """SDXL's inputs; it does nothing."""

    capturable = True

    def __init__(self) -> None:
        self.spec = components_of("sdxl")["unet"].resolve(SIZES, "fp32")

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
        hidden = "penultimate_hidden_state"
        encoders = [
            TextEncoder(tokenizers[0], wrap(self.texts[0]), hidden),
            TextEncoder(tokenizers[1], wrap(self.texts[1]), hidden, "text_embeds"),
        ]
        self.encoder = PromptEncoder(encoders, device, batch=2, most_texts=4)
        self.loop = DenoiseLoop(device, wrap(FakeUNet()), 2, (2, 3), guided=True)
        self.loop.prepare(draws_noise=False)
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
    scene.loop.start(TABLE, 5.0, seeds=[1, 2], time_ids=np.zeros((4, 6), np.float32))
    with pytest.raises(NumericsError, match=f"the {name} gave NaN or infinity for the prompt 'bad'"):
        scene.encoder.raise_faults(scene.loop.faults(), TABLE, list(map(Prompt, texts)))
    scene.write(texts)  # encoded anew
    scene.encoder.raise_faults(scene.loop.faults(), TABLE, list(map(Prompt, texts)))
    assert np.array_equal(scene.rows("encoder_hidden_states")[1], scene.expected("bad")[0])


def test_time_ids_reach_the_unet(scene: Scene) -> None:
    sizes = np.arange(24, dtype=np.float32).reshape(4, 6)
    scene.loop.start(TABLE, 5.0, seeds=[1, 2], time_ids=sizes)
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
