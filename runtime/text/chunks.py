"""A prompt of any length cut into chunks that a text encoder reads one by one, before anything is computed.

A chunk holds ``max_length - 2`` tokens. A word or an embedding of textual inversion that does not fit any
more begins the next chunk, unless it is longer than one, and what stands between it and a comma shortly
before goes with it, so that a phrase stays whole (``comma_padding_backtrack`` of stable-diffusion-webui).
Only the end of a prompt that is too long may be cut inside of a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from sdrt.runtime.errors import UsageError
from sdrt.runtime.text.syntax import Piece, Section, parse_prompt
from sdrt.runtime.text.tokenizer import Tokenized, Tokenizer, checked_text

OWN: Final = -1  # the id of a token that has an embedding of its own
COMMA_LOOKBACK: Final = 20  # tokens, as in stable-diffusion-webui


@dataclass(frozen=True, slots=True)
class Prompt:
    """One text and how it is read.

    Attributes:
        text: None stands for a text that was not given, whose embeddings are zeros.
        plain: Brackets and ``BREAK`` mean themselves (see `sdrt.runtime.text.syntax`).
        clip_skip: How many of the text encoders' last layers are left out.
        comma_lookback: How many tokens from a chunk's end a comma may stand for the next chunk to begin
            behind it; 0 for none.
        negative: It is what to move away from (see `sdrt.runtime.text.syntax.parse_prompt`).
    """

    text: str | None
    plain: bool = False
    clip_skip: int = 0
    comma_lookback: int = COMMA_LOOKBACK
    negative: bool = False


@dataclass(frozen=True, slots=True)
class Blend:
    """The way from one prompt to another: ``(1 - share) · first + share · second``, of their embeddings.

    The shorter prompt is filled up with chunks of the empty text.

    Raises:
        UsageError: ``share`` is not a number from 0 to 1.
    """

    first: Prompt
    second: Prompt
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UsageError(f"the share of the second prompt is {self.share!r}: a number from 0 to 1")


@dataclass(frozen=True, slots=True)
class Row:
    """What one text encoder reads of a chunk.

    Attributes:
        ids: Of all tokens; `OWN` where an embedding of textual inversion stands.
        own: (place of the token, name of the embedding, which of its vectors) for each of those.
        weights: One for each token, or empty if all are 1.
    """

    ids: tuple[int, ...]
    own: tuple[tuple[int, str, int], ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """What the text encoders read at once: a row for each."""

    rows: tuple[Row, ...]
    clip_skip: int = 0

    @property
    def weighted(self) -> bool:
        """Whether a token has another weight than 1."""
        return any(row.weights for row in self.rows)

    def unweighted(self) -> Chunk:
        """The same tokens, all with a weight of 1."""
        return replace(self, rows=tuple(replace(row, weights=()) for row in self.rows))

    def names(self) -> set[str]:
        """The embeddings of textual inversion in it."""
        return {name for row in self.rows for _, name, _ in row.own}


@dataclass(frozen=True, slots=True)
class Mixed:
    """Two chunks on the way from one to the other; None stands for zeros."""

    first: Chunk | None
    second: Chunk | None
    share: float


Part = Chunk | Mixed | None


class Plan(NamedTuple):
    """The chunks of a prompt, and what of its end, if anything, there was no room for."""

    chunks: tuple[Part, ...]
    cut_off: str


def _mixed(first: Chunk | None, second: Chunk | None, share: float) -> Part:
    if share in (0, 1) or first == second:
        return second if share == 1 else first
    return Mixed(first, second, share)


def with_sources(parts: Iterable[Part]) -> Iterator[Part]:
    """Chunks, and those that weighted and blended ones are made of."""
    for part in parts:
        yield part
        if isinstance(part, Mixed):
            yield from with_sources((part.first, part.second))
        elif part is not None and part.weighted:
            yield part.unweighted()


def part_names(part: Part) -> set[str]:
    """The embeddings of textual inversion that a chunk is made of."""
    return {name for each in with_sources((part,)) if isinstance(each, Chunk) for name in each.names()}


class PromptPlanner:
    """Tokenizers, the names of embeddings, and how many chunks there may be."""

    def __init__(self, tokenizers: Sequence[Tokenizer], *, max_chunks: int, max_clip_skip: int) -> None:
        """Use `plan`."""
        self._tokenizers = tuple(tokenizers)
        self._max_chunks, self._max_clip_skip = max_chunks, max_clip_skip
        self._vectors: dict[str, int] = {}  # name → number of vectors
        self._known: list[str] = []  # names in the order of the pattern's groups
        self._names: re.Pattern[str] | None = None

    def set_embeddings(self, vectors: Mapping[str, int]) -> None:
        """From now on these names in a text, and no others, stand for embeddings.

        In capitals or not, as stable-diffusion-webui finds them, but not as a part of a longer word.

        Args:
            vectors: Name in lower case → how many vectors the embedding has.
        """
        self._vectors = dict(vectors)
        # The longest first: `cat` must not hide `cat toy`.
        self._known = sorted(self._vectors, key=len, reverse=True)
        patterns = [f"({_as_words(known)})" for known in self._known]
        self._names = re.compile("|".join(patterns), re.IGNORECASE) if patterns else None

    def plan(self, prompt: Prompt | Blend, chunks: int = 1) -> Plan:
        """Cut a prompt into chunks; if they are fewer than ``chunks``, fill up with those of the empty text.

        Raises:
            UsageError: A weight that is no number, no Unicode text, or a ``clip_skip`` out of range.
        """
        if isinstance(prompt, Prompt):
            return Plan(*self._plan(prompt, chunks))
        both = (prompt.first, prompt.second)
        most = max(len(self._plan(part, chunks)[0]) for part in both)
        (first, cut), (second, other_cut) = (self._plan(part, most) for part in both)
        mixed = tuple(_mixed(one, other, prompt.share) for one, other in zip(first, second, strict=True))
        return Plan(mixed, cut or other_cut)

    def _plan(self, prompt: Prompt, chunks: int) -> tuple[tuple[Chunk | None, ...], str]:
        if prompt.text is None:
            return (None,) * chunks, ""
        check_clip_skip(prompt.clip_skip, self._max_clip_skip)
        sections = parse_prompt(checked_text(prompt.text), plain=prompt.plain, negative=prompt.negative)
        packed = [self._pack(tokenizer, sections, prompt.comma_lookback) for tokenizer in self._tokenizers]
        count = max(chunks, *(len(rows) for rows, _ in packed))
        rows = [
            [*rows, *[Row(tuple(tokenizer.row(())))] * (count - len(rows))]
            for tokenizer, (rows, _) in zip(self._tokenizers, packed, strict=True)
        ]
        cut_off = next((cut for _, cut in packed if cut), "")
        return tuple(Chunk(each, prompt.clip_skip) for each in zip(*rows, strict=True)), cut_off

    def _pack(
        self, tokenizer: Tokenizer, sections: Sequence[Section], lookback: int
    ) -> tuple[list[Row], str]:
        """The rows of one text encoder, and what did not fit."""
        packer = _Packer(tokenizer, self._max_chunks, lookback)
        for number, section in enumerate(sections):
            if number:
                packer.end_chunk()
            for text in (text for piece in section for text in self._texts(tokenizer, piece)):
                packer.add(text)
        return packer.rows(), packer.cut_off()

    def _texts(self, tokenizer: Tokenizer, piece: Piece) -> Iterator[_Text]:
        """A piece in stretches of ordinary text and embeddings."""
        position = 0
        for match in self._names.finditer(piece.text) if self._names else ():
            yield _ordinary(tokenizer, Piece(piece.text[position : match.start()], piece.weight))
            name = self._known[(match.lastindex or 1) - 1]  # not `match[0].lower()`: ſ matches s
            yield _Text(match[0], piece.weight, None, name, self._vectors[name])
            position = match.end()
        yield _ordinary(tokenizer, Piece(piece.text[position:], piece.weight))


def check_clip_skip(clip_skip: object, most: int) -> None:
    """Refuse another number of layers to leave out than the bundle admits.

    Raises:
        UsageError: It is not from 0 to ``most``.
    """
    if not isinstance(clip_skip, int) or isinstance(clip_skip, bool) or not 0 <= clip_skip <= most:
        allowed = (
            f"0 to {most} layers of its text encoders can be left out"
            if most
            else "it always runs all layers of its text encoders"
        )
        raise UsageError(f"clip_skip is {clip_skip!r}, and of this bundle {allowed}")


def _as_words(name: str) -> str:
    """A pattern for a name that neither begins nor ends inside of a word."""
    before = r"(?<!\w)" if re.match(r"\w", name) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", name) else ""
    return before + re.escape(name) + after


class _Text(NamedTuple):
    """A stretch of a prompt: ordinary text in tokens, or an embedding."""

    text: str
    weight: float
    tokens: Tokenized | None
    name: str = ""
    vectors: int = 0

    def words(self) -> Iterator[list[tuple[int, str, int]]]:
        """What is not to be cut apart: (id, name, number of the vector) for each token."""
        if self.tokens is None:
            yield [(OWN, self.name, index) for index in range(self.vectors)]
            return
        word: list[tuple[int, str, int]] = []
        last = None
        for token, number in zip(self.tokens.ids, self.tokens.words, strict=True):
            if word and number != last:
                yield word
                word = []
            word.append((token, "", 0))
            last = number
        if word:
            yield word


def _ordinary(tokenizer: Tokenizer, piece: Piece) -> _Text:
    return _Text(piece.text, piece.weight, tokenizer.tokenize(piece.text))


class _Packer:
    """Chunks of one text encoder while they are filled."""

    def __init__(self, tokenizer: Tokenizer, max_chunks: int, lookback: int) -> None:
        self._tokenizer, self._max_chunks, self._lookback = tokenizer, max_chunks, lookback
        self._commas = {token for token in tokenizer.tokenize(",").ids if lookback}
        self._rows: list[Row] = []
        self._tokens: list[tuple[int, str, int]] = []
        self._weights: list[float] = []
        self._lost: list[str] = []  # what was cut off

    def add(self, text: _Text) -> None:
        """Take a stretch of text, as far as there is room."""
        taken = 0
        for word in text.words():
            if self._lost or not self._make_room(word):
                break
            fitting = self._take(word, text.weight)
            taken += fitting
            if fitting < len(word):
                break
        else:
            return
        self._lost.append(self._end_of(text, taken))

    def _end_of(self, text: _Text, taken: int) -> str:
        """What follows the first ``taken`` tokens of a stretch, with the white space behind it."""
        if not taken or text.tokens is None:
            return text.text
        behind = text.text[len(text.text.rstrip()) :]
        return self._tokenizer.cut_off(text.text, text.tokens, taken) + behind

    def end_chunk(self) -> None:
        """Fill the current chunk up and begin the next one; after the last one nothing follows."""
        if len(self._rows) < self._max_chunks:
            self._rows.append(self._row())

    def rows(self) -> list[Row]:
        """All chunks; the one that was begun last is one if there is anything in it."""
        if self._tokens or not self._rows:
            self.end_chunk()
        return self._rows

    def cut_off(self) -> str:
        """What there was no room for."""
        return "".join(self._lost).strip()

    def _make_room(self, word: Sequence[tuple[int, str, int]]) -> bool:
        """Begin a chunk for a word that would be cut; False if there is no room for any of it."""
        room = self._tokenizer.room
        last = len(self._rows) >= self._max_chunks - 1
        if len(word) > room - len(self._tokens) and not last and len(word) <= room:
            begun = self._behind_comma(word)
            tokens, weights = self._tokens[begun:], self._weights[begun:]
            del self._tokens[begun:], self._weights[begun:]
            self.end_chunk()
            self._tokens, self._weights = tokens, weights
            if tokens:
                return self._make_room(word)  # there may be too little beside them, without a comma
        return len(self._rows) < self._max_chunks

    def _behind_comma(self, word: Sequence[tuple[int, str, int]]) -> int:
        """How many tokens of the chunk stay when ``word`` begins the next one: those up to a comma close by.

        All, if there is none, or if a comma itself or an embedding of several vectors is what does not fit.
        """
        room, count = self._tokenizer.room, len(self._tokens)
        if word[0][0] in self._commas or (word[0][0] == OWN and count < room):
            return count
        nearest = max(room - self._lookback, 0)
        commas = (
            place for place in range(count - 1, nearest - 1, -1) if self._tokens[place][0] in self._commas
        )
        return next(commas, count - 1) + 1

    def _take(self, word: Sequence[tuple[int, str, int]], weight: float) -> int:
        """Put the tokens of a word where there is room, an embedding whole or not at all; return how many."""
        room = self._tokenizer.room
        if word[0][0] == OWN and len(word) > room - len(self._tokens):
            return 0
        for count, token in enumerate(word):
            if len(self._tokens) == room:
                self.end_chunk()
                if len(self._rows) == self._max_chunks:
                    return count
            self._tokens.append(token)
            self._weights.append(weight)
        return len(word)

    def _row(self) -> Row:
        """The tokens so far as a row, which begins the next one."""
        ids = tuple(self._tokenizer.row([token for token, _, _ in self._tokens]))
        own = tuple((place, name, index) for place, (_, name, index) in enumerate(self._tokens, 1) if name)
        weights: tuple[float, ...] = ()
        if any(weight != 1 for weight in self._weights):
            weights = (1.0, *self._weights, *[1.0] * (len(ids) - 1 - len(self._weights)))
        self._tokens, self._weights = [], []
        return Row(ids, own, weights)
