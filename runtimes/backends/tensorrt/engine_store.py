"""Engines on disk: outside of the bundles, because they fit one machine only.

An engine is a file ``<component>-<key>.engine`` and a record of what it was built from and on,
``<component>-<key>.json``. The key is a digest of that record, so an engine that no longer fits
is never found; the records that do not fit say why.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from latentc.runtimes.bundle.recipe import Recipe
from latentc.runtimes.errors import BackendError, BundleError, LatentcError
from latentc.runtimes.storage.files import read_regular, write
from latentc.runtimes.storage.folders import cache_folder, expanded
from latentc.runtimes.storage.parsing import parser

_GRAPH = "graph"  # the fact that is the same for all machines

_LARGEST_RECORD = 1 << 20  # bytes

Facts = Mapping[str, str]  # what an engine depends on besides its recipe, by readable name


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A record says what an engine was built from and on. `place` is where the graph was then."""

    component: str
    facts: dict[str, str]
    recipe: Recipe
    place: str
    size: int
    built: str
    seconds: float


@dataclass(frozen=True)
class Engine:
    """An engine's file and its record."""

    path: Path
    record: Record


def engines_folder(cache: Path | None) -> Path:
    """Return the folder ``engines`` in the given cache folder, or in latentc's own."""
    return (expanded(cache) if cache else cache_folder()) / "engines"


def engine_key(component: str, facts: Facts, recipe: Recipe) -> str:
    """Return a SHA-256 over all that an engine depends on."""
    whole = [component, dict(sorted(facts.items())), msgspec.to_builtins(recipe)]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def exact(folder: Path, component: str, facts: Facts, recipe: Recipe) -> Engine | None:
    """Return the engine that was built of just this, if there is one."""
    return _read(_path(folder, component, facts, recipe))


def usable(folder: Path, component: str, facts: Facts) -> Engine | None:
    """Return the engine to run, or None.

    Of those that were built here of this graph, whatever shapes they are for, it is the one built
    last.
    """
    engines = [e for e in _all(folder, component) if e.record.facts == dict(facts)]
    return max(engines, key=lambda engine: engine.record.built, default=None)


def why_not(folder: Path, component: str, facts: Facts, place: Path) -> str:
    """Return why the engines that there are cannot be used: what differs, then and now.

    It is "" if there are none of this graph or this place.
    """
    candidates = [
        engine.record
        for engine in _all(folder, component)
        if engine.record.facts.get(_GRAPH) == facts.get(_GRAPH) or engine.record.place == str(place)
    ]
    if not candidates:
        return ""
    nearest = min(candidates, key=lambda record: (len(_different(record, facts)), record.built))
    return "; ".join(_different(nearest, facts))


def timing_file(folder: Path, facts: Facts) -> Path:
    """Return the file for measured times of kernels.

    They hold for a machine and its versions, and are the same for every graph.
    """
    machine = {name: value for name, value in sorted(facts.items()) if name != _GRAPH}
    digest = hashlib.sha256(json.dumps(machine).encode()).hexdigest()
    return folder / f"timing-{digest[:24]}.cache"


def save(
    folder: Path,
    component: str,
    facts: Facts,
    recipe: Recipe,
    place: Path,
    data: bytes,
    spent: float,
) -> Engine:
    """Write an engine, whole or not at all.

    Raises:
        BackendError: the folder cannot be written.
    """
    path = _path(folder, component, facts, recipe)
    built = datetime.now(UTC).isoformat(timespec="microseconds")
    record = Record(component, dict(facts), recipe, str(place), len(data), built, round(spent, 1))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(path, data)
        write(path.with_suffix(".json"), msgspec.json.format(msgspec.json.encode(record)))
    except OSError as error:
        raise BackendError(
            f"cannot write the engine {path}: {error.strerror}; name a folder with --cache"
        ) from error
    return Engine(path, record)


def _path(folder: Path, component: str, facts: Facts, recipe: Recipe) -> Path:
    return folder / f"{_stem(component)}-{engine_key(component, facts, recipe)[:24]}.engine"


def _stem(component: str) -> str:
    """Return a component's name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_]", "_", component)


def _all(folder: Path, component: str) -> Iterator[Engine]:
    for path in sorted(folder.glob(f"{_stem(component)}-*.engine")):
        engine = _read(path)
        if engine is not None and engine.record.component == component:
            yield engine


def _read(path: Path) -> Engine | None:
    """Return an engine with a record that fits it; a half-written one counts as none."""
    try:
        record = _load(path.with_suffix(".json"))
        whole = path.stat().st_size == record.size
    except (OSError, LatentcError):
        return None
    return Engine(path, record) if whole else None


@parser(BundleError, "path", "a record of an engine")
def _load(path: Path) -> Record:
    return msgspec.json.decode(read_regular(path, _LARGEST_RECORD), type=Record)


def _different(record: Record, facts: Facts) -> list[str]:
    names = [name for name in (*record.facts, *facts) if record.facts.get(name) != facts.get(name)]
    return [
        f"{name} was {_short(record.facts.get(name))}, is {_short(facts.get(name))}"
        for name in dict.fromkeys(names)
    ]


def _short(value: str | None) -> str:
    if value is None:
        return "unknown"
    return value[:12] if len(value) == 64 else value  # a digest
