"""The compiler's entry: check what is asked, digest the source, stop if the bundle is up to date,
say what the export needs; then `latentc.exporter.compiler.run` runs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from msgspec import structs

from latentc.exporter.artifacts.store import (
    Store,
    full_disk_reported,
    missing_artifacts,
    previous_manifest,
    recover,
)
from latentc.exporter.compiler import early_checks as early
from latentc.exporter.compiler.output import check_output
from latentc.exporter.compiler.preflight import Need, need, refuse, weights_of
from latentc.exporter.compiler.previous_builds import refuse_loss
from latentc.exporter.compiler.run import Compilation, Exported
from latentc.exporter.compiler.sharing import check as check_shared
from latentc.exporter.compiler.sharing import share
from latentc.exporter.export_arguments import (
    ExportArguments,
    adapters_of_packages,
    keyword,
    whole,
)
from latentc.exporter.memory import looking_at_what_is_new
from latentc.exporter.options import (
    ExportOptions,
    artifact_keys,
    check,
    options_of,
    up_to_date,
)
from latentc.exporter.progress import Progress
from latentc.exporter.source import given_files, left_out
from latentc.exporter.source.adapters.kinds import OWN as ADAPTERS
from latentc.exporter.source.model_card import Card
from latentc.exporter.source.resolving import PipelineSource, resolve
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.options import takes
from latentc.runtimes.storage import files
from latentc.runtimes.storage.locks import writing


@takes(ExportArguments)
def export(
    source: str | Path, output: str | Path, **arguments: Unpack[ExportArguments]
) -> Exported:
    """Compile a diffusers pipeline into a bundle.

    Args:
        source: a Hub id, a diffusers folder, or a checkpoint of one file.
        output: the bundle's folder. Builds of the same source that stand there are kept.
        {options}

    Targets of other packages may have options besides, which are keywords as well.

    Raises:
        InputError, SourceError, ExportError, VerificationError: see `latentc.runtimes.errors`.
            Nothing is left at `output` that was not there before.
    """
    asked = _read(source, output, arguments)
    with writing(asked.destination, asked.progress):
        recover(asked.destination)
        job = _planned(asked)
        if job.done is not None:
            done = _with_card(job.done, asked.source.card)
            shared = share(done.bundle, done.manifest, asked.others)
            return dataclasses.replace(done, shared=shared)
        with asked.progress.stage("needs", job.need.line()):
            if asked.preflight:
                refuse(job.need, asked.destination)
        store = Store(asked.destination, job.previous, asked.others)
        compilation = Compilation(asked.source, asked.options, job.keys, store, asked.progress)
        with looking_at_what_is_new():
            return compilation.run(job.previous, asked.others)


@dataclass(frozen=True)
class _Asked:
    """An `_Asked` says what an export is to make, of what and where.

    `others`: bundles to share files with.
    """

    source: PipelineSource
    options: ExportOptions
    destination: Path
    progress: Progress
    others: tuple[Path, ...]
    preflight: bool


@dataclass(frozen=True)
class _Job:
    """A job is what is left to do, as the output stands; `done` if that is nothing."""

    keys: Mapping[tuple[str, str], Mapping[str, str]]
    previous: Manifest | None
    need: Need
    done: Exported | None


@takes(ExportArguments)
def preflight(source: str | Path, output: str | Path, **arguments: Unpack[ExportArguments]) -> Need:
    """Return what `export` with these arguments will need; nothing is written.

    Args:
        source, output: as for `export`.
        {options}

    Raises:
        InputError, SourceError, ExportError: as `export` does before it begins.
    """
    return _planned(_read(source, output, arguments)).need


def _read(source: str | Path, output: str | Path, given: ExportArguments) -> _Asked:
    """Check the arguments of `export`, read and digest the source."""
    arguments = whole(given)
    options = options_of(arguments, given)
    check(options)
    destination = Path(output)
    check_output(destination)
    others = tuple(Path(bundle) for bundle in arguments["share_with"])
    check_shared(others, destination)
    left_out.check(arguments["without"])
    given_files.check(_beside(arguments))
    progress = Progress(arguments["report"])
    with progress.stage("source", "read and digest"):
        found = _found(source, arguments)
    return _Asked(found, options, destination, progress, others, arguments["preflight"])


def _planned(asked: _Asked) -> _Job:
    """Look at what stands at the output; the caller holds its lock, or changes nothing there."""
    source, options, destination = asked.source, asked.options, asked.destination
    previous = previous_manifest(destination)
    if previous is not None and not options.overwrite:
        refuse_loss(destination, previous, source, options)
    keys = artifact_keys(source, options)
    done = previous is not None and up_to_date(previous, source, destination, keys, options)
    if not done:
        early.check(source, options)
    missing = {} if done else missing_artifacts(keys, destination, previous, asked.others)
    wanted = need(weights_of(source, options), missing, options.verify and not done)
    exported = Exported(destination, previous) if done and previous else None
    return _Job(keys, previous, wanted, exported)


def _with_card(done: Exported, card: Card) -> Exported:
    """Let the manifest of a bundle that is up to date say what its source says of itself now. That
    is in no digest, so that nothing else is made again."""
    source = structs.replace(done.manifest.source, **dataclasses.asdict(card))
    if source == done.manifest.source:
        return done
    manifest = structs.replace(done.manifest, source=source)
    with full_disk_reported():
        files.write(done.bundle / MANIFEST, manifest.checked(), root=done.bundle)
    return dataclasses.replace(done, manifest=manifest)


def _beside(arguments: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the files and folders that are given beside the source, by kind."""
    kinds = (*ADAPTERS, *adapters_of_packages(), "image-encoder", "config")
    return {kind: _texts(arguments[keyword(kind)]) for kind in kinds}


def _found(source: str | Path, arguments: Mapping[str, Any]) -> PipelineSource:
    beside = _beside(arguments)
    return resolve(
        source,
        arguments["revision"],
        arguments["variant"],
        {kind: places for kind, places in beside.items() if kind not in given_files.OTHERS},
        next(iter(beside["config"]), None),
        arguments["allow_pickle"],
        arguments["without"],
        next(iter(beside["image-encoder"]), None),
    )


def _texts(places: str | Path | Sequence[str | Path] | None) -> list[str]:
    if places is None:
        return []
    return [str(place) for place in ([places] if isinstance(places, str | Path) else places)]
