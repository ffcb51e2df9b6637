"""This module tells which files of a bundle may be used: there, inside, whole and unaltered.

Hashing gigabytes at every start would cost more than loading them. So a file's SHA-256 is
computed once per machine and remembered together with what changes whenever the file does:
real path, size, inode, modification and change time. A program that can write the user's
cache folder can also write the user's programs: the cache is as trustworthy as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias

from latentc.runtimes.bundle.structures import File
from latentc.runtimes.errors import BundleError
from latentc.runtimes.storage.files import (
    UnsafeTarget,
    check_inside,
    open_regular,
    read_regular,
    write,
)
from latentc.runtimes.storage.folders import cache_folder
from latentc.runtimes.storage.parsing import parser

# "once": hash what is not remembered; "always": hash everything; "never": sizes only.
Hashing: TypeAlias = Literal["once", "always", "never"]

_CHUNK = 1 << 20
_SETTLED = 2.0  # seconds; a file younger than that could change again with the same times
_MAX_ENTRIES = 4096
_LARGEST_CACHE = 64 << 20  # bytes; more than so many entries with the longest paths
_UNLINK = "replace it by a copy (cp -rL copies a whole bundle so)"
_REPAIR = "the bundle is damaged or was altered: copy it again or export it again"


class HashCache:
    """SHA-256 digests of files that have not changed since, in one JSON file.

    A cache that cannot be read counts as empty, one that cannot be written is not. Several
    threads may use it; of two processes that write at once the later one wins.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._path = (folder or cache_folder()) / "hashes.json"
        self._lock = threading.Lock()
        self._entries: dict[str, list[int | str]] | None = None
        self._changed = False

    def get(self, path: str, status: os.stat_result) -> str | None:
        """Return the digest of the file at the real path `path`, None where it is not known."""
        with self._lock:
            entry = self._load().get(path)
        is_current = isinstance(entry, list) and entry[:-1] == identity(status)
        return str(entry[-1]) if is_current and entry else None

    def put(self, path: str, status: os.stat_result, digest: str) -> None:
        """Remember a digest (of a file that is old enough to tell a change by its times)."""
        if time.time() - status.st_mtime < _SETTLED:
            return
        with self._lock:
            entries = self._load()
            entries.pop(path, None)  # so that the last used stands last
            entries[path] = [*identity(status), digest]
            self._changed = True

    def save(self) -> None:
        """Write what was added, whole or not at all."""
        with self._lock:
            if not self._changed or self._entries is None:
                return
            self._changed = False
            kept = dict(list(self._entries.items())[-_MAX_ENTRIES:])
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write(self._path, json.dumps(kept).encode())

    def _load(self) -> dict[str, list[int | str]]:
        if self._entries is None:
            try:
                self._entries = _known_hashes(self._path)
            except BundleError:  # missing or damaged: files are hashed again
                self._entries = {}
        return self._entries


@parser(BundleError, "path", "a table of known hashes")
def _known_hashes(path: Path) -> dict[str, list[int | str]]:
    """Read what an earlier run knew: by path, the file's identity and then its digest."""
    entries = json.loads(read_regular(path, _LARGEST_CACHE))
    return {name: known for name, known in entries.items() if isinstance(known, list)}


def check_file(root: Path, file: File, hashing: Hashing, cache: HashCache | None) -> Path:
    """Check one file of the bundle whose resolved folder is `root`; returns its path.

    Without `cache` no digest is remembered.

    Raises:
        BundleError: missing, no regular file, outside the bundle (through a symlink), another
            size or another SHA-256 than the manifest says.
    """
    path = root / file.path
    real = _real_path(root, file.path)
    try:
        status = os.stat(real)
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
        raise BundleError(f"{path}: {what}; {_REPAIR}") from error
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path}: not a regular file; {_REPAIR}")
    if status.st_size != file.size:
        raise BundleError(f"{path}: expected {file.size} bytes, found {status.st_size}; {_REPAIR}")
    if hashing != "never":
        _check_hash(path, real, status, file, None if hashing == "always" else cache, cache)
    return path


def checked(bundle: Path, file: File, hashing: Literal["always", "never"]) -> Path:
    """Return the real path of a file of the bundle in the folder `bundle`, checked now.

    Raises:
        BundleError: as `check_file`.
    """
    root = Path(os.path.realpath(bundle))
    return Path(os.path.realpath(check_file(root, file, hashing, None)))


def check_unlinked(root: Path, places: Iterable[Path]) -> None:
    """Refuse to write into a bundle where a link would lead elsewhere.

    Raises:
        BundleError: says which one, and what to do.
    """
    for place in places:
        try:
            check_inside(root, place)
        except UnsafeTarget as error:
            raise BundleError(f"{error.filename}: {error.strerror}; {_UNLINK}") from None


def is_intact(
    bundle: Path, files: Iterable[File], hashing: Literal["always", "never"] = "never"
) -> bool:
    """Return whether all these files of a bundle are there, with their sizes or digests."""
    try:
        for file in files:
            checked(bundle, file, hashing)
    except BundleError:
        return False
    return True


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open_regular(path) as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _check_hash(
    path: Path,
    real: str,
    status: os.stat_result,
    file: File,
    known: HashCache | None,
    cache: HashCache | None,
) -> None:
    found = known.get(real, status) if known else None
    if found is None:
        try:
            found = sha256(real)
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror}") from error
        if cache is not None:
            cache.put(real, status, found)
    if found != file.sha256:
        raise BundleError(f"{path}: expected SHA-256 {file.sha256}, found {found}; {_REPAIR}")


def _real_path(root: Path, relative: str) -> str:
    real = os.path.realpath(root / relative)
    if os.path.commonpath([real, root]) != str(root):
        raise BundleError(
            f"{root / relative}: a symlink leads out of the bundle, to {real}; "
            "replace it by a copy of the file (cp -rL copies a whole bundle so)"
        )
    return real


def identity(status: os.stat_result) -> list[int]:
    """Return what changes whenever a file does: size, inode, modification and change time."""
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
