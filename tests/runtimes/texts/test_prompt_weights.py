"""The grammar of weights: what is read, what is refused, and that nothing else can happen."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from latentc.runtimes.errors import InputError
from latentc.runtimes.texts.prompt_weights import (
    MAX_DEPTH,
    MAX_WEIGHT,
    Weighted,
    escape,
    parse,
    unweighted,
)

TEXTS = st.text(max_size=60)
MARKS = st.text(alphabet="ab ()[]+-:|\\.,159eé\t", max_size=40)


def groups(weighted: Weighted) -> list[tuple[str, float]]:
    """Runs of characters of one weight."""
    made: list[tuple[str, float]] = []
    for sign, weight in zip(weighted.text, weighted.weights, strict=True):
        if made and math.isclose(made[-1][1], weight):
            made[-1] = made[-1][0] + sign, weight
        else:
            made.append((sign, weight))
    return made


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("a red circle", [("a red circle", 1)]),
        ("a (red:1.3) circle", [("a ", 1), ("red", 1.3), (" circle", 1)]),
        ("a (red) circle", [("a ", 1), ("red", 1.1), (" circle", 1)]),
        ("a [red] circle", [("a ", 1), ("red", 1 / 1.1), (" circle", 1)]),
        ("a red++ circle--", [("a ", 1), ("red", 1.21), (" ", 1), ("circle", 0.81)]),
        ("a (red circle)+++", [("a ", 1), ("red circle", 1.331)]),
        ("a (red circle:2)--", [("a ", 1), ("red circle", 1.62)]),
        ("((red:1.2) circle:1.5)", [("red", 1.8), (" circle", 1.5)]),
        ("(a [red++ circle])", [("a ", 1.1), ("red", 1.21), (" circle", 1)]),
        ("(red: 0.5 )", [("red", 0.5)]),
        ("(red:0) (blue:-1.5)", [("red", 0), (" ", 1), ("blue", -1.5)]),
        ("(red:+.5e1)", [("red", 5)]),
        # Brackets end a word, so that the tokenizer sees two.
        ("(red:1.2)(blue:1.3)", [("red", 1.2), (" blue", 1.3)]),
        ("super(man:2)", [("super", 1), (" man", 2)]),
        ("(red:2), blue", [("red", 2), (", blue", 1)]),
        # What is no mark.
        ("well-known, 16:9 - a -- b ++ c+d", [("well-known, 16:9 - a -- b ++ c+d", 1)]),
        ("a+- b-+, 1:2", [("a+- b-+, 1:2", 1)]),
        ("(style: watercolor)", [("style: watercolor", 1.1)]),
        ("it|that a:1.3 back\\slash", [("it|that a:1.3 back\\slash", 1)]),
        # A word ends at spaces and punctuation.
        ("blue-green++", [("blue-green", 1.21)]),
        ("red,blue+.", [("red,", 1), ("blue", 1.1), (".", 1)]),
        ("big (red+)", [("big ", 1), ("red", 1.21)]),
        # Escapes.
        (r"\(red:1.3\) \[b\] C\+\+ a\-, \|", [("(red:1.3) [b] C++ a-, |", 1)]),
        (r"C\+\+++", [("C++", 1.21)]),
        (r"(16\:9)", [("16:9", 1.1)]),
        ("end\\", [("end\\", 1)]),
        (r"\\(red:2)", [("\\", 1), ("red", 2)]),
    ],
)
def test_what_is_read(text: str, expected: list[tuple[str, float]]) -> None:
    found = groups(parse(text))
    assert [words for words, _ in found] == [words for words, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a (red", r"'\(' is never closed, at 'a \(red'; for the character itself write \\\("),
        ("a red)", r"'\)' closes nothing"),
        ("(a [red)]", r"'\)' closes nothing"),
        ("(a]", "']' closes nothing"),
        (":)", "closes nothing"),
        ("[red:0.5]", "no weights in square brackets: write"),
        ("[cow|horse]", "alternating words are not supported"),
        ("(red)1.3", "a number after a bracket: write"),
        ("(red:1.2.3)", "'1.2.3' is no weight"),
        ("(red:.)", "'.' is no weight"),
        ("(red:101)", "'101' is no weight: expected a number up to 100"),
        ("(red:1e999)", "is no weight"),
        ("((red:50):50)", "a weight of 2500 .* at most 100"),
        ("red" + "+" * 60, "at most 100"),
        ("red" + "+" * 9000, "a weight of inf"),
        ("(" * (MAX_DEPTH + 1) + ")" * (MAX_DEPTH + 1), "more than 32 deep"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse(text)


def test_as_deep_as_may_be() -> None:
    (weight,) = parse("(" * MAX_DEPTH + "a:2" + ")" * MAX_DEPTH).weights
    assert weight == pytest.approx(2 * 1.1 ** (MAX_DEPTH - 1))
    assert parse("red" + "-" * 9000).weights == (0.0,) * 3


@given(TEXTS)
@example("a (b:1.3) [c] d++ \\( e")
def test_an_escaped_text_is_itself(text: str) -> None:
    assert parse(escape(text)) == unweighted(text)
    assert unweighted(text).plain


@given(st.text(alphabet=st.characters(blacklist_characters="()[]+-:|\\"), max_size=60))
def test_a_text_without_marks_is_itself(text: str) -> None:
    assert parse(text) == unweighted(text)


@given(MARKS | TEXTS)
def test_nothing_else_can_happen(text: str) -> None:
    try:
        found = parse(text)
    except InputError:
        return
    assert len(found.text) == len(found.weights)
    assert all(abs(weight) <= MAX_WEIGHT for weight in found.weights)
    # Nothing is made up but spaces between words.
    assert set(found.text) <= set(text) | {" "}


@given(TEXTS, st.floats(-100, 100).map(lambda weight: round(weight, 3)))
def test_a_whole_text_with_a_weight(text: str, weight: float) -> None:
    found = parse(f"({escape(text)}:{weight:f})")
    assert found.text == text
    assert found.weights == pytest.approx((weight,) * len(text))
