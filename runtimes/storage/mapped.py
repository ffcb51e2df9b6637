"""A large weights file as memory that takes room only while it is being read."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np

_INTERVAL = 0.05  # seconds; what is read in between is what stays in memory at most


class MappedFile:
    """A file's bytes in `array`, mapped into memory.

    An engine that copies weights into a layout of its own reads them once and never again,
    but as long as it holds the mapping, every page it has read counts as this process's
    memory: twice the model. `release` gives the pages back; one that is touched again is read
    from the file (in general, from the system's cache) as if nothing had happened.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # A private copy, because engines ask for writable memory; nothing writes to it.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.array: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(self._map, np.uint8)

    def release(self) -> None:
        """Give back the memory; the content stays readable."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED)

    @contextmanager
    def releasing(self) -> Iterator[None]:
        """Release again and again while the body runs, so that its peak stays low too."""
        done = Event()

        def work() -> None:
            while not done.wait(_INTERVAL):
                self.release()

        thread = Thread(target=work, name="latentc-release", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.release()
