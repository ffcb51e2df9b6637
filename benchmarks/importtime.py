"""Reading what ``python -X importtime`` prints."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

STANDARD = "standard library"
_LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$")


@dataclass(frozen=True)
class Spent:
    """A `Spent` says what the modules of one package cost together, without what they import from
    others.
    """

    modules: int
    microseconds: int


def by_package(text: str) -> dict[str, Spent]:
    """Return the own import time by top-level package, the most expensive first."""
    spent: dict[str, Spent] = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        package = match[2].partition(".")[0]
        if package in sys.stdlib_module_names or package.startswith("_"):
            package = STANDARD
        so_far = spent.get(package, Spent(0, 0))
        spent[package] = Spent(so_far.modules + 1, so_far.microseconds + int(match[1]))
    return dict(sorted(spent.items(), key=lambda item: -item[1].microseconds))


def rows(spent: Mapping[str, Spent]) -> list[tuple[str, str, str]]:
    """Return the rows for a table, with a sum."""
    lines = [(name, str(s.modules), f"{s.microseconds / 1e3:.1f}") for name, s in spent.items()]
    total = sum(each.microseconds for each in spent.values())
    return [*lines, ("all", str(sum(s.modules for s in spent.values())), f"{total / 1e3:.1f}")]
