"""The choice of what is loaded where a caller names a preset: what `latentc tune` found on this
machine, or where it has not been run, what the figures in the bundle let expect."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from latentc.runtimes.backends import backend as engines
from latentc.runtimes.backends.backend import Backend
from latentc.runtimes.bundle.precision import canonical, usual_precisions
from latentc.runtimes.errors import BackendError, InputError
from latentc.runtimes.presets.load_arguments import AUTO
from latentc.runtimes.presets.preset import (
    LIMITS,
    Asked,
    Limits,
    Preset,
    content,
    expected_rank,
    points_lost,
    record_path,
)
from latentc.runtimes.unknown_names import suggestion

if TYPE_CHECKING:
    from latentc.runtimes.bundle.files import Bundle
    from latentc.runtimes.bundle.manifest import Manifest
    from latentc.runtimes.bundle.structures import Build
    from latentc.runtimes.presets.records import Choice


def prepare(bundle: Bundle, asked: Asked) -> tuple[Asked, Preset | None]:
    """Fill in what the preset says that was asked for, if one was.

    Where `latentc tune` has a record of this bundle and machine, that is what it found. Else the
    builds' own figures in the manifest decide, in the order of `Backend.places`, and a warning says
    so.

    Raises:
        InputError: no such preset, or what was asked for contradicts it.
    """
    name = asked.how["preset"]
    if name is None:
        return asked, None
    if name != AUTO and name not in LIMITS:
        raise InputError(f"no preset {name!r}; {suggestion(name, (*LIMITS, AUTO))}")
    if name == AUTO and asked.anything():
        return asked, None
    wanted = next(iter(LIMITS)) if name == AUTO else name
    if name == AUTO and not os.path.exists(record_path(content(bundle.manifest))):
        return asked, None  # as most often: at the cost of looking for one file
    from latentc.runtimes.presets import records

    try:
        choice, steps = records.find(bundle, wanted, asked)
    except records.UnusableRecord as why:
        if name == AUTO:
            _warn(f"{why}; latentc tune {bundle.root} measures again")
            return asked, None
        return _untuned(bundle, wanted, asked, str(why) or records.why_none(bundle))
    return _apply(bundle.manifest, wanted, choice, steps, asked)


def _apply(
    manifest: Manifest, name: str, choice: Choice, steps: int, asked: Asked
) -> tuple[Asked, Preset]:
    from latentc.runtimes.presets.records import contradictions

    wrong = contradictions(choice, asked)
    precision = next(each.precision for each in manifest.builds if each.name == choice.build)
    known = usual_precisions(manifest.components)
    own = asked.how["precision"]
    if own and canonical(own, known) != precision:
        wrong["precision"] = precision
    if wrong:
        found = ", ".join(f"{each} {value!r}" for each, value in wrong.items())
        raise InputError(
            f"preset {name!r} is build {choice.build!r} on {choice.backend} here, with {found}: "
            f"leave the preset out, or {', '.join(wrong)}"
        )
    sizes = (asked.static or asked.sizes or {}) if choice.static else None
    filled = asked.changed(
        {
            "backend": asked.instance(choice.backend),
            "device": choice.device,
            "build": choice.build,
            "threads": choice.threads,
            "compute": choice.compute,
            "static": sizes,
        }
    )
    return filled, Preset(name, choice.arguments, steps, _loaded(choice.compute, choice.threads))


def _loaded(compute: str | None, threads: int) -> dict[str, Any]:
    """Return what is not the usual of how a build was loaded."""
    return {name: v for name, v in (("compute", compute), ("threads", threads)) if v}


def _untuned(bundle: Bundle, name: str, asked: Asked, reason: str) -> tuple[Asked, Preset]:
    """By the figures of the builds' verification, where nothing was measured here."""
    chosen = _expected_fastest(bundle.manifest, LIMITS[name], asked)
    told = reason or f"{bundle.root} has not been tuned on this machine"
    what = f"build {chosen[0].name!r} on {chosen[1]}" if chosen else "the build nearest to fp32"
    _warn(
        f"{told}; preset {name!r} takes {what}, by the figures in the bundle; latentc tune "
        f"{bundle.root} would measure"
    )
    preset = Preset(name, {}, 1, _loaded(asked.how["compute"], asked.how["threads"]))
    if chosen is None:
        return asked, preset
    build, engine = chosen
    return asked.changed({"build": build.name, "backend": asked.instance(engine)}), preset


def _expected_fastest(manifest: Manifest, limits: Limits, asked: Asked) -> tuple[Build, str] | None:
    """Return the expected fastest build that the manifest says is good enough, and what loads it
    here.
    """
    known = usual_precisions(manifest.components)
    own = asked.how["precision"]
    precision = canonical(own, known) if own else None
    fitting = [
        (build, kind)
        for build in manifest.builds
        if asked.how["build"] in (None, build.name)
        and precision in (None, build.precision)
        and _good_enough(manifest, build, limits)
        for kind in _kinds(asked)
        if kind.loads(build)
    ]
    # Of two targets of the same precision that an engine loads, the one that it likes best.
    fitting.sort(
        key=lambda pair: (
            expected_rank(pair[1], pair[0].precision),
            pair[1].targets.index(pair[0].target),
        )
    )
    return next(((b, kind.name) for b, kind in fitting if _starts(kind, asked)), None)


def _good_enough(manifest: Manifest, build: Build, limits: Limits) -> bool:
    found = build.verification
    if found is None or found.loop is None:
        return False
    lost = points_lost(manifest, found.score.right) if found.score else None
    return limits.allow(found.loop.image_psnr, lost)


def _kinds(asked: Asked) -> Iterator[type[Backend]]:
    if isinstance(asked.how["backend"], Backend):
        yield type(asked.how["backend"])
        return
    for name in (asked.how["backend"],) if asked.how["backend"] else engines.names():
        try:
            kind = engines.find(name)
        except BackendError:  # somebody else's, broken
            continue
        if asked.how["backend"] or not kind.slow:
            yield kind


def _starts(kind: type[Backend], asked: Asked) -> bool:
    try:
        asked.instance(kind.name).device(asked.how["device"])
    except BackendError:
        return False
    return True


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)
