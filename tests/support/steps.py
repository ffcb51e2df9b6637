"""This module counts how much work a call does: a measure that no other load of the machine
changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

_LOOKING = ("count", "index", "remove")  # through a whole list


def steps_of(work: Callable[[], Any]) -> int:
    """Return how many lines of Python and calls of built-in functions `work` takes.

    The built-in functions are counted by what they are given: a look through a list or tuple, or
    a copy of one, takes as many steps as it has members.
    """
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += 1
        return trace

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event == "c_call":
            owner = getattr(argument, "__self__", None)
            if isinstance(owner, list | tuple) and argument.__name__ in (
                "count",
                "index",
                "remove",
            ):
                count += len(owner)

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
    return count
