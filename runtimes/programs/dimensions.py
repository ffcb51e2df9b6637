"""Dimensions of tensors in symbols: a number, a symbol, or ``k*symbol`` with a number added.

Symbols are sizes in latents: a program with ``height`` 64 and 8 pixels for each latent has images
of ``8*height`` = 512 pixels, and a video of 21 latent frames has ``4*frames-3`` = 81 frames.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

_FORM = re.compile(r"(?:([1-9]\d{0,3})\*)?([a-z][a-z0-9_]{0,31})(?:([+-])([1-9]\d{0,5}))?\Z")
LARGEST = 1 << 26  # numbers along one axis


@dataclass(frozen=True)
class Dimension:
    """``factor * symbol + offset``; without a symbol the number `offset`."""

    offset: int
    factor: int = 0
    symbol: str | None = None

    def __str__(self) -> str:
        if self.symbol is None:
            return str(self.offset)
        factor = "" if self.factor == 1 else f"{self.factor}*"
        offset = f"{self.offset:+d}" if self.offset else ""
        return f"{factor}{self.symbol}{offset}"

    def value(self, symbols: Mapping[str, int]) -> int:
        """Return the number that this is where the symbols have these values."""
        return self.offset + (0 if self.symbol is None else self.factor * symbols[self.symbol])

    def divided(self, by: Dimension) -> Dimension | None:
        """Return what the symbol of `by` must be for `by` to equal this; None where nothing is."""
        factor, rest = divmod(self.factor, by.factor)
        offset, remainder = divmod(self.offset - by.offset, by.factor)
        if rest or remainder or (self.symbol is None and offset < 1):
            return None
        return Dimension(offset, factor, self.symbol)

    def substituted(self, symbols: Mapping[str, Dimension]) -> Dimension | None:
        """Return this with its symbol replaced; None where `symbols` has none for it."""
        if self.symbol is None:
            return self
        if self.symbol not in symbols:
            return None
        inner = symbols[self.symbol]
        return Dimension(
            self.offset + self.factor * inner.offset, self.factor * inner.factor, inner.symbol
        )


def parse(text: int | str) -> Dimension | None:
    """Return the dimension that a manifest writes so; None where it is none."""
    if isinstance(text, int):
        return Dimension(text) if 1 <= text <= LARGEST else None
    match = _FORM.match(text)
    if match is None:
        return None
    factor, symbol, sign, offset = match.groups()
    return Dimension(int(f"{sign or ''}{offset or 0}"), int(factor or 1), symbol)


class Symbolic(NamedTuple):
    """``factor * symbol + offset``: a dimension that has a symbol."""

    factor: int
    symbol: str
    offset: int

    def value(self, size: int) -> int:
        """Return the number that this is where the symbol is `size`."""
        return self.factor * size + self.offset


@lru_cache(maxsize=1024)
def symbolic(text: str) -> Symbolic:
    """Return the dimension that a checked manifest writes so, which is no number."""
    found = parse(text)
    if found is None or found.symbol is None:
        raise ValueError(f"{text!r} is no dimension with a symbol")
    return Symbolic(found.factor, found.symbol, found.offset)


def shown(shape: Sequence[Dimension]) -> str:
    """Return a shape as messages and listings write it."""
    return f"[{', '.join(map(str, shape))}]"
