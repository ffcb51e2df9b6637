"""This module reads files whole and replaces them; it is the only one that renames anything.

Reading accepts regular files within a bound: a FIFO or a device, which would block or never end,
is an error. Writing goes to a scratch file with a random name beside the target, which takes the
target's place when it is complete and on the disk: a reader sees the old content or the new one.

A scratch is locked by the process that writes it. What killed processes left is therefore told
from what is still being written, and removed by the next process that writes into the folder.

What only some systems have (O_NOFOLLOW, O_NONBLOCK, locks, hard links, fsync of a folder) is used
where it is there. Without locks a scratch counts as left behind after a day.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeAlias

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PathLike: TypeAlias = "str | os.PathLike[str]"

# Bytes: bounds for what is read whole. Documents are JSON and text that people and libraries write:
# configurations, indexes of weights, reports, prompts. Settings are those of one thing: a recipe, a
# list of packages, a record in a cache, cases.
LARGEST_DOCUMENT = 64 << 20
LARGEST_SETTINGS = 1 << 20

_CHUNK = 1 << 20  # bytes
_SCRATCH = re.compile(r"\.latentc-[0-9a-f]{16}\.tmp")
_LEFT_BEHIND = 24 * 3600  # seconds; only where the system cannot lock files
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h> and <linux/fs.h>
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # by file systems without fsync
_MOST_FOLDERS = 4096  # that are remembered as swept
_swept: set[str] = set()

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnreadableFile(OSError):
    """A file is no regular one, too large or outside of its root; `strerror` says which."""

    def __init__(self, path: PathLike, problem: str) -> None:
        super().__init__(errno.EINVAL, problem, os.fspath(path))


class UnsafeTarget(OSError):
    """A path to be written or removed leads through a link, or out of its root."""

    def __init__(self, path: PathLike, problem: str) -> None:
        super().__init__(errno.EINVAL, problem, os.fspath(path))


def read_regular(path: PathLike, limit: int, *, root: PathLike | None = None) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Args:
        root: a folder that links must not lead out of.

    Raises:
        UnreadableFile: `path` is a FIFO, device or folder, has more than `limit` bytes, or lies
            outside of `root` once its links are followed.
        OSError: it is missing or cannot be read.
    """
    with open_regular(path, limit, root=root) as file:
        size = os.fstat(file.fileno()).st_size
        # At once: engines have gigabytes. None of what would wait, as some files under /proc do.
        data = file.read(size + 1) or b""
        if len(data) <= size:
            return data
        # It grows, or its size is not known before, as under /proc.
        chunks, total = [data], len(data)
        while total <= limit and (chunk := file.read(_CHUNK)):
            chunks.append(chunk)
            total += len(chunk)
    if total > limit:
        raise UnreadableFile(path, _too_large(limit, total))
    return b"".join(chunks)


@contextmanager
def open_regular(
    path: PathLike, limit: int | None = None, *, root: PathLike | None = None
) -> Iterator[BinaryIO]:
    """Open a regular file for reading; arguments and errors are those of `read_regular`."""
    real = _real_inside(root, path) if root is not None else os.fspath(path)
    try:
        _check_regular(path, os.stat(real), limit)  # opening a device can do something already
        flags = os.O_RDONLY | _flag("O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOCTTY")
        if root is not None:
            flags |= _flag("O_NOFOLLOW")  # the links were followed above
        descriptor = os.open(real, flags)
    except ValueError as error:  # a NUL, or what the file system's encoding lacks
        raise UnreadableFile(path, f"no file can have this name ({error})") from error
    with open(descriptor, "rb") as file:
        _check_regular(path, os.fstat(descriptor), limit)
        yield file


def require_regular(path: PathLike) -> None:
    """Check that `path` is a regular file, for a library that opens it by itself.

    Raises:
        UnreadableFile: it is not.
        OSError: it is missing or cannot be read.
    """
    with open_regular(path):
        pass


@contextmanager
def replacing(path: PathLike, *, root: PathLike | None = None) -> Iterator[BinaryIO]:
    """Yield a new binary file that takes the place of `path` on success, and vanishes otherwise.

    Args:
        path: where the content goes; its folder must exist, unless `root` is given.
        root: a folder that `path` lies in; neither `path` nor a folder between them may be a
            link, and folders that are missing there are made.

    Raises:
        UnsafeTarget: `path` is not in `root`, or through a link.
        OSError: the folder cannot be written, or the disk failed.
    """
    target = Path(path)
    if root is not None:
        check_inside(root, target)
        target.parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(target.parent)
    scratch, file = _new_file(target.parent)
    try:
        with file:
            yield file
            file.flush()
            _sync(file.fileno())
            if fcntl is None:
                file.close()  # Windows does not rename an open file
            os.replace(scratch, target)
    except BaseException:
        _remove(scratch)
        raise
    _sync_folder(target.parent)


def write(path: PathLike, data: bytes, *, root: PathLike | None = None) -> None:
    """Replace a file's content by `data`; see `replacing`."""
    with replacing(path, root=root) as file:
        file.write(data)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent`, which is removed afterwards with all that is in it.

    Raises:
        OSError: `parent` is missing or cannot be written.
    """
    import shutil

    _sweep_once(parent)
    folder, descriptor = _new_folder(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def temporary_folder() -> AbstractContextManager[Path]:
    """Return what yields a new folder in the system's place for temporary files; see
    `scratch_folder`, which also removes those of processes that were killed."""
    import tempfile

    return scratch_folder(Path(tempfile.gettempdir()))


def move(source: PathLike, target: PathLike) -> None:
    """Move a complete file or folder to `target` on the same disk, in the place of a file there.

    Raises:
        OSError: it cannot be moved, or the disk failed.
    """
    if not os.path.isdir(source):
        _sync_file(source)
    os.replace(source, target)
    _sync_folder(os.path.dirname(os.path.abspath(target)))


def exchange(one: PathLike, other: PathLike) -> bool:
    """Let two files or folders on one disk change places, in one step.

    Returns:
        False, with nothing done, where this system or disk cannot do that.
    """
    import ctypes

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2  # of Linux
    except (AttributeError, OSError, TypeError):
        return False
    paths = os.fsencode(os.path.abspath(one)), os.fsencode(os.path.abspath(other))
    if rename(_HERE, paths[0], _HERE, paths[1], ctypes.c_uint(_EXCHANGE)) != 0:
        return False
    for path in (one, other):
        _sync_folder(os.path.dirname(os.path.abspath(path)))
    return True


def link(existing: PathLike, path: PathLike) -> None:
    """Make `path`, where nothing is yet, a hard link to the file `existing`.

    Raises:
        OSError: this system or disk has no hard links, or they cannot lead there.
    """
    make = getattr(os, "link", None)
    if make is None:
        raise OSError(errno.ENOTSUP, "this system has no hard links", os.fspath(path))
    make(existing, path)


def link_or_copy(existing: PathLike, path: Path) -> None:
    """Make `path` a hard link to the file `existing`, or a copy where it cannot be one.

    Raises:
        OSError: neither can be made.
    """
    path.unlink(missing_ok=True)
    try:
        link(existing, path)
    except OSError:
        import shutil

        with open(existing, "rb") as source, replacing(path) as file:
            shutil.copyfileobj(source, file, _CHUNK)


def replace_by_link(existing: PathLike, path: Path) -> None:
    """Put a hard link to the file `existing` in the place of `path`. Raises as `link`."""
    with scratch_folder(path.parent) as folder:
        link(existing, folder / "link")
        os.replace(folder / "link", path)


def remove_folder(path: Path) -> None:
    """Remove a folder with all that is in it, as far as that can be done.

    What is no folder is left alone: a link is not followed, and a FIFO not opened, where
    ``shutil.rmtree`` would wait for a writer.
    """
    import shutil

    with suppress(OSError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path, ignore_errors=True)


def remove(path: Path, *, root: PathLike) -> None:
    """Remove a file under `root`, if it is there.

    Raises:
        UnsafeTarget: `path` is not in `root`, or a folder between them is a link.
        OSError: it cannot be removed.
    """
    check_inside(root, path.parent)
    path.unlink(missing_ok=True)


def check_inside(root: PathLike, path: Path) -> None:
    """Check that `path` lies in the folder `root` and that no link is between them, or is `path`.

    Raises:
        UnsafeTarget: it is not so.
    """
    place = Path(root)
    try:
        parts = path.relative_to(place).parts
    except ValueError:
        raise UnsafeTarget(path, f"expected a path inside of {place}") from None
    if ".." in parts:
        raise UnsafeTarget(path, f"expected a path inside of {place}, found '..' in it")
    for part in parts:
        place = place / part
        try:
            status = os.lstat(place)
        except FileNotFoundError:
            return
        if stat.S_ISLNK(status.st_mode) or getattr(status, "st_reparse_tag", 0) != 0:
            raise UnsafeTarget(place, f"expected no link inside of {root}, where files are written")


def is_scratch(path: Path) -> bool:
    """Return whether a path is a scratch file or folder, or lies in one."""
    return any(_SCRATCH.fullmatch(part) for part in path.parts)


def sweep(folder: PathLike) -> None:
    """Remove the scratch files and folders that killed processes left in a folder."""
    try:
        with os.scandir(folder) as entries:
            left = [entry.path for entry in entries if _SCRATCH.fullmatch(entry.name)]
    except OSError:
        return
    for path in left:
        with suppress(OSError):
            _remove_if_left(path)


def _sweep_once(folder: Path) -> None:
    """Sweep a folder when this process first writes there: listing it each time would cost more
    than writing where there are many files."""
    place = os.path.abspath(folder)
    if place in _swept:
        return
    if len(_swept) >= _MOST_FOLDERS:
        _swept.clear()
    _swept.add(place)
    sweep(place)


def _remove_if_left(path: str) -> None:
    import shutil

    status = os.lstat(path)
    is_folder = stat.S_ISDIR(status.st_mode)
    if not (is_folder or stat.S_ISREG(status.st_mode)):
        return
    descriptor = _open_to_lock(path)
    try:
        locked = None if descriptor is None else _lock(descriptor)
        if locked is None:
            locked = time.time() - status.st_mtime > _LEFT_BEHIND
        if locked:
            shutil.rmtree(path) if is_folder else os.unlink(path)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _new_file(folder: Path) -> tuple[Path, BinaryIO]:
    """Return a new, locked file with a random name, of the rights that the umask leaves."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _flag("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY")
    while True:
        path = folder / _scratch_name()
        descriptor = os.open(path, flags, 0o666)
        # A process that sweeps can see the file before it is locked; then another one is made.
        if _lock(descriptor) is not False and path.exists():
            return path, open(descriptor, "w+b")
        os.close(descriptor)


def _new_folder(parent: Path) -> tuple[Path, int | None]:
    """Return a new folder with a random name, for its owner only, and the descriptor locking it."""
    while True:
        path = parent / _scratch_name()
        path.mkdir(0o700)
        try:
            descriptor = _open_to_lock(path)
        except FileNotFoundError:  # swept already
            continue
        if descriptor is None or (_lock(descriptor) is not False and path.exists()):
            return path, descriptor
        os.close(descriptor)


def _open_to_lock(path: PathLike) -> int | None:
    """Return a descriptor of a file or folder, for its lock only; None where locks are missing."""
    if fcntl is None:
        return None
    return os.open(path, os.O_RDONLY | _flag("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"))


def _lock(descriptor: int) -> bool | None:
    """Return whether the lock was free and is ours now; None where nothing can be locked.

    The lock goes with the descriptor: the system gives it back however the process ends.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a disk over the network that has no locks
        return None
    return True


def _scratch_name() -> str:
    return f".latentc-{os.urandom(8).hex()}.tmp"


def _sync_file(path: PathLike) -> None:
    # Windows synchronises only what is open for writing.
    access = os.O_RDWR if os.name == "nt" else os.O_RDONLY
    descriptor = os.open(path, access | _flag("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _sync_folder(folder: PathLike) -> None:
    """Make a rename last, where the system can: the file itself is on the disk already."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | _flag("O_DIRECTORY", "O_CLOEXEC"))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _real_inside(root: PathLike, path: PathLike) -> str:
    try:
        real, top = os.path.realpath(path), os.path.realpath(root)
        within = os.path.commonpath([real, top]) == top
    except ValueError:  # another drive of Windows, or a name that no file can have
        real, within = os.fspath(path), False
    if not within:
        raise UnreadableFile(path, f"a link leads out of {os.fspath(root)}, to {real}")
    return real


def _check_regular(path: PathLike, status: os.stat_result, limit: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "something else")
        raise UnreadableFile(path, f"expected a regular file, found {kind}")
    if limit is not None and status.st_size > limit:
        raise UnreadableFile(path, _too_large(limit, status.st_size))


def _too_large(limit: int, size: int) -> str:
    return f"expected at most {limit:,} bytes, found {size:,}"


def _flag(*names: str) -> int:
    """Return the flags of ``os.open`` that this system has, combined."""
    flags = 0
    for name in names:
        flags |= getattr(os, name, 0)
    return flags


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
