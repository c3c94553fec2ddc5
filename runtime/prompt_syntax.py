"""Attention weights and ``BREAK`` in a prompt, with the meaning that stable-diffusion-webui gave them.

==================  ======================================================================
``(a red apple)``   weight 1.1
``(a red apple:w)`` weight w, a number such as 1.3 or 0.8
``[a red apple]``   weight 1/1.1
``((a) b)``         nested weights multiply
``\\( \\) \\[ \\] \\\\``  the character itself
``BREAK``           in capitals, as a word of its own: what follows begins a new chunk
==================  ======================================================================

The reference is ``parse_prompt_attention`` of its ``modules/prompt_parser.py``. Where that guesses (a bracket
without its partner, a weight such as 1.2.3) this refuses, and a backslash before anything else is kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from sdrt.runtime.errors import UsageError

ROUND: Final = 1.1  # weight of round brackets without a number; square ones have its inverse
MAX_WEIGHT: Final = 10.0
MAX_DEPTH: Final = 50  # brackets inside of each other
_MARKS: Final = re.compile(r"\\[()\[\]\\]|[()\[\]]|:\s*([+-]?[.\d]+(?:[eE][+-]?\d+)?)\s*\)")
_BREAK: Final = re.compile(r"\bBREAK\b")
_PARTNERS: Final = {")": "(", "]": "["}
_QUOTED: Final = 16  # characters of the prompt on either side of a place that a message quotes
_PLAIN: Final = "or take all brackets as they are (plain_prompt)"


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text that has one weight."""

    text: str
    weight: float = 1.0


Section = tuple[Piece, ...]


@dataclass(slots=True)
class _Bracket:
    mark: str
    position: int
    first: int  # of the pieces inside of it


def parse_prompt(prompt: str, *, plain: bool = False) -> tuple[Section, ...]:
    """The sections between the prompt's ``BREAK``, each a sequence of weighted pieces; at least one section.

    Args:
        prompt: As the user typed it.
        plain: Brackets, backslashes and ``BREAK`` mean themselves.

    Raises:
        UsageError: A bracket has no partner, or a weight is no number of −10 to 10.
    """
    if plain:
        return ((Piece(prompt),),)
    parser = _Parser(prompt)
    end = 0
    for match in _MARKS.finditer(prompt):
        parser.text(prompt[end : match.start()])
        mark, end = match[0], match.end()
        if mark[0] == "\\":
            parser.text(mark[1])
        elif mark in "([":
            parser.open(mark, match.start())
        elif mark == "]":
            parser.close(mark, match.start(), 1 / ROUND)
        elif match[1] is None:
            parser.close(mark, match.start(), ROUND)
        else:
            parser.close(")", end - 1, _number(match[1], prompt, match.start(1)))
    parser.text(prompt[end:])
    return parser.sections()


class _Parser:
    """What was read so far: texts with weights, None for ``BREAK``, and the brackets that are open."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt
        self._pieces: list[Piece | None] = []
        self._open: list[_Bracket] = []
        self._run: list[str] = []

    def text(self, text: str) -> None:
        self._run.append(text)

    def open(self, mark: str, position: int) -> None:
        self._flush()
        if len(self._open) == MAX_DEPTH:
            raise UsageError(
                f"the prompt has brackets more than {MAX_DEPTH} deep{_at(self._prompt, position)}: give the "
                f"weight as a number, such as (word:1.3), {_PLAIN}"
            )
        self._open.append(_Bracket(mark, position, len(self._pieces)))

    def close(self, mark: str, position: int, weight: float) -> None:
        self._flush()
        if not self._open or self._open[-1].mark != _PARTNERS[mark]:
            raise _unbalanced(self._prompt, mark, position, "that closes nothing", "remove it")
        first = self._open.pop().first
        for index in range(first, len(self._pieces)):
            piece = self._pieces[index]
            if piece is not None:
                self._pieces[index] = Piece(piece.text, piece.weight * weight)

    def sections(self) -> tuple[Section, ...]:
        self._flush()
        if self._open:
            last = self._open[-1]
            raise _unbalanced(self._prompt, last.mark, last.position, "that nothing closes", "close it")
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


def _unbalanced(prompt: str, mark: str, position: int, fault: str, mend: str) -> UsageError:
    return UsageError(
        f"the prompt has a {mark!r} {fault}{_at(prompt, position)}: {mend}, write \\{mark} for a bracket "
        f"that is meant as such, {_PLAIN}"
    )


def _at(prompt: str, position: int) -> str:
    """Where something stands: its number of character, and what is around it."""
    begin, end = max(position - _QUOTED, 0), position + _QUOTED
    before, after = "…" if begin else "", "…" if end < len(prompt) else ""
    return f", character {position + 1}, in {before + prompt[begin:end] + after!r}"


def _short(text: str) -> str:
    return text if len(text) <= 2 * _QUOTED else text[: 2 * _QUOTED] + "…"
