"""How a long export says what it is doing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """A stage of a subject begins (`seconds` None) or is over; `size` in bytes if it wrote."""

    subject: str
    stage: str
    seconds: float | None = None
    size: int = 0


class Progress:
    """Hands events to a callback; the command line draws them, other callers may ignore."""

    def __init__(self, report: Callable[[Event], None] | None = None) -> None:
        self._report = report or (lambda _: None)

    @contextmanager
    def stage(self, subject: str, stage: str) -> Iterator[Callable[[int], None]]:
        """Report begin and end; call the yielded function with the bytes written."""
        written = 0

        def wrote(size: int) -> None:
            nonlocal written
            written += size

        self._report(Event(subject, stage))
        begun = time.perf_counter()
        yield wrote
        self._report(Event(subject, stage, time.perf_counter() - begun, written))
