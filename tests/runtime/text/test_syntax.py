"""Weights, brackets and BREAK: what they mean, what is refused, and what holds for any text."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrt.runtime.errors import UsageError
from sdrt.runtime.text.syntax import MAX_DEPTH, MAX_WEIGHT, Piece, lora_tags, parse_prompt, remarks_on

MEANINGS: dict[str, list[list[tuple[str, float]]]] = {
    "": [[]],
    "a red apple": [[("a red apple", 1)]],
    "a (red) apple": [[("a ", 1), ("red", 1.1), (" apple", 1)]],
    "(red:1.3)": [[("red", 1.3)]],
    "(red: .5 )": [[("red", 0.5)]],
    "(red:+2)": [[("red", 2)]],
    "(red:-1e-1)": [[("red", -0.1)]],
    "[red]": [[("red", 1 / 1.1)]],
    "((red))": [[("red", 1.1 * 1.1)]],
    "[(red:2)]": [[("red", 2 / 1.1)]],
    "((a) b:2)": [[("a", 1.1 * 2), (" b", 2)]],
    "(a:b)": [[("a:b", 1.1)]],
    "(a:)": [[("a:", 1.1)]],
    "16:9, a": [[("16:9, a", 1)]],
    "a (b:1.0) c": [[("a b c", 1)]],
    "()": [[]],
    r"\(a\) \[b\] \\ \n": [[(r"(a) [b] \ \n", 1)]],
    r"(a\):2)": [[("a)", 2)]],
    "a\\": [[("a\\", 1)]],
    "a BREAK b": [[("a ", 1)], [(" b", 1)]],
    "a, BREAK, b": [[("a, ", 1)], [(", b", 1)]],
    "BREAK a BREAK": [[], [(" a ", 1)], []],
    "(a BREAK b:2) c": [[("a ", 2)], [(" b", 2), (" c", 1)]],
    "break BREAKFAST BREAK_": [[("break BREAKFAST BREAK_", 1)]],
    # Brackets without a partner.
    "a smile :)": [[("a smile :)", 1)]],
    "1) a cat": [[("1) a cat", 1)]],
    "a (red apple": [[("a ", 1), ("red apple", 1.1)]],
    "((red)": [[("red", 1.1 * 1.1)]],
    "[red": [[("red", 1 / 1.1)]],
    "red]": [[("red]", 1)]],
    "(red]": [[("red]", 1.1)]],
    "[red:1.3)": [[("red:1.3)", 1 / 1.1)]],
    "(a [b) c]": [[("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]],
    # What is no text elsewhere, either.
    "a <lora:x:0.8>cat": [[("a cat", 1)]],
    "(a <LyCO:x:1:te=0.5> b:2)": [[("a  b", 2)]],
    "a <cat-toy>": [[("a <cat-toy>", 1)]],
}


@pytest.mark.parametrize("prompt", MEANINGS)
def test_meaning(prompt: str) -> None:
    found: list[Any] = [[(piece.text, piece.weight) for piece in section] for section in parse_prompt(prompt)]
    expected = [[(text, pytest.approx(weight)) for text, weight in part] for part in MEANINGS[prompt]]
    assert found == expected


# What is said of a prompt; nothing is said of the others in `MEANINGS`.
REMARKS = {
    "a smile :)": ["has a ')' that closes nothing, character 10, in 'a smile :)': it is text"],
    "1) a cat": ["has a ')' that closes nothing, character 2,"],
    "a (red apple": [
        "a '(' that nothing closes, character 3, in 'a (red apple': it weighs all that follows it, as in "
        "stable-diffusion-webui; write \\( for a bracket that is meant as such, or take all brackets as they "
        "are (plain_prompt)"
    ],
    "((red)": ["a '(' that nothing closes, character 1,"],
    "[red": ["a '[' that nothing closes, character 1,"],
    "red]": ["a ']' that closes nothing"],
    "(red]": ["a ']' that closes nothing, character 5,", "a '(' that nothing closes, character 1,"],
    "[red:1.3)": ["a ')' that closes nothing, character 9,", "a '[' that nothing closes, character 1,"],
    "x" * 50 + "(" + "y" * 50: [f", character 51, in '…{'x' * 16}({'y' * 15}…'"],
    "a <hypernet:x:0.8>cat": [
        "'<hypernet:x:0.8>', character 3, in 'a <hypernet:x:0.8>…', asks for a hypernetwork"
    ],
    "[a:b:0.5]": ["'[a:b:0.5]', character 1, in '[a:b:0.5]', changes the prompt while it is drawn"],
    "[a:0.5]": ["changes the prompt while it is drawn"],
    "a [b::10] c": ["'[b::10]'"],
    "[a [b] :(c:1.2):.5]": ["'[a [b] :(c:1.2):.5]'"],
    "[a|b]": ["'[a|b]', character 1, in '[a|b]', takes turns from step to step"],
    "a AND b": ["'AND', character 3, in 'a AND b', joins prompts"],
    "{a|b} c": ["'{a|b}', character 1, in '{a|b} c', chooses one at random"],
    "a __animal__": ["'__animal__', character 3, in 'a __animal__', is a wildcard"],
    "embedding:toy, b": ["'embedding:toy,'"],
    "[a], sand, {a}, a | b, [16:9 b]": [],
}


@pytest.mark.parametrize("prompt", [*MEANINGS, *(prompt for prompt in REMARKS if prompt not in MEANINGS)])
def test_what_may_have_been_meant_otherwise_is_named(prompt: str) -> None:
    found = remarks_on(prompt)
    assert len(found) == len(REMARKS.get(prompt, []))
    for remark, words in zip(found, REMARKS.get(prompt, []), strict=True):
        assert words in remark
        assert "\n" not in remark
    assert remarks_on(prompt, plain=True) == ()


# The LoRAs that a prompt asks for: name, weights of text encoders and U-Net.
TAGS: dict[str, list[tuple[str, float, float]]] = {
    "a <lora:x>cat": [("x", 1, 1)],
    "a <lora:x:0.8>cat": [("x", 0.8, 0.8)],
    "<lora: x y : -2 :.5>": [("x y", -2, 0.5)],
    "(a <LyCO:x:1:te=0.5> b:2)": [("x", 0.5, 0.5)],
    "<lora:x:1:2:te=0.5> b": [("x", 0.5, 2)],
    "<lora:x:unet=0> <lora:styles/y:3>": [("x", 1, 0), ("styles/y", 3, 3)],
    "<lora:x><lora:x:2>": [("x", 1, 1), ("x", 2, 2)],
    "<hypernet:x:1> <cat:x> < lora:x>": [],
}


@pytest.mark.parametrize("prompt", TAGS)
def test_the_loras_that_a_prompt_asks_for(prompt: str) -> None:
    """As stable-diffusion-webui: no text of the prompt; text of a negative or plain one."""
    found = lora_tags(prompt)
    assert [(tag.name, *tag.weights) for tag in found] == TAGS[prompt]
    for tag in found:
        assert tag.quoted.split("'")[1] in prompt
        assert "lora" not in str(parse_prompt(prompt)).replace("< lora", "")
    assert lora_tags(prompt, plain=True) == ()
    ((piece,),) = parse_prompt("a <lora:x:0.8>cat", negative=True)
    assert piece == Piece("a <lora:x:0.8>cat")
    (remark,) = remarks_on("a <lora:x:0.8>cat", negative=True)
    assert "the negative prompt's '<lora:x:0.8>', character 3" in remark


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (
            "<lora:>",
            "the prompt's '<lora:>', character 1, in '<lora:>': a LoRA is <lora:name>, <lora:name:0.8>",
        ),
        ("<lora: :1>", "a LoRA is <lora:name>"),
        ("<lora:x:1:2:3>", "a LoRA is <lora:name>"),
        ("<lora:x:1:dyn=4>", "a LoRA is <lora:name>"),
        ("a <lora:x:1,2>", "'<lora:x:1,2>', character 3, in 'a <lora:x:1,2>': '1,2' or '1,2' is no weight"),
        ("<lora:x:>", "is no weight of a LoRA"),
        ("<lora:x:nan>", "the weight of the LoRA 'x', text_encoder, is nan: a finite number"),
        ("<lora:x:1:101>", "the weight of the LoRA 'x', unet, is 101: -100 to 100 are allowed"),
    ],
)
def test_a_tag_that_names_no_lora_is_refused(prompt: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        lora_tags(prompt)
    assert words in str(caught.value)
    assert parse_prompt(prompt, negative=True) == ((Piece(prompt),),)


REFUSED = {
    "(red:1.2.3)": "the weight '1.2.3', character 6, in '(red:1.2.3)': a number from -10 to 10",
    "(red:.)": "the weight '.'",
    "(red:11)": "the weight '11'",
    "(red:-10.5)": "the weight '-10.5'",
    "(red:1e400)": "the weight '1e400'",
    "((red:5):5)": "nested brackets give 'red' the weight 25: -10 to 10 are allowed",
    "(" * 60: f"brackets more than {MAX_DEPTH} deep",
}


@pytest.mark.parametrize("prompt", REFUSED)
def test_what_is_refused_is_quoted(prompt: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_prompt(prompt)
    assert REFUSED[prompt] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", [*MEANINGS, *REFUSED])
def test_plain_text_is_taken_as_it_is(prompt: str) -> None:
    assert parse_prompt(prompt, plain=True) == ((Piece(prompt),),)


def escaped(text: str) -> str:
    return "".join(f"\\{character}" if character in "()[]\\" else character for character in text)


@given(st.text())
def test_an_escaped_text_means_itself(text: str) -> None:
    sections = parse_prompt(escaped(text).replace("BREAK", "break"))
    assert ["".join(piece.text for piece in section) for section in sections] == [
        text.replace("BREAK", "break")
    ]
    assert all(piece.weight == 1 for section in sections for piece in section)


WORDS = st.text(st.characters(exclude_characters="()[]\\:", exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: "BREAK" not in text
)
TREES = st.recursive(
    WORDS.map(lambda text: (text, [(text, 1.0)])),
    lambda inner: st.tuples(
        st.lists(inner, min_size=1, max_size=3), st.sampled_from(["()", "[]"]) | st.floats(0.5, 1.5)
    ).map(lambda drawn: bracketed(*drawn)),
    max_leaves=8,
)


def bracketed(
    parts: list[tuple[str, list[tuple[str, float]]]], kind: str | float
) -> tuple[str, list[tuple[str, float]]]:
    """A prompt of several in brackets, and the weight of each of its texts."""
    inside = "".join(prompt for prompt, _ in parts)
    factor = {"()": 1.1, "[]": 1 / 1.1}.get(str(kind), kind)
    prompt = f"[{inside}]" if kind == "[]" else f"({inside})" if kind == "()" else f"({inside}:{kind:f})"
    factor = factor if isinstance(kind, str) else float(f"{kind:f}")
    return prompt, [(text, weight * float(factor)) for _, texts in parts for text, weight in texts]


@given(st.lists(TREES, min_size=1, max_size=3))
def test_weights_multiply_whatever_is_inside_of_what(
    trees: list[tuple[str, list[tuple[str, float]]]],
) -> None:
    (section,) = parse_prompt("".join(prompt for prompt, _ in trees))
    weights = [weight for piece in section for weight in [piece.weight] * len(piece.text)]
    expected = [weight for _, texts in trees for text, weight in texts for weight in [weight] * len(text)]
    assert "".join(piece.text for piece in section) == "".join(
        text for _, texts in trees for text, _ in texts
    )
    assert weights == pytest.approx(expected)


@given(st.text(st.sampled_from("ab ()[]\\:1.2-eBREAK")))
def test_any_text_has_a_meaning_or_is_refused(prompt: str) -> None:
    try:
        sections = parse_prompt(prompt)
    except UsageError:
        return
    assert sections
    for piece in (piece for section in sections for piece in section):
        assert piece.text
        assert math.isfinite(piece.weight)
        assert abs(piece.weight) <= MAX_WEIGHT
