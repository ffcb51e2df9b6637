"""Compiled graphs on disk: made once per machine, expendable, of a bounded size.

A graph is a file ``<key>.blob`` and a record ``<key>.json``. The key is a digest of all that the
compiled graph depends on, so one that no longer fits is never found. The record repeats those
facts and holds what tells that the blob is still the one that was written. Whatever goes wrong
here costs a compilation, never the load.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from latentc.runtimes.bundle.trust import identity
from latentc.runtimes.errors import BundleError, LatentcError
from latentc.runtimes.storage import files
from latentc.runtimes.storage.parsing import parser

LIMIT = 16 << 30  # bytes in one folder; what was used longest ago goes first
_SPARE = 1 << 30  # bytes of the disk that are left to others
_BLOB, _RECORD = ".blob", ".json"
_LARGEST_RECORD = 1 << 20  # bytes

Facts = Mapping[str, str]  # what a compiled graph depends on, by readable name


class CacheWarning(UserWarning):
    """A compiled graph could not be kept or used; the graph was compiled instead."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A record says what a blob was compiled from and for, and holds the blob's
    `latentc.runtimes.bundle.trust.identity`.
    """

    facts: dict[str, str]
    identity: list[int]


@parser(BundleError, "path", "a record of a compiled graph")
def _load(path: Path) -> Record:
    return msgspec.json.decode(files.read_regular(path, _LARGEST_RECORD), type=Record)


@dataclass(frozen=True)
class ModelCache:
    """The compiled graphs in one folder, at most `limit` bytes of them.

    Threads and processes may share a folder: files appear whole, and of two that write the same
    graph the later one wins.
    """

    folder: Path
    limit: int = LIMIT

    def find(self, facts: Facts) -> Path | None:
        """Return the blob that was compiled from just this, if it is here, whole and unaltered."""
        blob = self._path(facts, _BLOB)
        record = self._path(facts, _RECORD)
        try:
            record_of_blob = _load(record)
            identity_now = identity(os.stat(blob))
        except (OSError, LatentcError):
            return None
        if record_of_blob.facts != dict(facts) or record_of_blob.identity != identity_now:
            return None
        with suppress(OSError):  # a cache may be read-only
            os.utime(record)  # used last
        return blob

    @contextmanager
    def scratch(self, size: int) -> Iterator[Path | None]:
        """Yield a new folder for a blob of about `size` bytes, which is gone afterwards.

        It is None, with a `CacheWarning`, where there is no room or the folder cannot be written.
        """
        import shutil

        with ExitStack() as folders:
            folder: Path | None = None
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(self.folder).free
                if size > self.limit or free < size + _SPARE:
                    self._warn(f"no room for {size >> 20} MiB ({free >> 20} MiB are free)")
                else:
                    folder = folders.enter_context(files.scratch_folder(self.folder))
            except OSError as error:
                self._warn(f"cannot be written: {error.strerror or error}")
            yield folder

    def keep(self, facts: Facts, made: Path) -> None:
        """Take over the file `made`, which lies in a scratch folder, and remove what has not been
        used for longest where the folder has grown too large."""
        blob = self._path(facts, _BLOB)
        try:
            made.chmod(0o600)
            files.move(made, blob)
            record = Record(dict(facts), identity(os.stat(blob)))
            known = msgspec.json.format(msgspec.json.encode(record))
            files.write(self._path(facts, _RECORD), known)
        except OSError as error:
            self._warn(f"cannot be written: {error.strerror or error}")
        self.trim()

    def discard(self, facts: Facts, reason: str) -> None:
        """Remove a blob that the engine does not take."""
        self._warn(f"a compiled graph in it is of no use, and is made again: {reason}")
        for suffix in (_RECORD, _BLOB):
            _remove(self._path(facts, suffix))

    def trim(self) -> None:
        """Remove files, those that were used longest ago first, until `limit` is kept."""
        used: list[tuple[float, int, Path]] = []
        for path in self.folder.rglob("*"):
            with suppress(OSError):
                status = path.stat()
                if path.is_file() and path.suffix != _RECORD and not files.is_scratch(path):
                    used.append((_last_used(path, status), status.st_size, path))
        total = sum(size for _, size, _ in used)
        for _, size, path in sorted(used):
            if total <= self.limit:
                break
            _remove(path.with_suffix(_RECORD))
            _remove(path)
            total -= size

    def _path(self, facts: Facts, suffix: str) -> Path:
        digest = hashlib.sha256(json.dumps(sorted(facts.items())).encode()).hexdigest()
        return self.folder / f"{digest[:32]}{suffix}"

    def _warn(self, what: str) -> None:
        warnings.warn(
            f"the cache of compiled graphs {self.folder} {what}; going on without "
            "(cache=False or --no-cache keeps quiet about it)",
            CacheWarning,
            stacklevel=3,
        )


def _last_used(path: Path, status: os.stat_result) -> float:
    """Return when a blob was last used, in seconds since the epoch.

    Its record is touched when it is used: touching the blob would make it another one.
    """
    with suppress(OSError):
        return max(status.st_mtime, path.with_suffix(_RECORD).stat().st_mtime)
    return status.st_mtime


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
