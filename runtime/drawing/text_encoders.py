"""A family's text encoders, and what their buffers and the records of the texts' cache hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.bundle.families.components import CUSTOM_EMBEDDINGS, ENCODER_HIDDEN_STATES
from sdrt.runtime.devices.arena import Sections
from sdrt.runtime.text.syntax import MAX_WEIGHT
from sdrt.runtime.text.tokenizer import Tokenizer

FRESH: Final = -1  # the slot of the text that is being encoded
FAULTS: Final = "faults"
MIN_MEAN: Final = 1e-3  # of hidden states whose mean is restored, as a share of their size


class TextEncoder(NamedTuple):
    """One of a family's text encoders.

    Attributes:
        tokenizer: Its own.
        executor: On the device.
        gives: Input of the U-Net → its output, see `sdrt.runtime.bundle.families.record.Encoder`.
    """

    tokenizer: Tokenizer
    executor: Executor
    gives: Mapping[str, str]

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs that are wanted of it."""
        return tuple(dict.fromkeys(self.gives.values()))

    @property
    def width(self) -> int:
        """Numbers that its hidden state has for each token."""
        return self.output(ENCODER_HIDDEN_STATES).shape[-1]

    def output(self, name: str) -> Output:
        """What it gives for an input of the U-Net."""
        spec = self.executor.spec.output(self.gives[name])
        assert spec is not None  # in every family's record
        return Output(spec.name, spec.concrete({"batch": 1}), spec.dtype)


class Output(NamedTuple):
    """What an encoder gives for one text: the output's name, shape [1, …, width] and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def open_tokenizers(bundle: Bundle) -> list[Tokenizer]:
    """One tokenizer for each text encoder.

    Raises:
        BundleError: A tokenizer's file cannot be used.
    """
    if not bundle.embedded:
        from sdrt.runtime.admission.records import admit_tokenizers  # what sdrt ships need not wait for it

        admit_tokenizers(bundle)
    return [
        Tokenizer.from_file(
            bundle.file(facts.file), max_length=facts.max_length, bos=facts.bos, eos=facts.eos, pad=facts.pad
        )
        for facts in bundle.manifest.tokenizers
    ]


def text_encoders(
    bundle: Bundle, executors: Mapping[str, Executor], tokenizers: Sequence[Tokenizer]
) -> list[TextEncoder]:
    """The text encoders of a bundle's family, each with its tokenizer of `open_tokenizers`."""
    return [
        TextEncoder(tokenizer, executors[encoder.component], encoder.gives)
        for encoder, tokenizer in zip(bundle.manifest.record.encoders, tokenizers, strict=True)
    ]


def input_name(index: int, name: str) -> str:
    """The section of one encoder's input."""
    return f"input {index} {name}"


def output_name(index: int, name: str) -> str:
    """The section of one encoder's output."""
    return f"output {index} {name}"


def in_slot(slot: int, name: str) -> str:
    """The section of one tensor of a record."""
    return f"slot {slot} {name}"


def encoder_sections(encoders: Sequence[TextEncoder], batch: int) -> Sections:
    """Inputs and outputs of the encoders; what each text uploads last, beside the fresh slot's faults."""
    axes = {"batch": batch}
    sections: dict[str, tuple[tuple[int, ...], str]] = {}
    uploaded: dict[str, tuple[tuple[int, ...], str]] = {}
    for index, encoder in enumerate(encoders):
        for spec in encoder.executor.spec.outputs:
            if spec.name in encoder.outputs:
                sections[output_name(index, spec.name)] = (spec.concrete(axes), spec.dtype)
        for spec in encoder.executor.spec.inputs:
            kind = sections if spec.name == CUSTOM_EMBEDDINGS else uploaded
            kind[input_name(index, spec.name)] = (spec.concrete(axes), spec.dtype)
    return {**sections, **uploaded}


def record_sections(encoders: Sequence[TextEncoder]) -> Sections:
    """What is kept of a text: the fault words, then an input of the U-Net each, the hidden states first."""
    record: dict[str, tuple[tuple[int, ...], str]] = {FAULTS: ((1, len(encoders)), "int32")}
    for name in dict.fromkeys([ENCODER_HIDDEN_STATES, *(name for one in encoders for name in one.gives)]):
        given = [encoder.output(name) for encoder in encoders if name in encoder.gives]
        *rest, _ = given[0].shape
        record[name] = ((*rest, sum(output.shape[-1] for output in given)), given[0].dtype)
    return record


def weighted(states: NDArray[Any], weights: Sequence[float]) -> NDArray[np.float64]:
    """Hidden states times the tokens' weights, as stable-diffusion-webui does it, in float64.

    ``z' = z · w · mean(z) / mean(z · w)``: each token's state is multiplied, then all of them, so that their
    mean is what it was (``process_tokens`` of its ``modules/sd_hijack_clip.py``). Where a mean is below
    `MIN_MEAN` of the numbers' root mean square, or the two are more than `MAX_WEIGHT` times apart or of
    different sign, they say nothing of the size of the states, and the quotient would blow them up or turn
    them round: there is no second factor then.

    Args:
        states: [1, tokens, width], of one encoder and one chunk.
        weights: One per token.
    """
    exact = states.astype(np.float64)
    product: NDArray[np.float64] = exact * np.array(weights)[:, None]
    before, after = float(exact.mean()), float(product.mean())
    small = [abs(array.mean()) <= MIN_MEAN * math.sqrt(np.mean(array**2)) for array in (exact, product)]
    if not any(small) and 1 / MAX_WEIGHT <= before / after <= MAX_WEIGHT:
        product *= before / after
    return product
