"""Values of a call: arrays, and what their rows are of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.programs.values import Rows, met


@dataclass(frozen=True)
class Value:
    """An array whose first axis are its rows."""

    array: Array
    rows: Rows

    def as_rows(self, rows: Rows, made: int, each: int, given: int = 1) -> Array:
        """Return the array with a row for each of what `rows` says.

        The images of one prompt are next to each other. Given images are repeated as a whole, as in
        diffusers: images of the first and the second stand in turn.

        Args:
            made: images that are made; `each`: of each prompt; `given`: images that the call gives.
        """
        if rows in (self.rows, Rows.CALL) and rows != Rows.GIVEN:
            return self.array
        if self.rows == Rows.CALL:
            count = {Rows.IMAGES: made, Rows.PROMPTS: made // each, Rows.GIVEN: given}[rows]
            return np.repeat(self.array, count, axis=0)
        if rows == Rows.GIVEN:
            return tiled(self.array, given)
        if self.rows == Rows.PROMPTS:
            return np.repeat(self.array, each, axis=0)
        return tiled(self.array, made)


def tiled(array: Array, rows: int) -> Array:
    """Return so many rows: all of the array's again and again."""
    if len(array) == rows:
        return array
    return np.tile(array, (rows // len(array), *[1] * (array.ndim - 1)))


def together(values: Iterable[Value], made: int, each: int) -> tuple[list[Array], Rows]:
    """Return the arrays with as many rows as the kind that they meet in has, and that kind."""
    every = list(values)
    rows = met(value.rows for value in every)
    given = max((len(v.array) for v in every if v.rows == Rows.GIVEN), default=1)
    return [value.as_rows(rows, made, each, given) for value in every], rows
