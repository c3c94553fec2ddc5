"""Prompts to what the U-Net reads of them; each is encoded once, and what it gave stays on the device."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.backends.executor import replayable
from sdrt.runtime.bundle.families.components import (
    CLIP_SKIP,
    CUSTOM_EMBEDDINGS,
    ENCODER_HIDDEN_STATES,
    INPUT_IDS,
)
from sdrt.runtime.devices.arena import Arena, Span
from sdrt.runtime.devices.device import Buffer, Device
from sdrt.runtime.drawing.faults import Faults
from sdrt.runtime.drawing.loop import DenoiseLoop
from sdrt.runtime.drawing.text_encoders import (
    FAULTS,
    FRESH,
    TextEncoder,
    encoder_sections,
    in_slot,
    input_name,
    output_name,
    record_sections,
    weighted,
)
from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers.table import SamplerTable
from sdrt.runtime.text.chunks import (
    Blend,
    Chunk,
    Mixed,
    Part,
    Plan,
    Prompt,
    PromptPlanner,
    Row,
    part_names,
    with_sources,
)

MAX_QUOTED: Final = 400  # characters of a prompt's cut-off end that a warning repeats
MAX_CACHED: Final = 64  # chunks; a negative prompt and a few favourites stay
MAX_PLANS: Final = 256  # prompts that need not be cut into tokens again


Vectors = Sequence[NDArray[np.float32]]


class PromptTruncatedWarning(UserWarning):
    """A prompt has more tokens than the model reads; the message quotes what was cut off."""


class PromptEncoder:
    """Tokenizers and text encoders, with a cache on the device of the chunks that were used last.

    What a chunk of a prompt gives is a record: fault words, one per encoder, then a row of each input of the
    U-Net that is made of texts. The cache has a slot for each record. A chunk is encoded by itself, so that
    it never depends on others of a batch; all that has weights of 1 stays on the device. What is weighted or
    blended goes through the host, once, and is kept as the rest is.
    """

    def __init__(
        self,
        encoders: Sequence[TextEncoder],
        device: Device,
        *,
        batch: int,
        most_texts: int,
        max_chunks: int = 1,
        max_clip_skip: int = 0,
    ) -> None:
        """Allocate the cache and bind the encoders to buffers of their own.

        Args:
            encoders: In the order in which their hidden states stand side by side.
            device: Owns the buffers.
            batch: The smallest batch that the graphs admit; every row of it holds the same text.
            most_texts: How many different texts one call of `write` may name without one of them being
                encoded again by the next call.
            max_chunks: See `sdrt.runtime.bundle.manifest.Limits`.
            max_clip_skip: See `sdrt.runtime.bundle.manifest.Limits`.

        Raises:
            DeviceMemoryError: The buffers do not fit.
        """
        self._encoders, self._device = encoders, device
        self._planner = PromptPlanner(
            [encoder.tokenizer for encoder in encoders], max_chunks=max_chunks, max_clip_skip=max_clip_skip
        )
        self._max_chunks = max_chunks
        self._added: dict[str, Vectors] = {}  # name → vectors for each encoder
        self._lent: dict[str, Vectors] = {}  # the same, of LoRAs
        self._own: dict[str, Vectors] = {}  # what counts of the two
        self._record = record_sections(encoders)
        capacity = max(MAX_CACHED, most_texts)
        slots = {
            in_slot(slot, name): section
            for slot in range(-1, capacity)
            for name, section in self._record.items()
        }
        self._arena = Arena(device, {**encoder_sections(encoders, batch), **slots})
        self._upload = self._arena.span(input_name(0, INPUT_IDS), in_slot(FRESH, FAULTS))
        self._upload_bytes = self._upload.new_host_bytes()
        self._plans: OrderedDict[tuple[Prompt | Blend, int], Plan] = OrderedDict()
        self._cache: OrderedDict[Part, int] = OrderedDict()  # chunk → slot
        self._free = list(range(capacity))
        evaluations = [
            encoder.executor.bind(
                {
                    spec.name: self._arena[input_name(index, spec.name)]
                    for spec in encoder.executor.spec.inputs
                },
                {name: self._arena[output_name(index, name)] for name in encoder.outputs},
            )
            for index, encoder in enumerate(encoders)
        ]
        executors = [encoder.executor for encoder in encoders]
        self._encode = replayable(device, self._work(evaluations), executors)

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers that each encoder's embedding of a token has."""
        return tuple(encoder.width for encoder in self._encoders)

    def chunks(self, prompt: Prompt | Blend) -> int:
        """How many chunks a prompt has, at most the bundle's ``max_chunks``; no work on the device.

        Raises:
            UsageError: The prompt cannot be read: a weight that is no number, no Unicode text, or a
                ``clip_skip`` out of range.
        """
        return len(self._plan(prompt, 1).chunks)

    def add_embedding(self, name: str, vectors: Vectors) -> None:
        """Let ``name`` in a prompt stand for an embedding of textual inversion, from now on.

        Args:
            name: See `sdrt.runtime.text.textual_inversion.read_embedding`; another of that name is replaced.
            vectors: For each encoder float32 [k, width], k the same for all.

        Raises:
            UsageError: A shape does not fit.
        """
        self._check_vectors(name, vectors)
        self._added[name.lower()] = vectors
        self._read_otherwise({name.lower()})

    def lend_embeddings(self, embeddings: Mapping[str, Vectors]) -> None:
        """Let names stand for embeddings, before those that were added, until others are lent.

        Args:
            embeddings: As those of `add_embedding`, by name.

        Raises:
            UsageError: A shape does not fit.
        """
        lent = {name.lower(): vectors for name, vectors in embeddings.items()}
        names = lent.keys() | self._lent.keys()
        changed = {name for name in names if lent.get(name) is not self._lent.get(name)}
        for name in changed & lent.keys():
            self._check_vectors(name, lent[name])
        self._lent = lent
        if changed:
            self._read_otherwise(changed)

    def forget(self) -> None:
        """Encode every prompt anew: the encoders have other weights."""
        self._free.extend(self._cache.values())
        self._cache.clear()

    def _check_vectors(self, name: str, vectors: Vectors) -> None:
        count = len(vectors[0])
        room = min(encoder.tokenizer.room for encoder in self._encoders)
        wanted = [(count, width) for width in self.widths]
        if [array.shape for array in vectors] != wanted or not 1 <= count <= room:
            raise UsageError(
                f"the embedding {name!r} has the shapes {[array.shape for array in vectors]}: this model's "
                f"text encoders take 1 to {room} vectors of {' and '.join(map(str, self.widths))} numbers"
            )

    def _read_otherwise(self, names: Set[str]) -> None:
        """From now on texts with these names are others; what was kept of them is forgotten."""
        self._own = {**self._added, **self._lent}
        self._planner.set_embeddings({name: len(vectors[0]) for name, vectors in self._own.items()})
        self._plans.clear()
        for part in [part for part in self._cache if names & part_names(part)]:
            self._free.append(self._cache.pop(part))

    def write(self, prompts: Sequence[Prompt | Blend], loop: DenoiseLoop, chunks: int = 1) -> None:
        """Put what the prompts give into the rows of a loop's conditioning, and their fault words beside it.

        Nothing waits but for prompts with weights and blends that are not in the cache.

        Args:
            prompts: One per row of the U-Net's batch.
            loop: Which takes them.
            chunks: The loop's context in chunks; shorter prompts are filled up with chunks of the empty text.

        Raises:
            UsageError: As for `chunks`, or a prompt has more of them than the loop's context.

        Warns:
            PromptTruncatedWarning: A prompt has more chunks than the bundle admits.
        """
        plans = [self._plan(prompt, chunks) for prompt in prompts]
        if longest := max((len(plan.chunks) for plan in plans if len(plan.chunks) > chunks), default=0):
            raise UsageError(f"a prompt of {longest} chunks was given where there is room for {chunks}")
        for cut_off in dict.fromkeys(plan.cut_off for plan in plans):
            self._warn_if_cut(cut_off)
        # The first chunks of all rows come first: they bring the fault words that the others add to.
        for number in range(chunks):
            for part in dict.fromkeys(plan.chunks[number] for plan in plans):
                slot = self._slot(part)
                for row in (row for row, plan in enumerate(plans) if plan.chunks[number] == part):
                    self._copy_to_row(slot, loop, row, number, chunks)

    def raise_faults(self, faults: Faults, table: SamplerTable, prompts: Sequence[Prompt | Blend]) -> None:
        """Raise what a run's fault words say; prompts that gave no embeddings are encoded anew next time.

        Args:
            faults: Of the run.
            table: Its sampler.
            prompts: As given to `write`.

        Raises:
            NumericsError: A component gave NaN or infinity; the message names the first of them.
            UsageError: The latents that the caller brought hold them.
        """
        texts = faults.texts.copy()
        bad = {prompt for prompt, words in zip(prompts, texts, strict=True) if words.any()}
        found = {prompt: self._forget(prompt) for prompt in bad}
        for row, prompt in enumerate(prompts):
            if prompt in bad and found[prompt].any():
                texts[row] = found[prompt]
        names = [encoder.executor.spec.name for encoder in self._encoders]
        quotable = [_quotable(prompt) for prompt in prompts]
        replace(faults, texts=texts).raise_if_any(table, quotable, names)

    def _forget(self, prompt: Prompt | Blend) -> NDArray[np.bool]:
        """Take a prompt's chunks out of the cache and give their fault words, for each encoder; waits.

        In a row of several chunks the words do not tell the encoders apart.
        """
        words = np.zeros(len(self._encoders), bool)
        plans = [plan for (planned, _), plan in self._plans.items() if planned == prompt]
        for part in {part for plan in plans for part in with_sources(plan.chunks)} & set(self._cache):
            slot = self._cache.pop(part)
            words |= np.asarray(self._device.download(self._arena[in_slot(slot, FAULTS)]))[0].astype(bool)
            self._free.append(slot)
        return words

    def _plan(self, prompt: Prompt | Blend, chunks: int) -> Plan:
        key = (prompt, chunks)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._planner.plan(prompt, chunks)
        self._plans.move_to_end(key)
        if len(self._plans) > MAX_PLANS:
            self._plans.popitem(last=False)
        return plan

    def _copy_to_row(self, slot: int, loop: DenoiseLoop, row: int, number: int, chunks: int) -> None:
        """One chunk's record to its place in a row; the pooled embedding is the first chunk's."""
        device, arena = self._device, self._arena
        embeddings = arena[in_slot(slot, ENCODER_HIDDEN_STATES)]
        if chunks == 1:
            target = loop.conditioning[ENCODER_HIDDEN_STATES][row]
        else:
            each = math.prod(embeddings.shape)
            target = loop.arena.part(ENCODER_HIDDEN_STATES, (row * chunks + number) * each, embeddings.shape)
        device.copy(embeddings, target)
        if number:
            first = loop.arena.part("text_faults", row * len(self._encoders), (1,))
            device.check_finite(embeddings, first)
            return
        device.copy(arena[in_slot(slot, FAULTS)], loop.text_faults[row])
        for name in loop.conditioning:
            if name != ENCODER_HIDDEN_STATES:
                device.copy(arena[in_slot(slot, name)], loop.conditioning[name][row])

    def _slot(self, part: Part) -> int:
        """The slot of a chunk's record, which is made if there is none: the one unused for longest goes."""
        if part not in self._cache:
            record = None
            if isinstance(part, Mixed):
                record = self._mix(part)
            elif part is not None and part.weighted:
                record = self._weigh(part)
            if not self._free:
                self._free.append(self._cache.popitem(last=False)[1])
            kept = self._span(self._free[-1]).buffer
            if record is not None:
                self._device.upload(record, kept)
            elif isinstance(part, Chunk):
                self._read(part)
                self._device.copy(self._span(FRESH).buffer, kept)
            else:
                self._device.clear(kept)
            self._cache[part] = self._free.pop()
        self._cache.move_to_end(part)
        return self._cache[part]

    def _read(self, chunk: Chunk) -> None:
        """Queue the encoding of a chunk into the fresh record."""
        given = self._upload.arrays(self._upload_bytes)
        for index, row in enumerate(chunk.rows):
            given[input_name(index, INPUT_IDS)][...] = row.ids
            given[input_name(index, CLIP_SKIP)][...] = chunk.clip_skip
            if row.own:
                self._upload_own(index, row)
        self._device.upload(self._upload_bytes, self._upload.buffer)
        self._encode()

    def _upload_own(self, index: int, row: Row) -> None:
        """Put embeddings of textual inversion where an encoder reads them; elsewhere it reads nothing."""
        buffer = self._arena[input_name(index, CUSTOM_EMBEDDINGS)]
        values = np.zeros(buffer.shape, buffer.dtype)
        for place, name, number in row.own:
            values[:, place] = self._own[name][index][number]
        self._device.upload(values, buffer)

    def _host_record(self, part: Part) -> tuple[NDArray[np.uint8], dict[str, NDArray[Any]]]:
        """A chunk's record in main memory, and its sections; waits."""
        span = self._span(self._slot(part))
        record = np.array(self._device.download(span.buffer))
        sections = span.arrays(record)
        prefix = len(in_slot(self._cache[part], ""))
        return record, {name[prefix:]: array for name, array in sections.items()}

    def _weigh(self, chunk: Chunk) -> NDArray[np.uint8]:
        record, sections = self._host_record(chunk.unweighted())
        states, column = sections[ENCODER_HIDDEN_STATES], 0
        for encoder, row in zip(self._encoders, chunk.rows, strict=True):
            part = states[..., column : column + encoder.width]
            column += encoder.width
            if row.weights:
                part[...] = weighted(part, row.weights)
        return record

    def _mix(self, mixed: Mixed) -> NDArray[np.uint8]:
        (record, first), (_, second) = self._host_record(mixed.first), self._host_record(mixed.second)
        for name, array in first.items():
            if name == FAULTS:
                array |= second[name]
            else:
                other = second[name].astype(np.float64)
                array[...] = (1 - mixed.share) * array.astype(np.float64) + mixed.share * other
        return record

    def _work(self, evaluations: Sequence[Callable[[], None]]) -> Callable[[], None]:
        """From token ids to the record of a fresh text: the encoders, a look at what they gave, copies."""
        device, arena, copies = self._device, self._arena, self._copies_to_record()
        checks = [
            (arena[output_name(index, name)], arena.part(in_slot(FRESH, FAULTS), index, (1,)))
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
        """From the encoders' outputs; of several for one input, side by side, which is a copy per token."""
        arena, copies = self._arena, []
        for name, (shape, _) in self._record.items():
            lines, width, column = math.prod(shape[:-1]), shape[-1], 0
            for index, encoder in enumerate(self._encoders):
                if name not in encoder.gives:
                    continue
                output = encoder.output(name)
                own = output.shape[-1]
                pieces = 1 if own == width else lines  # what one encoder gives alone is one stretch
                run = lines * own // pieces
                for piece in range(pieces):
                    source = arena.part(output_name(index, output.name), piece * run, (run,))
                    target = arena.part(in_slot(FRESH, name), column + piece * width, (run,))
                    copies.append((source, target))
                column += own
        return copies

    def _span(self, slot: int) -> Span:
        first, *_, last = self._record
        return self._arena.span(in_slot(slot, first), in_slot(slot, last))

    def _warn_if_cut(self, cut_off: str) -> None:
        if cut_off:
            room = f"{self._encoders[0].tokenizer.room} tokens"
            if self._max_chunks > 1:
                room = f"{self._max_chunks} chunks of {room}"
            warnings.warn(
                f"the prompt is over {room}; this end of it is not read: {_shortened(cut_off)!r}",
                PromptTruncatedWarning,
                stacklevel=3,
            )


def _quotable(prompt: Prompt | Blend) -> str | None:
    """What a message quotes of a prompt."""
    if isinstance(prompt, Prompt):
        return prompt.text
    return f"{prompt.first.text} … {prompt.second.text}"


def _shortened(text: str) -> str:
    """A quotation that fits on a screen."""
    return text if len(text) <= MAX_QUOTED else f"{text[: MAX_QUOTED // 2]} … {text[-MAX_QUOTED // 2 :]}"
