"""What ``sd-run`` is asked to draw: prompts of the command line, of standard input and of files."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from sdrt.runtime.errors import UsageError

STDIN: Final = "-"
MAX_BYTES: Final = 1 << 24  # of all prompts together; a source without an end must not fill the memory
_JSON_SUFFIXES: Final = (".jsonl", ".ndjson")
# How a line of JSON begins, and no prompt: `{a|b}` is one.
_JSON: Final = re.compile(r"\{\s*[\"}]")


class Task(NamedTuple):
    """One call of the pipeline.

    Attributes:
        prompt: A text, several, or None where a picture alone says what to draw.
        options: Those that are its own, by the pipeline's names.
        output: Where its pictures go, if it says so.
        name: For messages: the line that it comes from; empty for the command line's.
    """

    prompt: str | list[str] | None
    options: Mapping[str, Any]
    output: Path | None = None
    name: str = ""


def has_prompt(arguments: argparse.Namespace) -> bool:
    """Whether the command line says what to draw in words, or where the words are."""
    words = arguments.prompt or arguments.more_prompts or arguments.prompts
    return bool(words) or arguments.recipe_prompt is not None


def read_tasks(arguments: argparse.Namespace) -> list[Task]:
    """The calls that a command line asks for: one for all of its texts, one for each line of JSON.

    A call has at most as many images as one may have; a longer list is several calls.

    Raises:
        UsageError: Words without quotes around them, a file that cannot be read, or a line that is no
            request.
    """
    from sdrt.runtime.request.texts import MAX_IMAGES

    _check_quotes(arguments.prompt)
    found: list[Task] = []
    for word in (*arguments.prompt, *arguments.more_prompts):
        found += _tasks_of(STDIN) if word == STDIN else [Task(word, {})]
    if arguments.prompts is not None:
        found += _tasks_of(arguments.prompts)
    most = max(1, MAX_IMAGES // max(1, arguments.num_images))
    tasks: list[Task] = []
    for with_name, group in itertools.groupby(found, lambda task: bool(task.name)):
        members = list(group)
        if with_name:
            tasks += members
            continue
        texts = [str(task.prompt) for task in members]
        for start in range(0, len(texts), most):
            part = texts[start : start + most]
            tasks.append(Task(part[0] if len(part) == 1 else part, {}))
    return tasks or [Task(None, {})]


def _check_quotes(words: list[str]) -> None:
    """Refuse what may be one prompt or several: a shell does not tell ``a cat`` from ``"a" "cat"``."""
    if len(words) > 1 and not any(len(word.split()) > 1 or word == STDIN for word in words):
        one = " ".join(words)
        raise UsageError(
            f'{len(words)} words without quotes: for one prompt write sd-run "{one[:200]}", for several give '
            "each with --prompt"
        )


def _tasks_of(source: str) -> list[Task]:
    """The prompts of a file, or of standard input.

    Raises:
        UsageError: It cannot be read, holds no prompt, or a line of it is no request.
    """
    name = "standard input" if source == STDIN else source
    try:
        text = _content(source).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read prompts from {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is no text in UTF-8 (byte {error.start + 1}): save it as such") from None
    except ValueError as error:
        raise UsageError(f"cannot read prompts from {name}: {error}") from None
    numbered = enumerate((line.strip() for line in text.split("\n")), start=1)
    lines = [(number, line) for number, line in numbered if line]
    if not lines:
        raise UsageError(f"{name} holds no prompt: one a line is wanted")
    if Path(source).suffix.lower() in _JSON_SUFFIXES or _JSON.match(lines[0][1]):
        return list(_requests(name, lines))
    return [Task(line, {}) for _, line in lines]


def _content(source: str) -> bytes:
    """At most `MAX_BYTES` of a file, a pipe, or standard input."""
    if source != STDIN:
        with Path(source).open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    elif sys.stdin is None:
        raise ValueError("it is closed")
    else:
        content = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes, which is the limit")
    return content


def _requests(source: str, lines: list[tuple[int, str]]) -> Iterator[Task]:
    """Lines of JSON as calls, with the names of ``--interactive``."""
    from sdrt.runtime.cli.json_lines import check_options, json_object, with_inline_pictures

    for number, line in lines:
        name = f"line {number} of {source}"
        request = json_object(line, name)
        check_options(request, name)
        request.pop("id", None)
        output = request.pop("output", None)
        if output is not None and not isinstance(output, str):
            raise UsageError(f"{name}: output is {output!r}: a path is wanted")
        prompt = request.pop("prompt", None)
        target = None if output is None else Path(output)
        yield Task(prompt, with_inline_pictures(request), target, name)
