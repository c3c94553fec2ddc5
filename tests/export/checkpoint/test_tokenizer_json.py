"""tokenizer.json from checkpoints and from OpenAI's vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import CLIPTokenizer

from sdrt.export.checkpoint.tokenizer_json import (
    NUM_MERGES,
    facts_from_folder,
    tokenizer_json_from_folder,
    tokenizer_json_from_vocabulary,
    vocabulary_from_clip,
    write_tokenizer_folder,
)
from sdrt.runtime.errors import CheckpointError, UsageError
from sdrt.runtime.text.tokenizer import Tokenizer

SMALL = 1000  # merges: quick to write, and like the embedded model's
ORDINARY = [
    "",
    "a photo of an astronaut riding a horse on mars",
    "It's a RED apple, they'll say: 4k, best quality!",
    "  two   spaces\nand a new line ",
    "Café in München, 東京 🍎",
    "very long " * 100,
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer"
    write_tokenizer_folder(path, SMALL)
    return path


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object; a value of None removes the key."""
    document = json.loads(path.read_text()) if path.exists() else {}
    document |= changes
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))


def load(folder: Path, target: Path) -> Tokenizer:
    target.write_bytes(tokenizer_json_from_folder(folder))
    return Tokenizer.from_file(target, **facts_from_folder(folder))


@pytest.mark.parametrize("num_merges", [None, SMALL])
def test_ids_are_those_of_transformers_for_ordinary_prompts(tmp_path: Path, num_merges: int | None) -> None:
    write_tokenizer_folder(tmp_path, num_merges)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    ours = load(tmp_path, tmp_path / "ours.json")
    expected = theirs(ORDINARY, padding="max_length", truncation=True, return_tensors="np")
    assert ours(ORDINARY).tolist() == expected.input_ids.tolist()


def test_file_is_whole_by_itself(folder: Path) -> None:
    """The Rust library alone gives rows with BOS, EOS, truncation and padding, and back again."""
    alone = tokenizers.Tokenizer.from_buffer(tokenizer_json_from_folder(folder))
    ours = load(folder, folder / "ours.json")
    for prompt in ORDINARY:
        assert alone.encode(prompt).ids == ours([prompt])[0].tolist()
    assert alone.decode(alone.encode("Café  🍎, it's").ids).strip() == "café 🍎, it 's"


def test_clip_vocabulary() -> None:
    vocabulary = vocabulary_from_clip()
    assert len(vocabulary.ids) == 49_408  # so every merge makes a token of its own
    assert sorted(vocabulary.ids.values()) == list(range(49_408))
    assert vocabulary.ids["!"] == 0
    assert vocabulary.ids["<|startoftext|>"] == 49_406
    assert len(vocabulary.merges) == NUM_MERGES == 48_894
    assert vocabulary.merges[0] == ("i", "n")
    assert vocabulary.merges[-1] == ("jeky", "ll</w>")


def test_first_merges_only() -> None:
    vocabulary = vocabulary_from_clip(SMALL)
    assert len(vocabulary.ids) == 514 + SMALL
    assert vocabulary.ids["<|endoftext|>"] == 513 + SMALL
    assert vocabulary.merges == vocabulary_from_clip().merges[:SMALL]


@pytest.mark.parametrize("num_merges", [-1, NUM_MERGES + 1])
def test_number_of_merges_out_of_range_is_refused(num_merges: int) -> None:
    with pytest.raises(UsageError, match="from 0 to 48894"):
        tokenizer_json_from_vocabulary(num_merges)


def test_all_sources_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """vocab.json and merges.txt; OpenAI's file; what transformers 5 saves; older tokenizer.json."""
    expected = tokenizer_json_from_folder(folder)
    assert tokenizer_json_from_vocabulary(SMALL) == expected

    saved = tmp_path / "saved"
    CLIPTokenizer.from_pretrained(folder).save_pretrained(saved)
    assert not (saved / "vocab.json").exists()
    assert tokenizer_json_from_folder(saved) == expected

    document = json.loads((saved / "tokenizer.json").read_text())
    assert isinstance(document["model"]["merges"][0], list)
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    (saved / "tokenizer.json").write_text(json.dumps(document))
    assert tokenizer_json_from_folder(saved) == expected


BANG = {"content": "!", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.mark.parametrize(
    ("config", "special", "pad"),
    [
        ({}, {}, "<|endoftext|>"),  # Stable Diffusion 1.x
        ({"pad_token": "<|endoftext|>"}, {"pad_token": "!"}, "!"),  # 2.x
        ({"pad_token": "<|endoftext|>"}, {"pad_token": BANG}, "!"),
        ({"pad_token": "!"}, {"pad_token": None}, "!"),
        ({"pad_token": None}, {"pad_token": None}, "<|endoftext|>"),
        (
            {
                "pad_token": "<|endoftext|>",
                "added_tokens_decoder": {"1513": {**BANG, "content": "<|endoftext|>"}},
            },
            {"pad_token": "!"},
            "<|endoftext|>",
        ),
    ],
)
def test_pad_token_is_the_one_that_transformers_takes(
    folder: Path, config: dict[str, Any], special: dict[str, Any], pad: str
) -> None:
    edit(folder / "tokenizer_config.json", **config)
    edit(folder / "special_tokens_map.json", **special)
    facts = facts_from_folder(folder)
    assert facts["pad"] == vocabulary_from_clip(SMALL).ids[pad]
    theirs = CLIPTokenizer.from_pretrained(folder)
    assert facts["pad"] == theirs.pad_token_id
    assert facts["bos"] == theirs.bos_token_id
    assert facts["eos"] == theirs.eos_token_id
    prompt = "a cat"
    expected = theirs(prompt, padding="max_length").input_ids
    assert load(folder, folder / "ours.json")([prompt])[0].tolist() == expected
    alone = tokenizers.Tokenizer.from_file(str(folder / "ours.json"))
    assert alone.encode(prompt).ids == expected


@pytest.mark.parametrize(
    ("written", "positions", "expected"),
    [(77, 77, 77), (None, 77, 77), (10**30, 77, 77), (1e30, 64, 64), (32, 77, 32), (77, 64, 64)],
)
def test_length_is_never_more_than_the_positions(
    folder: Path, written: float | None, positions: int, expected: int
) -> None:
    edit(folder / "tokenizer_config.json", model_max_length=written)
    assert facts_from_folder(folder, positions)["max_length"] == expected
    alone = tokenizers.Tokenizer.from_buffer(tokenizer_json_from_folder(folder, positions))
    assert len(alone.encode("cat").ids) == len(alone.encode("cat " * 99).ids) == expected


def test_without_configuration_files_clips_own_values_hold(folder: Path) -> None:
    expected = facts_from_folder(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    assert facts_from_folder(folder) == expected
    assert expected == {"max_length": 77, "bos": 1512, "eos": 1513, "pad": 1513}


def drop_token(token: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "vocab.json", **{token: None})


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return apply


def change(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, **changes)


def only_tokenizer_json(document: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "vocab.json").unlink()
        (folder / "tokenizer.json").write_text(json.dumps(document))

    return apply


ADDED = ["a photo of a <cat-toy>", "<CAT-TOY>,(gta5-artwork)s <cat-toy><cat-toy>", "a cat-toy, gta5 artwork"]


def test_words_that_were_added_are_found_where_transformers_finds_them(folder: Path, tmp_path: Path) -> None:
    """As a textual inversion of one vector leaves them in a saved pipeline."""
    theirs = CLIPTokenizer.from_pretrained(folder)
    theirs.add_tokens(["<cat-toy>", "gta5-artwork"])
    theirs.save_pretrained(tmp_path / "saved")
    ours = load(tmp_path / "saved", tmp_path / "ours.json")
    first = 514 + SMALL
    assert {first, first + 1} <= set(ours.tokens(ADDED[1]))
    for prompt in (*ADDED, *ORDINARY):
        expected = theirs(prompt, padding="max_length", truncation=True).input_ids
        assert ours.encode(prompt).ids.tolist() == expected


def test_an_older_folder_lists_added_words_by_themselves(folder: Path, tmp_path: Path) -> None:
    added = {"<Cat-Toy>": 514 + SMALL, "<|endoftext|>": 513 + SMALL}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    ours = load(folder, tmp_path / "ours.json")
    assert ours.tokens("<cat-toy>") == ours.tokens("<CAT-toy>") == [514 + SMALL]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "merges.txt").unlink(), "holds no tokenizer"),
        (lambda folder: (folder / "vocab.json").unlink(), "holds no tokenizer"),
        (write("vocab.json", b'{"a": 1'), r"vocab\.json is not valid JSON"),
        (write("vocab.json", b"[1]"), r"vocab\.json must be a JSON object, not list"),
        (write("vocab.json", b"\xff"), r"vocab\.json is not UTF-8"),
        (write("merges.txt", b"#version: 0.2\ni n\nthree in line\n"), "merge 3: 'three in line'"),
        (write("merges.txt", b"#version: 0.2\nq zzz\n"), r"merge 1 \(q zzz\) refers to 'zzz'"),
        (write("merges.txt", b"q z\n"), r"merge 1 \(q z\) refers to 'qz'"),
        (drop_token("<|startoftext|>"), r"lacks <\|startoftext\|>"),
        (drop_token("<|endoftext|>"), r"lacks <\|endoftext\|>"),
        (drop_token("th"), r"merge 2 \(t h\) refers to 'th'"),
        (change("vocab.json", new=0), "two tokens of the vocabulary have the same id"),
        (change("vocab.json", new=-1), "ids that are not numbers"),
        (change("vocab.json", new="7"), "ids that are not numbers"),
        (change("special_tokens_map.json", pad_token="<pad>"), "pad_token '<pad>' is not in the"),
        (change("special_tokens_map.json", bos_token={"content": ["x"]}), "bos_token"),
        (change("tokenizer_config.json", model_max_length="long"), "model_max_length is 'long'"),
        (change("tokenizer_config.json", model_max_length=1), "model_max_length is 1"),
        (change("tokenizer_config.json", model_max_length=float("nan")), "NaN is no finite number"),
        (write("tokenizer_config.json", b"no"), r"tokenizer_config\.json is not valid JSON"),
        (write("added_tokens.json", b'{"<cat-toy>": 7}'), "adds words to CLIP's .* ids that are taken"),
        (write("added_tokens.json", b'{"<cat-toy>": "x"}'), "adds <cat-toy> .* with the id 'x', which is"),
        (write("added_tokens.json", b'{" ": 1514}'), "adds ' ' to CLIP's vocabulary, which is no word"),
        (
            write("added_tokens.json", b'{"<toy>": 1514, "<toy>_1": 1515}'),
            r"adds <toy> to CLIP's vocabulary as several vectors \(<toy>_1\): .* sd-run \(--embedding\)",
        ),
        (
            change("tokenizer_config.json", added_tokens_decoder={"x": {"content": "<cat-toy>"}}),
            "adds <cat-toy> .* with the id 'x'",
        ),
        (write("tokenizer.json", b'{"added_tokens": [{"content": "<x>"}]}'), "adds <x> .* the id None"),
        (only_tokenizer_json({}), "not CLIP's kind of tokenizer"),
        (only_tokenizer_json({"model": {"type": "Unigram", "vocab": []}}), "not CLIP's kind"),
    ],
)
def test_damaged_folder_is_refused(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        tokenizer_json_from_folder(folder)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        tokenizer_json_from_folder(tmp_path / "none")


def test_file_of_another_system_has_carriage_returns(folder: Path) -> None:
    expected = tokenizer_json_from_folder(folder)
    merges = folder / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    assert tokenizer_json_from_folder(folder) == expected
