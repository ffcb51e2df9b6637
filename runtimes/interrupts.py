"""Ctrl-C: in the middle of a step, and where a library swallows it.

Python runs signal handlers between its own instructions, so while an engine works the main thread
hears of nothing: a step of minutes would go on for minutes. Python's wake-up descriptor is written
at once, though, and another thread can read it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def noticed() -> Iterator[Callable[[], bool]]:
    """Yield what says whether SIGINT has come since: a library that it comes to may make another
    exception of the KeyboardInterrupt, or none.

    Where this is not the main thread, or signals are handled otherwise, the answer is no.
    """
    came = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.default_int_handler(number, frame)

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def on_interrupt(end: Callable[[], None]) -> Iterator[None]:
    """Call `end` in another thread as soon as SIGINT comes; KeyboardInterrupt comes as always.

    Where this is not the main thread, which alone may ask for signals, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    with suppress(AttributeError, OSError):  # pipes of Windows, where it is not needed
        os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while heard := os.read(reader, 1):
            if heard[0] == signal.SIGINT:
                end()

    watcher = threading.Thread(target=watch, name="latentc-interrupts", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        watcher.join()
        os.close(reader)
