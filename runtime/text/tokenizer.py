"""Prompts to CLIP's token ids, with the text clean-up of OpenAI's original.

The reference is ``SimpleTokenizer`` of OpenAI's CLIP (github.com/openai/CLIP,
``clip/simple_tokenizer.py``), and the ids are its ids, to the quirks: ``<|endoftext|>`` in a prompt
is the special token, in any case, but not right after punctuation. Hugging Face's CLIPTokenizer
skips the clean-up, so it differs on HTML entities, curly quotes, ligatures and the like, and turns
the pad token of Stable Diffusion 2.x, ``!``, into padding wherever it is typed; this one does not.

The byte-pair merges run in the Rust library ``tokenizers``. Characters that Unicode 17 or later
added may be split otherwise than the reference does: its regular expressions and Rust's know
different versions of Unicode.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.bundle.limits import MAX_PROMPT_CHARACTERS, MAX_TOKENIZER_BYTES
from sdrt.runtime.errors import BundleError, UsageError
from sdrt.runtime.system.untrusted import library_errors, read_limited

if TYPE_CHECKING:
    import tokenizers

# What ftfy and html.unescape change within ASCII: character references and control characters. Line
# breaks, which ftfy changes too, are white space and folded anyway.
_REPAIRED_ASCII: Final = re.compile(r"[&\x00-\x08\x0b\x0e-\x1f\x7f]")
_SURROGATE: Final = re.compile(r"[\ud800-\udfff]")
_LONGEST_ENTITY: Final = len("&CounterClockwiseContourIntegral;")


class Tokenized(NamedTuple):
    """A text of any length in tokens, without BOS, EOS and padding.

    Attributes:
        ids: Of the tokens.
        starts: The index of the character of ``cleaned`` at which each begins.
        words: For each the number of its word; tokens of one word have the same.
        cleaned: The text that they were made from; see `clean`.
    """

    ids: list[int]
    starts: list[int]
    words: list[int]
    cleaned: str


class Encoded(NamedTuple):
    """One encoded prompt.

    Attributes:
        ids: int64 ``[max_length]``: BOS, tokens, EOS, padding.
        num_tokens: Tokens of the whole prompt, before the cut, without BOS and EOS.
        truncated_text: What the limit cut off, as the user typed it; empty if everything fitted. It
            begins inside a word if the limit falls there.
    """

    ids: NDArray[np.int64]
    num_tokens: int
    truncated_text: str


def clean(text: str) -> str:
    """Clean text up as OpenAI's CLIP does before it splits it into tokens.

    ``ftfy.fix_text``, ``html.unescape`` twice, white space stripped and folded into single spaces,
    lower case (``basic_clean`` and ``whitespace_clean`` of ``clip/simple_tokenizer.py``). ftfy
    takes 0.1 s to import and is needed only for text that is not plain ASCII.
    """
    if not text.isascii() or _REPAIRED_ASCII.search(text):
        text = _repair(text)
    return " ".join(text.split()).lower()


def _repair(text: str) -> str:
    import html

    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


class Tokenizer:
    """CLIP's tokenizer: ``tokenizer(["a red apple"])`` gives int64 ``[1, max_length]``.

    Attributes:
        max_length: Length of every row, BOS and EOS included (77 for CLIP).
        bos, eos, pad: Token ids that begin, end and fill up a row.
    """

    def __init__(self, rust: tokenizers.Tokenizer, *, max_length: int, bos: int, eos: int, pad: int) -> None:
        """Take over a tokenizer of the Rust library; see `from_file`."""
        self.max_length, self.bos, self.eos, self.pad = max_length, bos, eos, pad
        self._rust = rust
        rust.no_truncation()
        rust.no_padding()
        rust.normalizer = None  # `clean` stands in for it
        # The library would find special tokens anywhere; the reference's pattern only where a match
        # may begin.
        rust.encode_special_tokens = True
        self._specials = {str(rust.id_to_token(token)): token for token in (bos, eos)}

    @classmethod
    def from_file(cls, path: str | Path, *, max_length: int, bos: int, eos: int, pad: int) -> Tokenizer:
        """Load a bundle's ``tokenizer.json``; the numbers are those of the bundle's manifest.

        Args:
            path: Written by `sdrt.export.checkpoint.tokenizer_json`.
            max_length: Ids per prompt, at least 2 (BOS and EOS).
            bos, eos, pad: Token ids.

        Raises:
            BundleError: The file is missing or no tokenizer, ``max_length`` is too small, or an id
                is not in the vocabulary.
        """
        import tokenizers

        try:
            content = read_limited(path, MAX_TOKENIZER_BYTES)
        except OSError as error:
            raise BundleError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        except ValueError as error:
            raise BundleError(f"cannot read the tokenizer: {error}") from None
        with library_errors(BundleError, f"{path} is no tokenizer.json: export the bundle again"):
            rust = tokenizers.Tokenizer.from_buffer(content)
        if max_length < 2:
            raise BundleError(f"the tokenizer's max_length is {max_length}, it must be 2 or more")
        for name, token in (("bos", bos), ("eos", eos), ("pad", pad)):
            if not 0 <= token < 2**31 or rust.id_to_token(token) is None:
                raise BundleError(f"the tokenizer's {name} id {token} is not in {path}")
        return cls(rust, max_length=max_length, bos=bos, eos=eos, pad=pad)

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Ids of several prompts, int64 ``[len(prompts), max_length]``.

        Raises:
            UsageError: A single string in place of a list, or a prompt that `encode` refuses.
        """
        if isinstance(prompts, str):
            raise UsageError(f"give a list of prompts, not one string: [{prompts!r}]")
        rows = np.empty((len(prompts), self.max_length), np.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            row[:] = self.row(self.tokens(prompt))
        return rows

    def encode(self, prompt: str) -> Encoded:
        """Ids of one prompt, and what of it the token limit cut off.

        Raises:
            UsageError: Not a string, or not Unicode text (a lone surrogate).
        """
        prompt = checked_text(prompt)
        tokens = self.tokenize(prompt)
        cut = self.cut_off(prompt, tokens, self.room)
        return Encoded(np.array(self.row(tokens.ids), np.int64), len(tokens.ids), cut)

    def tokens(self, prompt: str) -> list[int]:
        """All token ids of a prompt, of any number, without BOS, EOS and padding.

        Raises:
            UsageError: As for `encode`.
        """
        return self.tokenize(prompt).ids

    def count(self, prompt: str) -> int:
        """How many tokens a prompt has, without BOS and EOS; ``max_length - 2`` of them fit.

        Raises:
            UsageError: As for `encode`.
        """
        return len(self.tokens(prompt))

    @property
    def room(self) -> int:
        """Tokens of a text that a row holds."""
        return self.max_length - 2

    def row(self, tokens: Sequence[int]) -> list[int]:
        """BOS, the tokens as far as there is room, EOS, and padding up to ``max_length``."""
        padding = [self.pad] * (self.room - len(tokens))
        return [self.bos, *tokens[: self.room], self.eos, *padding]

    def tokenize(self, prompt: str) -> Tokenized:
        """A text of any length in tokens.

        Raises:
            UsageError: As for `encode`.
        """
        text = clean(checked_text(prompt))
        with library_errors(BundleError, "the bundle's tokenizer fails on the prompt"):
            return self._tokenize(text)

    def _tokenize(self, text: str) -> Tokenized:
        """Of a text that is cleaned."""
        tokens: list[int] = []
        starts: list[int] = []
        words: list[int] = []
        position = 0
        for begin, end, special in self._special_spans(text):
            part = self._rust.encode(text[position:begin], add_special_tokens=False)
            following = words[-1] + 1 if words else 0
            words += [following + int(word or 0) for word in part.word_ids]
            words += [words[-1] + 1 if words else 0 for _ in special]
            tokens += [*part.ids, *special]
            starts += [*(position + start for start, _ in part.offsets), *(begin for _ in special)]
            position = end
        return Tokenized(tokens, starts, words, text)

    def cut_off(self, prompt: str, tokens: Tokenized, kept: int) -> str:
        """The end of a prompt that its tokens from number ``kept`` on were made from, as it was typed."""
        if kept >= len(tokens.ids):
            return ""
        return _cut_off(prompt, tokens.cleaned, tokens.starts[kept])

    def _special_spans(self, text: str) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Where typed special tokens count: begin, end, id; last the text's end, without an id."""
        if any(special in text for special in self._specials):
            for piece, (begin, end) in self._rust.pre_tokenizer.pre_tokenize_str(text):
                if piece in self._specials:
                    yield begin, end, (self._specials[piece],)
        yield len(text), len(text), ()


def checked_text(prompt: str) -> str:
    """The prompt as Unicode text: surrogate pairs joined; lone ones, other types and books refused."""
    if not isinstance(prompt, str):
        raise UsageError(f"a prompt must be a string, not {type(prompt).__name__}")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UsageError(f"a prompt has {len(prompt)} characters, the limit is {MAX_PROMPT_CHARACTERS}")
    found = None if prompt.isascii() else _SURROGATE.search(prompt)
    if found is None:
        return prompt
    try:
        return prompt.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise UsageError(
            f"the prompt is not Unicode text: character {found.start() + 1} is the surrogate "
            f"U+{ord(found[0]):04X}; type it again, in a terminal set to UTF-8"
        ) from None


def _cut_off(prompt: str, cleaned: str, kept: int) -> str:
    """The end of the prompt that ``cleaned[kept:]`` was made from.

    The clean-up keeps no record of what came from where. But the cleaned text of a beginning of the
    prompt is, nearly always, a beginning of the cleaned text: so search for the longest beginning
    that cleans to no more than ``kept`` characters, first by words, then inside the word. A
    character reference breaks the order while it is half typed (``&am``), so the places around the
    one found are tried again, one by one.
    """

    def cleaned_length(length: int) -> int:
        return len(clean(prompt[:length]))

    words = [match.span() for match in re.finditer(r"\S+", prompt)]
    begin, end = words[bisect_right(words, kept, key=lambda word: cleaned_length(word[0])) - 1]
    guess = begin + bisect_right(range(begin, end), kept, key=cleaned_length) - 1
    last = min(guess + _LONGEST_ENTITY, end - 1)
    nearby = range(last, max(guess - _LONGEST_ENTITY, begin) - 1, -1)
    split = next((n for n in nearby if cleaned[:kept].startswith(clean(prompt[:n]))), begin)
    return prompt[split:].rstrip()
