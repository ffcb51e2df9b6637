"""One run of the compiler: from a resolved source to a bundle, written atomically.

Stages: load the pipeline; sampling plans and tokenizers; reference results from PyTorch; capture
and lower what is not there yet; free PyTorch's copy; verify every build on its runtime; publish by
a rename.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from latentc.exporter.artifacts.store import Store
from latentc.exporter.artifacts.versions import libraries
from latentc.exporter.compiler.previous_builds import entry, refuse_other_graphs, with_kept
from latentc.exporter.compiler.requested import described
from latentc.exporter.compiler.sharing import share, store_once
from latentc.exporter.components.description import Description, Graph
from latentc.exporter.components.names import precision_of
from latentc.exporter.lowering.component import Lowering
from latentc.exporter.lowering.trajectories import Trajectories
from latentc.exporter.memory import free_memory, keep_nothing, release_weights
from latentc.exporter.options import ExportOptions
from latentc.exporter.programs.changes import nearest, usual_steps, with_planned_steps
from latentc.exporter.progress import Progress
from latentc.exporter.source.resolving import PipelineSource, load
from latentc.exporter.targets import computes
from latentc.exporter.verification.builds import verified
from latentc.exporter.verification.probes import Probing
from latentc.runtimes.bundle.manifest import FORMAT_VERSION, Manifest
from latentc.runtimes.bundle.precision import build_name
from latentc.runtimes.bundle.structures import (
    Artifact,
    Build,
    CreatedBy,
    Defaults,
    Ingredient,
    Probes,
    ProgramCheck,
    Schedule,
    Source,
    Tokenizer,
)
from latentc.runtimes.errors import BundleError, DiskFull, ExportError, VerificationError
from latentc.runtimes.version import __version__

if TYPE_CHECKING:
    from latentc.exporter.schedulers.shifting import Told
    from latentc.exporter.verification.programs import Subject
    from latentc.runtimes.programs.statements import Program


@dataclass(frozen=True)
class Exported:
    """The result: the bundle's folder, its manifest, and the names of what was made anew
    (empty: everything was up to date). `shared`: bytes that another bundle's files hold."""

    bundle: Path
    manifest: Manifest
    made: tuple[str, ...] = field(default=())
    shared: int = 0


@dataclass(frozen=True)
class Compilation:
    """One run of the compiler; holds what its stages share."""

    source: PipelineSource
    options: ExportOptions
    keys: Mapping[tuple[str, str], Mapping[str, str]]
    store: Store
    progress: Progress

    def run(self, previous: Manifest | None, others: Sequence[Path] = ()) -> Exported:
        keep_nothing()
        try:
            manifest = self._draft(previous)
            manifest = verified(manifest, self.store.staging, self.options, self.progress)
        except (VerificationError, DiskFull):
            self.store.discard()
            raise
        with self.progress.stage("bundle", "publish"):
            shared = share(self.store.staging, manifest, others)
            store_once(self.store.staging, manifest)
            self.store.publish(manifest)
        return Exported(self.store.output, manifest, tuple(self.store.made), shared)

    def _draft(self, previous: Manifest | None) -> Manifest:
        """The manifest with everything but verification; writes all files to the staging."""
        from latentc.exporter.compiler import tokenizer_files as tokenizers
        from latentc.exporter.schedulers import plans as schedules

        with self.progress.stage("pipeline", "load"):
            pipe = load(self.source)
            description = described(pipe, self.source, self.options)
        if previous is not None and not self.options.overwrite:
            components = tuple(graph.component for graph in description.graphs)
            refuse_other_graphs(self.store.output, previous, components, self.options)
        for own in self.options.of_targets.values():
            own.check(description.latents, self.options.height is not None)
        plans = schedules.add_all(
            self.store,
            pipe.scheduler,
            schedules.Wanted(
                self.options.schedulers,
                self.options.steps,
                usual_steps(description.program),
                self._steps_there(previous),
                self._told(pipe.scheduler, description),
                description.fixed_schedulers,
            ),
            self.progress,
        )
        texts = tokenizers.add_all(self.store, self.source, pipe, description)
        scheduler = (type(pipe.scheduler).__name__, schedules.plain_config(pipe.scheduler))
        draft = self._manifest(description, plans, scheduler, texts)
        refuse_unreadable(draft)
        if self.options.verify:
            draft = replace(draft, probes=self._probes(pipe, description, draft))
            programs_checked = self._programs_checked(pipe, description, draft)
            draft = replace(draft, programs_checked=programs_checked)
        draft = replace(draft, builds=self._builds(pipe, description, draft))
        release_weights([graph.module for graph in description.graphs], self.source.folder)
        del pipe, description
        free_memory()
        whole = with_kept(draft, previous, self.store)
        refuse_unreadable(whole)
        return whole

    def _told(self, scheduler: Any, description: Description) -> Told:
        """Return what the pipeline tells its scheduler besides the number of steps."""
        from latentc.exporter.schedulers import shifting

        shift = shifting.line(scheduler.config, description.shifted)
        denoiser = next(g for g in description.graphs if g.component.role == "denoiser").component
        sample, latents = denoiser.inputs["sample"], description.latents
        programs = description.programs
        return shifting.told_by(self.source.pipeline_class, shift, latents, sample, programs)

    def _steps_there(self, previous: Manifest | None) -> Mapping[str, tuple[int, ...]]:
        """Step counts that were added to the bundle since: they are not lost."""
        if previous is None or previous.source.fingerprint != self.source.fingerprint:
            return {}
        return {schedule.name: schedule.steps for schedule in previous.schedules}

    def _manifest(
        self,
        description: Description,
        plans: tuple[Schedule, ...],
        scheduler: tuple[str, dict[str, Any]],
        tokenizers: tuple[Tokenizer, ...],
    ) -> Manifest:
        """Return all but the probes and the builds."""
        own = plans[0]
        return Manifest(
            format_version=FORMAT_VERSION,
            programs=planned_programs(description, plans),
            source=Source(
                self.source.id,
                self.source.pipeline_class,
                self.source.fingerprint,
                *scheduler,
                self.source.revision,
                tuple(
                    Ingredient(each.kind, each.id, each.sha256, each.scale, each.token)
                    for each in self.source.ingredients
                ),
                self.source.without,
                self.source.card.licence,
                self.source.card.author,
                self.source.card.base_model,
            ),
            created_by=created_by(),
            components=tuple(graph.component for graph in description.graphs),
            tokenizers=tokenizers,
            builds=(),
            schedules=plans,
            defaults=Defaults(own.name, nearest(own.steps, usual_steps(description.program))),
            left_out=self.options.left_out(self.source),
        )

    def _probes(self, pipe: Any, description: Description, draft: Manifest) -> Probes:
        own = draft.schedules[0]
        return Probing(
            self.source, self.options, description, draft, own, self.store, self.progress
        ).add(pipe)

    def _programs_checked(
        self, pipe: Any, description: Description, draft: Manifest
    ) -> tuple[ProgramCheck, ...]:
        """Compare every program with diffusers, and return the record of it.

        Raises:
            VerificationError: one does something else.
        """
        from latentc.exporter.verification.programs import check_programs, recorded

        options = self.options
        fixed = (options.height, options.width) if options.height and options.width else None
        staging, progress = self.store.staging, self.progress
        small = partial(self._miniature, pipe, draft)
        return recorded(check_programs(pipe, description, draft, staging, progress, fixed, small))

    def _miniature(self, pipe: Any, draft: Manifest) -> Subject:
        """Return a miniature of a pipeline, and what would be its manifest.

        Raises:
            LatentcError: there is none.
        """
        from latentc.exporter.verification.miniature import miniature_of
        from latentc.exporter.verification.programs import Subject

        small = miniature_of(pipe)
        description = described(small, self.source, self.options)
        programs = planned_programs(description, draft.schedules)
        components = tuple(graph.component for graph in description.graphs)
        manifest = replace(draft, programs=programs, components=components)
        return Subject(small, description, manifest, miniature=True)

    def _builds(self, pipe: Any, description: Description, manifest: Manifest) -> tuple[Build, ...]:
        from latentc.exporter.lowering.overflow import probe_samples

        def samples(graph: Graph) -> Iterator[Any]:
            return probe_samples(graph, manifest.probes, self.store.staging)

        trajectories = self._trajectories(description, manifest)
        lowerings = {
            graph.component.name: Lowering(
                graph, description, self.options, self.progress, samples, trajectories
            )
            for graph in description.graphs
        }
        kept = self._kept(lowerings, samples, description, manifest)
        artifacts: dict[tuple[str, str], dict[str, Artifact]] = {pair: {} for pair in self.keys}
        for name, lowering in lowerings.items():
            for pair, made in artifacts.items():
                made[name] = self._artifact(lowering, pair, kept.get(pair, {}))
            lowering.forget()
            free_memory()
        return tuple(self._build(pair, made) for pair, made in artifacts.items())

    def _artifact(
        self,
        lowering: Lowering,
        pair: tuple[str, str],
        kept: Mapping[str, frozenset[str]],
    ) -> Artifact:
        target, precision = pair
        name = lowering.name
        own = precision_of(precision, name)

        def write(folder: Path) -> Mapping[str, Any]:
            weights = kept.get(name, frozenset())
            return {**lowering.write(target, own, weights, folder), "kept": sorted(weights)}

        key = self.keys[pair][name]
        item = self.store.item(key, f"{build_name(target, precision)}/{name}", write)
        free_memory()
        compute = computes(target, own)
        return Artifact(
            key, entry(item), item.files, own, compute, tuple(item.meta.get("kept", ()))
        )

    def _build(self, pair: tuple[str, str], artifacts: dict[str, Artifact]) -> Build:
        target, precision = pair
        return Build(build_name(target, precision), target, precision, artifacts)

    def _trajectories(
        self, description: Description, manifest: Manifest
    ) -> Callable[[], Trajectories]:
        """Run when a build first asks for them."""

        @cache
        def run() -> Trajectories:
            from latentc.exporter.lowering.trajectories import trajectories

            wanted = self.options.calibration
            with self.progress.counted("calibration", "denoise", wanted.samples) as told:
                staging = self.store.staging
                return trajectories(description, manifest, staging, wanted, told)

        return run

    def _kept(
        self,
        lowerings: Mapping[str, Lowering],
        samples: Callable[[Graph], Iterator[Any]],
        description: Description,
        manifest: Manifest,
    ) -> dict[tuple[str, str], Mapping[str, frozenset[str]]]:
        """For each quantised build the layers to keep so that it reaches the fidelity floor."""
        if self.options.fidelity_floor is None:
            return {}
        from latentc.exporter.lowering.fidelity_floor import FloorSearch

        search = FloorSearch(
            lowerings,
            self.options,
            self.store.staging,
            manifest,
            self.progress,
            {graph.component.name: list(samples(graph)) for graph in description.graphs},
        )
        return {
            pair: search.run(*pair)
            for pair, keys in self.keys.items()
            if not all(map(self.store.keep, keys.values()))
        }


def planned_programs(
    description: Description, schedules: Sequence[Schedule]
) -> tuple[Program, ...]:
    """Return a description's programs, whose step counts are among those of the schedules that
    they follow, the pipeline's own scheduler first."""
    own, *others = schedules
    fixed = {each.name: each.steps for each in others}
    return tuple(with_planned_steps(each, own.steps, fixed) for each in description.programs)


def refuse_unreadable(manifest: Manifest) -> None:
    """Refuse to go on with a manifest that its own reader refuses.

    Raises:
        ExportError: with what is wrong; the exporter takes a pipeline that it should refuse.
    """
    try:
        manifest.checked()
    except BundleError as error:
        raise ExportError(
            f"{manifest.source.pipeline_class}: {error}; a pipeline of this form cannot be exported"
        ) from error


def created_by() -> CreatedBy:
    """The versions at hand."""
    return CreatedBy(
        latentc=__version__,
        python=platform.python_version(),
        platform=platform.platform(terse=True),
        libraries=libraries(),
    )
