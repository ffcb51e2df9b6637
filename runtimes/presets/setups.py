"""The ways to load a bundle's builds on this machine that are worth timing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from latentc.runtimes.backends import backend as engines
from latentc.runtimes.backends.backend import Backend
from latentc.runtimes.backends.choosing import choose_build, distance
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.precision import DENOISER, of_component
from latentc.runtimes.bundle.structures import Build
from latentc.runtimes.errors import DeviceUnavailable, InputError
from latentc.runtimes.machine import cores
from latentc.runtimes.presets.preset import expected_rank


@dataclass(frozen=True)
class Setup:
    """A setup says how a build is loaded.

    `compute` None is as the build says, `threads` 0 the engine's choice; `static`: for images of
    the default size, one at a time.
    """

    build: str
    backend: str
    device: str
    compute: str | None = None
    threads: int = 0
    static: bool = True


def setups(
    bundle: Bundle, backend: str | Backend | None = None, device: str | None = None
) -> list[tuple[Setup, Backend]]:
    """Return what is worth trying here, the expected fastest first.

    Raises:
        InputError, BackendUnavailable, DeviceUnavailable: nothing is.
    """
    found: list[tuple[tuple[int, int], Setup, Backend]] = []
    misses: list[DeviceUnavailable] = []
    for engine in _engines(bundle, backend):
        try:
            where = engine.device(device)
        except DeviceUnavailable as error:
            misses.append(error)
            continue
        for build in _best_targets(bundle, engine):
            rank = expected_rank(type(engine), build.precision)
            found += [
                (rank, Setup(build.name, engine.name, where, compute), engine)
                for compute in _computes(engine, build, where)
            ]
    if not found:
        if misses:
            raise misses[0]
        choose_build(bundle.manifest, backend)  # says what is missing
        raise InputError("no installed engine is meant for images: name one with --backend")
    found.sort(key=lambda each: each[0])
    return [(setup, engine) for _, setup, engine in found]


def _engines(bundle: Bundle, backend: str | Backend | None) -> list[Backend]:
    """The installed engines that load one of the builds; slow ones only if named."""
    if isinstance(backend, Backend):
        return [backend]
    if backend is not None:
        choose_build(bundle.manifest, backend)  # says what does not fit
        return [engines.get(backend)]
    loading = dict.fromkeys(
        name for build in bundle.manifest.builds for name in engines.for_build(build)
    )
    return [engines.get(name) for name in loading if not engines.find(name).slow]


def _best_targets(bundle: Bundle, engine: Backend) -> list[Build]:
    """Return of each precision the build whose target the engine likes best."""
    best: dict[str, Build] = {}
    for build in bundle.manifest.builds:
        if not engine.loads(build):
            continue
        other = best.get(build.precision)
        rank = engine.targets.index
        if other is None or rank(build.target) < rank(other.target):
            best[build.precision] = build
    return list(best.values())


def _computes(engine: Backend, build: Build, device: str) -> tuple[str | None, ...]:
    """Return the computes to try: the build's own, and the engine's, where that can be another."""
    fixed = any(artifact.compute for artifact in build.artifacts.values())
    lower = set(engine.computes) - {"fp32", "auto"} or not device.lower().startswith("cpu")
    return (None, "auto") if lower and not fixed and "auto" in engine.computes else (None,)


def thread_counts() -> list[int]:
    """Other numbers of threads than the engine's own choice."""
    count = cores()
    return sorted({count, count // 2} - {0, 1}) if count > 2 else [count]


def exactness(build: Build, setup: Setup) -> tuple[bool, int, int]:
    """Sorts the setup nearest to the original first."""
    precision = of_component(build.precision, DENOISER)
    rank, _ = expected_rank(engines.find(setup.backend), build.precision)
    return setup.compute is not None, distance(precision), rank


def label(setup: Setup, arguments: Mapping[str, float] | None = None) -> str:
    parts = [f"{setup.build} on {setup.backend}"]
    parts += [f"compute {setup.compute}"] if setup.compute else []
    parts += [f"threads {setup.threads}"] if setup.threads else []
    parts += [f"{name} {value:g}" for name, value in (arguments or {}).items()]
    return ", ".join(parts)
