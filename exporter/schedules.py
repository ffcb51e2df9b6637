"""The sampling plans of a bundle: which ones, under which names, in which files."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from exporter import schedule as tracing
from exporter.progress import Progress
from exporter.scheduler_names import DEFAULT_SCHEDULERS, SCHEDULERS
from exporter.source import digest, quiet_loading
from exporter.store import Store, write_atomically
from exporter.versions import code, versions
from runtimes.errors import ExportError
from runtimes.manifest import MANIFEST, File, Manifest, Schedule
from runtimes.plan import PlanTable

FOLDER = "schedules"
# The pipeline's own scheduler, where its settings are those of no named one.
OWN = "default"
_LEFT_OPEN = "_use_default_values"

_TRACING_CODE = (
    "exporter.schedule",
    "exporter.scheduler_names",
    "exporter.scheduler_trace",
    "exporter.symbols",
    "exporter.plan_rows",
    "runtimes.plan",
)


def plain_config(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config as JSON-able values.

    Of diffusers' private entries `_use_default_values` stays: the settings that the source
    left open, for which another scheduler class takes its own defaults.
    """
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    config[_LEFT_OPEN] = sorted(scheduler.config.get(_LEFT_OPEN, ()))
    found: dict[str, Any] = json.loads(json.dumps(config, default=list))
    return found


def own_name(scheduler: Any) -> str:
    """The short name whose settings are exactly those of `scheduler`, else ``"default"``."""
    config = plain_config(scheduler)
    for name in SCHEDULERS:
        named = tracing.resolve(name)
        if named.class_name == type(scheduler).__name__:
            with quiet_loading(), suppress(ExportError):
                made = plain_config(tracing.build(name, config))
                if made | {_LEFT_OPEN: None} == config | {_LEFT_OPEN: None}:
                    return name
    return OWN


def make(
    name: str,
    class_name: str,
    config: Mapping[str, Any],
    steps: Sequence[int] | None,
    path: Path,
    skip_refused: bool = False,
) -> tuple[str, tuple[int, ...]]:
    """Trace scheduler `name` into `path`; returns its class name and the step counts.

    `class_name` and `config` are the pipeline's own scheduler's. Steps None means the usual
    ones; `skip_refused` leaves out counts that the scheduler itself refuses.
    """
    with quiet_loading():
        scheduler = tracing.build(class_name if name == OWN else name, config)
    traced = tracing.trace(scheduler, steps, skip_refused=skip_refused)
    traced.table.save(path)
    return type(scheduler).__name__, tuple(int(count) for count in traced.table.step_counts)


def key_of(
    name: str, class_name: str, config: Mapping[str, Any], steps: Sequence[int] | None
) -> str:
    """The store's key of one scheduler's table."""
    return digest(
        {
            "kind": "schedule",
            "name": name,
            "class": class_name,
            "config": dict(config),
            "steps": list(steps) if steps is not None else None,
            "versions": versions(("diffusers", "torch", "numpy")),
            "code": code(*_TRACING_CODE),
        }
    )


@dataclass(frozen=True)
class Wanted:
    """Which plans: scheduler names (None: the default set, beside the pipeline's own), step
    counts (None: the usual ones), the pipeline's own default step count, and by scheduler the
    step counts that an older bundle has and that stay."""

    names: tuple[str, ...] | None
    steps: tuple[int, ...] | None
    default_steps: int
    kept: Mapping[str, tuple[int, ...]]


def add_all(
    store: Store, scheduler: Any, wanted: Wanted, progress: Progress
) -> tuple[Schedule, ...]:
    """Trace the pipeline's own scheduler, which comes first, and the wanted ones.

    A scheduler of the default set that cannot be made from the pipeline's configuration, or that
    refuses all the wanted step counts (PNDM one step), is left out; one that was asked for is an
    error.
    """
    own = own_name(scheduler)
    asked = DEFAULT_SCHEDULERS if wanted.names is None else wanted.names
    class_name, config = type(scheduler).__name__, plain_config(scheduler)
    made = []
    for name in dict.fromkeys([own, *asked]):
        steps: Sequence[int] | None = wanted.steps
        if name == own and steps is None:
            steps = _own_steps(wanted.default_steps, config)
        usual = set(tracing.DEFAULT_STEPS if steps is None else steps)
        if not usual >= set(wanted.kept.get(name, ())):
            steps = sorted(usual | set(wanted.kept[name]))
        try:
            made.append(_add(store, name, class_name, config, steps, progress))
        except ExportError:
            if name == own or wanted.names is not None:
                raise
    return tuple(made)


def _own_steps(default: int, config: Mapping[str, Any]) -> Sequence[int] | None:
    """The usual step counts and the pipeline's own, where that is an unusual one."""
    if default in tracing.DEFAULT_STEPS:
        return None
    limit = int(config.get("num_train_timesteps", default))
    return sorted({count for count in (*tracing.DEFAULT_STEPS, default) if count <= limit})


def _add(
    store: Store,
    name: str,
    class_name: str,
    config: Mapping[str, Any],
    steps: Sequence[int] | None,
    progress: Progress,
) -> Schedule:
    key = key_of(name, class_name, config, steps)

    def write(folder: Path) -> Mapping[str, Any]:
        with progress.stage(f"schedule {name}", "trace") as wrote:
            path = folder / f"{name}.npz"
            found, counts = make(name, class_name, config, steps, path, skip_refused=True)
            wrote(path.stat().st_size)
        return {"class_name": found, "steps": list(counts)}

    item = store.item(key, FOLDER, write)
    found = tracing.resolve(class_name if name == OWN else name).class_name
    counts = tuple(item.meta["steps"])
    return Schedule(name, found, item.files[0], counts, key, _trained_timesteps(config))


def _trained_timesteps(config: Mapping[str, Any]) -> int:
    return int(config.get("num_train_timesteps", 1000))


def add_to_bundle(
    bundle: Path, names: Sequence[str], steps: Sequence[int] | None, progress: Progress
) -> Manifest:
    """Add plans to a bundle without exporting it again; returns the new manifest.

    A new table is written beside the old one and the manifest is replaced last, in one
    step, so that the bundle is whole at every moment.

    Raises:
        BundleError: no bundle there.
        ExportError: an unknown scheduler, one that cannot be traced, or step counts that
            the scheduler refuses.
    """
    manifest = Manifest.load(bundle)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            manifest = _extended(bundle, manifest, name, steps, Path(folder), progress)
    stale = {file.path for file in Manifest.load(bundle).files()}
    write_atomically(bundle / MANIFEST, manifest.encode())
    for path in stale - {file.path for file in manifest.files()}:
        (bundle / path).unlink(missing_ok=True)
    return manifest


def _extended(
    bundle: Path,
    manifest: Manifest,
    name: str,
    steps: Sequence[int] | None,
    folder: Path,
    progress: Progress,
) -> Manifest:
    source = manifest.source
    old = next((schedule for schedule in manifest.schedules if schedule.name == name), None)
    with progress.stage(f"schedule {name}", "trace") as wrote:
        path = folder / "table.npz"
        config = source.scheduler_config
        class_name, counts = make(name, source.scheduler_class, config, steps, path)
        if old is not None:
            table = PlanTable.load(bundle / old.file.path).merge(PlanTable.load(path))
            table.save(path)
            counts = tuple(int(count) for count in table.step_counts)
        data = path.read_bytes()
        wrote(len(data))
    sha256 = hashlib.sha256(data).hexdigest()
    file = File(f"{FOLDER}/{name}-{sha256[:8]}.npz", len(data), sha256)
    write_atomically(bundle / file.path, data)
    key = key_of(name, source.scheduler_class, source.scheduler_config, counts)
    made = Schedule(name, class_name, file, counts, key, _trained_timesteps(config))
    others = tuple(schedule for schedule in manifest.schedules if schedule.name != name)
    return replace(manifest, schedules=(*others, made))
