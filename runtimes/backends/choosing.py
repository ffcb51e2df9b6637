"""This module chooses which of a bundle's builds to load, and with which backend."""

from __future__ import annotations

from collections.abc import Iterator

from latentc.runtimes.backends import backend as engines
from latentc.runtimes.backends.backend import Backend
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.precision import canonical, has_passes, usual_precisions
from latentc.runtimes.bundle.precisions import PRECISIONS, Precision
from latentc.runtimes.bundle.structures import Build
from latentc.runtimes.errors import BackendError, BackendUnavailable, InputError
from latentc.runtimes.unknown_names import suggestion


def choose_build(
    manifest: Manifest,
    backend: str | Backend | None = None,
    build: str | None = None,
    precision: str | None = None,
    *,
    passes: bool = False,
) -> tuple[Build, Backend]:
    """Return the build to load and the backend to load it with.

    `backend`: by name, or one made already; None takes the first installed one that can load
    a fitting build. `build`: by name. `precision`: only builds of that one; None prefers fp32.
    Of several builds that a backend can load, the target it likes best wins. A build with passes
    makes another image: it is taken where `build` or `precision` names it, or `passes` is set.

    Raises:
        InputError: nothing fits; lists what the bundle has. Not a precision.
        BackendUnavailable: the engine that could load it is not installed.
    """
    precision = canonical(precision, usual_precisions(manifest.components)) if precision else None
    builds = [
        each
        for each in manifest.builds
        if build in (None, each.name) and precision in (None, each.precision)
    ]
    if not builds:
        wishes = [f"build {build!r}"] if build else []
        wishes += [f"precision {precision!r}"] if precision else []
        asked, names = (build, "name") if build else (precision or "", "precision")
        known = dict.fromkeys(getattr(each, names) for each in manifest.builds)
        hint = suggestion(asked, known, "it has", listed=describe(manifest))
        raise InputError(f"the bundle has no {' of '.join(wishes) or 'builds'}; {hint}")
    if not (build or precision or passes):
        builds = [each for each in builds if not has_passes(each.precision)]
        if not builds:
            raise InputError(
                f"every build has passes, which make another image: ask for one by its name or "
                f"precision; {_has(manifest)}"
            )
    if isinstance(backend, Backend):
        return _best(builds, type(backend), manifest), backend
    if backend is not None:
        return _best(builds, engines.find(backend), manifest), engines.get(backend)
    return _first_installed(builds, manifest)


def describe(manifest: Manifest) -> str:
    """Return the builds of a bundle in a few words: ``onnx-fp32 (onnx, fp32), …``."""
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
    """Yield every backend whose class can be imported; a broken third-party one is passed over."""
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
    return min(loadable, key=lambda b: (kind.targets.index(b.target), distance(b.precision)))


def distance(precision: str) -> int:
    """Return how far a build's precision is from the original; one of several parts is as far as
    one that nothing is known of."""
    known = precision.isalnum() and precision in PRECISIONS
    return PRECISIONS[precision].distance if known else Precision.distance


def _has(manifest: Manifest) -> str:
    return f"it has: {describe(manifest)}"
