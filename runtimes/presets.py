"""Presets: how much fidelity may be given for speed, and what that means on this machine.

`latentc tune` (`runtimes.tune`) measures a bundle's builds and settings and keeps the winner of
each preset in a record outside of the bundle, in latentc's cache folder. The file is named after
the bundle's content; the record says which machine it is for. One that does not fit any more, or
cannot be read, is not used, and the user is told why.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from runtimes import backend as engines
from runtimes.backend import Backend
from runtimes.errors import BackendError, InputError
from runtimes.folders import cache_folder
from runtimes.precision import DENOISER, canonical, of_component, split_passes

if TYPE_CHECKING:
    from runtimes.bundle import Bundle
    from runtimes.manifest import Build, Manifest
    from runtimes.tuning_records import Choice


@dataclass(frozen=True)
class Limits:
    """What a preset may cost: a picture of at least `image_psnr` dB against fp32 (same seed, every
    prompt), and at most `points` of 100 of the judge's score of the original pipeline."""

    image_psnr: float
    points: float

    def allow(self, image_psnr: float, points: float | None) -> bool:
        """Whether it is within; `points` is None where there is no judge."""
        return image_psnr >= self.image_psnr and (points is None or points <= self.points)


# At 30 dB nobody tells two pictures apart side by side. At 20 dB details have moved, at 12 dB
# parts of the picture: it then takes a judge to say whether it still shows what was asked for.
LIMITS: Mapping[str, Limits] = {
    "faithful": Limits(30.0, 0.0),
    "balanced": Limits(20.0, 2.0),
    "fast": Limits(12.0, 4.0),
}
AUTO = "auto"  # `faithful` where the bundle has been tuned here, else as without a preset

# What is expected to be fast where nothing was measured, fastest first: engines and precisions
# of the denoiser. Passes that leave out work (``w8a8+downsampled-attention``) come before the
# precision alone. Anything else comes last.
EXPECTED: tuple[tuple[str, str], ...] = (
    *(("tensorrt", precision) for precision in ("w8a8", "fp16", "bf16", "int8", "fp32")),
    *(("coreml", precision) for precision in ("fp16", "palette8", "palette6", "int8", "palette4")),
    *(("openvino", precision) for precision in ("w8a8", "bf16")),
    ("torch", "bf16"),
    *(("openvino", precision) for precision in ("fp32", "int8", "fp16", "int4")),
    *(("onnxruntime", precision) for precision in ("fp32", "int8", "int4", "w8a8", "fp16")),
    *(("torch", precision) for precision in ("fp32", "fp16")),
    ("coreml", "fp32"),
)

Arguments: TypeAlias = dict[str, int | float]
_WINDOW = ("guidance_start", "guidance_stop")  # one setting: whoever gives one of them gives both


@dataclass(frozen=True)
class Preset:
    """What a loaded pipeline knows of its preset.

    `arguments` are defaults of its calls. Calls of fewer steps than `steps` do without them: the
    fewer there are, the more each counts. `loaded` says how the build was loaded.
    """

    name: str
    arguments: Mapping[str, int | float]
    steps: int
    loaded: Mapping[str, Any]

    def complete(self, given: Mapping[str, Any], usual_steps: int) -> dict[str, Any]:
        """The arguments of a call (None: not given) with those of the preset added."""
        asked = {name: value for name, value in given.items() if value is not None}
        steps = asked.get("num_inference_steps", usual_steps)
        if hasattr(steps, "__index__") and steps < self.steps:
            return asked
        window = any(name in asked for name in _WINDOW)
        own = {n: v for n, v in self.arguments.items() if not (window and n in _WINDOW)}
        return own | asked

    def settings(self, static: bool) -> dict[str, Any]:
        """What of it made a picture, as JSON-compatible values; `static`: by graphs for one
        size."""
        return {"preset": self.name, **self.loaded, "static": static}


@dataclass(frozen=True)
class Asked:
    """How a caller wants a bundle loaded, as in `runtimes.pipeline.load`. `sizes` is what `static`
    may hold: those of the calls to come, where it is the preset that wants one size."""

    backend: str | Backend | None = None
    device: str | None = None
    build: str | None = None
    precision: str | None = None
    threads: int = 0
    compute: str | None = None
    compile: bool = False
    static: Mapping[str, float] | None = None
    options: Mapping[str, str] | None = None
    sizes: Mapping[str, float] | None = None

    @property
    def engine(self) -> str | None:
        """The backend's name."""
        return self.backend.name if isinstance(self.backend, Backend) else self.backend

    def instance(self, name: str) -> Backend:
        """The backend of that name: the caller's own if it is one."""
        own = self.backend
        return own if isinstance(own, Backend) and own.name == name else engines.get(name)

    def anything(self) -> bool:
        """Whether anything was asked for: an empty `static` is."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        del values["sizes"]
        return values.pop("static") is not None or any(values.values())


def prepare(bundle: Bundle, name: str, asked: Asked) -> tuple[Asked, Preset | None]:
    """Fill in what a preset says.

    Where `latentc tune` has a record of this bundle and machine, that is what it found. Else the
    builds' own figures in the manifest decide, in the order of `EXPECTED`, and a warning says so.

    Raises:
        InputError: no such preset, or what was asked for contradicts it.
    """
    if name != AUTO and name not in LIMITS:
        raise InputError(f"no preset {name!r}; there are: {', '.join(LIMITS)}, or {AUTO}")
    if name == AUTO and asked.anything():
        return asked, None
    wanted = next(iter(LIMITS)) if name == AUTO else name
    if name == AUTO and not os.path.exists(record_path(content(bundle.manifest))):
        return asked, None  # as most often: at the cost of looking for one file
    from runtimes import tuning_records as records

    try:
        choice, steps = records.find(bundle, wanted, asked)
    except records.UnusableRecord as why:
        if name == AUTO:
            _warn(f"{why}; latentc tune {bundle.root} measures again")
            return asked, None
        return _untuned(bundle, wanted, asked, str(why) or records.why_none(bundle))
    return _apply(bundle.manifest, wanted, choice, steps, asked)


def content(manifest: Manifest) -> str:
    """SHA-256 over what a bundle's speed and pictures depend on: its builds and defaults."""
    whole = [
        msgspec.to_builtins(manifest.defaults),
        msgspec.to_builtins(manifest.latents),
        [
            [build.name, name, artifact.key, artifact.compute, *(f.sha256 for f in artifact.files)]
            for build in manifest.builds
            for name, artifact in sorted(build.artifacts.items())
        ],
    ]
    return hashlib.sha256(msgspec.json.encode(whole)).hexdigest()


def points_lost(manifest: Manifest, right: int | None) -> float | None:
    """Points of 100 by which `right` pictures are fewer than PyTorch's; None without a judge."""
    probe = manifest.probes.judged if manifest.probes else None
    if probe is None or right is None:
        return None
    return 100 * (probe.right - right) / len(probe.prompts)


def expected_rank(backend: str, precision: str) -> tuple[int, int]:
    """Sorts what is expected to be faster first: see `EXPECTED`."""
    base, passes = split_passes(of_component(precision, DENOISER))
    pair = (backend, base)
    rank = EXPECTED.index(pair) if pair in EXPECTED else len(EXPECTED)
    return rank, -len(passes)


def records_folder() -> Path:
    """Where the records are."""
    return cache_folder() / "tuned"


def record_path(digest: str, backend: str | None = None, device: str | None = None) -> Path:
    """Where the record of a bundle's `content` is, for a search that was limited to these."""
    scope = [each.lower() for each in (backend or "", device or "")]
    key = hashlib.sha256("\n".join([digest, *scope]).encode()).hexdigest()
    return records_folder() / f"{key[:24]}.json"


def _apply(
    manifest: Manifest, name: str, choice: Choice, steps: int, asked: Asked
) -> tuple[Asked, Preset]:
    wrong = contradictions(choice, asked)
    precision = next(each.precision for each in manifest.builds if each.name == choice.build)
    if asked.precision and canonical(asked.precision) != precision:
        wrong["precision"] = precision
    if wrong:
        found = ", ".join(f"{each} {value!r}" for each, value in wrong.items())
        raise InputError(
            f"preset {name!r} is build {choice.build!r} on {choice.backend} here, with {found}: "
            f"leave the preset out, or {', '.join(wrong)}"
        )
    sizes = (asked.static or asked.sizes or {}) if choice.static else None
    filled = replace(
        asked,
        backend=asked.instance(choice.backend),
        device=choice.device,
        build=choice.build,
        threads=choice.threads,
        compute=choice.compute,
        static=sizes,
    )
    return filled, Preset(name, choice.arguments, steps, _loaded(choice.compute, choice.threads))


def _loaded(compute: str | None, threads: int) -> dict[str, Any]:
    """Of how a build was loaded, what is not the usual."""
    return {name: v for name, v in (("compute", compute), ("threads", threads)) if v}


def contradictions(choice: Choice, asked: Asked) -> dict[str, Any]:
    """What was asked for and is otherwise in the choice: name → what the choice has."""
    pairs: dict[str, tuple[Any, Any]] = {
        "backend": (asked.engine, choice.backend),
        "device": (asked.device and asked.device.lower(), choice.device.lower()),
        "build": (asked.build, choice.build),
        "threads": (asked.threads or None, choice.threads),
        "compute": (asked.compute, choice.compute),
        "compile": (asked.compile or None, False),
        "static": (None if asked.static is None else True, choice.static),
    }
    return {name: own for name, (given, own) in pairs.items() if given not in (None, own)}


def _untuned(bundle: Bundle, name: str, asked: Asked, reason: str) -> tuple[Asked, Preset]:
    """By the figures of the builds' verification, where nothing was measured here."""
    chosen = _expected_fastest(bundle.manifest, LIMITS[name], asked)
    told = reason or f"{bundle.root} has not been tuned on this machine"
    what = f"build {chosen[0].name!r} on {chosen[1]}" if chosen else "the build nearest to fp32"
    _warn(
        f"{told}; preset {name!r} takes {what}, by the figures in the bundle; latentc tune "
        f"{bundle.root} would measure"
    )
    preset = Preset(name, {}, 1, _loaded(asked.compute, asked.threads))
    if chosen is None:
        return asked, preset
    build, engine = chosen
    return replace(asked, build=build.name, backend=asked.instance(engine)), preset


def _expected_fastest(manifest: Manifest, limits: Limits, asked: Asked) -> tuple[Build, str] | None:
    """Of the builds that the manifest says are good enough, and what loads them here."""
    precision = canonical(asked.precision) if asked.precision else None
    fitting = [
        (build, kind)
        for build in manifest.builds
        if asked.build in (None, build.name)
        and precision in (None, build.precision)
        and _good_enough(manifest, build, limits)
        for kind in _kinds(asked)
        if kind.loads(build)
    ]
    # Of two targets of the same precision that an engine loads, the one that it likes best.
    fitting.sort(
        key=lambda pair: (
            expected_rank(pair[1].name, pair[0].precision),
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
    if isinstance(asked.backend, Backend):
        yield type(asked.backend)
        return
    for name in (asked.backend,) if asked.backend else engines.names():
        try:
            kind = engines.find(name)
        except BackendError:  # somebody else's, broken
            continue
        if asked.backend or not kind.slow:
            yield kind


def _starts(kind: type[Backend], asked: Asked) -> bool:
    try:
        asked.instance(kind.name).device(asked.device)
    except BackendError:
        return False
    return True


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)
