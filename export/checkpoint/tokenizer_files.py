"""The files of a ``tokenizer`` folder, and the words that were added to CLIP's vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdrt.runtime.errors import CheckpointError
from sdrt.runtime.system.untrusted import MAX_JSON_BYTES, parse_json, read_limited


def added_words(folder: Path, ids: Mapping[str, int]) -> dict[str, int]:
    """Words that a folder adds to a vocabulary, as a saved textual inversion does, and their ids.

    Each has an embedding of its own in the text encoder, and is found wherever it stands in a prompt, in any
    case.

    Args:
        folder: As for `sdrt.export.checkpoint.tokenizer_json.tokenizer_json_from_folder`.
        ids: Of the vocabulary.

    Raises:
        CheckpointError: A word has no id, or that of another; or it stands for several vectors, which
            diffusers puts in its place and a tokenizer cannot.
    """
    result: dict[str, int] = {}
    for word, index in _listed(folder):
        if not isinstance(word, str) or not word.strip():
            raise CheckpointError(f"{folder} adds {word!r} to CLIP's vocabulary, which is no word")
        if word in ids:
            continue
        word = word.lower()  # as prompts are before they are split
        if word in ids or type(index) is not int or index < 0 or result.get(word, index) != index:
            raise CheckpointError(
                f"{folder} adds {word} to CLIP's vocabulary with the id {index!r}, which is not its own"
            )
        result[word] = index
    taken = [*ids.values(), *result.values()]
    if len(set(taken)) != len(taken):
        raise CheckpointError(f"{folder} adds words to CLIP's vocabulary with ids that are taken")
    several = [word for word in result if (match := re.fullmatch(r"(.+)_\d+", word)) and match[1] in result]
    if several:
        first = several[0].rpartition("_")[0]
        raise CheckpointError(
            f"{folder} adds {first} to CLIP's vocabulary as several vectors ({', '.join(several[:3])}): "
            "export the checkpoint without them, and give the textual inversion to sd-run (--embedding)"
        )
    return result


def _listed(folder: Path) -> Iterator[tuple[Any, Any]]:
    """Every word and its id that a file of a folder calls an added one."""
    yield from optional_json(folder / "added_tokens.json").items()
    decoder = optional_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for index, token in (decoder if isinstance(decoder, dict) else {}).items():
        yield token_text(token), int(index) if str(index).isdecimal() else index
    listed = optional_json(folder / "tokenizer.json").get("added_tokens")
    for token in listed if isinstance(listed, list) else ():
        yield token_text(token), token.get("id") if isinstance(token, dict) else None


def token_text(token: Any) -> Any:
    """A token is written as a string or as an object with its ``content``."""
    return token.get("content") if isinstance(token, dict) else token


def optional_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file."""
    return json_object(path) if path.exists() else {}


def json_object(path: Path) -> dict[str, Any]:
    """What a file holds.

    Raises:
        CheckpointError: It cannot be read, or holds no JSON object.
    """
    try:
        document = parse_json(text_of(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} must be a JSON object, not {type(document).__name__}")
    return document


def text_of(path: Path) -> str:
    """A file as UTF-8 text.

    Raises:
        CheckpointError: It cannot be read, is too large, or is no such text.
    """
    try:
        return read_limited(path, MAX_JSON_BYTES).decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is not UTF-8 text") from None
    except ValueError as error:
        raise CheckpointError(f"cannot read: {error}") from None
