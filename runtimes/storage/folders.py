"""Where latentc keeps what it makes once per machine, also where there is no home folder."""

from __future__ import annotations

import os
import stat
from functools import cache
from pathlib import Path


def cache_folder() -> Path:
    """Return ``$LATENTC_CACHE``, else ``$XDG_CACHE_HOME/latentc``, else ``~/.cache/latentc``.

    A process without a home folder, as in many containers, gets a folder of its user's own in the
    system's temporary folder.
    """
    chosen = os.environ.get("LATENTC_CACHE")
    if chosen:
        return expanded(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return expanded(base) / "latentc"
    home = _home()
    return _temporary() if home is None else home / ".cache" / "latentc"


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with ``~`` replaced by the home folder.

    Files that name paths (a Dockerfile, a service's unit) are read by no shell, and a folder that
    is called ``~`` is never meant.
    """
    text = os.fspath(path)
    first, *rest = text.replace(os.sep, "/").split("/", 1)
    if first != "~":
        return Path(os.path.expanduser(text))
    return (_home() or _temporary()) / "".join(rest)


def _home() -> Path | None:
    """Return the user's home folder.

    It is None where there is none, or where it is ``/`` and not theirs.
    """
    home = os.path.expanduser("~")
    if not os.path.isabs(home) or (home == "/" and not os.access(home, os.W_OK)):
        return None
    return Path(home)


def _temporary() -> Path:
    """Return a folder that only this user can write.

    Digests and compiled graphs in it are trusted.
    """
    import tempfile

    user = getattr(os, "geteuid", None)  # Windows has temporary folders by user
    if user is None:
        return Path(tempfile.gettempdir()) / "latentc"
    folder = Path(tempfile.gettempdir()) / f"latentc-{user()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(folder)
    except OSError:  # a file, or a folder that cannot be written: what uses the cache says so
        return folder / "cache"
    safe = stat.S_ISDIR(status.st_mode) and status.st_uid == user() and not status.st_mode & 0o022
    return folder if safe else _private()


@cache
def _private() -> Path:
    """Return a new folder for this process alone, which is removed at its end: somebody else has
    taken the usual one's name."""
    import atexit
    from contextlib import ExitStack

    from latentc.runtimes.storage.files import temporary_folder

    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(temporary_folder())
