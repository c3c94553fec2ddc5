"""A family's text encoders, and what their buffers and the records of the texts' cache hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.devices.arena import Sections
from sdrt.runtime.drawing.faults import MAX_ENCODERS
from sdrt.runtime.text.syntax import MAX_WEIGHT
from sdrt.runtime.text.tokenizer import Tokenizer

IDS, CUSTOM, SKIP = "input_ids", "custom_embeddings", "clip_skip"  # inputs of a text encoder
EMBEDDINGS, POOLED = "encoder_hidden_states", "text_embeds"  # inputs of the U-Net
FRESH: Final = -1  # the slot of the text that is being encoded
FAULTS: Final = "faults"
MIN_MEAN: Final = 1e-3  # of hidden states whose mean is restored, as a share of their size


class TextEncoder(NamedTuple):
    """One of a family's text encoders.

    Attributes:
        tokenizer: Its own.
        executor: On the device.
        hidden: Its output that the U-Net was trained on; of several encoders they stand side by side.
        pooled: Its output that the U-Net reads as ``text_embeds``, if any.
    """

    tokenizer: Tokenizer
    executor: Executor
    hidden: str
    pooled: str | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs that are wanted of it."""
        return (self.hidden,) if self.pooled is None else (self.hidden, self.pooled)

    @property
    def width(self) -> int:
        """Numbers that its hidden state has for each token."""
        (spec,) = (spec for spec in self.executor.spec.outputs if spec.name == self.hidden)
        return spec.concrete({"batch": 1})[-1]


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
    manifest = bundle.manifest
    encoders = [TextEncoder(tokenizers[0], executors["text_encoder"], manifest.text_output)]
    if manifest.family == "sdxl":
        hidden = "penultimate_hidden_state"
        encoders.append(TextEncoder(tokenizers[1], executors["text_encoder_2"], hidden, POOLED))
    return encoders


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
            kind = sections if spec.name == CUSTOM else uploaded
            kind[input_name(index, spec.name)] = (spec.concrete(axes), spec.dtype)
    return {**sections, **uploaded}


def record_sections(encoders: Sequence[TextEncoder]) -> Sections:
    """What is kept of a text: the fault words first."""
    specs = [{spec.name: spec for spec in encoder.executor.spec.outputs} for encoder in encoders]
    hidden = [spec[encoder.hidden] for spec, encoder in zip(specs, encoders, strict=True)]
    (_, tokens, _) = hidden[0].concrete({"batch": 1})
    width = sum(encoder.width for encoder in encoders)
    record: dict[str, tuple[tuple[int, ...], str]] = {
        FAULTS: ((1, MAX_ENCODERS), "int32"),
        EMBEDDINGS: ((1, tokens, width), hidden[0].dtype),
    }
    for spec, encoder in zip(specs, encoders, strict=True):
        if encoder.pooled is not None:
            record[POOLED] = (spec[encoder.pooled].concrete({"batch": 1}), spec[encoder.pooled].dtype)
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
