"""This module reads how an engine is built from a graph: recipe.json, a document beside the graph.

The graph says in which precision everything is computed. The recipe says for which shapes, and
how much memory and care the builder may spend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from latentc.runtimes.bundle.sizes import dimension
from latentc.runtimes.bundle.structures import Component
from latentc.runtimes.errors import BundleError, InputError
from latentc.runtimes.storage.files import LARGEST_SETTINGS, read_regular
from latentc.runtimes.storage.parsing import parser
from latentc.runtimes.strict import readable

RECIPE = "recipe.json"
FORMAT = 1

_MOST_DIGITS = 9
Range = tuple[int, int, int]  # smallest, the one to optimise for, largest
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A recipe says what engine to build from a graph.

    Attributes:
        format: of this document.
        precision: what the graph computes in: float32, float16 or bfloat16.
        profile: for each open dimension of the inputs its range.
        note: why the precision is not the one that was asked for; "" if it is.
        workspace: bytes that the builder's kernels may use; 0 leaves it to the engine.
        tf32: whether float32 products may be computed in TensorFloat-32.
        level: the builder's optimisation level; None is its default.
    """

    format: int
    precision: str
    profile: dict[str, Range]
    note: str = ""
    workspace: int = 0
    tf32: bool = False
    level: int | None = None

    @classmethod
    @parser(BundleError, "path", "a recipe for an engine")
    def load(cls, path: Path) -> Recipe:
        """Raises BundleError for what is missing, damaged or of another format."""
        recipe = msgspec.json.decode(read_regular(path, LARGEST_SETTINGS), type=cls)
        if recipe.format != FORMAT:
            raise BundleError(
                f"{path}: format {recipe.format}, but this latentc reads {FORMAT}; "
                "upgrade latentc or export the bundle again"
            )
        try:
            for symbol, bounds in recipe.profile.items():
                check_range(f"{path}: {symbol}", bounds)
        except InputError as error:  # nobody asked for these ranges: the file is wrong
            raise BundleError(str(error)) from error
        return recipe

    def encode(self) -> bytes:
        """Return the document as indented UTF-8 JSON with a final newline."""
        return readable(self)

    def shapes(self, component: Component) -> dict[str, Shapes]:
        """Return the smallest, usual and largest shape of every input that has an open dimension.

        Raises:
            BundleError: the profile lacks one of them.
        """
        shapes: dict[str, Shapes] = {}
        for name, spec in component.inputs.items():
            if all(isinstance(dim, int) for dim in spec.shape):
                continue
            smallest, usual, largest = (self._shape(name, spec.shape, i) for i in range(3))
            shapes[name] = (smallest, usual, largest)
        return shapes

    def _shape(self, name: str, shape: Sequence[int | str], which: int) -> tuple[int, ...]:
        values = {symbol: bounds[which] for symbol, bounds in self.profile.items()}
        made = [dimension(dim, values) for dim in shape]
        numbers = tuple(dim for dim in made if isinstance(dim, int))
        if len(numbers) != len(shape):
            lacking = [dim for dim in made if isinstance(dim, str)]
            raise BundleError(f"the recipe has no range for {', '.join(lacking)} of input {name!r}")
        return numbers


@parser(InputError, "text", "a range")
def parse_range(name: str, text: str) -> Range:
    """Return the range that a text gives: ``"1:2:8"`` is smallest, usual and largest; ``"512"``
    only that.

    Raises:
        InputError: no such thing.
    """
    parts = text.split(":")
    numbers = all(part.isdecimal() and len(part) <= _MOST_DIGITS for part in parts)
    if len(parts) not in (1, 3) or not numbers:
        raise InputError(f"{name} {text!r}: expected MIN:OPT:MAX, such as 1:2:8, or one number")
    low, usual, high = (int(part) for part in (parts if len(parts) == 3 else parts * 3))
    check_range(name, (low, usual, high))
    return low, usual, high


def check_range(name: str, bounds: Range) -> None:
    """Raises InputError where a range is not in order."""
    if not 1 <= bounds[0] <= bounds[1] <= bounds[2]:
        raise InputError(f"{name}: {list(bounds)} is not smallest, usual and largest, from 1 on")


def check_profile(
    component: str, shapes: Mapping[str, Sequence[int]], profile: Mapping[str, Shapes]
) -> None:
    """Refuse shapes that an engine was not built for.

    Raises:
        InputError: names the input, its shape and the engine's profile.
    """
    for name, (smallest, _, largest) in profile.items():
        found = tuple(shapes[name])
        if not all(a <= x <= b for a, x, b in zip(smallest, found, largest, strict=True)):
            raise InputError(
                f"{component}: input {name!r} of shape {list(found)} is outside of this engine's "
                f"profile, {list(smallest)} to {list(largest)}; ask for another size or fewer "
                "images, or build for them: latentc build BUNDLE --images, --height, --width"
            )
