"""This module says what an export is asked for, and what its results depend on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Unpack

from latentc.exporter.artifacts.source_closure import code
from latentc.exporter.artifacts.versions import CAPTURE, digest, libraries, versions
from latentc.exporter.calibration_prompts import Calibration, calibration
from latentc.exporter.classes import CLASSES, record_of
from latentc.exporter.components.names import (
    IP_IMAGE_ENCODER,
    SAFETY_CHECKER,
    T2I_ADAPTER,
    USUAL,
    WATERMARK,
    precision_of,
)
from latentc.exporter.export_arguments import ExportArguments, whole
from latentc.exporter.families import family_of
from latentc.exporter.passes import (
    STEP_CACHE,
    calibrated,
    computes,
    has_integers,
    load,
    module_of,
    rewriting,
)
from latentc.exporter.schedulers.names import SCHEDULERS, unknown_scheduler
from latentc.exporter.source.adapters import kinds as ingredients
from latentc.exporter.source.left_out import takes_watermark
from latentc.exporter.source.resolving import PipelineSource
from latentc.exporter.targets import TARGETS, passes, unknown_target, verifier
from latentc.exporter.targets import options as own_options
from latentc.exporter.targets.options import TargetOptions, of_targets
from latentc.runtimes.backends import backend as engines
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.precision import (
    DENOISER,
    SHALLOW,
    build_name,
    canonical,
    check_components,
    split_passes,
    with_passes,
)
from latentc.runtimes.bundle.precisions import PRECISIONS
from latentc.runtimes.bundle.structures import LeftOut
from latentc.runtimes.bundle.trust import is_intact
from latentc.runtimes.errors import InputError
from latentc.runtimes.unknown_names import suggestion

# What a bundle can be asked to be for besides what its pipeline does anyhow, and the components
# that it takes: for each the parts of the source that it is made of.
TASKS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "text-to-image": {},
    "image-to-image": {"vae_encoder": ("vae",)},
    "inpainting": {"vae_encoder": ("vae",)},
    "instruct-pix2pix": {"vae_encoder": ("vae",)},
    "upscaling": {"low_res": ("low_res_scheduler",)},
    "depth-to-image": {
        "vae_encoder": ("vae",),
        "depth_estimator": ("depth_estimator", "feature_extractor"),
    },
}
ALL = "all"  # of the targets; of the precisions, those that each target has
_VAE_ENCODER, _VAE_DECODER = "vae_encoder", "vae_decoder"
_OF_TEXTS = ("text_encoder", "tokenizer")
# What loads a pipeline and describes it as asked, besides its family.
_DESCRIBING = ("latentc.exporter.source.resolving", "latentc.exporter.compiler.requested")
# What makes a component's build of that, besides the passes and the target.
_LOWERING = "latentc.exporter.lowering.component"
# What runs the whole pipeline for the inputs of its components.
_REFERENCE = "latentc.exporter.verification.reference"


@dataclass(frozen=True)
class ExportOptions:
    """The options say what to make.

    Height and width in pixels fix the size, None keeps it dynamic; `schedulers` None is the default
    set beside the pipeline's own; `steps` None is the usual step counts; `of_targets` holds the own
    options of each target; `fidelity_floor` is in dB; `asked` names passes for the denoiser of
    every build, `tasks` what to add components for; `watermark`: images get SDXL's invisible one.
    """

    targets: tuple[str, ...]
    precisions: tuple[str, ...]
    schedulers: tuple[str, ...] | None
    steps: tuple[int, ...] | None
    height: int | None
    width: int | None
    verify: bool
    overwrite: bool
    of_targets: Mapping[str, TargetOptions]
    calibration: Calibration
    fidelity_floor: float | None
    asked: tuple[str, ...]
    tasks: tuple[str, ...]
    watermark: bool

    def tasks_of(self, source: PipelineSource) -> tuple[str, ...]:
        """Return the tasks that the pipeline's class is for, and those that were asked for."""
        return tuple(dict.fromkeys((*record_of(source.pipeline_class).tasks, *self.tasks)))

    def left_out(self, source: PipelineSource) -> tuple[LeftOut, ...]:
        """Return what the bundle does without: what the source says, less what was asked for."""
        return tuple(
            each for each in source.left_out if not (self.watermark and each.name == WATERMARK)
        )

    @property
    def step_cache(self) -> bool:
        """Return whether the denoiser's shallow part is a component."""
        return STEP_CACHE in self.asked

    def builds(self) -> list[tuple[str, str]]:
        """(target, precision) of each asked build; a precision may name components, and names
        the passes."""
        pairs = [
            (target, with_passes(each, rewriting(self.asked), USUAL))
            for precision in self.precisions
            for target in self.targets
            for each in (TARGETS[target].precisions if precision == ALL else (precision,))
        ]
        return list(dict.fromkeys(pairs))

    def names(self) -> set[str]:
        """Return the names of the asked builds."""
        return {build_name(*pair) for pair in self.builds()}

    def of(self, target: str) -> TargetOptions:
        """A target's own options."""
        return self.of_targets.get(target) or TARGETS[target].options()

    def passes(self, target: str, precision: str) -> tuple[str, ...]:
        """The passes that make a component's program; `precision` is its own."""
        return passes(target, precision, self.of(target))


def export_options(**given: Unpack[ExportArguments]) -> ExportOptions:
    """Return what the arguments of an export ask for; those that are for files are passed over.

    Raises:
        InputError: an argument of another type or beyond its limits; prompts that cannot be read.
    """
    return options_of(whole(given), given)


def options_of(arguments: Mapping[str, Any], given: Mapping[str, Any]) -> ExportOptions:
    """Return what the arguments of an export ask for, which `whole` made of those given.

    Raises:
        InputError: an option of a target that is not asked for; prompts that cannot be read.
    """
    targets = [
        name
        for target in arguments["targets"]
        for name in (TARGETS if target == ALL else (target,))
    ]
    unique = tuple(dict.fromkeys(targets))
    prompts, samples = arguments["calibration_prompts"], arguments["calibration_samples"]
    steps = arguments["steps"]
    explicit = {name: value for name, value in given.items() if value is not None}
    read = {
        "targets": unique,
        "precisions": tuple(
            dict.fromkeys(canonical(each, USUAL) for each in arguments["precision"])
        ),
        "steps": None if steps is None else tuple(sorted(set(steps))),
        "of_targets": of_targets(explicit, own_options(), unique),
        "calibration": calibration(prompts, samples),
        "asked": arguments["passes"],
    }
    same = {each.name for each in fields(ExportOptions)} & arguments.keys() - read.keys()
    return ExportOptions(**read, **{name: arguments[name] for name in same})


def artifact_keys(
    source: PipelineSource, options: ExportOptions
) -> dict[tuple[str, str], dict[str, str]]:
    """For each (target, precision) the key of each component: all that its files depend on.

    Raises:
        InputError: a precision names a component that the pipeline does not have, or a watermark
            is asked for that its class does not have.
    """
    _check_watermark(source, options)
    components = components_of(source, options)
    for _, precision in options.builds():
        check_components(precision, components)
    return {
        (target, precision): {
            name: _artifact_key(source, options, target, precision_of(precision, name), name)
            for name in components
        }
        for target, precision in options.builds()
    }


def components_of(source: PipelineSource, options: ExportOptions) -> Mapping[str, tuple[str, ...]]:
    """Each component of the bundle, and the parts of the source that it is made of."""
    own = {
        name: parts
        for name, parts in family_of(source.pipeline_class).COMPONENTS.items()
        if not parts or any(part in source.digests for part in parts)
    }
    shallow = {SHALLOW: own[DENOISER]} if options.step_cache else {}
    made = {**own, **shallow}
    if "controlnet" in source.digests:
        made[DENOISER] = (*made[DENOISER], "controlnet")
    if "adapter" in source.digests:
        made |= {DENOISER: (*made[DENOISER], "adapter"), T2I_ADAPTER: ("adapter",)}
    made |= {name: (name,) for name in ingredients.added(source.ingredients)}
    if options.watermark:
        made[WATERMARK] = ()
    if SAFETY_CHECKER in source.digests:
        made[SAFETY_CHECKER] = (SAFETY_CHECKER, "feature_extractor")
    for task in options.tasks_of(source):
        made |= TASKS[task]
    if _VAE_ENCODER in made:  # of the part that is the decoder, whatever the pipeline calls it
        made[_VAE_ENCODER] = own.get(_VAE_DECODER, made[_VAE_ENCODER])
    return made


def _check_watermark(source: PipelineSource, options: ExportOptions) -> None:
    """Refuse a watermark for images of another class than SDXL's, or that is left out as well."""
    if not options.watermark:
        return
    if not takes_watermark(source.pipeline_class):
        raise InputError(
            f"--watermark: {source.pipeline_class} puts no watermark into images in diffusers; "
            "classes of SDXL do"
        )
    if any(each.name == WATERMARK and each.chosen for each in source.left_out):
        raise InputError("--watermark and --without watermark: give one of them")


def _artifact_key(
    source: PipelineSource, options: ExportOptions, target: str, precision: str, component: str
) -> str:
    parts = components_of(source, options)[component]
    weights = {part: source.digests.get(part) for part in parts}
    return digest(
        {
            "kind": "artifact",
            "class": source.pipeline_class,
            "component": component,
            "weights": weights,
            "configurations": _configurations(source, parts),
            "size": [options.height, options.width],
            "split": options.step_cache and component in (DENOISER, SHALLOW),
            "target": target,
            "precision": precision,
            "options": asdict(options.of(target)),
            "versions": versions((*CAPTURE, *TARGETS[target].packages)),
            "code": code(
                *describing(source, parts), *_lowering(target, options.passes(target, precision))
            ),
            **_measured(source, options, target, precision),
        }
    )


def _configurations(source: PipelineSource, parts: tuple[str, ...]) -> Mapping[str, str]:
    """A graph's sizes follow from other parts than those that it is made of: lengths from
    tokenizers, multiples of its sides from the denoiser, and from the VAE."""
    of_texts = bool(parts) and all(part.startswith(_OF_TEXTS) for part in parts)
    return {
        name: each
        for name, each in source.configurations.items()
        if name.startswith(_OF_TEXTS) or not (of_texts or name == "scheduler")
    }


def describing(source: PipelineSource, parts: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Return the modules that load a pipeline, or parts of it, and say what it consists of."""
    family = family_of(source.pipeline_class).__name__
    record = CLASSES.modules(source.pipeline_class)
    of_ingredients = ingredients.modules(source.ingredients, source.pipeline_class, parts)
    return (*_DESCRIBING, *record, family, *of_ingredients)


def _lowering(target: str, passes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the modules that make a component's build of what describes it."""
    record = TARGETS.modules(target)
    return (_LOWERING, *record, TARGETS[target].module, *map(module_of, passes))


def _measured(
    source: PipelineSource, options: ExportOptions, target: str, precision: str
) -> dict[str, Any]:
    """Return what a component's build depends on because of runs of the whole pipeline: ranges of
    activations, whether half precision would overflow, which layers a fidelity floor keeps."""
    passes = options.passes(target, precision)
    measured: dict[str, Any] = {}
    if any(map(calibrated, passes)):
        looking = code("latentc.exporter.lowering.trajectories")
        measured["calibration"] = [source.fingerprint, asdict(options.calibration), looking]
    if any(map(computes, passes)):
        measured["headroom"] = [source.fingerprint, options.verify, code(_REFERENCE)]
    if options.fidelity_floor is not None and has_integers(precision):
        engine = engines.find(verifier(target, [precision])).__module__
        looking = code("latentc.exporter.lowering.fidelity_floor", _REFERENCE, engine)
        measured["floor"] = [source.fingerprint, options.fidelity_floor, looking]
    return measured


def check(options: ExportOptions) -> None:
    """Refuse what is asked for wrongly, whatever the source is.

    Raises:
        InputError: naming it, and what there is instead.
        BackendUnavailable: the engine that would verify is not installed.
    """
    if not options.targets:
        raise InputError(f"no target given; targets: {', '.join(TARGETS)}")
    if not options.precisions:
        raise InputError("no precision given, such as fp32 or all")
    for target in options.targets:
        if target not in TARGETS:
            raise unknown_target(target)
    rewriting(options.asked)
    for task in options.tasks:
        if task not in TASKS:
            raise InputError(f"unknown task {task!r}; {suggestion(task, TASKS)}")
    for target, precision in options.builds():
        for each in _own_precisions(precision):
            for name in options.passes(target, each):
                if module_of(name) == name:  # of another package, which may be broken
                    load(name)
            _check_known(target, split_passes(each)[0])
        _check_components(precision)
    for target in options.targets:
        options.of(target).check_alone(options.height is not None)
    for scheduler in options.schedulers or ():
        _check_scheduler(scheduler)
    if options.fidelity_floor is not None and not options.verify:
        raise InputError("--fidelity-floor is measured by verification: drop --no-verify")
    if (options.height is None) != (options.width is None):
        raise InputError("give both height and width, or neither for a dynamic size")
    if options.verify:
        for name in {verifier(t, _own_precisions(p)) for t, p in options.builds()}:
            engines.get(name)


def _check_known(target: str, precision: str) -> None:
    """Refuse a precision of a target that nothing else is known of, as what it may be off by."""
    if precision not in PRECISIONS:
        raise InputError(
            f"precision {precision!r} of target {target!r}: nothing else is known of it; expected "
            f"one of {', '.join(PRECISIONS)}, or a package that brings it in its entry points "
            "latentc.precisions (docs/extending.md)"
        )


def _check_scheduler(name: str) -> None:
    """Refuse a scheduler that there is not. Only of what may be a class is diffusers asked, which
    takes seconds to load."""
    if name in SCHEDULERS:
        return
    if not name.endswith("Scheduler"):
        raise unknown_scheduler(name)
    from latentc.exporter.schedulers.tables import resolve

    resolve(name)


def _check_components(precision: str) -> None:
    """Refuse a component that no pipeline has."""
    if "=" not in precision:
        return
    named: list[str] = []
    for each in CLASSES:
        with suppress(InputError):  # of another package, which is broken
            named += family_of(each).COMPONENTS
    of_tasks = [name for each in TASKS.values() for name in each]
    adapters = re.findall(rf"\b{T2I_ADAPTER}_[0-9]+", precision)  # those after the first
    others = (SHALLOW, IP_IMAGE_ENCODER, T2I_ADAPTER, *adapters)
    check_components(precision, dict.fromkeys([*named, *of_tasks, *others]))


def _own_precisions(precision: str) -> list[str]:
    """Return the precisions that components have under `precision`, whichever there are."""
    named = [part.partition("=")[0] for part in precision.split(",") if "=" in part]
    return [precision_of(precision, name) for name in ("denoiser", "", *named)]


def up_to_date(
    manifest: Manifest,
    source: PipelineSource,
    bundle: Path,
    keys: Mapping[tuple[str, str], Mapping[str, str]],
    options: ExportOptions,
) -> bool:
    from latentc.exporter.schedulers.names import DEFAULT_SCHEDULERS, flow_matching

    if (manifest.source.id, manifest.source.fingerprint) != (source.id, source.fingerprint):
        return False
    if manifest.left_out != options.left_out(source):
        return False
    if options.verify and not manifest.programs_checked:
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
    own = manifest.source.scheduler_class, manifest.source.scheduler_config
    default = () if flow_matching(*own) else DEFAULT_SCHEDULERS
    if options.schedulers is None and default and not set(default) & have.keys():
        return False
    if not all(set(options.steps or ()) <= steps for steps in have.values()):
        return False
    same_versions = manifest.created_by.libraries == libraries()
    return same_versions and is_intact(bundle, manifest.files())
