"""How prompts are cut into chunks: where the borders are, what is cut off, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrt.runtime.bundle.bundle import Bundle
from sdrt.runtime.errors import UsageError
from sdrt.runtime.text.chunks import OWN, Blend, Chunk, Mixed, Plan, Prompt, PromptPlanner
from sdrt.runtime.text.tokenizer import Tokenizer

LENGTH = 12  # so that a chunk has 10 tokens
ROOM = LENGTH - 2


@pytest.fixture(scope="module")
def tokenizer(tiny_bundle: Path) -> Tokenizer:
    bundle = Bundle.open(tiny_bundle, verify=False)
    (facts,) = bundle.manifest.tokenizers
    return Tokenizer.from_file(
        bundle.file(facts.file), max_length=LENGTH, bos=facts.bos, eos=facts.eos, pad=facts.pad
    )


def planner(tokenizer: Tokenizer, max_chunks: int = 3, max_clip_skip: int = 2) -> PromptPlanner:
    return PromptPlanner([tokenizer], max_chunks=max_chunks, max_clip_skip=max_clip_skip)


def tokens_of(tokenizer: Tokenizer, plan: Plan) -> list[list[int]]:
    """The ids of each chunk between its beginning and its end of text."""
    rows = []
    for chunk in plan.chunks:
        assert isinstance(chunk, Chunk)
        (row,) = chunk.rows
        assert len(row.ids) == LENGTH
        assert row.ids[0] == tokenizer.bos
        end = row.ids.index(tokenizer.eos)
        assert set(row.ids[end + 1 :]) <= {tokenizer.pad}
        rows.append(list(row.ids[1:end]))
    return rows


def chunked(tokenizer: Tokenizer, text: str, **options: Any) -> tuple[list[str], str]:
    """The chunks as words again, and what was cut off."""
    return words_of(tokenizer, planner(tokenizer, **options).plan(Prompt(text)))


def words_of(tokenizer: Tokenizer, plan: Plan) -> tuple[list[str], str]:
    alphabet = {tokenizer.tokens(letter)[0]: letter for letter in "abcdefgh,"}
    return [
        "".join(alphabet.get(token, "x") for token in row) for row in tokens_of(tokenizer, plan)
    ], plan.cut_off


# Each letter of these texts is a token; `xqxqx` is a word of several.
LONG_WORD = "xqxqxqxqxqxqxqxq"


def test_the_long_word_is_longer_than_a_chunk(tokenizer: Tokenizer) -> None:
    assert ROOM < tokenizer.count(LONG_WORD) < 2 * ROOM
    assert tokenizer.count("xqx") == 3
    assert [tokenizer.count(letter) for letter in "abcdefgh"] == [1] * 8


@pytest.mark.parametrize(
    ("text", "lookback", "chunks"),
    [
        ("a a a a a a a, b b b", 3, ["aaaaaaa,", "bbb"]),  # the phrase goes to the next chunk whole
        ("a a a a a a a, b b", 3, ["aaaaaaa,bb"]),
        ("a a a a a a, b b b b", 3, ["aaaaaa,bbb", "b"]),  # too far from the end
        ("a, a a a a a a, b b b, b", 4, ["a,aaaaaa,", "bbb,b"]),
        ("a a a a a a a a a a, b", 3, ["a" * 10, ",b"]),  # a comma that does not fit is no reason
        ("a a a a a a a a a, b", 3, ["a" * 9 + ",", "b"]),
        ("a a a a a a a, b xqx", 3, ["aaaaaaa,", "bxxx"]),  # a word of several tokens does not fit
        ("a a a a a a a, b b b", 0, ["aaaaaaa,bb", "b"]),
        ("a a a a a a a, b BREAK c", 3, ["aaaaaaa,b", "c"]),
        ("a a a a a a a, (b b:2) b", 3, ["aaaaaaa,", "bbb"]),
        # In the last chunk nothing follows that the phrase could go to.
        ("a a a a a a a, b b b " + "c " * 6 + ", d d", 3, ["aaaaaaa,", "bbbcccccc,"]),
    ],
)
def test_a_phrase_stays_whole(tokenizer: Tokenizer, text: str, lookback: int, chunks: list[str]) -> None:
    plan = planner(tokenizer, max_chunks=2).plan(Prompt(text, comma_lookback=lookback))
    assert words_of(tokenizer, plan)[0] == chunks
    if "(b b:2)" in text:
        first, second = (chunk.rows[0] for chunk in plan.chunks if isinstance(chunk, Chunk))
        assert (first.weights, second.weights[:4]) == ((), (1.0, 2.0, 2.0, 1.0))


@pytest.mark.parametrize(
    ("text", "chunks", "cut_off"),
    [
        ("", [""], ""),
        ("a b", ["ab"], ""),
        ("a " * 10, ["a" * 10], ""),
        ("a " * 11, ["a" * 10, "a"], ""),
        ("a " * 8 + "xqx b", ["a" * 8, "xxxb"], ""),  # a word stays whole
        ("a " * 7 + "xqx b", ["a" * 7 + "xxx", "b"], ""),
        ("a BREAK b", ["a", "b"], ""),
        ("BREAK a", ["", "a"], ""),
        ("a BREAK", ["a"], ""),
        ("a BREAK BREAK b", ["a", "", "b"], ""),
        ("a BREAK b BREAK c BREAK", ["a", "b", "c"], ""),
        ("a BREAK b BREAK c BREAK d (e:2) f", ["a", "b", "c"], "d e f"),
        ("a " * 30, ["a" * 10] * 3, ""),
        ("a " * 30 + "b, c ", ["a" * 10] * 3, "b, c"),
        ("a " * 28 + "xqx b", ["a" * 10, "a" * 10, "a" * 8 + "xx"], "x b"),  # the last chunk is filled
    ],
)
def test_borders(tokenizer: Tokenizer, text: str, chunks: list[str], cut_off: str) -> None:
    assert chunked(tokenizer, text) == (chunks, cut_off)


def test_a_word_longer_than_a_chunk_is_cut(tokenizer: Tokenizer) -> None:
    count = tokenizer.count(LONG_WORD)
    assert chunked(tokenizer, f"a {LONG_WORD} b") == (
        ["a" + "x" * (ROOM - 1), "x" * (count - ROOM + 1) + "b"],
        "",
    )


@given(text=st.text(st.sampled_from("abx qé,&;<|>\n🍎")) | st.text(max_size=30))
def test_one_chunk_is_what_the_tokenizer_gives(tokenizer: Tokenizer, text: str) -> None:
    plan = planner(tokenizer, max_chunks=1).plan(Prompt(text, plain=True))
    encoded = tokenizer.encode(text)
    (chunk,) = plan.chunks
    assert isinstance(chunk, Chunk)
    assert list(chunk.rows[0].ids) == encoded.ids.tolist()
    assert plan.cut_off == encoded.truncated_text
    assert not chunk.weighted


@given(text=st.text(st.sampled_from("abx qé,")))
def test_chunks_together_have_all_tokens(tokenizer: Tokenizer, text: str) -> None:
    plan = planner(tokenizer, max_chunks=1000).plan(Prompt(text))
    assert list(itertools.chain(*tokens_of(tokenizer, plan))) == tokenizer.tokens(text)
    assert not plan.cut_off


def test_shorter_prompts_are_filled_up(tokenizer: Tokenizer) -> None:
    filled = planner(tokenizer).plan(Prompt("a", clip_skip=1), 3)
    assert tokens_of(tokenizer, filled)[1:] == [[], []]
    assert {chunk.clip_skip for chunk in filled.chunks if isinstance(chunk, Chunk)} == {1}
    assert planner(tokenizer).plan(Prompt(None), 2).chunks == (None, None)


def test_weights_stand_beside_their_tokens(tokenizer: Tokenizer) -> None:
    (chunk,) = planner(tokenizer).plan(Prompt("a (b c:1.5) d")).chunks
    assert isinstance(chunk, Chunk)
    assert chunk.rows[0].weights == (1, 1, 1.5, 1.5, *[1] * (LENGTH - 4))
    assert chunk.unweighted() == planner(tokenizer).plan(Prompt("a b c d")).chunks[0]
    plain = planner(tokenizer).plan(Prompt("a (b:1.0) (:2)")).chunks[0]
    assert isinstance(plain, Chunk)
    assert not plain.weighted


def test_embeddings_are_found_as_words(tokenizer: Tokenizer) -> None:
    own = planner(tokenizer)
    own.set_embeddings({"cat": 1, "cat toy": 2, "<x>": 3})

    def found(text: str) -> list[tuple[int, str, int]]:
        (chunk,) = own.plan(Prompt(text)).chunks
        assert isinstance(chunk, Chunk)
        (row,) = chunk.rows
        assert [place for place, number in enumerate(row.ids) if number == OWN] == [own[0] for own in row.own]
        return list(row.own)

    assert found("a cat") == [(2, "cat", 0)]
    assert found("CAT, cat") == [(1, "cat", 0), (3, "cat", 0)]
    assert found("cat toy") == [(1, "cat toy", 0), (2, "cat toy", 1)]
    assert found("a<x>") == [(2, "<x>", 0), (3, "<x>", 1), (4, "<x>", 2)]
    for text in ("cats", "tomcat", "cat_", "<y>", "c at"):
        assert found(text) == []
    assert [entry[1] for entry in found("cat-toy")] == ["cat"]
    own.set_embeddings({})
    assert found("a cat") == []


def test_an_embedding_is_not_cut_apart(tokenizer: Tokenizer) -> None:
    own = planner(tokenizer)
    own.set_embeddings({"toy": 4})
    plan = own.plan(Prompt("a " * 7 + "toy b"))
    rows = [chunk.rows[0].ids for chunk in plan.chunks if isinstance(chunk, Chunk)]
    assert rows[0].count(OWN) == 0
    assert rows[1][1:5] == (OWN,) * 4
    # Where there is no further chunk it goes with all that follows.
    single = planner(tokenizer, max_chunks=1)
    single.set_embeddings({"toy": 4})
    plan = single.plan(Prompt("a " * 7 + "Toy b"))
    assert plan.cut_off == "Toy b"
    (chunk,) = plan.chunks
    assert isinstance(chunk, Chunk)
    assert chunk == planner(tokenizer).plan(Prompt("a " * 7)).chunks[0]


def test_blends(tokenizer: Tokenizer) -> None:
    plan = planner(tokenizer).plan
    one, two = Prompt("a"), Prompt("a BREAK b")
    mixed = plan(Blend(one, two, 0.25)).chunks
    assert mixed[0] == plan(one).chunks[0]  # the same in both
    first, second = (plan(prompt, 2).chunks[1] for prompt in (one, two))
    assert mixed[1] == Mixed(first, second, 0.25)  # type: ignore[arg-type]
    assert plan(Blend(one, two, 0.0)).chunks == plan(one, 2).chunks
    assert plan(Blend(one, two, 1.0)).chunks == plan(two).chunks
    zeros = plan(Blend(Prompt(None), one, 0.5)).chunks
    assert zeros == (Mixed(None, plan(one).chunks[0], 0.5),)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), float("inf")])
def test_share_of_a_blend(share: float) -> None:
    with pytest.raises(UsageError, match=r"the share of the second prompt is .*: a number from 0 to 1"):
        Blend(Prompt("a"), Prompt("b"), share)


@pytest.mark.parametrize("clip_skip", [-1, 3, 1.0, True, "1", None])
def test_clip_skip_out_of_range(tokenizer: Tokenizer, clip_skip: Any) -> None:
    with pytest.raises(UsageError, match=r"clip_skip is .*, and of this bundle 0 to 2 layers of its text"):
        planner(tokenizer).plan(Prompt("a", clip_skip=clip_skip))


def test_clip_skip_where_the_graphs_have_none(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="it always runs all layers of its text encoders"):
        planner(tokenizer, max_clip_skip=0).plan(Prompt("a", clip_skip=1))


@pytest.mark.parametrize("text", ["(a:1.2.3)", "\ud800", 7])
def test_text_that_cannot_be_read(tokenizer: Tokenizer, text: Any) -> None:
    with pytest.raises(UsageError):
        planner(tokenizer).plan(Prompt(text))
