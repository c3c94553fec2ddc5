"""A bundle's ``tokenizer.json``, checked before the Rust library reads it.

Its regular expressions are run on whatever is typed: one that can go back and forth over a text, as
``(a+)+b`` does, takes longer than anybody waits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sdrt.runtime.bundle.limits import MAX_PATTERN_CHARACTERS, MAX_TOKENIZER_BYTES
from sdrt.runtime.errors import BundleError
from sdrt.runtime.system.untrusted import read_json

_ONE_CHARACTER: Final = re.compile(r"\\[pPx]\{[^{}]*\}|\\.|\[(?:\\.|[^\]\\])*\]", re.DOTALL)
# A group that is repeated, one that looks around, or two repetitions in one alternative.
_WILD: Final = re.compile(r"\)[*+?{]|\(\?|[*+?}][^|]*[*+?{]")


def check_tokenizer_file(path: Path) -> None:
    """Refuse what is no byte-pair tokenizer with tame patterns.

    Raises:
        BundleError: It is so, or the file cannot be read or is too large.
    """
    try:
        document = read_json(path, limit=MAX_TOKENIZER_BYTES)
        _check(document)
    except OSError as error:
        raise BundleError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    except ValueError as error:
        raise BundleError(f"{path} is no tokenizer of a bundle: {error}; export the bundle again") from None


def _check(document: Any) -> None:
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise ValueError("it holds no model")
    if document["model"].get("type") != "BPE":
        raise ValueError("its model is not BPE")
    steps = [document.get(name) for name in ("normalizer", "pre_tokenizer")]
    for pattern in _patterns(steps):
        plain = _ONE_CHARACTER.sub("x", pattern)
        if len(pattern) > MAX_PATTERN_CHARACTERS or _WILD.search(plain):
            raise ValueError(
                f"the regular expression {pattern[:80]!r} could take for ever: at most "
                f"{MAX_PATTERN_CHARACTERS} characters, alternatives with one repetition each"
            )


def _patterns(value: Any) -> Iterator[str]:
    """Every regular expression, at whatever place."""
    if isinstance(value, dict):
        if isinstance(value.get("Regex"), str):
            yield value["Regex"]
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from _patterns(entry)
