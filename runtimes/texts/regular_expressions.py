r"""Regular expressions that a file brings: which of them are plain enough to be tried on a text.

An engine that backtracks takes exponential time for ``(a+)+b`` and for many optional parts in a
row. The patterns that are taken here have at most one part that repeats without a bound in each
branch, no repetition of what repeats or is a choice, and few optional parts and choices: their time
is at most in proportion to the square of a text's length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LONGEST = 1024  # characters
_MOST_QUANTIFIERS = 4  # in a branch
_MOST_TIMES = 16
_GROUP = re.compile(r"\((?:\?(?P<kind>[imsx-]*:|=|!|>))?")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|\[:\^?[a-z]+:\]|[^\]\\\[])*\]", re.DOTALL)
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?[A-Za-z_]{1,40}\}|x\{[0-9a-fA-F]{1,6}\}|x[0-9a-fA-F]{2}|[^0-9kgXKRG])"
)
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d{1,4})(,)?(\d{1,4})?\})[?+]?")
_WITHOUT_WIDTH = ("^", "$", r"\b", r"\B", r"\A", r"\z", r"\Z")


@dataclass(frozen=True)
class Pattern:
    """A pattern says what is known of a regular expression or a part of one.

    Attributes:
        least: characters that it matches at least.
        quantifiers: parts of it in one branch that are optional, repeat, or are a choice.
        repeats: parts of it in one branch that repeat without a bound.
        goes_back: something comes after such a part, so that it may have to be tried again.
    """

    least: int = 0
    quantifiers: int = 0
    repeats: int = 0
    goes_back: bool = False

    def followed_by(self, other: Pattern) -> Pattern:
        """Return what is known of both, one after the other."""
        return Pattern(
            self.least + other.least,
            self.quantifiers + other.quantifiers,
            self.repeats + other.repeats,
            self.goes_back or other.goes_back or self.repeats > 0,
        )


def read_pattern(text: str) -> Pattern:
    """Return what is known of a pattern.

    Raises:
        ValueError: it is not plain, or none.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"a pattern of {len(text)} characters")
    found, end = _branches(text, 0, 0)
    if end != len(text):
        raise ValueError(f"a pattern that is none: {text!r:.80}")
    return found


def _branches(text: str, at: int, depth: int) -> tuple[Pattern, int]:
    """Read alternatives up to a closing parenthesis or the end."""
    if depth > _MOST_TIMES:
        raise ValueError("a pattern of many groups in one another")
    branches = [Pattern()]
    while at < len(text) and text[at] != ")":
        if text[at] == "|":
            branches.append(Pattern())
            at += 1
            continue
        atom, at = _quantified(text, at, depth)
        branches[-1] = branches[-1].followed_by(atom)
        if branches[-1].quantifiers > _MOST_QUANTIFIERS or branches[-1].repeats > 1:
            raise ValueError(f"a pattern that may take too long: {text!r:.80}")
    return Pattern(
        min(branch.least for branch in branches),
        max(each.quantifiers for each in branches) + (depth > 0 and len(branches) > 1),
        max(each.repeats for each in branches),
        any(each.goes_back for each in branches),
    ), at


def _quantified(text: str, at: int, depth: int) -> tuple[Pattern, int]:
    atom, at = _atom(text, at, depth)
    quantifier = _QUANTIFIER.match(text, at)
    if quantifier is None:
        return atom, at
    at = quantifier.end()
    if _QUANTIFIER.match(text, at):
        raise ValueError(f"a pattern that repeats repetitions: {text!r:.80}")
    low, high = _times(quantifier)
    if atom.quantifiers and high != 1:
        raise ValueError(f"a pattern that repeats repetitions: {text!r:.80}")
    repeats = atom.repeats + (high is None)
    return Pattern(atom.least * low, atom.quantifiers + 1, repeats, atom.goes_back), at


def _times(quantifier: re.Match[str]) -> tuple[int, int | None]:
    """Return how often at least and at most a quantifier repeats; None is without a bound.

    Raises ValueError for numbers beyond `_MOST_TIMES`.
    """
    match quantifier[0][0]:
        case "*":
            return 0, None
        case "+":
            return 1, None
        case "?":
            return 0, 1
    low = int(quantifier[1])
    high = int(quantifier[3]) if quantifier[3] else None if quantifier[2] else low
    if max(low, high or 0) > _MOST_TIMES:
        raise ValueError(f"a pattern that repeats {quantifier[0]} times")
    return low, high


def _atom(text: str, at: int, depth: int) -> tuple[Pattern, int]:
    """Read a character, a class of characters or a group."""
    if text[at] == "(":
        group = _GROUP.match(text, at)
        kind = group["kind"] if group else None
        inner, end = _branches(text, group.end() if group else at + 1, depth + 1)
        if end >= len(text):
            raise ValueError(f"a pattern that is none: {text!r:.80}")
        return Pattern(0, inner.quantifiers, inner.repeats) if kind in (
            "=",
            "!",
        ) else inner, end + 1
    for kinds in (_CLASS, _ESCAPE):
        found = kinds.match(text, at)
        if found:
            return Pattern(0 if found[0] in _WITHOUT_WIDTH else 1), found.end()
    if text[at] in "[\\*+?{":
        raise ValueError(f"a pattern that is none, or not plain: {text!r:.80}")
    return Pattern(0 if text[at] in _WITHOUT_WIDTH else 1), at + 1
