"""Who wants to hear of every run that is done, such as a logger.

Observers are of the whole process: a program that logs its images does not have to hand
something to every pipeline. Nothing that an observer does can touch a run: its result is ready
when they are called, and their errors become warnings.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import TypeAlias

from latentc.runtimes.pipeline.run import Result, Run

Observer: TypeAlias = Callable[[Run, Result], None]

_observers: list[Observer] = []
_failed: set[Observer] = set()
_lock = threading.Lock()


def add(observer: Observer) -> Callable[[], None]:
    """Call `observer(run, result)` after every run that ends with a result, in its thread.

    Returns:
        A function that takes the observer away again; calling it twice is harmless.
    """
    with _lock:
        _observers.append(observer)

    def remove() -> None:
        with _lock:
            _failed.discard(observer)
            if observer in _observers:
                _observers.remove(observer)

    return remove


def notify(run: Run, result: Result) -> None:
    """Tell every observer, in the order in which they came.

    An observer that raises an error is a warning, once, and is called again the next time.
    """
    for observer in [*_observers]:
        try:
            observer(run, result)
        except Exception as error:
            if observer not in _failed:
                _failed.add(observer)
                text = f"{getattr(observer, '__qualname__', observer)}: {error!r:.300}"
                warnings.warn(f"an observer of results failed: {text}", stacklevel=2)
