"""This module builds the engines of a bundle on this machine, from its graphs and recipes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from latentc.runtimes.backends import backend as backends
from latentc.runtimes.backends.backend import Backend, BuildRequest, Built, SessionOptions
from latentc.runtimes.backends.choosing import describe
from latentc.runtimes.backends.tensorrt.engine_store import engines_folder
from latentc.runtimes.building.build_arguments import BuildArguments, RangeArguments
from latentc.runtimes.bundle.files import Bundle, graph_digest
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.recipe import Range, parse_range
from latentc.runtimes.bundle.sizes import ranges, text_lengths
from latentc.runtimes.bundle.structures import Build
from latentc.runtimes.errors import BackendError, InputError
from latentc.runtimes.options import complete, declared, takes
from latentc.runtimes.programs.latents import other_sizes
from latentc.runtimes.storage.outputs import check_folder

_GIB = 1 << 30


@dataclass(frozen=True)
class ComponentEngine:
    """A component's engine of one build of a bundle: where it is, and how long it took."""

    build: str
    component: str
    built: Built


@dataclass(frozen=True)
class _Job:
    """A job is a build whose engines are to be made, by which backend on which device."""

    build: Build
    backend: Backend
    device: str


@takes(BuildArguments)
def build_engines(
    bundle: str | os.PathLike[str], **arguments: Unpack[BuildArguments]
) -> Iterator[ComponentEngine]:
    """Check everything, then build one engine after another, as they are asked for.

    An engine fits one GPU, one driver, one version of its library and one graph; what fits is kept.

    Args:
        bundle: its folder.
        {options}

    Returns:
        the engines of all components of the builds that need some, which are built while it is
        iterated over.

    Raises:
        BundleError: missing, damaged or altered.
        InputError: no build that needs engines, or a range that cannot be.
        BackendUnavailable: the engine's library is not installed.
        DeviceUnavailable: no such device here.
        BackendError: the library refused a graph.
    """
    options = complete(BuildArguments, arguments)
    opened = Bundle.open(bundle)
    profiles = _profiles(opened.manifest, options)
    jobs = [
        _Job(build, backend, backend.device(options["device"]))
        for build, backend in _to_build(opened.manifest, options["target"], options["build"])
    ]
    cache = options["cache"]
    session = SessionOptions(cache=None if cache is None else Path(cache))
    check_folder(engines_folder(session.cache), "--cache")
    return _built_all(opened, jobs, session, profiles, options)


def _built_all(
    bundle: Bundle,
    jobs: list[_Job],
    session: SessionOptions,
    profiles: Mapping[str, Mapping[str, Range]],
    options: Mapping[str, Any],
) -> Iterator[ComponentEngine]:
    """Build each component of each build; `profiles`: by component the ranges of its symbols."""
    workspace, report = options["workspace"], options["report"]
    for job in jobs:
        build, backend = job.build, job.backend
        for component in bundle.manifest.components:
            request = BuildRequest(
                profile=profiles[component.name],
                workspace=None if workspace is None else int(workspace * _GIB),
                tf32=options["tf32"],
                force=options["force"],
            )
            if report is not None:
                report(f"{build.name}, {component.name}: building")
            settings = replace(session, key=graph_digest(build.artifacts[component.name]))
            entry = bundle.entry(build, component.name, backend)
            built = backend.build(entry, component, job.device, settings, request)
            yield ComponentEngine(build.name, component.name, built)
        bundle.cache.save()


def _to_build(
    manifest: Manifest, target: str | None, name: str | None
) -> list[tuple[Build, Backend]]:
    """Return every build that is asked for and needs engines, with the backend that makes them.

    Raises:
        InputError: none; says which there are, or how to export one.
        BackendUnavailable: its engine is not installed.
    """
    backend_by_target = _builders()
    builds = [
        build
        for build in manifest.builds
        if target in (None, build.target)
        and name in (None, build.name)
        and build.target in backend_by_target
    ]
    if not builds:
        raise InputError(
            f"nothing to build: engines are built for the targets {', '.join(backend_by_target)}; "
            f"the bundle has: {describe(manifest)}; add one with: latentc export SOURCE -o BUNDLE "
            f"--target {next(iter(backend_by_target))}"
        )
    return [(build, backends.get(backend_by_target[build.target])) for build in builds]


def _builders() -> dict[str, str]:
    """Return the backend that builds the engines of each target that needs any."""
    backend_by_target: dict[str, str] = {}
    for name in backends.names():
        with suppress(BackendError):  # a broken package of somebody else's
            kind = backends.find(name)
            backend_by_target |= {target: name for target in kind.targets if kind.builds}
    return backend_by_target


def _profiles(manifest: Manifest, options: Mapping[str, Any]) -> Mapping[str, Mapping[str, Range]]:
    """Return by component the ranges of its symbols that follow from those that are asked for.

    Raises:
        InputError: a text that is no range, or a range of what the graphs have fixed or lack.
    """
    spans = {
        name: parse_range(_flag(name), options[name])
        for name in declared(RangeArguments)
        if options[name] is not None
    }
    _refuse_fixed(manifest, spans)
    if not spans:
        return {component.name: {} for component in manifest.components}
    components, others = manifest.components, other_sizes(manifest.programs[0])
    lengths = text_lengths(manifest.programs, components)
    return ranges(components, manifest.latents, manifest.guidance, spans, lengths, others)


def _refuse_fixed(manifest: Manifest, spans: Mapping[str, Range]) -> None:
    """Raise InputError for a range of what the graphs have fixed, or do not have."""
    shape = manifest.sample().shape
    symbols = {symbol.argument: name for name, symbol in manifest.programs[0].symbols.items()}
    for name in set(spans) - {"images"}:
        if name not in symbols:
            raise InputError(f"this bundle has no {name}; leave {_flag(name)} out")
        if symbols[name] not in shape:
            raise InputError(f"this bundle was exported for one {name}; leave {_flag(name)} out")


def _flag(name: str) -> str:
    return declared(RangeArguments)[name].flags[0]
