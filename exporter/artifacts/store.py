"""Writing a bundle: content-addressed items in a staging folder, published by a rename.

Every item (a lowered component, a table of sampling plans …) has a key, the digest of all
that it depends on. An item that the staging folder of an interrupted export, the bundle about to
be replaced or one to share files with already holds under the same key is taken over, not made
again. Builds share
items, so that one may stand where another build's new one is to stand: it gets another place.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.bundle.structures import File
from latentc.runtimes.bundle.trust import checked, is_intact, sha256
from latentc.runtimes.errors import BundleError, DiskFull, ExportError
from latentc.runtimes.storage import files
from latentc.runtimes.storage.parsing import parser

# Rights, and what stands in the place of a file or folder of the export's own.
_IN_THE_WAY = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP),
)
_DONE = ".done"
_WORK = ".work"
_LARGEST_MARK = 16 << 20  # bytes; what an item's maker says, and a line for each of its files


@dataclass(frozen=True)
class Item:
    """Files relative to the bundle and what else their maker said (JSON-able)."""

    files: tuple[File, ...]
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class _Held:
    """An item in a bundle. Of the one that is replaced its size vouches for a file, as of any that
    is loaded; one of another bundle is read."""

    bundle: Path
    item: Item
    own: bool

    def is_there(self) -> bool:
        return is_intact(self.bundle, self.item.files, "never" if self.own else "always")


class Store:
    """The staging folder ``.NAME.partial`` beside the output.

    Args:
        previous: the bundle's manifest, where one stands there already.
        others: bundles whose items do as well.

    Raises:
        ExportError: the output is something else than a bundle, or the disk is full.
    """

    def __init__(
        self, output: Path, previous: Manifest | None, others: Iterable[Path] = ()
    ) -> None:
        self.output = output
        self.staging = _staging_of(output)
        self._held = {
            key: _Held(bundle, item, own=False)
            for bundle in others
            for key, item in _items_of(Manifest.load(bundle))
        }
        for key, item in _items_of(previous) if previous else ():
            self._held[key] = _Held(output, item, own=True)
        self.made: list[str] = []
        self._owners: dict[str, str] = {}  # by path, the key of what this run has put there
        with full_disk_reported():
            if self.staging.is_symlink():
                self.staging.unlink()
            (self.staging / _DONE).mkdir(parents=True, exist_ok=True)

    def item(self, key: str, folder: str, make: Callable[[Path], Mapping[str, Any]]) -> Item:
        """Return the item `key` with its files under `folder`; make it only if nowhere there yet.

        `make` writes files into the (empty) folder it is given and returns the item's meta.
        """
        kept = self.keep(key)
        if kept:
            return kept
        work = self.staging / _WORK
        files.remove_folder(work)
        with full_disk_reported():
            work.mkdir()
            meta = make(work)
            written = sorted(path for path in work.rglob("*") if path.is_file())
            places = self._places(
                key, [f"{folder}/{path.relative_to(work).as_posix()}" for path in written]
            )
            item = self._mark(key, Item(tuple(map(self._move_in, written, places)), meta))
        self.made.append(key)
        return item

    def keep(self, key: str) -> Item | None:
        """Take over the item `key` as an interrupted export, the previous bundle or another one has
        it, unmade; None if it is not intact. Its files may have moved."""
        item = self._staged(key)
        return self._own(key, item) if item else self._taken_over(key)

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest and put the staging folder in the output's place."""
        with full_disk_reported():
            files.write(self.staging / MANIFEST, manifest.checked(), root=self.staging)
            self._drop_unlisted(manifest)
            self._put_in_place()

    def _put_in_place(self) -> None:
        """Let the staging folder and what stands at the output change places: a reader finds one
        of them at every moment. Where that takes two steps, the old bundle waits beside."""
        old = _aside(self.output)
        files.remove_folder(old)
        if self.output.exists():
            if files.exchange(self.staging, self.output):
                self.discard()
                return
            files.move(self.output, old)
        try:
            files.move(self.staging, self.output)
        except OSError:
            if old.exists():
                files.move(old, self.output)
            raise
        files.remove_folder(old)

    def discard(self) -> None:
        """Remove the staging folder and all that was made."""
        files.remove_folder(self.staging)

    def _staged(self, key: str) -> Item | None:
        try:
            item = _read_item(self._mark_of(key))
        except (ExportError, files.UnsafeTarget):
            return None
        # An attempt with other options may have written over it.
        return item if is_intact(self.staging, item.files, "always") else None

    def _taken_over(self, key: str) -> Item | None:
        held = self._held.get(key)
        if held is None or not held.is_there():
            return None
        item = held.item
        places = self._places(key, [file.path for file in item.files])
        for file, place in zip(item.files, places, strict=True):
            with full_disk_reported():
                files.link_or_copy(checked(held.bundle, file, "never"), self._target(place))
        moved = tuple(
            File(place, file.size, file.sha256)
            for file, place in zip(item.files, places, strict=True)
        )
        with full_disk_reported():
            return self._mark(key, Item(moved, item.meta))

    def _places(self, key: str, wanted: list[str]) -> list[str]:
        """Return where files of an item go: elsewhere if another item of this run is in their
        place.
        """
        if all(self._owners.get(path, key) == key for path in wanted):
            return wanted
        parted = [path.partition("/") for path in wanted]
        return [f"{first}-{key[:8]}/{rest}" for first, _, rest in parted]

    def _own(self, key: str, item: Item) -> Item:
        self._owners |= dict.fromkeys((file.path for file in item.files), key)
        return item

    def _move_in(self, path: Path, place: str) -> File:
        digest, size = sha256(path), path.stat().st_size
        files.move(path, self._target(place))
        return File(place, size, digest)

    def _target(self, place: str) -> Path:
        """Return the path of a file to be written into the staging folder; its folder exists."""
        target = self.staging / place
        files.check_inside(self.staging, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _mark_of(self, key: str) -> Path:
        """Return the path that says that the item `key` is complete.

        A key can come from a bundle.
        """
        path = self.staging / _DONE / key
        files.check_inside(self.staging, path)
        return path

    def _mark(self, key: str, item: Item) -> Item:
        data = {
            "files": [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in item.files],
            "meta": dict(item.meta),
        }
        files.write(self._mark_of(key), json.dumps(data).encode())
        return self._own(key, item)

    def _drop_unlisted(self, manifest: Manifest) -> None:
        """Remove what an earlier, different attempt left: a bundle holds what it lists."""
        keep = {MANIFEST, *(file.path for file in manifest.files())}
        for name in (_DONE, _WORK):
            files.remove_folder(self.staging / name)
        for path in sorted(self.staging.rglob("*"), reverse=True):
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.staging).as_posix() not in keep:
                path.unlink()


def recover(output: Path) -> None:
    """Put right what an export left that was killed while it published, or just after.

    The bundle that it had moved aside is moved back, or removed where the new one stands already.
    A staging folder with a manifest, and without marks of what is complete, was about to be
    published, or is the old bundle: nothing of it would be taken over. The caller holds the lock
    of `output`.
    """
    staging = _staging_of(output)
    if (staging / MANIFEST).exists() and not (staging / _DONE).exists():
        files.remove_folder(staging)
    aside = _aside(output)
    if aside.is_dir() and not aside.is_symlink() and not output.exists():
        files.move(aside, output)
    files.remove_folder(aside)


def previous_manifest(output: Path) -> Manifest | None:
    """Return the manifest of the bundle that stands where the export will write, if any.

    Raises:
        ExportError: something else than a bundle is there; it is not overwritten.
    """
    if not output.exists():
        return None
    if output.is_dir() and not any(output.iterdir()):
        return None
    if not (output / MANIFEST).is_file():
        raise ExportError(
            f"{output} exists and is not a bundle; it is left alone. Choose another output"
        )
    try:
        return Manifest.load(output)
    except BundleError:
        return None  # an unreadable bundle is simply made again


def missing_artifacts(
    keys: Mapping[tuple[str, str], Mapping[str, str]],
    output: Path,
    previous: Manifest | None,
    others: Iterable[Path] = (),
) -> dict[tuple[str, str], list[str]]:
    """Return for each build the components that are nowhere yet.

    Neither an interrupted export nor the previous bundle nor one of the others seems to have them;
    no weights are read.
    """
    done = _staging_of(output) / _DONE
    manifests = [*([previous] if previous else []), *map(Manifest.load, others)]
    stored_keys = {key for manifest in manifests for key, _ in _items_of(manifest)}
    return {
        build: [
            name
            for name, key in key_by_component.items()
            if key not in stored_keys and not (done / key).exists()
        ]
        for build, key_by_component in keys.items()
    }


def _staging_of(output: Path) -> Path:
    return output.parent / f".{output.name}.partial"


@contextmanager
def full_disk_reported() -> Iterator[None]:
    """Turn the system's writing errors into one clear ExportError."""
    try:
        yield
    except files.UnsafeTarget as error:
        raise ExportError(f"cannot write {error.filename}: {error.strerror}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(error.filename or error.strerror) from error
        if error.errno in _IN_THE_WAY:
            raise ExportError(f"cannot write {error.filename}: {error.strerror}") from error
        raise


def _aside(output: Path) -> Path:
    """Return the path where the old bundle waits while the new one takes its place."""
    return output.parent / f".{output.name}.old"


@parser(ExportError, "path", "a note of an earlier attempt")
def _read_item(path: Path) -> Item:
    data = json.loads(files.read_regular(path, _LARGEST_MARK))
    return Item(tuple(File(**file) for file in data["files"]), data["meta"])


def _items_of(manifest: Manifest) -> Iterator[tuple[str, Item]]:
    for build in manifest.builds:
        for artifact in build.artifacts.values():
            meta = {"entry": Path(artifact.entry).name, "kept": list(artifact.kept)}
            yield artifact.key, Item(artifact.files, meta)
    for schedule in manifest.schedules:
        yield schedule.key, Item((schedule.file,), {"steps": list(schedule.steps)})
