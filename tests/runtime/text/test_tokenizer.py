"""Token ids equal those of OpenAI's SimpleTokenizer, and what was cut off is quoted."""

from __future__ import annotations

import contextlib
import gzip
import html
import json
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import ftfy
import ftfy.chardata
import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sdrt.export.checkpoint.tokenizer_json as export
from sdrt.runtime.admission.tokenizer_check import check_tokenizer_file
from sdrt.runtime.errors import BundleError, UsageError
from sdrt.runtime.text.tokenizer import Tokenizer, clean

BOS, EOS = 49406, 49407
VOCABULARY = Path(export.__file__).parents[1] / "data" / "bpe_simple_vocab_16e6.txt.gz"


class Reference:
    """OpenAI's SimpleTokenizer, written anew from its description: slow, plain, with `regex`.

    It shares nothing with `sdrt` but the vocabulary file.
    """

    PATTERN = regex.compile(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        regex.IGNORECASE,
    )

    def __init__(self) -> None:
        text = gzip.decompress(VOCABULARY.read_bytes()).decode("utf-8")
        merges = [tuple(line.split()) for line in text.split("\n")[1 : 49152 - 256 - 2 + 1]]
        self.symbol: dict[int, str] = {}
        for byte in (*range(33, 127), *range(161, 173), *range(174, 256)):
            self.symbol[byte] = chr(byte)
        for byte in range(256):
            self.symbol.setdefault(byte, chr(256 + max(0, len(self.symbol) - 188)))
        names = [*self.symbol.values(), *(symbol + "</w>" for symbol in self.symbol.values())]
        names += ["".join(pair) for pair in merges]
        self.special = ("<|startoftext|>", "<|endoftext|>")
        self.id = {name: n for n, name in enumerate((*names, *self.special))}
        self.rank = {pair: n for n, pair in enumerate(merges)}

    def clean(self, text: str) -> str:
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        return str(regex.sub(r"\s+", " ", text)).strip().lower()

    def ids(self, text: str) -> list[int]:
        return [self.id[part] for word in self.PATTERN.findall(self.clean(text)) for part in self.parts(word)]

    def parts(self, word: str) -> Sequence[str]:
        if word in self.special:
            return (word,)
        parts = [self.symbol[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pair = min(pairwise(parts), key=lambda two: self.rank.get(two, 10**9))
            if pair not in self.rank:
                break
            merged: list[str] = []
            for part in parts:  # every occurrence, from left to right
                if merged and (merged[-1], part) == pair:
                    merged[-1] = merged[-1] + part
                else:
                    merged.append(part)
            parts = merged
        return parts


@cache
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(export.tokenizer_json_from_vocabulary())
    return Tokenizer.from_file(path, max_length=77, bos=BOS, eos=EOS, pad=EOS)


ODD_PROMPTS = {
    "plain": "a photo of an astronaut riding a horse on mars",
    "empty": "",
    "white space only": " \t\n\r\f\v\x85\u00a0\u2003\u3000 ",
    "mixed white space": "  a\tred\r\napple\u2028on\u2029a\u00a0 table\u3000!  ",
    "upper case": "PORTRAIT, Ultra-Detailed, 8K, HDR",
    "digits": "4k 1920x1080 in 2024, ½ of ²³ Ⅷ ٣٤ 〇",
    "contractions": "It's they'LL i'm we'Ve don't you'RE he'd 'S 's'' ''s o'clock rock'n'roll",
    "underscores": "snake_case __init__ _ a_b_1",
    "punctuation": "(((masterpiece))), [best:1.3] {a|b} --ar 16:9 ... ?! #tag @user $5 50% a/b\\c",
    "accents": "Café à la crème, naïve Señor Ångström, Œuvre, Straße, ŞIŞ",
    "combining": "cafe\u0301 a\u0308\u0323 Z\u0351\u036b\u0343alg\u033bo e\u0301\u0301",
    "emoji": "🍎 👩🏽‍🚀👨‍👩‍👧‍👦 🏳️‍🌈🇩🇪 ❤️ 😀😀😀 1️⃣",
    "tag flag": "🏴󠁧󠁢󠁷󠁬󠁳󠁿",
    "chinese": "一只红苹果，放在桌子上。",
    "japanese": "赤いリンゴ ﾊﾝｶｸ ＦＵＬＬ　ＷＩＤＴＨ！",
    "korean": "빨간 사과 \u1112\u1161\u11ab",
    "hebrew": "תפוח אדום על שולחן",
    "arabic": "تفاحة حمراء ﷺ \u200fabc\u200e",
    "hindi": "लाल सेब क्षत्रिय",
    "thai": "แอปเปิ้ลสีแดง",
    "russian": "Красное яблоко",
    "greek": "ΟΔΥΣΣΕΥΣ Σίσυφος ΣΑΣ ᾳ ΐ",
    "turkish": "İstanbul ILIK ışık DİYARBAKIR",
    "ligatures": "ﬁne ﬂower eﬃcient ﬆ ĳ œ ǆ",
    "curly quotes": "“quoted” ‘it’s’ „low“ «guillemets» ‹x› ʼn ′″",
    "dashes": "en–dash em—dash minus− hyphen‐ soft\u00adhyphen…",
    "entities": "Tom &amp; Jerry &lt;3 &eacute; &#233; &#x1F34E; &nbsp; &EACUTE;",
    "entities twice": "Tom &amp;amp; Jerry &amp;lt;b&amp;gt; &amp;eacute;",
    "entities twice beside <": "< &amp;amp; &amp;eacute; &amp;amp;amp;",
    "entities, odd": "&notanentity; &ampx &am &; & && &#; &#x110000; &#0; &#xD800; &#x1c; &copy20",
    "entity beside <": "a < b &amp; c &gt; d e&#x301; &rsquo;s &#x130;",
    "html": "<b>bold</b><br/>&lt;i&gt;x",
    "mojibake": "schÃ¶n cafÃ© â€œhelloâ€\u009d âœ” voilÃ  le travail",
    "c0 controls": "a\x00b\x01c\x07d\x08e\x0bf\x1bg\x1ch\x1di\x1ej\x1fk\x7fl",
    "ansi colour": "\x1b[31mred\x1b[0m apple \x1b[1;2Hx",
    "c1 controls": "a\x80b\x85c\x9fd",
    "zero width": "a\u200bb\u200cc\u200dd\u2060e\ufefff\u180eg",
    "byte order mark": "\ufeffred apple",
    "directional": "\u202eabc\u202c \u2066x\u2069 \u061c",
    "private use": "\ue000 \U000f0000",
    "noncharacters": "\ufffe \uffff \ufdd0 \U0010ffff",
    "replacement": "a \ufffd b",
    "mathematical": "𝐁𝐨𝐥𝐝 𝒮𝒸𝓇𝒾𝓅𝓉 𝔽𝕣𝕒𝕜 ℌ ℵ K Å Ω",
    "enclosed": "Ⓐⓑ ① ㊗ 🅰",
    "old scripts": "𐍈𐌰 𒀀 𓀀 𐐀𐐨",
    "special": "a<|endoftext|>b <|startoftext|> <|endoftext|><|endoftext|>1<|endoftext|>",
    "special, upper case": "<|ENDOFTEXT|> <|StartOfText|>",
    "special after punctuation": "a!<|endoftext|> (<|startoftext|>) <<|endoftext|>> '<|endoftext|>",
    "special, broken": "<|endoftext| > <|endoftext <|pad|> <|endoftext|>|>",
    "special, written as entities": "&lt;|endoftext|&gt;",
    "long s": "'ſ it'ſ <|ſtartoftext|> ſtop '\u212a",
    "ypogegrammeni": "a\u0345b !\u0345! \u0345 1\u0345 '\u0345s \u0345<|endoftext|>",
    "surrogate pair": "\ud83d\ude00 apple",
    "long text": "a very long prompt, full of words; " * 300,
    "10k letters": "a" * 10_000,
    "10k emoji": "👩🏽‍🚀" * 2_000,
    "10k marks": "!?" * 5_000,
    "no spaces": "supercalifragilisticexpialidocious" * 20,
}


@pytest.mark.parametrize("prompt", ODD_PROMPTS.values(), ids=ODD_PROMPTS.keys())
def test_ids_are_those_of_openai(tokenizer: Tokenizer, prompt: str) -> None:
    assert tokenizer.tokens(prompt) == reference().ids(prompt)


def test_known_ids(tokenizer: Tokenizer) -> None:
    """Published ids, so that a fault in the vocabulary cannot hide in the reference as well."""
    # transformers' documentation and the CLIP notebook: "a photo of a cat" and "hello world!".
    assert tokenizer.tokens("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert tokenizer.tokens("Hello world!") == [3306, 1002, 256]


ODD_PARTS = st.sampled_from(
    (
        *" \n\r\x85'&;<!_1½aeéſİΣ🍎ﬁ“\u0301\u0345\u200d",
        *("'s", "'LL", "&amp;", "&lt;", "&#x301;", "&#x345;", "&am", "Ã©", "â€™", "\x1b[0m"),
        *("<|endoftext|>", "<|startoftext|>", "<|EndOfText|>"),
    )
)
# Which characters newer versions of Unicode add is known differently to `regex` and to Rust.
ASSIGNED = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=20)
ODD_TEXT = st.lists(ODD_PARTS | ASSIGNED, max_size=12).map("".join)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ODD_TEXT)
@example("'ſ\u0345<|endoftext|>")
def test_ids_of_any_text_are_those_of_openai(tokenizer: Tokenizer, text: str) -> None:
    assert clean(text) == reference().clean(text)
    assert tokenizer.tokens(text) == reference().ids(text)


def test_every_assigned_character_is_split_as_openai_splits_it(tokenizer: Tokenizer) -> None:
    """Beside letters, marks, digits and apostrophes. Ideographs and syllables are sampled."""
    characters = [
        chr(code)
        for code in range(0x110000)
        if (code % 97 == 0 or not _is_ideograph_or_syllable(code))
        and unicodedata.category(chr(code)) not in ("Cn", "Co", "Cs")
        and chr(code) == chr(code).lower()
    ]
    assert len(characters) > 25_000
    pre_tokenizer = tokenizer._rust.pre_tokenizer
    for start in range(0, len(characters), 500):
        text = " ".join(f"a{c}a !{c}! 1{c}1 '{c}" for c in characters[start : start + 500])
        words = [text[begin:end] for _, (begin, end) in pre_tokenizer.pre_tokenize_str(text)]
        assert words == Reference.PATTERN.findall(text)


def _is_ideograph_or_syllable(code: int) -> bool:
    return 0x3400 <= code <= 0xD7A3 or 0x17000 <= code <= 0x18CFF or code >= 0x20000


def test_row_is_bos_tokens_eos_padding(tokenizer: Tokenizer) -> None:
    rows = tokenizer(["", "a cat", "a cat " * 100])
    assert rows.dtype == np.int64
    assert rows.shape == (3, 77)
    assert rows[0].tolist() == [BOS, EOS, *[EOS] * 75]
    assert rows[1].tolist() == [BOS, 320, 2368, EOS, *[EOS] * 73]
    assert rows[2].tolist() == [BOS, *[320, 2368] * 37, 320, EOS]
    assert tokenizer([]).shape == (0, 77)


def test_padding_of_stable_diffusion_2_is_not_an_exclamation_mark(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(export.tokenizer_json_from_vocabulary(num_merges=0))
    tokenizer = Tokenizer.from_file(path, max_length=7, bos=512, eos=513, pad=0)
    a, exclamation_mark = ord("a") - ord("!") + 256, 256  # both end a word
    assert tokenizer(["a!"]).tolist() == [[512, a, exclamation_mark, 513, 0, 0, 0]]


def test_encode_agrees_with_call_and_count(tokenizer: Tokenizer) -> None:
    for prompt in ODD_PROMPTS.values():
        encoded = tokenizer.encode(prompt)
        assert encoded.ids.dtype == np.int64
        np.testing.assert_array_equal(encoded.ids, tokenizer([prompt])[0])
        assert encoded.num_tokens == tokenizer.count(prompt) == len(tokenizer.tokens(prompt))
        assert bool(encoded.truncated_text) == (encoded.num_tokens > 75)


FILL = "apple " * 74  # 74 tokens, so that one more fits


@pytest.mark.parametrize(
    ("prompt", "cut"),
    [
        (FILL + "red", ""),
        (FILL + "red Car", "Car"),
        (FILL + "red\n\t GREEN  Apples,\nbig ", "GREEN  Apples,\nbig"),
        (FILL + "red, &amp; Caf&eacute;!", ", &amp; Caf&eacute;!"),
        (FILL[6:] + "red&amp;Car", "Car"),
        (FILL + "&amp; Tom &amp; Jerry", "Tom &amp; Jerry"),
        (FILL + "red “Quoted” ﬁne", "“Quoted” ﬁne"),
        (FILL + "red 🍎🍎", "🍎🍎"),
        (FILL + "red a<|endoftext|>", "a<|endoftext|>"),
        (FILL + "red<|endoftext|>B", "<|endoftext|>B"),
        (FILL + "İİ", "\u0130İ"),  # the limit falls inside the first: all of it is quoted
        ("x" + " İ" * 100 + " End", None),
        ("&CounterClockwiseContourIntegral; " * 100 + "End", None),
        ("\x1b[31mred\x1b[0m " * 100 + "End", None),
        ("e\u0301 \ud83c\udf4e " * 100 + "End", None),
    ],
)
def test_cut_text_is_quoted_from_the_prompt(tokenizer: Tokenizer, prompt: str, cut: str | None) -> None:
    encoded = tokenizer.encode(prompt)
    if cut is not None:
        assert encoded.truncated_text == cut
    prompt = prompt.encode("utf-16", "surrogatepass").decode("utf-16").rstrip()
    assert prompt.endswith(encoded.truncated_text)
    kept = prompt.removesuffix(encoded.truncated_text)
    whole = tokenizer.tokens(prompt)
    # What was kept gives the ids that were kept, but for a character that the limit divides.
    assert tokenizer.tokens(kept)[:73] == whole[:73]
    assert tokenizer.count(kept) in (73, 74, 75) or not encoded.truncated_text


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["Red", "apple,", "it's", "4K", "“é”", "🍎"]), min_size=80, max_size=100))
def test_cut_text_and_kept_text_make_up_the_prompt(tokenizer: Tokenizer, words: list[str]) -> None:
    prompt = "  ".join(words)
    cut = tokenizer.encode(prompt).truncated_text
    assert cut
    assert prompt.endswith(cut)
    kept = tokenizer.tokens(prompt.removesuffix(cut))
    assert kept == tokenizer.tokens(prompt)[:75][: len(kept)]
    assert len(kept) >= 72  # an apple of the longest kind is three tokens


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("caf\udce9", r"character 4 is the surrogate U\+DCE9"),  # how Python reads Latin-1 in argv
        ("\ud83d", r"character 1 is the surrogate U\+D83D"),
        ("\ude00\ud83d", r"surrogate U\+DE00"),
        (None, "must be a string, not NoneType"),
        (b"cat", "must be a string, not bytes"),
    ],
)
def test_what_is_not_text_is_refused(tokenizer: Tokenizer, prompt: Any, message: str) -> None:
    for call in (
        tokenizer.encode,
        tokenizer.tokens,
        tokenizer.count,
        lambda p: tokenizer(["a", p]),
    ):
        with pytest.raises(UsageError, match=message):
            call(prompt)


def test_single_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"give a list of prompts.*\['cat'\]"):
        tokenizer("cat")


def test_plain_ascii_needs_no_repair() -> None:
    """ftfy's tables hold no ASCII but what `clean` looks for; and by trial."""
    unchecked = {chr(code) for code in range(128)} - set("&\x0b\x7f")
    unchecked -= {chr(code) for code in (*range(9), *range(0x0E, 0x20))}
    tables = (ftfy.chardata.LIGATURES, ftfy.chardata.WIDTH_MAP, ftfy.chardata.CONTROL_CHARS)
    assert not unchecked & {chr(code) for table in tables for code in table}
    for pattern in (ftfy.chardata.SINGLE_QUOTE_RE, ftfy.chardata.DOUBLE_QUOTE_RE):
        assert not pattern.search("".join(sorted(unchecked)))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_is_cleaned_as_by_ftfy(text: str) -> None:
    assert clean(text) == reference().clean(text)


def test_ftfy_is_imported_only_when_needed() -> None:
    code = """
import sys
from sdrt.runtime.text.tokenizer import clean
assert clean(" A red\\tapple, it's <b>  50% ") == "a red apple, it's <b> 50%"
assert not {"ftfy", "regex", "transformers", "torch"} & sys.modules.keys()
assert clean("caf\\xe9") and "ftfy" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"version": "1.0"', b"null"])
def test_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer.from_file(path, max_length=77, bos=BOS, eos=EOS, pad=EOS)


def panicking(folder: Path) -> Path:
    """A file with which the Rust library panics on the first text: no ``Exception`` in Python."""
    path = folder / "tokenizer.json"
    document = json.loads(export.tokenizer_json_from_vocabulary(num_merges=10))
    document["model"]["continuing_subword_prefix"] = "<|endoftext|>"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_a_panic_of_the_library_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is no tokenizer\.json.*out of range"):
        Tokenizer.from_file(panicking(tmp_path), max_length=77, bos=522, eos=523, pad=523)


def test_a_book_is_no_prompt(tokenizer: Tokenizer) -> None:
    tokenizer.encode("a cat, " * 1000)
    with pytest.raises(UsageError, match="a prompt has 50001 characters, the limit is 50000"):
        tokenizer.encode("x" * 50_001)


@pytest.mark.parametrize(
    ("pattern", "is_tame"),
    [
        (r"'s|'t|[\p{L}]+|\p{N}|[^\s\p{L}\p{N}]+", True),
        (r"\s+", True),
        (r"a?b", True),
        (r"(a+)+b", False),
        (r"(a|aa)*b", False),
        (r"a*a*a*b", False),
        (r"a?a?a?aaa", False),
        (r"(?=a)a", False),
        (r"(a){2,99}", False),
        ("x" * 501, False),
    ],
)
def test_patterns_that_take_for_ever_are_refused(tmp_path: Path, pattern: str, is_tame: bool) -> None:
    path = tmp_path / "tokenizer.json"
    document = json.loads(export.tokenizer_json_from_vocabulary(num_merges=0))
    path.write_text(json.dumps(document), encoding="utf-8")
    check_tokenizer_file(path)
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    path.write_text(json.dumps(document), encoding="utf-8")
    with contextlib.nullcontext() if is_tame else pytest.raises(BundleError, match="could take for ever"):
        check_tokenizer_file(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 10**5, "nested more than"),
        (b"{}", "holds no model"),
        (b'{"model": {"type": "WordPiece"}}', "its model is not BPE"),
        (b" " * (33 << 20), "more than 33554432 bytes"),
    ],
    ids=["nested", "nothing", "kind", "huge"],
)
def test_what_is_no_tokenizer_of_a_bundle(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=words):
        check_tokenizer_file(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot read the tokenizer"):
        Tokenizer.from_file(tmp_path / "none.json", max_length=77, bos=BOS, eos=EOS, pad=EOS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bos": 514}, "bos id 514 is not in"),
        ({"eos": -1}, "eos id -1 is not in"),
        ({"pad": 2**40}, "pad id 1099511627776 is not in"),
        ({"max_length": 1}, "max_length is 1"),
    ],
)
def test_ids_that_do_not_fit_the_file_are_refused(
    tmp_path: Path, change: dict[str, int], message: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(export.tokenizer_json_from_vocabulary(num_merges=0))
    facts = {"max_length": 77, "bos": 512, "eos": 513, "pad": 513}
    Tokenizer.from_file(path, **facts)
    with pytest.raises(BundleError, match=message):
        Tokenizer.from_file(path, **{**facts, **change})


def test_shortest_row_has_no_room_for_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(export.tokenizer_json_from_vocabulary(num_merges=0))
    tokenizer = Tokenizer.from_file(path, max_length=2, bos=512, eos=513, pad=513)
    encoded = tokenizer.encode(" A cat ")
    assert encoded.ids.tolist() == [512, 513]
    assert encoded.truncated_text == "A cat"
