"""One process at a time writes into a bundle's folder; another one waits for it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from latentc.runtimes.errors import ExportError

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_POLL = 0.2  # seconds
WAITING = "wait for another export into it"  # a stage that may take long and does nothing


class Stages(Protocol):
    """A `Stages` is told of work that takes long."""

    def stage(self, subject: str, stage: str) -> AbstractContextManager[object]:
        """Return a context in which `stage` is done with `subject`."""
        ...


@contextmanager
def writing(bundle: Path, progress: Stages) -> Iterator[None]:
    """Hold the lock of a bundle's folder, which need not exist yet.

    The lock is a file ``.NAME.lock`` beside the folder, where every process that writes there
    finds it whatever its cache folder, and it is gone afterwards. It stands in the bundle only
    where nothing can be written beside it; then no export can replace the bundle either.

    Args:
        progress: told where another process has to be waited for.

    Raises:
        ExportError: there is no place for the lock.
    """
    real = Path(os.path.realpath(bundle))
    try:
        lock = _acquired(real.parent / f".{real.name}.lock", real, progress)
    except OSError as error:
        if error.errno not in _READ_ONLY or not real.is_dir():
            raise _refused(real, error) from error
        try:
            lock = _acquired(real / ".lock", real, progress)
        except OSError as inner:
            raise _refused(real, inner) from inner
    try:
        yield
    finally:
        # While it is held: whoever waits for it sees that its file is gone, and makes a new one.
        with suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


def _acquired(path: Path, bundle: Path, progress: Stages) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, poll_interval=_POLL)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with progress.stage(bundle.name, WAITING):
            lock.acquire()
    return lock


def _refused(bundle: Path, error: OSError) -> ExportError:
    place = f" (its lock is {error.filename})" if error.filename else ""
    return ExportError(f"cannot write {bundle}: {error.strerror or error}{place}")
