"""Weights of words in a prompt, as web interfaces write them.

The grammar (docs/prompts.md), which a call asks for by `prompt_weighting`:

    (words)        weight 1.1             (words:1.3)    weight 1.3
    [words]        weight 1 / 1.1         (words)++      weight 1.1 for each plus
    word++ word--  weight 1.1 for each plus, 0.9 for each minus
    \\(  \\)  \\[  \\]  \\+  \\-  \\:  \\|  \\\\  the character itself

Brackets nest, and weights multiply. Brackets and numbers are those of AUTOMATIC1111's web
interface, signs those of compel (https://github.com/damian0815/compel).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

from latentc.runtimes.errors import InputError
from latentc.runtimes.storage.parsing import parser

MAX_WEIGHT = 100.0
MAX_DEPTH = 32
_STRONGER, _WEAKER = 1.1, 0.9
_SPECIAL = "()[]+-:|\\"
_PAIRS = {")": "(", "]": "["}
# What ends a word, besides spaces and brackets, so that signs before it are the word's.
_STOPS = ",.;:!?"
_NUMBER = re.compile(r":\s*([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(?=[)\]])")
_SIGNS = re.compile(rf"(\++|-+)(?=$|[\s()\[\]{re.escape(_STOPS)}])")
_RUN = re.compile(r"[+-]+")


@dataclass(frozen=True)
class Weighted:
    """A text without its marks, and a weight for each of its characters."""

    text: str
    weights: tuple[float, ...]

    @cached_property
    def plain(self) -> bool:
        """Return whether all weights are 1."""
        return all(weight == 1.0 for weight in self.weights)


def unweighted(text: str) -> Weighted:
    """Return the text as it is."""
    return Weighted(text, (1.0,) * len(text))


def escape(text: str) -> str:
    """Return a text whose characters all stand for themselves: `parse` gives it back."""
    return re.sub(rf"([{re.escape(_SPECIAL)}])", r"\\\1", text)


@parser(InputError, "text", "a weighted prompt")
def parse(text: str) -> Weighted:
    """Read the marks of a prompt.

    Raises:
        InputError: a bracket without its partner, a number that is none, a weight beyond
            `MAX_WEIGHT`, brackets deeper than `MAX_DEPTH`, or a mark of web interfaces that does
            something else.
    """
    return _Reader(text).read()


class _Reader:
    """One pass over the characters. Open groups are on a stack, with the place where their text
    begins in what has been read."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._at = 0
        self._text: list[str] = []
        self._weights: list[float] = []
        self._open: list[tuple[str, int, int]] = []  # bracket, its place in the source, in the text
        self._word = 0  # where the last word begins in the text
        self._split = False  # a bracket came after the last character

    def read(self) -> Weighted:
        while self._at < len(self._source):
            self._next(self._source[self._at])
        if self._open:
            bracket, at, _ = self._open[-1]
            raise self._error(at, f"{bracket!r} is never closed", bracket)
        found = max(map(abs, self._weights), default=1.0)
        if not found <= MAX_WEIGHT:
            raise InputError(
                f"a weight of {found:g} in the prompt {self._source!r:.80}: expected at most "
                f"{MAX_WEIGHT:g}"
            )
        return Weighted("".join(self._text), tuple(self._weights))

    def _next(self, sign: str) -> None:
        if sign == "\\" and self._source[self._at + 1 : self._at + 2] in (*_SPECIAL,):
            self._put(self._source[self._at + 1], 2)
        elif sign in "([":
            self._begin(sign)
        elif sign in _PAIRS:
            self._end(sign, None)
        elif sign == ":" and self._open and (number := _NUMBER.match(self._source, self._at)):
            self._at = number.end()
            self._end(self._source[self._at], number[1])
        elif sign == "|" and self._open and self._open[-1][0] == "[":
            raise self._error(self._at, "alternating words are not supported", "|")
        elif sign in "+-":
            self._signs()
        else:
            self._put(sign, 1)

    def _signs(self) -> None:
        """Give the word before the signs their weight; else all of them are text."""
        signs = _SIGNS.match(self._source, self._at)
        if signs and self._word < len(self._text) and not self._split:
            self._scale(self._word, _factor(signs[1]))
            self._at = signs.end()
            return
        run = _RUN.match(self._source, self._at)
        assert run
        for sign in run[0]:
            self._put(sign, 1)

    def _put(self, sign: str, length: int) -> None:
        """Add a character of the text, `length` long in the source.

        Brackets end a word: without a space between them the tokenizer would see one word on both
        sides.
        """
        if self._split and self._text and self._text[-1].isalnum() and sign.isalnum():
            self._text.append(" ")
            self._weights.append(1.0)
        if self._split:
            self._word = len(self._text)
        self._split = False
        self._text.append(sign)
        self._weights.append(1.0)
        self._at += length
        if length == 1 and (sign.isspace() or sign in _STOPS):
            self._word = len(self._text)

    def _begin(self, bracket: str) -> None:
        if len(self._open) == MAX_DEPTH:
            raise self._error(self._at, f"brackets nested more than {MAX_DEPTH} deep", bracket)
        self._open.append((bracket, self._at, len(self._text)))
        self._at += 1
        self._split = True

    def _end(self, bracket: str, number: str | None) -> None:
        if not self._open or self._open[-1][0] != _PAIRS[bracket]:
            raise self._error(self._at, f"{bracket!r} closes nothing", bracket)
        opened, _, start = self._open.pop()
        if number is not None and opened == "[":
            raise self._error(self._at, "no weights in square brackets: write (words:0.9)", "[")
        self._at += 1
        self._split = True
        signs = _SIGNS.match(self._source, self._at)
        if signs:
            self._at = signs.end()
        elif self._source[self._at : self._at + 1].isdecimal():
            raise self._error(self._at, "a number after a bracket: write (words:1.3)", "a digit")
        weight = _STRONGER if opened == "(" else 1 / _STRONGER
        if number is not None:
            weight = self._number(number)
        elif signs and opened == "(":
            weight = 1.0
        self._scale(start, weight * (_factor(signs[1]) if signs else 1.0))

    def _scale(self, start: int, factor: float) -> None:
        self._weights[start:] = [weight * factor for weight in self._weights[start:]]

    def _number(self, text: str) -> float:
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not abs(weight) <= MAX_WEIGHT:
            raise self._error(
                self._at, f"{text!r} is no weight: expected a number up to {MAX_WEIGHT:g}", ":"
            )
        return weight

    def _error(self, at: int, what: str, escaped: str) -> InputError:
        around = self._source[max(at - 20, 0) : at + 20]
        hint = f"\\{escaped}" if len(escaped) == 1 else "a space before it"
        return InputError(
            f"prompt_weighting: {what}, at {around!r}; for the character itself write {hint}"
        )


def _factor(signs: str) -> float:
    """Return the factor of a run of plus or minus signs; far too many give infinity, or zero."""
    try:
        return float((_STRONGER if signs[0] == "+" else _WEAKER) ** len(signs))
    except OverflowError:
        return math.inf
