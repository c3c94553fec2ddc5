"""Prompts against a plain reference with transformers: chunks, weights, BREAK, skipped layers, own words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.references.text_reference import Encoded, Reference, Weighted

import tolerances
from sdrt.export.parity.components import compare
from sdrt.runtime.backends.executor import FixedWeights
from sdrt.runtime.backends.onnxruntime_cpu.executor import OnnxRuntimeExecutor
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.families.record import ComponentSpec
from sdrt.runtime.devices.host import HostDevice
from sdrt.runtime.drawing.loop import DenoiseLoop
from sdrt.runtime.drawing.text_conditioning import PromptEncoder
from sdrt.runtime.drawing.text_encoders import open_tokenizers, text_encoders
from sdrt.runtime.text.chunks import Blend, Prompt

Array = NDArray[Any]
Sections = list[list[Weighted]]
ROOM = 75


class NoUNet(FixedWeights):
    """The U-Net's buffers without the U-Net."""

    capturable = True

    def __init__(self, spec: ComponentSpec) -> None:
        self.spec = spec

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        return lambda: None

    def close(self) -> None:
        """There is nothing to give back."""


class Scene:
    """A bundle's text encoders on ONNX Runtime, and their checkpoint in PyTorch."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.bundle, self.checkpoint = Bundle.open(folder, verify=False), checkpoint
        parts = self.bundle.manifest.components
        names = [name for name in parts if name.startswith("text_encoder")]
        executors = {
            name: OnnxRuntimeExecutor(folder / parts[name].model, parts[name].spec) for name in names
        }
        self.device, limits = HostDevice(), self.bundle.manifest.limits
        self.encoder = PromptEncoder(
            text_encoders(self.bundle, executors, open_tokenizers(self.bundle)),
            self.device,
            batch=1,
            most_texts=4,
            max_chunks=limits.max_chunks,
            max_clip_skip=limits.max_clip_skip,
        )
        self.reference = Reference(checkpoint)

    def write(self, *prompts: Prompt | Blend) -> list[Encoded]:
        """What each prompt puts into the rows of a loop of that many images."""
        chunks = max(map(self.encoder.chunks, prompts))
        unet = NoUNet(self.bundle.component("unet").spec)
        loop = DenoiseLoop(
            self.device,
            unet,
            len(prompts),
            (2, 2),
            guided=False,
            context=chunks * self.bundle.manifest.tokens,
            encoders=len(self.bundle.manifest.record.encoders),
        )
        self.encoder.write(prompts, loop, chunks)
        assert not loop.faults().texts.any()
        pooled = loop.conditioning.get("text_embeds", [np.zeros((1, 1))] * len(prompts))
        rows = zip(loop.conditioning["encoder_hidden_states"], pooled, strict=True)
        return [Encoded(states[0].copy(), row[0].copy()) for states, row in rows]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def scene(request: pytest.FixtureRequest) -> Scene:
    kind = {"sd": "tiny", "sdxl": "sdxl"}[request.param]
    return Scene(request.getfixturevalue(f"{kind}_bundle"), request.getfixturevalue(f"{kind}_checkpoint"))


def assert_close(actual: Encoded, expected: Encoded, tolerance: float = tolerances.GRAPH_FP32) -> None:
    assert actual.states.shape == expected.states.shape
    assert compare(actual.states, expected.states)[0] <= tolerance
    if expected.pooled is not None:
        assert compare(np.asarray(actual.pooled), expected.pooled)[0] <= tolerances.GRAPH_FP32


WORDS = ("a", "red", "apple", "and", "a", "green", "pear", "on", "an", "old", "wooden", "table", "in")


def long_text(words: int) -> str:
    return " ".join(WORDS[number % len(WORDS)] for number in range(words))


CASES: dict[str, tuple[str, Sections]] = {
    "short": ("a red apple", [[("a red apple", 1)]]),
    "empty": ("", [[]]),
    "weight": ("a (red:1.3) apple", [[("a", 1), ("red", 1.3), ("apple", 1)]]),
    "below one": ("a [red] (apple:0.5)", [[("a", 1), ("red", 1 / 1.1), ("apple", 0.5)]]),
    "nested": ("((red) apple:1.2)", [[("red", 1.2 * 1.1), ("apple", 1.2)]]),
    "escaped": (r"\(red\) apple", [[("(red) apple", 1)]]),
    "break": ("a red BREAK apple", [[("a red", 1)], [("apple", 1)]]),
    "empty chunk": ("BREAK apple", [[], [("apple", 1)]]),
    "two chunks": (long_text(60), [[(long_text(60), 1)]]),
    "four chunks": (long_text(150), [[(long_text(150), 1)]]),
    "weighted chunks": (
        f"({long_text(50)}:1.2) apple BREAK [pear]",
        [[(long_text(50), 1.2), ("apple", 1)], [("pear", 1 / 1.1)]],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_prompt_means_what_it_means_in_transformers(scene: Scene, name: str) -> None:
    text, sections = CASES[name]
    (actual,) = scene.write(Prompt(text))
    weighted = any(weight != 1 for section in sections for _, weight in section)
    assert_close(
        actual, scene.reference(sections), tolerances.WEIGHTED_TEXT if weighted else tolerances.GRAPH_FP32
    )


def test_the_long_texts_are_as_long_as_they_say(scene: Scene) -> None:
    assert [scene.encoder.chunks(Prompt(CASES[name][0])) for name in ("short", "two chunks")] == [1, 2]
    assert scene.encoder.chunks(Prompt(CASES["four chunks"][0])) == 4
    assert scene.encoder.chunks(Prompt(CASES["weighted chunks"][0])) >= 3


def test_a_batch_of_prompts_of_different_lengths(scene: Scene) -> None:
    """The shorter ones are filled up with chunks of the empty text."""
    texts = ["break", "short", "empty"]
    prompts = [Prompt(CASES[name][0]) for name in texts]
    for actual, name in zip(scene.write(*prompts), texts, strict=True):
        assert_close(actual, scene.reference(CASES[name][1], chunks=2))


@pytest.mark.parametrize("skip", [0, 1])
def test_skipped_layers(scene: Scene, skip: int) -> None:
    most = scene.bundle.manifest.limits.max_clip_skip
    for prompt, sections in (CASES["short"], CASES["weight"], CASES["break"]):
        (actual,) = scene.write(Prompt(prompt, clip_skip=min(skip, most)))
        assert_close(actual, scene.reference(sections, clip_skip=min(skip, most)), tolerances.WEIGHTED_TEXT)


def test_plain_brackets(scene: Scene) -> None:
    text = "a (red:1.3) apple BREAK [x"
    (actual,) = scene.write(Prompt(text, plain=True))
    assert_close(actual, scene.reference([[(text, 1)]]))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_blend_of_two_prompts(scene: Scene, share: float) -> None:
    first, second = (CASES[name] for name in ("weight", "break"))
    (actual,) = scene.write(Blend(Prompt(first[0]), Prompt(second[0]), share))
    ends = [scene.reference(sections, chunks=2) for _, sections in (first, second)]
    states = (1 - share) * ends[0].states + share * ends[1].states
    pooled = None
    if ends[0].pooled is not None and ends[1].pooled is not None:
        pooled = (1 - share) * ends[0].pooled + share * ends[1].pooled
    assert_close(actual, Encoded(states, pooled), tolerances.WEIGHTED_TEXT)


def own_words(scene: Scene) -> dict[str, list[Array]]:
    generator = np.random.default_rng(5)
    return {
        name: [
            (0.05 * generator.standard_normal((count, width))).astype(np.float32)
            for width in scene.encoder.widths
        ]
        for name, count in (("<toy>", 1), ("moss-stone", 3))
    }


def test_embeddings_of_textual_inversion(scene: Scene) -> None:
    """One vector and three, in capitals, weighted, and where three would be cut apart between two chunks."""
    fresh, own = Scene(scene.bundle.path, scene.checkpoint), own_words(scene)
    before = fresh.write(Prompt("a <toy> apple"))[0].states
    for name, vectors in own.items():
        fresh.encoder.add_embedding(name, vectors)
    fresh.reference = Reference(scene.checkpoint, own)
    assert not np.array_equal(fresh.write(Prompt("a <toy> apple"))[0].states, before)
    filler = "a " * (ROOM - 1)  # each a token
    cases: list[tuple[str, Sections]] = [
        ("a <toy> apple", [[("a <toy> apple", 1)]]),
        ("Moss-Stone and <TOY>", [[("moss-stone and <toy>", 1)]]),
        ("a (moss-stone:1.4) apple", [[("a", 1), ("moss-stone", 1.4), ("apple", 1)]]),
        (f"{filler} moss-stone a", [[(f"{filler} moss-stone a", 1)]]),
    ]
    for text, sections in cases:
        (actual,) = fresh.write(Prompt(text))
        assert_close(actual, fresh.reference(sections), tolerances.WEIGHTED_TEXT)
    assert fresh.encoder.chunks(Prompt(cases[-1][0])) == 2
    # Part of a longer word it is not.
    (actual,) = fresh.write(Prompt("moss-stones"))
    assert_close(actual, scene.reference([[("moss-stones", 1)]]))
