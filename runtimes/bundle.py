"""A bundle on disk: its manifest, its checked files, and which of its builds to use."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from runtimes import backend as engines
from runtimes.backend import Backend
from runtimes.errors import BackendError, BackendUnavailable, BundleError, InputError
from runtimes.manifest import Artifact, Build, File, Manifest
from runtimes.precision import canonical, has_passes
from runtimes.trust import HashCache, Hashing, check_file

_PREFERRED = (
    "fp32",
    "fp16",
    "bf16",
)  # of several precisions, the one nearest to the original first


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
        """The checked path of one of the manifest's files.

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

    def entry(self, build: Build, component: str, backend: Backend | type[Backend]) -> Path:
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


def choose_build(
    manifest: Manifest,
    backend: str | Backend | None = None,
    build: str | None = None,
    precision: str | None = None,
    *,
    passes: bool = False,
) -> tuple[Build, Backend]:
    """Which build to load, and with which backend.

    `backend`: by name, or one made already; None takes the first installed one that can load
    a fitting build. `build`: by name. `precision`: only builds of that one; None prefers fp32.
    Of several builds that a backend can load, the target it likes best wins. A build with passes
    makes another picture: it is taken where `build` or `precision` names it, or `passes` is set.

    Raises:
        InputError: nothing fits; lists what the bundle has. Not a precision.
        BackendUnavailable: the engine that could load it is not installed.
    """
    precision = canonical(precision) if precision else None
    builds = [
        each
        for each in manifest.builds
        if build in (None, each.name) and precision in (None, each.precision)
    ]
    if not builds:
        asked = [f"build {build!r}"] if build else []
        asked += [f"precision {precision!r}"] if precision else []
        raise InputError(f"the bundle has no {' of '.join(asked) or 'builds'}; {_has(manifest)}")
    if not (build or precision or passes):
        builds = [each for each in builds if not has_passes(each.precision)]
        if not builds:
            raise InputError(
                f"every build has passes, which make another picture: ask for one by its name or "
                f"precision; {_has(manifest)}"
            )
    if isinstance(backend, Backend):
        return _best(builds, type(backend), manifest), backend
    if backend is not None:
        return _best(builds, engines.find(backend), manifest), engines.get(backend)
    return _first_installed(builds, manifest)


def graph_digest(artifact: Artifact) -> str:
    """SHA-256 over a graph's files: what a cache of things made from it goes by."""
    lines = sorted(f"{Path(file.path).name} {file.sha256}" for file in artifact.files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def describe(manifest: Manifest) -> str:
    """The builds of a bundle in a few words: ``onnx-fp32 (onnx, fp32), …``."""
    return ", ".join(f"{b.name} ({b.target}, {b.precision})" for b in manifest.builds) or "none"


def _first_installed(builds: list[Build], manifest: Manifest) -> tuple[Build, Backend]:
    missing: BackendError | None = None
    for name, kind in _kinds():
        loadable = [build for build in builds if kind.loads(build)]
        if not loadable:
            continue
        try:
            return _best(loadable, kind, manifest), engines.get(name)
        except BackendError as error:
            missing = missing or error
    if isinstance(missing, BackendUnavailable):
        raise BackendUnavailable(
            missing.backend, missing.install, "no backend for this bundle is installed"
        ) from missing
    if missing:
        raise missing
    raise InputError(f"no known backend loads any of these builds: {describe(manifest)}")


def _kinds() -> Iterator[tuple[str, type[Backend]]]:
    """Every backend whose class can be imported; a broken third-party one is passed over."""
    for name in engines.names():
        try:
            yield name, engines.find(name)
        except BackendError:
            continue


def _best(builds: list[Build], kind: type[Backend], manifest: Manifest) -> Build:
    loadable = [build for build in builds if kind.loads(build)]
    if not loadable:
        lacks = f" (without {', '.join(kind.lacks)})" if kind.lacks else ""
        raise InputError(
            f"backend {kind.name!r} loads builds for {' and '.join(kind.targets)}{lacks}, but not "
            f"{', '.join(repr(build.name) for build in builds)}; {_has(manifest)}; add one with: "
            f"latentc export SOURCE -o BUNDLE --target {kind.targets[0]}"
        )
    return min(loadable, key=lambda b: (kind.targets.index(b.target), _rank(b.precision)))


def _rank(precision: str) -> int:
    return _PREFERRED.index(precision) if precision in _PREFERRED else len(_PREFERRED)


def _has(manifest: Manifest) -> str:
    return f"it has: {describe(manifest)}"
