"""The sampling plans of a bundle: which ones, under which names, in which files."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from msgspec.structs import replace

from latentc.exporter.artifacts.source_closure import code
from latentc.exporter.artifacts.store import Store, full_disk_reported
from latentc.exporter.artifacts.versions import digest, versions
from latentc.exporter.components.description import FixedScheduler
from latentc.exporter.progress import Progress
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.schedulers import tables as tracing
from latentc.exporter.schedulers.names import DEFAULT_SCHEDULERS, SCHEDULERS, flow_matching
from latentc.exporter.schedulers.schedule_arguments import ScheduleArguments
from latentc.exporter.schedulers.shifting import Told, told_by, trace_more, trace_told
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.bundle.structures import File, Schedule
from latentc.runtimes.bundle.trust import check_unlinked, checked
from latentc.runtimes.errors import ExportError, InputError
from latentc.runtimes.options import complete, takes, tuple_of
from latentc.runtimes.sampling.plan import PlanTable
from latentc.runtimes.sampling.plan_archive import read_all_plans, write_archive
from latentc.runtimes.storage import files
from latentc.runtimes.storage.locks import writing
from latentc.runtimes.storage.outputs import check_folder

FOLDER = "schedules"
# The pipeline's own scheduler, where its settings are those of no named one.
OWN = "default"
# Traces and their checks replace functions of diffusers meanwhile, for the whole process.
_TRACING = threading.Lock()
_MOST_TIMESTEPS = 10_000  # of a scheduler that is made of what a bundle says
_ADDED = re.compile(r".+-[0-9a-f]{8}\.(?:json|zip)").fullmatch  # a table that was added to a bundle


def plain_config(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's config as JSON-able values.

    Of diffusers' private entries `_use_default_values` stays: the settings that the source
    left open, for which another scheduler class takes its own defaults.
    """
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    config[tracing.LEFT_OPEN] = sorted(scheduler.config.get(tracing.LEFT_OPEN, ()))
    plain: dict[str, Any] = json.loads(json.dumps(config, default=list))
    return plain


def own_name(scheduler: Any) -> str:
    """Return the short name whose settings are exactly those of `scheduler`, else ``"default"``."""
    config = plain_config(scheduler)
    for name in SCHEDULERS:
        named = tracing.resolve(name)
        if named.class_name == type(scheduler).__name__:
            with quiet_loading(), suppress(ExportError):
                settings = plain_config(tracing.build(name, config))
                if settings | {tracing.LEFT_OPEN: None} == config | {tracing.LEFT_OPEN: None}:
                    return name
    return OWN


@dataclass(frozen=True)
class Settings:
    """The settings say which scheduler is traced, and what it is made of.

    Attributes:
        kind: a name of `SCHEDULERS` or a class; `OWN` for that of the configuration itself.
        class_name, config: the pipeline's own scheduler's, or those of a loop's that never follows
            another one.
        told: what the pipeline tells it.
    """

    kind: str
    class_name: str
    config: Mapping[str, Any]
    told: Told

    def built(self) -> Any:
        """Return the scheduler. Raises ExportError as `_built` does."""
        return _built(self.kind, self.class_name, self.config)

    def follows_size(self) -> bool:
        """Return whether the plans depend on the image's size. Raises ExportError as `built`."""
        return bool(self.built().config.get("use_dynamic_shifting"))


def make(
    settings: Settings,
    steps: Sequence[int],
    skip_refused: bool = False,
    there: PlanTable | None = None,
) -> tuple[str, PlanTable]:
    """Trace a scheduler; returns its class name, and its plans beside those that are `there`.

    `skip_refused` leaves out counts that the scheduler itself refuses.
    """
    with _TRACING:
        scheduler = settings.built()
        if there is None:
            table = trace_told(scheduler, steps, settings.told, skip_refused)
        else:
            table = trace_more(there, scheduler, steps, settings.told, skip_refused)
    return type(scheduler).__name__, table.of_singles()


def _built(name: str, class_name: str, config: Mapping[str, Any]) -> Any:
    """Return the scheduler `name` of a pipeline whose own one is given.

    Raises:
        ExportError: there is none, or it is for another kind of model.
    """
    with quiet_loading():
        is_own = name == OWN
        scheduler = tracing.rebuild(class_name, config) if is_own else tracing.build(name, config)
    built_class = type(scheduler).__name__
    if flow_matching(class_name, config) != flow_matching(built_class, scheduler.config):
        kind = "flow matching" if flow_matching(class_name, config) else "diffusion"
        raise ExportError(
            f"{built_class} is not for models of {kind}, as the pipeline's own {class_name} is"
        )
    return scheduler


def check_kinds(names: Sequence[str], class_name: str, config: Mapping[str, Any]) -> None:
    """Refuse schedulers that cannot stand in the place of a pipeline's own one.

    Raises:
        InputError: one is for another kind of model, or cannot be made from that configuration.
    """
    for name in names:
        try:
            _built(name, class_name, config)
        except ExportError as error:
            raise InputError(f"scheduler {name!r}: {error}") from error


def _defaults(class_name: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the default set, less what is for other kinds of models."""
    if not flow_matching(class_name, config):
        return DEFAULT_SCHEDULERS
    usable = []
    for name in DEFAULT_SCHEDULERS:
        with suppress(ExportError):
            _built(name, class_name, config)
            usable.append(name)
    return tuple(usable)


def key_of(name: str, settings: Settings, steps: Sequence[int]) -> str:
    """Return the store's key of one scheduler's table."""
    return digest(
        {
            "kind": "schedule",
            "name": name,
            "class": settings.class_name,
            "config": dict(settings.config),
            "steps": list(steps),
            "told": [settings.told.even_sigmas, settings.told.ranges],
            "versions": versions(("diffusers", "torch", "numpy")),
            "code": code(__name__),
        }
    )


@dataclass(frozen=True)
class Wanted:
    """A `Wanted` says which plans are to be made.

    Attributes:
        names: scheduler names; None is the default set, beside the pipeline's own.
        steps: step counts; None is the usual ones.
        default_steps: the pipeline's own default step count.
        kept: by scheduler the step counts that an older bundle has and that stay.
        told: what the pipeline tells its scheduler.
        fixed: the schedulers of loops that never follow another one.
    """

    names: tuple[str, ...] | None
    steps: tuple[int, ...] | None
    default_steps: int
    kept: Mapping[str, tuple[int, ...]]
    told: Told = field(default_factory=Told)
    fixed: Mapping[str, FixedScheduler] = field(default_factory=dict)


def add_all(
    store: Store, scheduler: Any, wanted: Wanted, progress: Progress
) -> tuple[Schedule, ...]:
    """Trace the pipeline's own scheduler, which comes first, the wanted ones, and those of loops
    that never follow another one.

    A scheduler of the default set that cannot be made from the pipeline's configuration, or that
    refuses all the wanted step counts (PNDM one step), is left out; one that was asked for is an
    error.
    """
    own = own_name(scheduler)
    class_name, config = type(scheduler).__name__, plain_config(scheduler)
    asked = _defaults(class_name, config) if wanted.names is None else wanted.names
    made = []
    for name in dict.fromkeys([own, *asked]):
        settings = Settings(name, class_name, config, wanted.told)
        try:
            default = wanted.default_steps if name == own else None
            steps = _steps(wanted, name, settings, default)
            schedule = _add(store, name, settings, steps, progress)
            _warn_refused(schedule, wanted.steps)
            made.append(schedule)
        except ExportError:
            if name == own or wanted.names is not None:
                raise
    return (*made, *(_add_fixed(store, n, f, wanted, progress) for n, f in wanted.fixed.items()))


def _warn_refused(schedule: Schedule, asked: Sequence[int] | None) -> None:
    """Say which of the step counts that were asked for a scheduler refuses."""
    refused = sorted({*(asked or ())} - {*schedule.steps})
    if refused:
        counts = ", ".join(map(str, refused))
        warnings.warn(
            f"{schedule.class_name} refuses {counts} steps, in diffusers too: the bundle has no "
            f"plan of {schedule.name!r} for them",
            UserWarning,
            stacklevel=2,
        )


def _add_fixed(
    store: Store, name: str, fixed: FixedScheduler, wanted: Wanted, progress: Progress
) -> Schedule:
    """Trace the scheduler that a loop follows in every call, at the wanted step counts and that of
    a call which asks for none."""
    config = plain_config(fixed.scheduler)
    settings = Settings(OWN, type(fixed.scheduler).__name__, config, Told())
    steps = {*_steps(wanted, name, settings), fixed.default_steps}
    schedule = _add(store, name, settings, sorted(steps), progress)
    _warn_refused(schedule, wanted.steps)
    return replace(schedule, config=config)


def _steps(
    wanted: Wanted, name: str, settings: Settings, default: int | None = None
) -> Sequence[int]:
    """Return the step counts to trace a scheduler for: the wanted or usual ones, and those that an
    older bundle has.

    Args:
        default: the step count of a call that asks for none, where it is the pipeline's own
            scheduler.
    """
    kept = wanted.kept.get(name, ())
    if wanted.steps is not None:
        return sorted({*wanted.steps, *kept})
    return sorted({*_usual_steps(settings, default), *kept})


def _usual_steps(settings: Settings, default: int | None) -> Sequence[int]:
    """Return the step counts of a scheduler where nobody says which; `default` as in `_steps`."""
    usual = tracing.DEFAULT_STEPS if default is None else tracing.OWN_STEPS
    if default is not None and settings.follows_size():
        usual = tracing.SIZED_STEPS
    limit = int(settings.config.get("num_train_timesteps", 1000))
    counts = {*usual, *([] if default is None else [default])}
    return sorted(count for count in counts if count <= limit)


def _add(
    store: Store,
    name: str,
    settings: Settings,
    steps: Sequence[int],
    progress: Progress,
) -> Schedule:
    """Trace a scheduler into the store, and return what the manifest says of it."""
    key = key_of(name, settings, steps)

    def write(folder: Path) -> Mapping[str, Any]:
        with progress.stage(f"schedule {name}", "trace") as wrote:
            path = folder / f"{name}.zip"
            found, table = make(settings, steps, skip_refused=True)
            write_archive(table, path)
            wrote(path.stat().st_size)
        return {"class_name": found, "steps": list(table.step_counts)}

    item = store.item(key, FOLDER, write)
    return _schedule(name, settings, item.files[0], tuple(item.meta["steps"]), key)


def _schedule(
    name: str, settings: Settings, file: File, steps: tuple[int, ...], key: str
) -> Schedule:
    """Return what the manifest says of a table that was written."""
    return Schedule(
        *(name, type(settings.built()).__name__, file, steps, key),
        settings.told.shift if settings.follows_size() else None,
        int(settings.config.get("num_train_timesteps", 1000)),
        archive=True,
    )


@takes(ScheduleArguments)
def add_to_bundle(bundle: Path, **arguments: Unpack[ScheduleArguments]) -> Manifest:
    """Add plans to a bundle without exporting it again; returns the new manifest.

    A new table is written beside the old one and the manifest is replaced last, in one
    step, so that the bundle is whole at every moment.

    Args:
        bundle: its folder.
        {options}

    Raises:
        InputError: an unknown scheduler, one that is not for such a model, or a bundle that cannot
            be written.
        BundleError: no bundle there, or links in it where something is to be written.
        ExportError: a scheduler that cannot be traced, or step counts that
            the scheduler refuses.
    """
    options = complete(ScheduleArguments, arguments)
    names, progress = tuple_of(options["schedulers"]), Progress(options["report"])
    steps = tuple_of(options["steps"] or ()) or None
    manifest = Manifest.load(bundle)  # before a lock is made beside what may be no bundle
    _check_config(manifest.source.scheduler_config)
    traced = [name for name in names if _fixed(manifest, name) is None]
    for name in traced:
        if name != OWN:
            tracing.resolve(name)
    check_folder(bundle)
    check_kinds(traced, manifest.source.scheduler_class, manifest.source.scheduler_config)
    with writing(bundle, progress):
        return _add_locked(bundle, names, steps, progress)


def _add_locked(
    bundle: Path, names: Sequence[str], steps: Sequence[int] | None, progress: Progress
) -> Manifest:
    opened = Bundle.open(bundle)
    root, manifest = opened.root, opened.manifest
    check_unlinked(root, (root / MANIFEST, root / FOLDER))
    with files.temporary_folder() as folder:
        for name in names:
            manifest = _extended(root, manifest, name, steps, folder, progress)
    with full_disk_reported():
        files.write(root / MANIFEST, manifest.checked(), root=root)
        _remove_stale(root, opened.manifest, manifest)
    return manifest


def _remove_stale(root: Path, before: Manifest, now: Manifest) -> None:
    """Remove the files that the manifest lists no longer, and tables that a killed run left."""
    listed = {file.path for file in now.files()}
    stale = {file.path for file in before.files()}
    stale |= {f"{FOLDER}/{path.name}" for path in (root / FOLDER).glob("*") if _ADDED(path.name)}
    for path in stale - listed:
        files.remove(root / path, root=root)


def _extended(
    root: Path,
    manifest: Manifest,
    name: str,
    steps: Sequence[int] | None,
    folder: Path,
    progress: Progress,
) -> Manifest:
    old = next((schedule for schedule in manifest.schedules if schedule.name == name), None)
    settings = _settings(manifest, name)
    with progress.stage(f"schedule {name}", "trace") as wrote:
        path = folder / "table.zip"
        there = None
        if old is not None:
            there = read_all_plans(checked(root, old.file, "always"), old)
        defaults = manifest.defaults
        default = defaults.num_inference_steps if name == defaults.scheduler else None
        counts = _usual_steps(settings, default) if steps is None else steps
        _, table = make(settings, counts, skip_refused=steps is None, there=there)
        write_archive(table, path)
        data = path.read_bytes()
        wrote(len(data))
    sha256 = hashlib.sha256(data).hexdigest()
    file = File(f"{FOLDER}/{name}-{sha256[:8]}.zip", len(data), sha256)
    with full_disk_reported():
        files.write(root / file.path, data, root=root)
    key = key_of(name, settings, table.step_counts)
    made = _schedule(name, settings, file, table.step_counts, key)
    if old is not None:
        made = replace(made, config=old.config)
    others = tuple(schedule for schedule in manifest.schedules if schedule.name != name)
    return replace(manifest, schedules=(*others, made))


def traced_for(manifest: Manifest, schedule: Schedule, steps: int) -> PlanTable:
    """Return the plans of a bundle's scheduler for one step count.

    Raises:
        ExportError: the scheduler refuses so many steps, or cannot be traced.
    """
    return make(_settings(manifest, schedule.name), [steps])[1]


def _settings(manifest: Manifest, name: str) -> Settings:
    """Return the settings of a bundle's scheduler, or of one that may be added to it."""
    fixed, source = _fixed(manifest, name), manifest.source
    if fixed is not None:
        _check_config(fixed.config or {})
        return Settings(OWN, fixed.class_name, fixed.config or {}, Told())
    _check_config(source.scheduler_config)
    return Settings(name, source.scheduler_class, source.scheduler_config, _told(manifest))


def _check_config(config: Mapping[str, Any]) -> None:
    """Refuse a configuration of which a scheduler would be made whose size has no limit: it may be
    of a bundle that a stranger made.

    Raises:
        ExportError: it has more timesteps or longer lists than `_MOST_TIMESTEPS`.
    """
    timesteps = config.get("num_train_timesteps") or 1
    longest = max((len(each) for each in config.values() if isinstance(each, list)), default=0)
    whole = isinstance(timesteps, int) and 1 <= timesteps <= _MOST_TIMESTEPS
    if not whole or longest > _MOST_TIMESTEPS:
        raise ExportError(
            f"the scheduler's configuration has num_train_timesteps {timesteps} and a list of "
            f"{longest}: expected 1 to {_MOST_TIMESTEPS:,}"
        )


def _fixed(manifest: Manifest, name: str) -> Schedule | None:
    """Return the schedule of that name which is not made of the pipeline's own scheduler."""
    found = (each for each in manifest.schedules if each.name == name and each.config is not None)
    return next(found, None)


def _told(manifest: Manifest) -> Told:
    """Return what the pipeline of a bundle tells its scheduler; its own one says how that follows
    the size.
    """
    shift = manifest.schedule(manifest.defaults.scheduler).shift
    pipeline_class, programs = manifest.source.pipeline_class, manifest.programs
    return told_by(pipeline_class, shift, manifest.latents, manifest.sample(), programs)
