"""A bundle on disk: its manifest and its checked files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.structures import Artifact, Build, File
from latentc.runtimes.bundle.trust import HashCache, Hashing, check_file
from latentc.runtimes.errors import BundleError


class Opener(Protocol):
    """An opener opens graphs, as a `latentc.runtimes.backends.backend.Backend` does.

    It has a name, the suffixes of the files that it takes, and tells which other files one of them
    makes it open.
    """

    @property
    def name(self) -> str: ...

    @property
    def entries(self) -> tuple[str, ...]: ...

    def references(self, entry: Path) -> Iterable[Path]: ...


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder and its manifest.

    `root` is resolved. `hashing` says when files are hashed: once per machine, always, or
    never (their sizes are compared in any case).
    """

    root: Path
    manifest: Manifest
    hashing: Hashing = "once"
    cache: HashCache = field(default_factory=HashCache, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, hashing: Hashing = "once") -> Bundle:
        """Read and check the manifest; the other files are checked when they are used.

        Raises:
            BundleError: there is no bundle, or its manifest cannot be used.
        """
        manifest = Manifest.load(Path(path))
        return cls(Path(os.path.realpath(path)), manifest, hashing)

    def path(self, file: File) -> Path:
        """Return the checked path of one of the manifest's files.

        Raises:
            BundleError: missing, altered, cut short, or outside the bundle; where the bundle has
                another manifest by now, it says that.
        """
        try:
            return check_file(self.root, file, self.hashing, self.cache)
        except BundleError as error:
            if self._was_replaced(file):
                raise BundleError(
                    f"{self.root}: the bundle was changed after it was opened, and has no longer "
                    f"the same {file.path}: load it again"
                ) from error
            raise

    def _was_replaced(self, file: File) -> bool:
        """Return whether the manifest that is there now lists that file no longer."""
        try:
            return file not in Manifest.load(self.root).files()
        except BundleError:
            return False

    def entry(self, build: Build, component: str, backend: Opener) -> Path:
        """Return the checked path of the file to load for one component.

        Its side files are checked, too, and that it makes the engine open no others.

        Raises:
            BundleError: one of them is missing, altered or outside the bundle, or the graph
                refers to a file that the manifest does not list for it.
        """
        artifact = build.artifacts[component]
        paths = {file.path: self.path(file) for file in artifact.files}
        entry = paths[artifact.entry]
        if backend.entries and entry.suffix not in backend.entries:
            raise BundleError(
                f"{entry}: expected a file {' or '.join(backend.entries)} for the backend "
                f"{backend.name!r}; the bundle is damaged or was altered"
            )
        listed = {os.fspath(path) for path in paths.values()}
        for path in backend.references(entry):
            if os.fspath(path) not in listed:
                raise BundleError(
                    f"{entry}: refers to {path}, which the manifest does not list for "
                    f"{component!r}; the bundle is damaged or was altered: export it again"
                )
        return entry

    def check(self, files: Iterable[File] | None = None) -> int:
        """Check `files`, or every file that the manifest names; returns how many bytes."""
        total = 0
        for file in self.manifest.files() if files is None else files:
            self.path(file)
            total += file.size
        self.cache.save()
        return total


def graph_digest(artifact: Artifact) -> str:
    """Return a SHA-256 over a graph's files: what a cache of things made from it goes by."""
    lines = sorted(f"{Path(file.path).name} {file.sha256}" for file in artifact.files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
