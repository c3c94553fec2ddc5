"""Prompts to what the U-Net reads of them; each is encoded once, and what it gave stays on the device."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from sdrt.runtime.arena import Arena, Sections, Span
from sdrt.runtime.bundle import Bundle
from sdrt.runtime.denoise import DenoiseLoop
from sdrt.runtime.devices import Buffer, Device
from sdrt.runtime.executors import Executor
from sdrt.runtime.faults import MAX_ENCODERS, Faults
from sdrt.runtime.replay import replayable
from sdrt.runtime.solvers import SamplerTable
from sdrt.runtime.tokenizer import Tokenizer

MAX_QUOTED: Final = 400  # characters of a prompt's cut-off end that a warning repeats
MAX_CACHED: Final = 64  # texts; a negative prompt and a few favourites stay

IDS = "input_ids"
EMBEDDINGS, POOLED = "encoder_hidden_states", "text_embeds"  # inputs of the U-Net


class PromptTruncatedWarning(UserWarning):
    """A prompt has more tokens than the model reads; the message quotes what was cut off."""


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


def text_encoders(bundle: Bundle, executors: Mapping[str, Executor]) -> list[TextEncoder]:
    """The text encoders of a bundle's family, each with its tokenizer.

    Raises:
        BundleError: A tokenizer's file cannot be used.
    """
    manifest = bundle.manifest
    tokenizers = [
        Tokenizer.from_file(
            bundle.file(facts.file), max_length=facts.max_length, bos=facts.bos, eos=facts.eos, pad=facts.pad
        )
        for facts in manifest.tokenizers
    ]
    encoders = [TextEncoder(tokenizers[0], executors["text_encoder"], manifest.text_output)]
    if manifest.family == "sdxl":
        hidden = "penultimate_hidden_state"
        encoders.append(TextEncoder(tokenizers[1], executors["text_encoder_2"], hidden, POOLED))
    return encoders


class _Cached(NamedTuple):
    slot: int
    cut_off: str


class PromptEncoder:
    """Tokenizers and text encoders, with a cache on the device of the texts that were used last.

    What a text gives is a record: fault words, one per encoder, then a row of each input of the U-Net that
    is made of texts. The cache has a slot for each record.
    """

    def __init__(
        self, encoders: Sequence[TextEncoder], device: Device, *, batch: int, most_texts: int
    ) -> None:
        """Allocate the cache and bind the encoders to buffers of their own.

        Args:
            encoders: One, or SDXL's two, in the order in which their hidden states stand side by side.
            device: Owns the buffers.
            batch: The smallest batch that the graphs admit; every row of it holds the same text.
            most_texts: How many different texts one call of `write` may name.

        Raises:
            DeviceMemoryError: The buffers do not fit.
        """
        self._encoders, self._device = encoders, device
        self._record = _record_sections(encoders)
        capacity = max(MAX_CACHED, most_texts)
        slots = {
            _in_slot(slot, name): section
            for slot in range(-1, capacity)
            for name, section in self._record.items()
        }
        self._arena = Arena(device, {**_encoder_sections(encoders, batch), **slots})
        self._upload = self._arena.span(_input(0, IDS), _in_slot(_FRESH, _FAULTS))
        self._upload_bytes = self._upload.new_host_bytes()
        self._cache: OrderedDict[str | None, _Cached] = OrderedDict()
        self._free = list(range(capacity))
        evaluations = [
            encoder.executor.bind(
                {spec.name: self._arena[_input(index, spec.name)] for spec in encoder.executor.spec.inputs},
                {name: self._arena[_output(index, name)] for name in encoder.outputs},
            )
            for index, encoder in enumerate(encoders)
        ]
        executors = [encoder.executor for encoder in encoders]
        self._encode = replayable(device, self._work(evaluations), executors)

    def write(self, texts: Sequence[str | None], loop: DenoiseLoop) -> None:
        """Put what the texts give into the rows of a loop's conditioning, and their fault words beside it.

        Nothing waits. A text that is not in the cache is encoded first, by itself, so that its embedding
        never depends on the others of a batch.

        Args:
            texts: One per row of the U-Net's batch; None stands for a text that was not given, whose
                embeddings are zeros.
            loop: Which takes them.

        Warns:
            PromptTruncatedWarning: A text is over the token limit.
        """
        for text in dict.fromkeys(texts):
            if text not in self._cache:
                self._add(text)
            self._cache.move_to_end(text)
            self._warn_if_cut(self._cache[text].cut_off)
        for row, text in enumerate(texts):
            slot = self._cache[text].slot
            for name, rows in loop.conditioning.items():
                self._device.copy(self._arena[_in_slot(slot, name)], rows[row])
            self._device.copy(self._arena[_in_slot(slot, _FAULTS)], loop.text_faults[row])

    def raise_faults(self, faults: Faults, table: SamplerTable, texts: Sequence[str | None]) -> None:
        """Raise what a run's fault words say; texts that gave no embeddings are encoded anew next time.

        Args:
            faults: Of the run.
            table: Its sampler.
            texts: As given to `write`.

        Raises:
            NumericsError: A component gave NaN or infinity; the message names the first of them.
            UsageError: The latents that the caller brought hold them.
        """
        for text, words in zip(texts, faults.texts, strict=True):
            if words.any() and (found := self._cache.pop(text, None)):
                self._free.append(found.slot)
        names = [encoder.executor.spec.name for encoder in self._encoders]
        faults.raise_if_any(table, texts, names)

    def _add(self, text: str | None) -> None:
        """Queue the encoding of a text into a free slot, or that of the text unused for longest."""
        if not self._free:
            self._free.append(self._cache.popitem(last=False)[1].slot)
        slot = self._free[-1]
        kept = self._span(slot).buffer
        cut_off = ""
        if text is None:
            self._device.clear(kept)
        else:
            given = self._upload.arrays(self._upload_bytes)
            for index, encoder in enumerate(self._encoders):
                encoded = encoder.tokenizer.encode(text)
                given[_input(index, IDS)][...] = encoded.ids
                cut_off = cut_off or encoded.truncated_text
            self._device.upload(self._upload_bytes, self._upload.buffer)
            self._encode()
            self._device.copy(self._span(_FRESH).buffer, kept)
        self._cache[text] = _Cached(self._free.pop(), cut_off)

    def _work(self, evaluations: Sequence[Callable[[], None]]) -> Callable[[], None]:
        """From token ids to the record of a fresh text: the encoders, a look at what they gave, copies."""
        device, arena, copies = self._device, self._arena, self._copies_to_record()
        checks = [
            (arena[_output(index, name)], arena.part(_in_slot(_FRESH, _FAULTS), index, (1,)))
            for index, encoder in enumerate(self._encoders)
            for name in encoder.outputs
        ]

        def work() -> None:
            for evaluate in evaluations:
                evaluate()
            for output, fault in checks:
                device.check_finite(output, fault)
            for source, target in copies:
                device.copy(source, target)

        return work

    def _copies_to_record(self) -> list[tuple[Buffer, Buffer]]:
        """From the encoders' outputs: hidden states side by side, which is a copy per token, and the rest."""
        arena, copies = self._arena, []
        record = {name: _in_slot(_FRESH, name) for name in self._record}
        (_, tokens, width), _ = self._record[EMBEDDINGS]
        column = 0
        for index, encoder in enumerate(self._encoders):
            part = encoder.width
            pieces = 1 if part == width else tokens  # a single encoder's states are one stretch
            run = tokens * part // pieces
            for piece in range(pieces):
                source = arena.part(_output(index, encoder.hidden), piece * run, (run,))
                target = arena.part(record[EMBEDDINGS], column + piece * width, (run,))
                copies.append((source, target))
            column += part
            if encoder.pooled is not None:
                shape, _ = self._record[POOLED]
                pooled = arena.part(_output(index, encoder.pooled), 0, shape)
                copies.append((pooled, arena[record[POOLED]]))
        return copies

    def _span(self, slot: int) -> Span:
        first, *_, last = self._record
        return self._arena.span(_in_slot(slot, first), _in_slot(slot, last))

    def _warn_if_cut(self, cut_off: str) -> None:
        if cut_off:
            warnings.warn(
                f"the prompt is over {self._encoders[0].tokenizer.max_length - 2} tokens; "
                f"this end of it is not read: {_shortened(cut_off)!r}",
                PromptTruncatedWarning,
                stacklevel=2,
            )


_FRESH: Final = -1  # the slot of the text that is being encoded
_FAULTS: Final = "faults"


def _input(index: int, name: str) -> str:
    return f"input {index} {name}"


def _output(index: int, name: str) -> str:
    return f"output {index} {name}"


def _in_slot(slot: int, name: str) -> str:
    return f"slot {slot} {name}"


def _encoder_sections(encoders: Sequence[TextEncoder], batch: int) -> Sections:
    """Inputs and outputs of the encoders; the inputs last, beside the fresh slot's fault words."""
    axes = {"batch": batch}
    outputs, inputs = {}, {}
    for index, encoder in enumerate(encoders):
        for spec in encoder.executor.spec.outputs:
            if spec.name in encoder.outputs:
                outputs[_output(index, spec.name)] = (spec.concrete(axes), spec.dtype)
        for spec in encoder.executor.spec.inputs:
            inputs[_input(index, spec.name)] = (spec.concrete(axes), spec.dtype)
    return {**outputs, **inputs}


def _record_sections(encoders: Sequence[TextEncoder]) -> Sections:
    """What is kept of a text: the fault words first."""
    specs = [{spec.name: spec for spec in encoder.executor.spec.outputs} for encoder in encoders]
    hidden = [spec[encoder.hidden] for spec, encoder in zip(specs, encoders, strict=True)]
    (_, tokens, _) = hidden[0].concrete({"batch": 1})
    width = sum(encoder.width for encoder in encoders)
    record: dict[str, tuple[tuple[int, ...], str]] = {
        _FAULTS: ((1, MAX_ENCODERS), "int32"),
        EMBEDDINGS: ((1, tokens, width), hidden[0].dtype),
    }
    for spec, encoder in zip(specs, encoders, strict=True):
        if encoder.pooled is not None:
            record[POOLED] = (spec[encoder.pooled].concrete({"batch": 1}), spec[encoder.pooled].dtype)
    return record


def _shortened(text: str) -> str:
    """A quotation that fits on a screen."""
    return text if len(text) <= MAX_QUOTED else f"{text[: MAX_QUOTED // 2]} … {text[-MAX_QUOTED // 2 :]}"
