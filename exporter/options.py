"""What an export is asked for, and what its results depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from exporter.families import family_of
from exporter.passes import COMPUTES
from exporter.source import PipelineSource, digest
from exporter.targets import OPTIONS, TARGETS, passes, verifier
from exporter.targets.options import TargetOptions
from exporter.versions import CAPTURE, code, libraries, versions
from runtimes.errors import InputError
from runtimes.manifest import File, Manifest

MAX_STEPS = 1000
_CAPTURE_CODE = ("exporter.capture", "exporter.families", "exporter.families.text_to_image")


@dataclass(frozen=True)
class ExportOptions:
    """What to make. Height and width in pixels fix the size, None keeps it dynamic;
    `schedulers` None is the default set beside the pipeline's own; `steps` None is the usual
    step counts; `of_targets` holds the own options of each target."""

    targets: tuple[str, ...] = ("onnx",)
    precisions: tuple[str, ...] = ("fp32",)
    schedulers: tuple[str, ...] | None = None
    steps: tuple[int, ...] | None = None
    height: int | None = None
    width: int | None = None
    verify: bool = True
    overwrite: bool = False
    of_targets: Mapping[str, TargetOptions] = field(default_factory=dict)

    def builds(self) -> list[tuple[str, str]]:
        """(target, precision) of each asked build."""
        return [(target, precision) for precision in self.precisions for target in self.targets]

    def of(self, target: str) -> TargetOptions:
        """A target's own options."""
        return self.of_targets.get(target) or OPTIONS[target]()

    def passes(self, target: str, precision: str) -> tuple[str, ...]:
        """The passes that make a build's program."""
        return passes(target, precision, self.of(target))


def artifact_keys(
    source: PipelineSource, options: ExportOptions
) -> dict[tuple[str, str], dict[str, str]]:
    """For each (target, precision) the key of each component: all that its files depend on."""
    family = family_of(source.pipeline_class)
    return {
        (target, precision): {
            name: digest(
                {
                    "kind": "artifact",
                    "class": source.pipeline_class,
                    "component": name,
                    "weights": {part: source.digests.get(part) for part in parts},
                    "size": [options.height, options.width],
                    "target": target,
                    "precision": precision,
                    "options": asdict(options.of(target)),
                    "versions": versions((*CAPTURE, *TARGETS[target].packages)),
                    "code": code(
                        *_CAPTURE_CODE,
                        family.__name__,
                        f"exporter.targets.{TARGETS[target].module}",
                        *TARGETS[target].code,
                        *(f"exporter.passes.{each}" for each in options.passes(target, precision)),
                    ),
                    **_looked_at(source, options, options.passes(target, precision)),
                }
            )
            for name, parts in family.COMPONENTS.items()
        }
        for target, precision in options.builds()
    }


def _looked_at(
    source: PipelineSource, options: ExportOptions, names: tuple[str, ...]
) -> dict[str, Any]:
    """Whether a component can be half is decided on inputs from a run of the whole pipeline."""
    if not any(name in COMPUTES for name in names):
        return {}
    looking = code("exporter.headroom", "exporter.passes.half_compute", "exporter.reference")
    return {"headroom": [source.fingerprint, options.verify, looking]}


def check(options: ExportOptions) -> None:
    if not options.targets:
        raise InputError(f"no target given; targets: {', '.join(TARGETS)}")
    for target in options.targets:
        if target not in TARGETS:
            raise InputError(f"unknown target {target!r}; targets: {', '.join(TARGETS)}")
    for target, precision in options.builds():
        options.passes(target, precision)
    for count in options.steps or ():
        if not 1 <= count <= MAX_STEPS:
            raise InputError(f"step count {count} is not between 1 and {MAX_STEPS}")
    if (options.height is None) != (options.width is None):
        raise InputError("give both height and width, or neither for a dynamic size")
    if options.verify:
        from runtimes import backend

        for name in {verifier(target, precision) for target, precision in options.builds()}:
            backend.get(name)


def up_to_date(
    manifest: Manifest,
    source_id: str,
    bundle: Path,
    keys: Mapping[tuple[str, str], Mapping[str, str]],
    options: ExportOptions,
) -> bool:
    from exporter.scheduler_names import DEFAULT_SCHEDULERS

    if manifest.source.id != source_id:
        return False
    builds = {(build.target, build.precision): build for build in manifest.builds}
    for pair, wanted in keys.items():
        build = builds.get(pair)
        if build is None or {n: a.key for n, a in build.artifacts.items()} != dict(wanted):
            return False
        if options.verify and not (build.verification and build.verification.passed):
            return False
    have = {schedule.name: set(schedule.steps) for schedule in manifest.schedules}
    if not set(options.schedulers or ()) <= have.keys():
        return False
    if options.schedulers is None and not set(DEFAULT_SCHEDULERS) & have.keys():
        return False
    if not all(set(options.steps or ()) <= steps for steps in have.values()):
        return False
    same_versions = manifest.created_by.libraries == libraries()
    return same_versions and all(_is_intact(bundle, file) for file in manifest.files())


def _is_intact(bundle: Path, file: File) -> bool:
    path = bundle / file.path
    return path.is_file() and path.stat().st_size == file.size
