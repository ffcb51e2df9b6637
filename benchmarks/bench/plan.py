"""From what was asked to what will be run: everything that can be refused is refused here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from latentc.benchmarks.bench import latentc_case
from latentc.benchmarks.bench.cases import Case, Group, with_baselines
from latentc.benchmarks.bench.model import Settings
from latentc.benchmarks.bench.peers import python_of, script_of
from latentc.runtimes.backends import backend as engines
from latentc.runtimes.backends.backend import SessionOptions
from latentc.runtimes.backends.choosing import choose_build
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.sizes import side
from latentc.runtimes.bundle.structures import Build
from latentc.runtimes.errors import InputError, SourceError
from latentc.runtimes.terminal import tell
from latentc.runtimes.unknown_names import suggestion

DEFAULT_STEPS = 10


@dataclass(frozen=True)
class Plan:
    """A plan says what a run does.

    `baseline_of` maps a case's id to that of its baseline; `source` is the diffusers folder of the
    baselines; `score` is how many images the judge gets.
    """

    bundle: Path
    manifest: Manifest
    source: Path | None
    builtin: bool
    cases: tuple[Case, ...]
    baseline_of: Mapping[str, str]
    settings: Settings
    score: int
    notes: tuple[str, ...]


def make(
    bundle: Path,
    groups: Sequence[Group],
    baselines: Sequence[str],
    settings: Settings,
    source: Path | None = None,
    score: int = 0,
) -> Plan:
    """Resolve everything against the bundle and this machine.

    Raises:
        InputError: no such build, step count, size or scenario; nothing to run.
        SourceError: the baseline's source is missing, or is not what the bundle was made from.
        BackendError: an engine, device or peer that was asked for by name is not here.
    """
    manifest = Manifest.load(bundle)
    notes: list[str] = []
    found: list[Case] = []
    for group in groups or [Group()]:
        if group.builds or group.torches or group.peers:
            found += [_with_backend(case, manifest) for case in group.cases()]
        else:  # of axes only: every build at them; what is named must be there, these need not
            found += _possible(group, manifest, notes)
    if not found:
        raise InputError(f"nothing to measure: {'; '.join(notes) or 'no case was given'}")
    chosen = [_complete(case, manifest) for case in found]
    for case in chosen:
        _check(case, bundle, settings)
    folder, builtin = _source(manifest, source, needed=_needs_source(chosen, baselines))
    baseline_of: dict[str, str] = {}
    if baselines and folder is not None:
        chosen, baseline_of = with_baselines(chosen, baselines)
    unique = list({case.id: case for case in chosen}.values())
    return Plan(
        bundle=bundle,
        manifest=manifest,
        source=folder,
        builtin=builtin,
        cases=tuple(unique),
        baseline_of=baseline_of,
        settings=settings,
        score=score if builtin else 0,
        notes=tuple(notes),
    )


def _possible(group: Group, manifest: Manifest, notes: list[str]) -> list[Case]:
    """Return the cases of all builds, without those that nothing here loads, or only slowly."""
    cases, left_out = [], set()
    every = replace(group, builds=tuple(build.name for build in manifest.builds))
    for case in every.cases():
        try:
            cases.append(_with_backend(case, manifest))
        except InputError as error:
            left_out.add(str(error))
    if not cases and any((*group.backends, *group.devices)):
        raise InputError("; ".join(sorted(left_out)))
    notes += sorted(left_out)
    return cases


def _with_backend(case: Case, manifest: Manifest) -> Case:
    """Return the case with its backend and the device's own name.

    Peers and PyTorch pass unchanged.
    """
    if case.engine == "peer":
        python_of(case.variant)
        script_of(case.variant)
        return case
    if case.engine == "torch":
        return case
    build = _build(manifest, case.variant)
    if case.backend:
        choose_build(manifest, case.backend, case.variant)
        backend = case.backend
    else:
        able = engines.for_build(build)
        fast = [name for name in able if not engines.find(name).slow]
        if not fast:
            why = (
                f"only {able[0]} loads it here, which is slow"
                if able
                else "no engine loads it here"
            )
            hint = f" (--backend {able[0]} measures it all the same)" if able else ""
            raise InputError(f"{build.name} is left out: {why}{hint}")
        backend = fast[0]
    engine = engines.get(backend)
    device = engine.device(case.device or None)
    options = SessionOptions(compute=case.compute, compile=case.compile, extra=case.options)
    engine.check(options, device)
    return replace(case, backend=backend, device="" if device.lower() == "cpu" else device)


def _build(manifest: Manifest, name: str) -> Build:
    for build in manifest.builds:
        if build.name == name:
            return build
    hint = suggestion(name, (build.name for build in manifest.builds), "it has")
    raise InputError(f"the bundle has no build {name!r}; {hint}")


def _complete(case: Case, manifest: Manifest) -> Case:
    """Fill in what the case leaves to the bundle, and refuse what the bundle cannot do."""
    latents = manifest.latents
    height, width = case.height or latents.default_height, case.width or latents.default_width
    if latents.bins is None:
        side(latents, "height", height)
        side(latents, "width", width)
    plans = next(s for s in manifest.schedules if s.name == manifest.defaults.scheduler)
    steps = case.steps or min(plans.steps, key=lambda count: abs(count - DEFAULT_STEPS))
    return replace(case, height=height, width=width, steps=steps)


def _check(case: Case, bundle: Path, settings: Settings) -> None:
    """Refuse what the worker of a case could not load or call; trace the sampling plans that are
    missing.

    Raises:
        PlanNotFound: there are none for so many steps.
        InputError: an option of the engine, a size or an argument that cannot be used.
    """
    if case.engine != "latentc":
        return
    request = {
        "case": asdict(case),
        "negative_prompt": settings.negative_prompt,
        "guidance_scale": settings.guidance_scale,
    }
    loading = latentc_case.loading(str(bundle), request)
    known, guidance = loading.signature, settings.guidance_scale
    arguments = latentc_case.arguments(
        request, known, settings.prompt, case.steps, settings.seed, guidance
    )
    loading.request(arguments, tell=tell)


def _needs_source(cases: Iterable[Case], baselines: Sequence[str]) -> bool:
    return bool(baselines) or any(case.engine != "latentc" for case in cases)


def _source(manifest: Manifest, given: Path | None, needed: bool) -> tuple[Path | None, bool]:
    """Return the diffusers folder that the bundle was made from, and whether it is the built-in
    model.
    """
    from latentc.exporter.cli import builtin_folder
    from latentc.exporter.source.resolving import resolve

    if needed and manifest.source.ingredients:
        names = ", ".join(ingredient.id for ingredient in manifest.source.ingredients)
        raise SourceError(
            f"{names} went into the bundle beside {manifest.source.id}, which no folder alone is: "
            "leave PyTorch and peers out with --baseline none"
        )
    recorded = manifest.source.fingerprint
    builtin = resolve(builtin_folder()).fingerprint == recorded
    if given is None and builtin:
        return builtin_folder(), True
    if given is None:
        if not needed:
            return None, False
        raise SourceError(
            f"PyTorch and peers need the pipeline that the bundle was made from "
            f"({manifest.source.id}): give its folder with --source, or leave them out with "
            "--baseline none"
        )
    if resolve(given).fingerprint != recorded:
        raise SourceError(
            f"baseline source moved: {given} is not what the bundle was made from "
            f"({manifest.source.id}, fingerprint {recorded[:12]}); a comparison would say nothing"
        )
    return given, builtin
