"""This module tells what a long export is doing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """A stage of a subject begins or goes on (`seconds` None) or is over; `size` in bytes if it
    wrote; `done` of `total` if it counts."""

    subject: str
    stage: str
    seconds: float | None = None
    size: int = 0
    done: int = 0
    total: int = 0


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

    @contextmanager
    def counted(self, subject: str, stage: str, total: int) -> Iterator[Callable[[int], None]]:
        """Report begin, progress and end; call the yielded function with how many are done."""
        begun = time.perf_counter()

        def told(done: int) -> None:
            self._report(Event(subject, stage, done=done, total=total))

        told(0)
        yield told
        self._report(Event(subject, stage, time.perf_counter() - begun))
