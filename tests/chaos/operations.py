"""This module lists what is killed: commands of latentc that write, and what must hold of what they
leave behind.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

OUTPUT = "output"
# Files that stay beside what they lock, on purpose and empty.
_LOCKS = (".lock",)
# What libraries keep in the temporary folder, always under the same name.
_NOT_OURS = (".ses",)  # a session's number, of ONNX Runtime


@dataclass(frozen=True)
class Place:
    """The folders of one trial: what stands in `work`, the caches, and temporary files.

    `good` is a verified bundle that the trial must not change, `source` the pipeline that it was
    made from.
    """

    root: Path
    good: Path
    source: Path

    @property
    def output(self) -> Path:
        return self.root / "work" / OUTPUT

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def temporary(self) -> Path:
        return self.root / "tmp"

    def make(self, with_bundle: bool) -> None:
        """Make the folders; `with_bundle` puts a copy of the good bundle in the output's place."""
        for folder in (self.output.parent, self.cache, self.temporary):
            folder.mkdir(parents=True)
        if with_bundle:
            shutil.copytree(self.good, self.output)


@dataclass(frozen=True)
class Operation:
    """A command that is killed.

    Attributes:
        arguments: of the command line, for a place.
        had_bundle: whether a bundle stands there before; it must never be lost.
        check: raises AssertionError for what is half-written, at any time.
    """

    name: str
    arguments: Callable[[Place], list[str]]
    had_bundle: bool
    check: Callable[[Place], None]


def check_bundle(bundle: Path) -> None:
    """Raise unless every file of a bundle is as its manifest says."""
    from latentc.runtimes.bundle.files import Bundle

    Bundle.open(bundle, hashing="always").check()


def _check_export(place: Place) -> None:
    """Check that the bundle in the output's place, if one is there, is whole."""
    if place.output.exists():
        check_bundle(place.output)


def _check_kept(place: Place) -> None:
    aside = place.output.parent / f".{OUTPUT}.old"
    check_bundle(place.output if place.output.exists() else aside)


def _check_shared(place: Place) -> None:
    _check_export(place)
    check_bundle(place.good)


def _check_written(place: Place) -> None:
    """The bundle is there at every moment."""
    check_bundle(place.output)


def _check_tuned(place: Place) -> None:
    check_bundle(place.output)
    for path in _regular(place.cache):
        if path.suffix == ".json":
            json.loads(path.read_bytes())


def _check_report(place: Place) -> None:
    check_bundle(place.output)
    report = place.root / "work" / "report" / "report.json"
    if report.exists():
        json.loads(report.read_bytes())


def _export(place: Place, *more: str) -> list[str]:
    plans = ["--scheduler", "ddim", "--steps", "1", "--steps", "2"]
    output = ["-o", str(place.output), "--quiet"]
    return ["export", str(place.source), *output, "--target", "onnx", *plans, *more]


def _bench(place: Place) -> list[str]:
    short = [
        "--rounds",
        "1",
        "--repeats",
        "1",
        "--steps",
        "1",
        "--baseline",
        "none",
    ]
    report = str(place.root / "work" / "report")
    return ["bench", str(place.output), "-o", report, "--backend", "onnxruntime", *short]


def _tune(place: Place) -> list[str]:
    how = ["--backend", "onnxruntime", "--seconds", "4", "--steps", "1"]
    return ["tune", str(place.output), *how, "--prompt", "a red circle"]


OPERATIONS: tuple[Operation, ...] = (
    Operation("export", _export, False, _check_export),
    Operation("export over", lambda p: _export(p, "--precision", "fp16"), True, _check_kept),
    Operation(
        "share-with",
        lambda p: _export(p, "--precision", "fp16", "--share-with", str(p.good)),
        False,
        _check_shared,
    ),
    Operation(
        "schedule",
        lambda p: ["schedule", str(p.output), "--scheduler", "euler", "--steps", "3", "--quiet"],
        True,
        _check_written,
    ),
    Operation("tune", _tune, True, _check_tuned),
    Operation("bench", _bench, True, _check_report),
)


def leftovers(place: Place) -> list[str]:
    """Return what stands where nothing but results should, after a run that went through."""
    from latentc.runtimes.bundle.manifest import Manifest

    work = place.output.parent
    allowed = {OUTPUT, "report"}
    found = [path for path in work.iterdir() if path.name not in allowed and not _is_lock(path)]
    listed = {"manifest.json", *(file.path for file in Manifest.load(place.output).files())}
    inside = ((path, path.relative_to(place.output).as_posix()) for path in _regular(place.output))
    found += [path for path, name in inside if name not in listed]
    scratch = (".tmp", ".new", ".partial", ".part")
    found += [path for path in place.cache.rglob("*") if path.name.endswith(scratch)]
    found += [path for path in place.temporary.iterdir() if path.name not in _NOT_OURS]
    return sorted(str(path.relative_to(place.root)) for path in found)


def _is_lock(path: Path) -> bool:
    return path.name.endswith(_LOCKS) and path.is_file() and path.stat().st_size == 0


def _regular(folder: Path) -> Iterable[Path]:
    for base, _, names in os.walk(folder):
        yield from (Path(base) / name for name in names)
