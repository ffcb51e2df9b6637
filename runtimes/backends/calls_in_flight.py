"""The calls of graphs that are in flight: closing what they run on, and ending one of them early.

An engine's memory must not be freed while a call reads it: OpenVINO then ends the process. So
everything that is closed counts its calls (`Calls`), and is released when the last one has left.

Nothing here may wait for the thread that it runs in: `close` may be called by a signal handler or
a finaliser that interrupts a call, at any point of it. Hence the order of the assignments below,
which is the same for both sides: announce first, then look at what the other side has announced.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from latentc.runtimes.errors import BackendError

_AGAIN = 0.1  # seconds between two attempts to end the calls that a `close` waits for


class Call:
    """One run of a graph, in the thread that made this object."""

    def __init__(self) -> None:
        self.thread, self.process = threading.get_ident(), os.getpid()
        self.cancelled = False
        self._abort: Callable[[], None] | None = None

    def cancel(self) -> None:
        """End the call early where its engine can; any thread may ask for it."""
        self.cancelled = True
        abort = self._abort
        if abort is not None:
            with suppress(Exception):  # the engine has ended by itself
                abort()

    @contextmanager
    def abortable(self, abort: Callable[[], None]) -> Iterator[None]:
        """Let `cancel` end what runs inside by calling `abort`, from another thread."""
        self._abort = abort
        try:
            if self.cancelled:
                abort()
            yield
        finally:
            self._abort = None


class _Thread(threading.local):
    """A `_Thread` holds the call that the current thread is in, and the cancellation it heeds."""

    call: Call | None = None
    cancellation: Cancellation | None = None


_here = _Thread()


@contextmanager
def in_flight() -> Iterator[Call]:
    """Make the call that the current thread is in from here on; it is cancelled together with the
    `Cancellation` that is in force."""
    before, cancellation, call = _here.call, _here.cancellation, Call()
    _here.call = call
    if cancellation is not None:
        cancellation.calls.append(call)
        if cancellation.requested:  # it may be cancelled in between, which must not be undone
            call.cancelled = True
    try:
        yield call
    finally:
        _here.call = before
        if cancellation is not None:
            cancellation.calls.remove(call)


def current() -> Call:
    """Return the innermost call of the current thread, a new one where it is in none."""
    return _here.call or Call()


class Cancellation:
    """A request to end all calls that are made on somebody's behalf, those in flight included."""

    def __init__(self) -> None:
        self.requested = False
        self.calls: list[Call] = []

    def request(self) -> None:
        """Ask for it, from any thread."""
        self.requested = True
        for call in tuple(self.calls):
            call.cancel()

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Make the calls of the current thread inside ones that `request` ends."""
        before, _here.cancellation = _here.cancellation, self
        try:
            yield
        finally:
            _here.cancellation = before


class Calls:
    """The calls in flight of one thing that can be closed.

    Args:
        closed: what a call is told that comes after `close`.
    """

    def __init__(self, closed: str) -> None:
        self.closed = False
        self._told = closed
        self._active: list[Call] = []
        self._change = threading.Condition()  # its lock may be taken again by the same thread
        self._left_to_calls = False  # whether the last call has to release what is closed
        self._release: Callable[[], None] | None = None
        self._releaser: int | None = None
        self._released = False

    @contextmanager
    def including(self, call: Call) -> Iterator[None]:
        """Keep what can be closed from being released for the time inside.

        Raises:
            BackendError: it is closed.
        """
        try:
            self._active.append(call)
            if self.closed:
                raise BackendError(self._told)
            yield
        finally:
            self._active.remove(call)
            if self.closed:
                self._left()

    def close(self, release: Callable[[], None]) -> None:
        """Refuse new calls, end those in flight or wait for them, then call `release` once.

        Where the current thread is in one of the calls, this returns at once, and `release` is
        called by the last call that leaves. A process that was forked during a call of another
        thread has that call forever, and releases nothing.
        """
        with self._change:
            self._release = self._release or release
            self.closed = True
        me, here = threading.get_ident(), os.getpid()
        while self._active and not self._released:
            calls = tuple(self._active)
            if any(call.process != here for call in calls):
                return
            for call in calls:
                call.cancel()
            with self._change:
                if any(call.thread == me for call in calls):
                    self._left_to_calls = True
                    break
                if self._active and not self._released:
                    self._change.wait(_AGAIN)
        self._settle()
        with self._change:
            while self._releaser not in (None, me) and not self._released:
                self._change.wait()

    def _left(self) -> None:
        with self._change:
            self._change.notify_all()
        if self._left_to_calls:
            self._settle()

    def _settle(self) -> None:
        """Release what is closed, if nobody uses it and nobody has begun to."""
        with self._change:
            if self._active or self._releaser is not None or self._release is None:
                return
            self._releaser = threading.get_ident()
        try:
            self._release()
        finally:
            self._released = True
            with self._change:
                self._change.notify_all()
