"""This module says what an export leaves standing of the bundle that is there already."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from latentc.exporter.artifacts.store import Item, Store
from latentc.exporter.options import ExportOptions
from latentc.exporter.passes import STEP_CACHE
from latentc.exporter.source.resolving import PipelineSource
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.structures import Build, Component
from latentc.runtimes.errors import ExportError


def refuse_loss(
    destination: Path, previous: Manifest, source: PipelineSource, options: ExportOptions
) -> None:
    """Stop before an export that would throw away what the bundle holds.

    Raises:
        ExportError: the bundle is of another source, or the source has changed and builds
            that were not asked for would be out of date.
    """
    if previous.source.id != source.id:
        raise ExportError(
            f"{destination} was made from another source ({previous.source.id}); "
            "choose another output, or replace it with --overwrite"
        )
    lost = _lost(previous, options)
    if lost and previous.source.fingerprint != source.fingerprint:
        raise ExportError(
            f"{source.id} has changed since {destination} was made, whose {', '.join(lost)} "
            "would be lost; ask for these builds too, or drop them with --overwrite"
        )


def refuse_other_graphs(
    destination: Path,
    previous: Manifest,
    components: tuple[Component, ...],
    options: ExportOptions,
) -> None:
    """All builds of a bundle have the same components: stop before others would be lost.

    Raises:
        ExportError: the bundle has builds of other components, which were not asked for.
    """
    lost = _lost(previous, options)
    if lost and previous.components != components:
        raise ExportError(
            f"{destination} holds other graphs (of another fixed size, or with or "
            f"without the pass {STEP_CACHE} or a task), and {', '.join(lost)} would be lost; "
            "ask for these builds too, export as they were, or drop them with --overwrite"
        )


def _lost(previous: Manifest, options: ExportOptions) -> list[str]:
    """Builds that were not asked for."""
    asked = options.names()
    return [build.name for build in previous.builds if build.name not in asked]


def with_kept(draft: Manifest, previous: Manifest | None, store: Store) -> Manifest:
    """Add the previous bundle's other builds of the same source, and its other schedules."""
    if previous is None or previous.source.fingerprint != draft.source.fingerprint:
        return draft
    if previous.components != draft.components:
        return draft
    asked = {build.name for build in draft.builds}
    kept = [_kept(build, store) for build in previous.builds if build.name not in asked]
    known = {schedule.name for schedule in draft.schedules}
    plans = [
        replace(each, file=item.files[0])
        for each in previous.schedules
        if each.name not in known and (item := store.keep(each.key))
    ]
    builds = (*draft.builds, *filter(None, kept))
    return replace(draft, builds=builds, schedules=(*draft.schedules, *plans))


def _kept(build: Build, store: Store) -> Build | None:
    """A build of the previous bundle, its files where they stand now; None if any is damaged."""
    artifacts = {}
    for name, artifact in build.artifacts.items():
        item = store.keep(artifact.key)
        if item is None:
            return None
        artifacts[name] = replace(artifact, entry=entry(item), files=item.files)
    return replace(build, artifacts=artifacts)


def entry(item: Item) -> str:
    """The path in the bundle of the file that an artifact is loaded by."""
    return next(file.path for file in item.files if file.path.endswith(f"/{item.meta['entry']}"))
