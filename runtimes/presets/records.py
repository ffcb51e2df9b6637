"""This module keeps what `latentc tune` found on the disk, outside of the bundles, by machine.

A record's file is named after the bundle's content and what the search was limited to; what the
times depend on stands in it. One that does not fit, or cannot be read, is never used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from latentc.runtimes.calls.choosing import Calls
from latentc.runtimes.errors import BundleError, LatentcError
from latentc.runtimes.machine import cores, processor
from latentc.runtimes.presets.preset import Arguments, Asked, content, record_path, records_folder
from latentc.runtimes.storage.files import read_regular, write
from latentc.runtimes.storage.parsing import parser
from latentc.runtimes.strict import readable
from latentc.runtimes.version import __version__

if TYPE_CHECKING:
    from latentc.runtimes.bundle.files import Bundle
    from latentc.runtimes.machine import cores, processor
from latentc.runtimes.bundle.manifest import Manifest

_LARGEST = 1 << 20  # bytes of a record; a search writes a few thousand


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A choice is what a preset stands for on one machine, and the figures that it was chosen for.

    `version` is the backend's. `arguments` are those of a call. `seconds`: of an image with the
    default steps; `image_psnr` in dB and `points` (lost, of 100) as in `Limits`.
    """

    build: str
    backend: str
    version: str
    device: str
    compute: str | None
    threads: int
    static: bool
    arguments: Arguments
    seconds: float
    image_psnr: float
    points: float | None


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A record holds what `latentc tune` found.

    `place` is where the bundle was, `steps` the number of steps of the images that were compared.
    """

    bundle: str
    place: str
    machine: dict[str, str]
    tuned: str
    steps: int
    presets: dict[str, Choice]


class UnusableRecord(Exception):
    """No record to go by, and why; "" where there never was one."""


def find(bundle: Bundle, preset: str, asked: Asked) -> tuple[Choice, int]:
    """The record's choice and its steps: of the search that was limited like this call, else of
    the whole search if its winner is what the call is limited to."""
    digest = content(bundle.manifest)
    scope = (asked.engine, asked.how["device"])
    try:
        return _read(bundle, digest, preset, scope, asked)
    except UnusableRecord:
        if not any(scope):
            raise
        with_all = _read(bundle, digest, preset, (None, None), asked)
        if any(name in contradictions(with_all[0], asked) for name in ("backend", "device")):
            raise
        return with_all


def _read(
    bundle: Bundle, digest: str, preset: str, scope: tuple[str | None, str | None], asked: Asked
) -> tuple[Choice, int]:
    path = record_path(digest, *scope)
    if not path.exists():
        raise UnusableRecord
    try:
        record = _load(path)
        choice = record.presets[preset]
        _check(choice, bundle.manifest)
        sound = record.bundle == digest and record.steps > 0
    except (LatentcError, KeyError, ValueError):
        sound = False
    if not sound:
        raise UnusableRecord(f"the tuning record {path} is damaged and not used")
    _fit(record, choice, asked)
    return choice, record.steps


def _check(choice: Choice, manifest: Manifest) -> None:
    """Raises ValueError for what no search would have written."""
    if choice.build not in {build.name for build in manifest.builds}:
        raise ValueError(choice.build)
    if choice.threads < 0:
        raise ValueError(choice.threads)
    calls = Calls.of(manifest)
    text = dict.fromkeys(calls.signature.texts[:1], "")
    calls.request({**text, **choice.arguments})  # an InputError is a ValueError


def _fit(record: Record, choice: Choice, asked: Asked) -> None:
    """Raises UnusableRecord where the machine, the engine or the device is another one now."""
    was, found = dict(record.machine), machine()
    try:
        engine = asked.instance(choice.backend)
        engine.device(choice.device)
        was[choice.backend], found[choice.backend] = choice.version, engine.version()
    except LatentcError as error:
        raise UnusableRecord(f"what latentc tune chose cannot be used any more ({error})") from None
    changed = [
        f"{name} was {was.get(name, 'unknown')}, is {found.get(name, 'unknown')}"
        for name in dict.fromkeys([*was, *found])
        if was.get(name) != found.get(name)
    ]
    if changed:
        raise UnusableRecord(f"what latentc tune found here is not used: {'; '.join(changed)}")


def why_none(bundle: Bundle) -> str:
    """Why there is no record to go by though the bundle was tuned here; "" if it never was."""
    digest = content(bundle.manifest)
    of_others = [r.bundle != digest for r in _all() if r.place == str(bundle.root)]
    if not of_others:
        return ""
    if all(of_others):
        return "what latentc tune found is not used, because the bundle's builds are others now"
    return "latentc tune was run for another engine or device only"


def _all() -> Iterator[Record]:
    for path in sorted(records_folder().glob("*.json")):
        try:
            yield _load(path)
        except LatentcError:
            continue


@parser(BundleError, "path", "a tuning record")
def _load(path: Path) -> Record:
    return msgspec.json.decode(read_regular(path, _LARGEST), type=Record)


def save(record: Record, backend: str | None = None, device: str | None = None) -> Path:
    """Write a record, whole or not at all. `backend` and `device` are what the search was limited
    to: such a record counts where the same are asked for.

    Raises:
        OSError: the cache folder cannot be written.
    """
    path = record_path(record.bundle, backend, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, readable(record))
    return path


def machine() -> dict[str, str]:
    """Return what times depend on besides the engines' versions."""
    return {"processor": processor(), "cores": str(cores()), "latentc": __version__}


def contradictions(choice: Choice, asked: Asked) -> dict[str, Any]:
    """Return what was asked for and is otherwise in the choice: name → what the choice has."""
    pairs: dict[str, tuple[Any, Any]] = {
        "backend": (asked.engine, choice.backend),
        "device": (asked.how["device"] and asked.how["device"].lower(), choice.device.lower()),
        "build": (asked.how["build"], choice.build),
        "threads": (asked.how["threads"] or None, choice.threads),
        "compute": (asked.how["compute"], choice.compute),
        "compile": (asked.how["compile"] or None, False),
        "static": (None if asked.static is None else True, choice.static),
    }
    return {name: own for name, (given, own) in pairs.items() if given not in (None, own)}
