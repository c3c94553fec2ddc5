"""A family is one record: another one is registered here, and the rest of the house draws from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.checkpoints.manifests import components, entry, example

from sdrt.runtime.backends.executor import FixedWeights
from sdrt.runtime.bundle.bundle import EMBEDDED, Bundle
from sdrt.runtime.bundle.families.components import (
    ENCODER_HIDDEN_STATES,
    LAST_HIDDEN_STATE,
    VAE_DECODER,
    by_name,
    hidden_state,
    text_encoder,
    unet,
)
from sdrt.runtime.bundle.families.record import FLOAT, ComponentSpec, Encoder, Family, TensorSpec
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.bundle.manifest_json import from_json, to_json
from sdrt.runtime.devices.host import HostDevice
from sdrt.runtime.drawing.loading import condition_encoder
from sdrt.runtime.drawing.loop import DenoiseLoop
from sdrt.runtime.drawing.text_encoders import open_tokenizers
from sdrt.runtime.errors import BundleError, NumericsError
from sdrt.runtime.samplers.registry import make_table
from sdrt.runtime.samplers.schedule import NoiseSchedule
from sdrt.runtime.text.chunks import Prompt

Array = NDArray[Any]

# Three text encoders: all give hidden states, the last two a pooled embedding each.
WIDTHS, POOLED = (2, 3, 4), "pooled"
NAMES = tuple(f"reader_{number}" for number in range(3))


def _reader(number: int) -> ComponentSpec:
    pooled = TensorSpec(POOLED, FLOAT, ("batch", f"width_{number}"))
    states = hidden_state(LAST_HIDDEN_STATE, f"width_{number}")
    return text_encoder(NAMES[number], f"width_{number}", (states, pooled) if number else (states,))


TRIPLE = Family(
    name="triple",
    title="Triple",
    components=by_name(
        *map(_reader, range(3)), unet(TensorSpec(POOLED, FLOAT, ("rows", "pooled_width"))), VAE_DECODER
    ),
    encoders=tuple(
        Encoder(
            name,
            {ENCODER_HIDDEN_STATES: LAST_HIDDEN_STATE, **({POOLED: POOLED} if number else {})},
            tokenizer=f"words_{number}",
        )
        for number, name in enumerate(NAMES)
    ),
)
SIZES = {
    **{f"width_{number}": width for number, width in enumerate(WIDTHS)},
    **{"cross_width": sum(WIDTHS), "pooled_width": WIDTHS[1] + WIDTHS[2], "tokens": 77, "skips": 1},
    **{"unet_channels": 4, "latent_channels": 4},
}


class Stub(FixedWeights):
    """A component whose outputs are numbers of its own; the U-Net's are nothing."""

    capturable = False

    def __init__(self, spec: ComponentSpec) -> None:
        self.spec = spec
        self.broken = False

    def gives(self, output: str) -> Array:
        (entry,) = (entry for entry in self.spec.outputs if entry.name == output)
        shape = entry.concrete({"batch": 1})
        first = 1000 * NAMES.index(self.spec.name) + 100 * len(output)
        return (first + np.arange(np.prod(shape))).reshape(shape).astype(np.float32)

    def bind(self, _inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        def evaluate() -> None:
            for name, array in outputs.items():
                array[...] = np.nan if self.broken else self.gives(name)

        return evaluate

    def close(self) -> None:
        """There is nothing to give back."""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, TRIPLE.name, TRIPLE)


def triple() -> Manifest:
    facts = Bundle.open(EMBEDDED).manifest.tokenizers[0]
    return example(
        family=TRIPLE.name,
        components=components(TRIPLE.name, SIZES),
        tokenizers=tuple(replace(facts, file=entry(f"{name}.json")) for name in TRIPLE.tokenizers),
    )


class Scene:
    """The family's encoders and a loop of one image without guidance."""

    def __init__(self) -> None:
        manifest = triple()
        self.stubs = {name: Stub(manifest.components[name].spec) for name in (*NAMES, "unet")}
        tokenizers = open_tokenizers(Bundle.open(EMBEDDED)) * len(NAMES)
        device = HostDevice()
        self.encoder = condition_encoder(Bundle(EMBEDDED, manifest), self.stubs, device, tokenizers)
        self.loop = DenoiseLoop(
            device, self.stubs["unet"], 1, (2, 2), guided=False, encoders=len(TRIPLE.encoders)
        )


def test_its_manifest_is_read_as_it_was_written() -> None:
    manifest = triple()
    assert from_json(to_json(manifest)) == manifest
    document = json.loads(to_json(manifest))
    document["tokenizers"].pop()
    with pytest.raises(BundleError, match="there is a tokenizer for each text encoder"):
        from_json(json.dumps(document))
    narrow = components(TRIPLE.name, {**SIZES, "pooled_width": 6})
    with pytest.raises(BundleError, match="the text encoders' pooled fit the unet"):
        from_json(to_json(replace(manifest, components=narrow)))


def test_a_text_becomes_what_its_u_net_reads() -> None:
    scene = Scene()
    scene.encoder.write([Prompt("a cat")], scene.loop, 1)
    readers = [scene.stubs[name] for name in NAMES]
    for name, output, encoders in (
        (ENCODER_HIDDEN_STATES, LAST_HIDDEN_STATE, readers),
        (POOLED, POOLED, readers[1:]),
    ):
        wanted = np.concatenate([reader.gives(output) for reader in encoders], axis=-1)
        assert np.array_equal(scene.loop.conditioning[name][0], wanted)
    assert not scene.loop.faults().texts.any()


def test_an_encoder_that_fails_is_named() -> None:
    scene = Scene()
    scene.stubs[NAMES[2]].broken = True
    scene.encoder.write([Prompt("a cat")], scene.loop, 1)
    table = make_table("euler", NoiseSchedule(), 1)
    with pytest.raises(NumericsError, match="the reader_2 gave NaN or infinity for the prompt 'a cat'"):
        scene.encoder.raise_faults(scene.loop.faults(), table, [Prompt("a cat")])
