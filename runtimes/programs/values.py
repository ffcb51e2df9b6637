"""The types of values: what kind of rows they have, and the dtype and shape of a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum

from latentc.runtimes.programs.dimensions import Dimension, parse, shown
from latentc.runtimes.programs.graphs import ROWS, Form


class Rows(IntEnum):
    """A `Rows` says what a value has a row for.

    Of two kinds that meet, the later one is that of the result.
    """

    CALL = 0  # one row for the whole call
    PROMPTS = 1
    GIVEN = 2  # images that the call gives
    IMAGES = 3  # images that are made

    def __str__(self) -> str:
        return self.name.lower()


def met(kinds: Iterable[Rows]) -> Rows:
    """Return the rows of what is made of values with these. Prompts and given images meet in the
    images that are made."""
    distinct = set(kinds)
    if {Rows.PROMPTS, Rows.GIVEN} <= distinct:
        return Rows.IMAGES
    return max(distinct, default=Rows.CALL)


@dataclass(frozen=True)
class Type:
    """A value's: `shape` is that of a row. Integers and floats are told apart, widths are not: a
    reader casts to what a graph takes."""

    integers: bool
    shape: tuple[Dimension, ...]
    rows: Rows

    def __str__(self) -> str:
        return f"{'integers' if self.integers else 'floats'} {shown(self.shape)}"

    def same_form(self, other: Type) -> bool:
        """Return whether the rows of both are alike."""
        return (self.integers, self.shape) == (other.integers, other.shape)


def type_of(form: Form, symbols: Mapping[str, Dimension], rows: Rows) -> Type | None:
    """Return the type of an output whose graph's symbols are known; None where one is not."""
    dimensions = [parse(each) for each in form.shape[1:]]
    if form.shape[:1] != (ROWS,) or any(dimension is None for dimension in dimensions):
        return None
    known = [each.substituted(symbols) for each in dimensions if each is not None]
    if any(each is None for each in known):
        return None
    shape = tuple(each for each in known if each is not None)
    return Type("int" in form.dtype, shape, rows)


def fits(value: Type, form: Form, symbols: dict[str, Dimension]) -> bool:
    """Return whether a value can feed an input; notes what the graph's symbols are then."""
    if form.shape[:1] != (ROWS,) or len(form.shape) != len(value.shape) + 1:
        return False
    if ("int" in form.dtype) != value.integers:
        return False
    return all(
        _fits(own, parse(wanted), symbols)
        for own, wanted in zip(value.shape, form.shape[1:], strict=True)
    )


def _fits(own: Dimension, wanted: Dimension | None, symbols: dict[str, Dimension]) -> bool:
    if wanted is None:
        return False
    if wanted.symbol is None:
        return own == wanted
    solved = own.divided(wanted)
    return solved is not None and symbols.setdefault(wanted.symbol, solved) == solved
