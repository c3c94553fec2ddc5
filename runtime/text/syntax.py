"""Attention weights and ``BREAK`` in a prompt, with the meaning that stable-diffusion-webui gave them.

==================  ======================================================================
``(a red apple)``   weight 1.1
``(a red apple:w)`` weight w, a number such as 1.3 or 0.8
``[a red apple]``   weight 1/1.1
``((a) b)``         nested weights multiply
``\\( \\) \\[ \\] \\\\``  the character itself
``BREAK``           in capitals, as a word of its own: what follows begins a new chunk
``<lora:name:w>``   no text: the LoRA of that name changes the model, with weight w, or 1
==================  ======================================================================

The reference is ``parse_prompt_attention`` of its ``modules/prompt_parser.py``, also for brackets without a
partner: one that closes nothing is text, one that nothing closes weighs all that follows, and round and
square ones do not see each other. A weight that is no number (1.2.3) is refused, and a backslash before
anything else is kept.

A LoRA may also be called ``lyco``, and have two weights, of the text encoders and of the U-Net, as
``<lora:name:te:unet>`` or ``<lora:name:te=…:unet=…>`` (``activate`` of its ``extra_networks_lora.py``). In a
negative prompt all of this is text: ``parse_extra_network_prompts`` of its ``processing.py`` looks for it in
prompts alone.

What means something elsewhere and is not done here (prompt editing, alternatives, ``AND``, hypernetworks …)
is drawn as the words that it consists of, or, where those are no words, left out; `remarks_on` names all of
it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, NamedTuple

from sdrt.runtime.errors import UsageError
from sdrt.runtime.lora.weights import LoraWeights, checked_weights

ROUND: Final = 1.1  # weight of round brackets without a number; square ones have its inverse
MAX_WEIGHT: Final = 10.0
MAX_DEPTH: Final = 50  # brackets inside of each other
# Networks that stable-diffusion-webui adds to the model: no part of the text there either.
_LORAS: Final = ("lora", "lyco")
EXTRA_NETWORK: Final = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE)
_MARKS: Final = re.compile(
    rf"\\[()\[\]\\]|[()\[\]]|:\s*([+-]?[.\d]+(?:[eE][+-]?\d+)?)\s*\)|{EXTRA_NETWORK.pattern}", re.IGNORECASE
)
_BREAK: Final = re.compile(r"\bBREAK\b")
_PARTNERS: Final = {")": "(", "]": "["}
_QUOTED: Final = 16  # characters of the prompt on either side of a place that a message quotes
_PLAIN: Final = "or take all brackets as they are (plain_prompt)"
_AS_WORDS: Final = "which sdrt does not do: it is drawn as words"
# What stands in square brackets of prompt editing: [from:to:when], [to:when], [from::when].
_EDITING: Final = re.compile(r":\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\Z")
# Words and signs of other programs → what they are there.
_ELSEWHERE: Final = (
    (re.compile(r"\bAND\b"), "joins prompts in stable-diffusion-webui, " + _AS_WORDS),
    (re.compile(r"\{[^{}]*\|[^{}]*\}"), "chooses one at random in dynamic prompts, " + _AS_WORDS),
    (re.compile(r"\b__[\w/*-]+__\b"), "is a wildcard in dynamic prompts, " + _AS_WORDS),
    (
        re.compile(r"\bembedding:\S+"),
        "is a textual inversion in ComfyUI: load its file (--embedding FILE=WORD, load_textual_inversion) "
        "and write the word alone; it is drawn as words",
    ),
)


class PromptSyntaxWarning(UserWarning):
    """A prompt holds what means something elsewhere, or a bracket without its partner."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text that has one weight."""

    text: str
    weight: float = 1.0


Section = tuple[Piece, ...]


class LoraTag(NamedTuple):
    """A LoRA that a prompt asks for.

    Attributes:
        name: As the prompt has it.
        weights: How strongly it changes the model.
        quoted: The tag and where it stands, for messages.
    """

    name: str
    weights: LoraWeights
    quoted: str


class _Parsed(NamedTuple):
    """What a prompt means, and what of it is not taken as it may have been meant."""

    sections: tuple[Section, ...]
    remarks: tuple[str, ...] = ()
    tags: tuple[LoraTag, ...] = ()


@dataclass(slots=True)
class _Bracket:
    position: int
    first: int  # of the pieces inside of it


def parse_prompt(prompt: str, *, plain: bool = False, negative: bool = False) -> tuple[Section, ...]:
    """The sections between the prompt's ``BREAK``, each a sequence of weighted pieces; at least one section.

    Args:
        prompt: As the user typed it.
        plain: Brackets, backslashes and ``BREAK`` mean themselves, and so does all else.
        negative: It is what to move away from: ``<lora:…>`` is text there.

    Raises:
        UsageError: A weight is no number of −10 to 10, or brackets are nested too deep.
    """
    return ((Piece(prompt),),) if plain else _parsed(prompt, negative=negative).sections


def lora_tags(prompt: str, *, plain: bool = False) -> tuple[LoraTag, ...]:
    """The LoRAs that a prompt asks for, in their order; a negative prompt asks for none.

    Args:
        prompt: As the user typed it.
        plain: See `parse_prompt`; there are none then.

    Raises:
        UsageError: As `parse_prompt`, or a tag without a name, or with weights that are none.
    """
    return () if plain else _parsed(prompt).tags


def remarks_on(prompt: str, *, plain: bool = False, negative: bool = False) -> tuple[str, ...]:
    """What a prompt holds that means something elsewhere, or was perhaps meant otherwise, a sentence each.

    Args:
        prompt: As the user typed it.
        plain: See `parse_prompt`; nothing is remarked on then.
        negative: See `parse_prompt`.

    Raises:
        UsageError: As `parse_prompt`.
    """
    if plain:
        return ()
    found = [
        f"{_short(match[0])!r}{_at(prompt, match.start())}, {what}"
        for pattern, what in _ELSEWHERE
        for match in pattern.finditer(prompt)
    ]
    return (*_parsed(prompt, negative=negative).remarks, *(f"the prompt's {one}" for one in found))


def _parsed(prompt: str, *, negative: bool = False) -> _Parsed:
    parser = _Parser(prompt)
    end = 0
    for match in _MARKS.finditer(prompt):
        parser.text(prompt[end : match.start()])
        mark, end = match[0], match.end()
        if mark[0] == "\\":
            parser.text(mark[1])
        elif mark[0] == "<" and negative:
            parser.keep_as_text(mark, match.start())
        elif mark[0] == "<":
            parser.leave_out(mark, match.start())
        elif mark in "([":
            parser.open(mark, match.start())
        elif mark == "]":
            parser.close(mark, match.start(), 1 / ROUND)
        elif match[1] is None:
            parser.close(mark, match.start(), ROUND)
        elif not parser.is_open("("):
            parser.text(mark[:-1])
            parser.close(")", end - 1, ROUND)
        else:
            parser.close(")", end - 1, _number(match[1], prompt, match.start(1)))
    parser.text(prompt[end:])
    return _Parsed(parser.sections(), tuple(parser.remarks), tuple(parser.tags))


class _Parser:
    """What was read so far: texts with weights, None for ``BREAK``, and the brackets that are open."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt
        self._pieces: list[Piece | None] = []
        self._open: dict[str, list[_Bracket]] = {"(": [], "[": []}
        self._run: list[str] = []
        self.remarks: list[str] = []
        self.tags: list[LoraTag] = []

    def text(self, text: str) -> None:
        self._run.append(text)

    def leave_out(self, network: str, position: int) -> None:
        """Pass over what names a network beside the model, and note the LoRAs."""
        quoted = f"{_short(network)!r}{_at(self._prompt, position)}"
        kind, _, rest = network[1:-1].partition(":")
        if kind.lower() in _LORAS:
            self.tags.append(_lora_tag(rest, quoted))
            return
        self.remarks.append(
            f"the prompt's {quoted}, asks for a hypernetwork, which sdrt does not load: it is left out"
        )

    def keep_as_text(self, network: str, position: int) -> None:
        """In a negative prompt it is drawn as the characters that it consists of."""
        self.remarks.append(
            f"the negative prompt's {_short(network)!r}{_at(self._prompt, position)}, is text, as in "
            "stable-diffusion-webui: a LoRA is asked for in the prompt"
        )
        self.text(network)

    def is_open(self, mark: str) -> bool:
        return bool(self._open[mark])

    def open(self, mark: str, position: int) -> None:
        self._flush()
        if sum(map(len, self._open.values())) == MAX_DEPTH:
            raise UsageError(
                f"the prompt has brackets more than {MAX_DEPTH} deep{_at(self._prompt, position)}: give the "
                f"weight as a number, such as (word:1.3), {_PLAIN}"
            )
        self._open[mark].append(_Bracket(position, len(self._pieces)))

    def close(self, mark: str, position: int, weight: float) -> None:
        opened = self._open[_PARTNERS[mark]]
        if not opened:
            self._unbalanced(mark, position, "that closes nothing", "it is text")
            self.text(mark)
            return
        self._flush()
        bracket = opened.pop()
        if mark == "]":
            self._remark_on_square(self._prompt[bracket.position : position + 1], bracket.position)
        self._multiply(bracket.first, weight)

    def sections(self) -> tuple[Section, ...]:
        self._flush()
        for mark, weight in (("(", ROUND), ("[", 1 / ROUND)):
            for bracket in self._open[mark]:
                self._unbalanced(
                    mark, bracket.position, "that nothing closes", "it weighs all that follows it"
                )
                self._multiply(bracket.first, weight)
        sections: list[list[Piece]] = [[]]
        for piece in self._pieces:
            if piece is None:
                sections.append([])
                continue
            if not -MAX_WEIGHT <= piece.weight <= MAX_WEIGHT:
                raise UsageError(
                    f"nested brackets give {_short(piece.text)!r} the weight {piece.weight:.4g}: "
                    f"{-MAX_WEIGHT:g} to {MAX_WEIGHT:g} are allowed"
                )
            section = sections[-1]
            if section and section[-1].weight == piece.weight:
                section[-1] = Piece(section[-1].text + piece.text, piece.weight)
            else:
                section.append(piece)
        return tuple(map(tuple, sections))

    def _multiply(self, first: int, weight: float) -> None:
        for index in range(first, len(self._pieces)):
            piece = self._pieces[index]
            if piece is not None:
                self._pieces[index] = Piece(piece.text, piece.weight * weight)

    def _remark_on_square(self, text: str, position: int) -> None:
        """Square brackets may be prompt editing or alternatives, which are no weights elsewhere."""
        inside = text[1:-1]
        kind = "changes the prompt while it is drawn" if _EDITING.search(inside) else ""
        if "|" in inside:
            kind = "takes turns from step to step"
        if kind:
            self.remarks.append(
                f"the prompt's {_short(text)!r}{_at(self._prompt, position)}, {kind} in "
                f"stable-diffusion-webui, {_AS_WORDS}, with the weight of square brackets"
            )

    def _unbalanced(self, mark: str, position: int, fault: str, taken: str) -> None:
        self.remarks.append(
            f"the prompt has a {mark!r} {fault}{_at(self._prompt, position)}: {taken}, as in "
            f"stable-diffusion-webui; write \\{mark} for a bracket that is meant as such, {_PLAIN}"
        )

    def _flush(self) -> None:
        """End a run of text; escaped brackets belong to it as any other character does."""
        run = "".join(self._run)
        self._run.clear()
        for number, text in enumerate(_BREAK.split(run)):
            if number:
                self._pieces.append(None)
            if text:
                self._pieces.append(Piece(text))


def _number(text: str, prompt: str, position: int) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = float("nan")
    if not -MAX_WEIGHT <= weight <= MAX_WEIGHT:  # also if it is no number
        raise UsageError(
            f"the prompt has the weight {_short(text)!r}{_at(prompt, position)}: a number from "
            f"{-MAX_WEIGHT:g} to {MAX_WEIGHT:g}, such as (word:1.3); write \\( and \\) for brackets that are "
            f"meant as such, {_PLAIN}"
        )
    return weight


def _lora_tag(words: str, quoted: str) -> LoraTag:
    """What stands in ``<lora:…>``: a name, then weights by their place or by their name."""
    name, *rest = (word.strip() for word in words.split(":"))
    placed = [word for word in rest if "=" not in word]
    named = dict(word.split("=", 1) for word in rest if "=" in word)
    te = named.pop("te", placed[0] if placed else "1")
    unet = named.pop("unet", placed[1] if len(placed) > 1 else te)
    if not name or named or len(placed) > 2:
        raise UsageError(
            f"the prompt's {quoted}: a LoRA is <lora:name>, <lora:name:0.8>, or with a second weight for the "
            f"U-Net <lora:name:0.8:0.5>; write it otherwise, {_PLAIN}"
        )
    try:
        weights = {"text_encoder": float(te), "unet": float(unet)}
    except ValueError:
        raise UsageError(
            f"the prompt's {quoted}: {te!r} or {unet!r} is no weight of a LoRA; write a number, such as 0.8"
        ) from None
    return LoraTag(name, checked_weights(name, weights), quoted)


def _at(prompt: str, position: int) -> str:
    """Where something stands: its number of character, and what is around it."""
    begin, end = max(position - _QUOTED, 0), position + _QUOTED
    before, after = "…" if begin else "", "…" if end < len(prompt) else ""
    return f", character {position + 1}, in {before + prompt[begin:end] + after!r}"


def _short(text: str) -> str:
    return text if len(text) <= 2 * _QUOTED else text[: 2 * _QUOTED] + "…"
