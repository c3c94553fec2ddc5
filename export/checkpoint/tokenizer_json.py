"""CLIP's tokenizer as one ``tokenizer.json`` for the Rust library ``tokenizers``.

The file is whole by itself: with ``tokenizers`` alone it gives CLIP's ids for ordinary prompts,
BOS, EOS, truncation and padding included. `sdrt.runtime.text.tokenizer` puts OpenAI's text clean-up in
place of the file's normalizer, and then the ids are those of OpenAI's ``SimpleTokenizer`` for any
prompt.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypedDict

import tokenizers

from sdrt.export.checkpoint.tokenizer_files import (
    added_words,
    json_object,
    optional_json,
    text_of,
    token_text,
)
from sdrt.runtime.errors import CheckpointError, UsageError

BOS: Final = "<|startoftext|>"
EOS: Final = "<|endoftext|>"
WORD_END: Final = "</w>"
CLIP_LENGTH: Final = 77  # position embeddings of CLIP's text encoders
NUM_MERGES: Final = 49152 - 256 - 2  # those of the vocabulary file that CLIP uses

_VOCABULARY_FILE: Final = Path(__file__).parents[1] / "data" / "bpe_simple_vocab_16e6.txt.gz"
# OpenAI's pattern, with what its IGNORECASE means in lower-case text written out: the long s is an
# s, and U+0345, whose case folding is the letter iota, matches neither the class of letters nor its
# complement.
_SPLIT: Final = (
    r"<\|[sſ]tartoftext\|>|<\|endoftext\|>|'[sſ]|'t|'re|'ve|'m|'ll|'d"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
)


class TokenizerIds(TypedDict):
    """What a manifest says of the tokenizer beside its file: row length, and three token ids."""

    max_length: int
    bos: int
    eos: int
    pad: int


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A byte-pair encoding: token → id, the merges, most frequent first, and words that were added to it."""

    ids: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    added: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ClipTokenizer:
    """A checked tokenizer: its vocabulary, and what a manifest says of it."""

    vocabulary: Vocabulary
    ids: TokenizerIds

    def to_json(self) -> bytes:
        """``tokenizer.json``, whole by itself."""
        return _tokenizer_json(self.vocabulary, self.ids)


def open_tokenizer(
    folder: Path, max_positions: int = CLIP_LENGTH, vocabulary: Vocabulary | None = None
) -> ClipTokenizer:
    """Read and check a checkpoint's ``tokenizer`` folder.

    Args:
        folder: As for `tokenizer_json_from_folder`.
        max_positions: Position embeddings of the text encoder: ``max_length`` is never more.
        vocabulary: For a folder that holds configuration files only.

    Raises:
        CheckpointError: As for `tokenizer_json_from_folder`.
    """
    vocabulary = vocabulary or vocabulary_from_folder(folder)
    return ClipTokenizer(vocabulary, _facts(folder, vocabulary, max_positions))


def tokenizer_json_from_folder(folder: Path, max_positions: int = CLIP_LENGTH) -> bytes:
    """``tokenizer.json`` from a checkpoint's ``tokenizer`` folder.

    Args:
        folder: Holds ``vocab.json`` and ``merges.txt``, or a ``tokenizer.json``; and the
            configuration files that `facts_from_folder` reads.
        max_positions: Position embeddings of the text encoder.

    Raises:
        CheckpointError: A file is missing or malformed, a merge refers to a token that is not in
            the vocabulary, a special token is missing, or a word that was added to CLIP's has no place
            in a bundle.
    """
    return open_tokenizer(folder, max_positions).to_json()


def tokenizer_json_from_vocabulary(num_merges: int | None = None) -> bytes:
    """``tokenizer.json`` from OpenAI's vocabulary: 49,408 tokens, or ``514 + num_merges``.

    Raises:
        UsageError: ``num_merges`` is not within 0 … 48,894.
    """
    return _tokenizer_json(*_clip(num_merges))


def facts_from_folder(folder: Path, max_positions: int = CLIP_LENGTH) -> TokenizerIds:
    """Length and special ids of the tokenizer in a checkpoint's ``tokenizer`` folder.

    Read from ``tokenizer_config.json`` and ``special_tokens_map.json`` with the precedence that
    transformers gives them; CLIP's own values where they say nothing. Stable Diffusion 1.x pads
    with EOS, 2.x with ``!``.

    Args:
        folder: As for `tokenizer_json_from_folder`.
        max_positions: Position embeddings of the text encoder: ``max_length`` is never more.

    Raises:
        CheckpointError: As for `tokenizer_json_from_folder`.
    """
    return open_tokenizer(folder, max_positions).ids


def write_tokenizer_folder(folder: Path, num_merges: int | None = None, pad: str = EOS) -> None:
    """Write OpenAI's vocabulary as a ``tokenizer`` folder that transformers' CLIPTokenizer loads.

    ``vocab.json``, ``merges.txt``, ``tokenizer_config.json`` and ``special_tokens_map.json``; with
    the first ``num_merges`` merges only, if given. ``pad`` is the token that fills a row up.

    Raises:
        UsageError: ``num_merges`` is not within 0 … 48,894.
        OSError: The folder cannot be written.
    """
    vocabulary, facts = _clip(num_merges)
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": pad, "unk_token": EOS}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": facts["max_length"]}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in vocabulary.merges)]
    files = {
        "vocab.json": json.dumps(vocabulary.ids, ensure_ascii=False),
        "merges.txt": "\n".join(merges),
        "tokenizer_config.json": json.dumps(config | special, indent=2),
        "special_tokens_map.json": json.dumps(special, indent=2),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")


def vocabulary_from_clip(num_merges: int | None = None) -> Vocabulary:
    """OpenAI's vocabulary: 256 bytes, the same ending a word, one token per merge, BOS and EOS.

    Raises:
        UsageError: ``num_merges`` is not within 0 … 48,894.
    """
    count = NUM_MERGES if num_merges is None else num_merges
    if not 0 <= count <= NUM_MERGES:
        raise UsageError(f"num_merges is {count}, it must be from 0 to {NUM_MERGES}")
    with gzip.open(_VOCABULARY_FILE, "rt", encoding="utf-8") as stream:
        merges = list(_merges_from_text(stream.read().split("\n")[: count + 1], _VOCABULARY_FILE))
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + WORD_END for symbol in symbols)]
    tokens += [*(left + right for left, right in merges), BOS, EOS]
    return Vocabulary({token: index for index, token in enumerate(tokens)}, merges)


def vocabulary_from_folder(folder: Path) -> Vocabulary:
    """The vocabulary of a checkpoint's ``tokenizer`` folder, checked.

    Raises:
        CheckpointError: As for `tokenizer_json_from_folder`.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if {"vocab.json", "merges.txt"} <= names:
        ids = json_object(folder / "vocab.json")
        merges = tuple(_merges_from_text(text_of(folder / "merges.txt").split("\n"), folder / "merges.txt"))
    elif "tokenizer.json" in names:
        ids, merges = _model_from_tokenizer_json(folder / "tokenizer.json")
    else:
        raise CheckpointError(f"{folder} holds no tokenizer: vocab.json and merges.txt, or tokenizer.json")
    _check_ids(ids, folder)
    _check_merges(ids, merges, folder)
    added = added_words(folder, ids)
    return Vocabulary({**ids, **added}, merges, tuple(added))


def byte_symbols() -> list[str]:
    """One printable character for each byte, in the order of CLIP's ids (GPT-2's
    ``bytes_to_unicode``).

    Bytes that are printable in Latin-1 stand for themselves; the others follow, as U+0100 and on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in (*printable, *range(0x100, 0x200 - len(printable)))]


def _clip(num_merges: int | None) -> tuple[Vocabulary, TokenizerIds]:
    vocabulary = vocabulary_from_clip(num_merges)
    bos, eos = vocabulary.ids[BOS], vocabulary.ids[EOS]
    return vocabulary, TokenizerIds(max_length=CLIP_LENGTH, bos=bos, eos=eos, pad=eos)


# Without `use_regex` false ByteLevel would split once more, by GPT-2's pattern.
_BYTE_LEVEL: Final = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
_NORMALIZER: Final = {
    "type": "Sequence",
    "normalizers": [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Lowercase"},
    ],
}
_PRE_TOKENIZER: Final = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Removed", "invert": True},
        _BYTE_LEVEL,
    ],
}
_DECODER: Final = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": WORD_END}, "content": "Ġ"},  # byte 0x20
        _BYTE_LEVEL,
    ],
}


def _tokenizer_json(vocabulary: Vocabulary, facts: TokenizerIds) -> bytes:
    """The file for the Rust library; the same bytes for the same vocabulary and facts."""
    tokens = {index: token for token, index in vocabulary.ids.items()}
    bos, eos = facts["bos"], facts["eos"]
    document = {
        "version": "1.0",
        "truncation": {
            "direction": "Right",
            "max_length": facts["max_length"],
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": _padding(facts, tokens[facts["pad"]]),
        "added_tokens": [
            *(_added(index, tokens[index], special=True) for index in sorted({bos, eos})),
            *(_added(vocabulary.ids[word], word, special=False) for word in vocabulary.added),
        ],
        "normalizer": _NORMALIZER,
        "pre_tokenizer": _PRE_TOKENIZER,
        "post_processor": _template(tokens[bos], bos, tokens[eos], eos),
        "decoder": _DECODER,
        "model": _byte_pairs(vocabulary),
    }
    data = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    tokenizers.Tokenizer.from_buffer(data)  # a file that the library refuses is never handed out
    return data


def _padding(facts: TokenizerIds, token: str) -> dict[str, Any]:
    return {
        "strategy": {"Fixed": facts["max_length"]},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": facts["pad"],
        "pad_type_id": 0,
        "pad_token": token,
    }


def _added(index: int, token: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": token, **flags, "special": special}


def _byte_pairs(vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": EOS,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": WORD_END,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(sorted(vocabulary.ids.items(), key=lambda item: item[1])),
        "merges": [" ".join(pair) for pair in vocabulary.merges],
    }


def _template(bos: str, bos_id: int, eos: str, eos_id: int) -> dict[str, Any]:
    def special(token: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": 0}}

    def sequence(name: str) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": 0}}

    single = [special(bos), sequence("A"), special(eos)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, sequence("B"), special(eos)],
        "special_tokens": {
            token: {"id": token, "ids": [index], "tokens": [token]}
            for token, index in ((bos, bos_id), (eos, eos_id))
        },
    }


def _facts(folder: Path, vocabulary: Vocabulary, max_positions: int) -> TokenizerIds:
    config = optional_json(folder / "tokenizer_config.json")
    special = optional_json(folder / "special_tokens_map.json")
    # transformers reads the map last, and not at all beside a list of added tokens.
    merged = config if "added_tokens_decoder" in config else {**config, **special}

    def token_id(key: str, default: str) -> int:
        token = token_text(merged.get(key) or default)
        if not isinstance(token, str) or token not in vocabulary.ids:
            raise CheckpointError(f"{folder}: the {key} {token!r} is not in the vocabulary")
        return vocabulary.ids[token]

    length = merged.get("model_max_length") or max_positions
    if not (isinstance(length, int | float) and length >= 2):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: model_max_length is {length!r}, "
            "it must be a number of 2 or more"
        )
    return TokenizerIds(
        max_length=int(min(length, max_positions)),
        bos=token_id("bos_token", BOS),
        eos=token_id("eos_token", EOS),
        pad=token_id("pad_token", token_text(merged.get("eos_token") or EOS)),
    )


def _model_from_tokenizer_json(path: Path) -> tuple[dict[str, Any], tuple[tuple[str, str], ...]]:
    model = json_object(path).get("model")
    if (
        not isinstance(model, dict)
        or not isinstance(model.get("vocab"), dict)
        or not isinstance(model.get("merges"), list)
        or model.get("end_of_word_suffix") != WORD_END
    ):
        raise CheckpointError(f"{path} is not CLIP's kind of tokenizer (byte pairs with {WORD_END!r})")
    merges = model["merges"]  # each "left right" in older files, ["left", "right"] in newer ones
    lines = [merge if isinstance(merge, str) else " ".join(map(str, merge)) for merge in merges]
    return model["vocab"], tuple(_merges_from_text(lines, path))


def _merges_from_text(lines: Sequence[str], path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and "#version" in line):
            continue
        parts = line.split()
        if len(parts) != 2:
            raise CheckpointError(f"{path}, merge {number}: {line!r} is not two tokens")
        yield parts[0], parts[1]


def _check_ids(ids: Mapping[str, Any], folder: Path) -> None:
    if not all(type(index) is int and index >= 0 for index in ids.values()):
        raise CheckpointError(f"{folder}: the vocabulary has ids that are not numbers of 0 or more")
    if len(set(ids.values())) != len(ids):
        raise CheckpointError(f"{folder}: two tokens of the vocabulary have the same id")
    for token in (BOS, EOS):
        if token not in ids:
            raise CheckpointError(f"{folder}: the vocabulary lacks {token}; it is not CLIP's")


def _check_merges(ids: Mapping[str, int], merges: Sequence[tuple[str, str]], folder: Path) -> None:
    for number, (left, right) in enumerate(merges, 1):
        for token in (left, right, left + right):
            if token not in ids:
                raise CheckpointError(
                    f"{folder}: merge {number} ({left} {right}) refers to {token!r}, "
                    "which is not in the vocabulary; the two files do not belong together"
                )
