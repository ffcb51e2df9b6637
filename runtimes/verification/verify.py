"""Does a build still compute what PyTorch computed? The probes in a bundle tell, torch-free.

A probe is a component's input together with what PyTorch made of it; the loop probe is a
whole image with its settings. `latentc export` checks a build against them before it is
done, `latentc verify` does the same again on another machine, engine or device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends import backend as engines
from latentc.runtimes.backends.backend import Backend, SessionOptions
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.precision import split_passes
from latentc.runtimes.bundle.precisions import PASSES, PRECISIONS, Tolerance
from latentc.runtimes.bundle.structures import (
    Build,
    Check,
    Component,
    File,
    JudgeProbe,
    Loop,
    LoopProbe,
    Score,
    Verification,
)
from latentc.runtimes.bundle.trust import Hashing
from latentc.runtimes.errors import BundleError, NumericalError, VerificationError
from latentc.runtimes.pipeline.loading import Loading
from latentc.runtimes.pipeline.pipeline import Pipeline, open_pipeline
from latentc.runtimes.pipeline.run import Result
from latentc.runtimes.storage.npz import read_arrays
from latentc.runtimes.verification import judges
from latentc.runtimes.verification.verify_arguments import Report

if TYPE_CHECKING:
    from PIL import Image

LOOP = "loop"  # the name of the loop's probe file among those of the components
# JSON has neither infinity nor NaN: what is not finite or has another shape gets this error.
NOT_COMPARABLE = 1e99
MAX_PSNR = 99.0  # dB, given to equal images
_MAX_PROBES = 1 << 30  # bytes unpacked: a dozen images of 4096 by 4096


def check_build(
    path: Path,
    manifest: Manifest,
    build: Build,
    backend: Backend | str,
    device: str | None = None,
    *,
    options: SessionOptions | None = None,
    hashing: Hashing = "never",
    report: Report | None = None,
    low_memory: bool = False,
) -> Verification:
    """Run every probe against one build.

    Args:
        path: the bundle's folder; its manifest.json is not read, so it need not be there yet.
        hashing: whether the files are hashed again, besides their sizes.
        report: told what is being checked, one short text at a time.
        low_memory: hold one component at a time in memory.

    Returns:
        What was measured; `passed` says whether all of it was within the tolerances.

    Raises:
        VerificationError: the bundle holds no probes, none of a shape that the build takes, or
            nothing is known about its precision.
        BundleError: a probe file is damaged.
        BackendError: the engine failed.
    """
    if manifest.probes is None:
        raise VerificationError("the bundle holds no probes to verify against; export it again")
    tolerances = _tolerances(build)
    allowed = _allowed(manifest, tolerances.values())
    bundle = Bundle(path.resolve(), manifest, hashing)
    backend = engines.get(backend) if isinstance(backend, str) else backend
    where = backend.device(device)
    checks: list[Check] = []
    loop = None
    loading = Loading.of(bundle, build, backend, where, options, low_memory=low_memory)
    with open_pipeline(loading) as pipe:
        for component in manifest.components:
            file = manifest.probes.files.get(component.name)
            if file is None:
                continue
            if report:
                report(component.name)
            tolerance = tolerances[component.name].component
            with pipe.sessions.using(component.name) as session:
                for name, inputs, outputs in read_probes(bundle, file, component):
                    if session.accepts(inputs):
                        found = session.run(inputs)
                        checks.append(_check(component.name, name, found, outputs, tolerance))
            if not any(check.subject == component.name for check in checks):
                raise VerificationError(
                    f"build {build.name!r}, {component.name}: it takes no shape that there is a "
                    "probe of; export it again"
                )
        if manifest.probes.loop is not None:
            if report:
                report("whole loop")
            loop = _check_loop(bundle, pipe, manifest.probes.loop, allowed)
        score = _judged(pipe, manifest.probes.judged, allowed, report)
    return Verification(backend.name, backend.version(), where, tuple(checks), loop, score)


def check_loop(path: Path, manifest: Manifest, build: Build, backend: Backend) -> Loop:
    """Run the whole loop of one build, whose files need not be listed in the manifest, and
    compare it with PyTorch's.

    Raises:
        VerificationError: the bundle holds no image to compare with.
    """
    if manifest.probes is None or manifest.probes.loop is None:
        raise VerificationError("the bundle holds no image to verify against; export it again")
    bundle = Bundle(path.resolve(), manifest, "never")
    with open_pipeline(Loading.of(bundle, build, backend)) as pipe:
        return _check_loop(
            bundle, pipe, manifest.probes.loop, _allowed(manifest, _tolerances(build).values())
        )


def read_probes(
    bundle: Bundle, file: File, component: Component
) -> Iterator[tuple[str, dict[str, Array], dict[str, Array]]]:
    """The probes of a component: name, inputs, PyTorch's outputs.

    The arrays of the .npz are named ``<probe>/in/<tensor>`` and ``<probe>/out/<tensor>``.
    """
    probes: dict[str, dict[str, dict[str, Array]]] = {}
    for key, array in read_arrays(bundle.path(file), max_bytes=_MAX_PROBES).items():
        name, _, rest = key.partition("/")
        side, _, tensor = rest.partition("/")
        if side not in ("in", "out") or not tensor:
            raise BundleError(f"{file.path}: unexpected array {key!r}")
        probes.setdefault(name, {"in": {}, "out": {}})[side][tensor] = array
    for name, probe in probes.items():
        if set(probe["in"]) != set(component.inputs) or set(probe["out"]) != set(component.outputs):
            raise BundleError(f"{file.path}: probe {name!r} does not fit {component.name!r}")
        yield name, probe["in"], probe["out"]


def relative_l2(found: Array, expected: Array) -> float:
    """``|found - expected| / |expected|`` in float64; 0 for two zeros."""
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    if a.shape != b.shape or not np.isfinite(a).all():
        return NOT_COMPARABLE
    difference, norm = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
    if norm == 0:
        return 0.0 if difference == 0 else NOT_COMPARABLE
    return difference / norm


def psnr(found: Array, expected: Array) -> float:
    """Peak signal-to-noise ratio of two images of 0 … 255, in dB, at most `MAX_PSNR`."""
    error = float(np.mean((found.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return MAX_PSNR if error == 0 else min(MAX_PSNR, 20 * math.log10(255) - 10 * math.log10(error))


def _tolerances(build: Build) -> dict[str, Tolerance]:
    """By component, each by the precision and the passes that it has."""
    made = {}
    for name, artifact in build.artifacts.items():
        precision, passes = split_passes(artifact.precision)
        parts = (precision, *(f"+{each}" for each in passes))
        where = f"build {build.name!r}, {name}"
        made[name] = _loosest(_tolerance(where, each) for each in parts)
    return made


def _tolerance(where: str, named: str) -> Tolerance:
    """Return that of a precision, or of a pass, which a plus stands before."""
    kind, name = (PASSES, named[1:]) if named.startswith("+") else (PRECISIONS, named)
    if name not in kind:
        known = [*PRECISIONS, *(f"+{each}" for each in PASSES if PASSES[each].tolerance)]
        raise VerificationError(
            f"{where}: no tolerance is known for precision {named!r}, only for {', '.join(known)}"
        )
    tolerance = kind[name].tolerance
    if tolerance is None:
        raise VerificationError(f"{where}: the pass {name!r} has no tolerance")
    return tolerance


def _allowed(manifest: Manifest, tolerances: Iterable[Tolerance]) -> Tolerance:
    """Return what the whole loop may be off by, of components with these tolerances."""
    loosest = _loosest(tolerances)
    jumps = any(component.jumps for component in manifest.components)
    return replace(loosest, image_difference=255) if jumps else loosest


def _loosest(tolerances: Iterable[Tolerance]) -> Tolerance:
    """Return what the whole loop may be off by: what its coarsest component may make of it."""
    every = list(tolerances)
    return Tolerance(
        component=max(each.component for each in every),
        latents=max(each.latents for each in every),
        image_difference=max(each.image_difference for each in every),
        image_psnr=min(each.image_psnr for each in every),
        judged=max(each.judged for each in every),
    )


def _check(
    subject: str,
    probe: str,
    found: Mapping[str, Array],
    expected: Mapping[str, Array],
    tolerance: float,
) -> Check:
    pairs = [(found[name], expected[name]) for name in expected]
    error = max(relative_l2(a, b) for a, b in pairs)
    return Check(
        subject=subject,
        probe=probe,
        relative_l2=error,
        max_abs=max(_max_abs(a, b) for a, b in pairs),
        tolerance=tolerance,
        passed=error <= tolerance,
    )


def _max_abs(found: Array, expected: Array) -> float:
    if found.shape != expected.shape or not np.isfinite(found).all():
        return NOT_COMPARABLE
    return float(np.max(np.abs(found.astype(np.float64) - expected), initial=0.0))


def measure_loop(bundle: Bundle, pipe: Pipeline, **given: Any) -> tuple[float, int, float]:
    """Run the loop probe on a loaded build and compare it with what PyTorch made of it.

    Args:
        given: arguments of the call that replace the probe's, or come on top.

    Returns:
        The latents' relative L2 error, the image's largest difference of 255, its PSNR in dB.

    Raises:
        BundleError: the probe's file is damaged or not named.
    """
    probes = bundle.manifest.probes
    assert probes is not None
    assert probes.loop is not None
    if LOOP not in probes.files:
        raise BundleError("the manifest describes a loop probe but names no file for it")
    expected = read_arrays(bundle.path(probes.files[LOOP]), max_bytes=_MAX_PROBES)
    fed = {key[3:]: expected.pop(key) for key in list(expected) if key.startswith("in/")}
    if set(expected) != {"latents", "image"}:
        raise BundleError(f"{probes.files[LOOP].path}: expected the arrays latents and image")
    with suppress(NumericalError):  # NaN is a failed check, not a failure to check
        result = repeat(pipe, probes.loop, output_type="np", **fed, **given)
        difference, ratio = compare_images(to_bytes(result.images), expected["image"])
        return relative_l2(result.latents, expected["latents"]), difference, ratio
    return NOT_COMPARABLE, 255, 0.0


def _check_loop(bundle: Bundle, pipe: Pipeline, probe: LoopProbe, tolerance: Tolerance) -> Loop:
    error, difference, ratio = measure_loop(bundle, pipe)
    return Loop(
        scheduler=probe.scheduler,
        num_inference_steps=probe.num_inference_steps,
        latents_relative_l2=error,
        image_max_difference=difference,
        image_psnr=ratio,
        tolerance=tolerance.latents,
        passed=error <= tolerance.latents
        and difference <= tolerance.image_difference
        and ratio >= tolerance.image_psnr,
    )


def _judged(
    pipe: Pipeline, probe: JudgeProbe | None, tolerance: Tolerance, report: Report | None
) -> Score | None:
    """Return what the bundle's judge says; None where none is installed here, or the backend is
    slow.
    """
    if probe is None or not can_judge(pipe.backend, probe):
        return None
    if report:
        report("judge")
    right, images = count_right(pipe, probe), len(probe.prompts)
    least = math.ceil(probe.right - tolerance.judged * images)
    return Score(probe.judge, right, images, least, right >= least)


def can_judge(backend: Backend, probe: JudgeProbe) -> bool:
    """Return whether the judge is installed here and the backend is quick enough to draw for it."""
    return not backend.slow and probe.judge in judges.names()


def count_right(pipe: Pipeline, probe: JudgeProbe, **given: Any) -> int:
    """Return how many images the bundle's judge finds right; `given` as in `measure_loop`."""

    def draw(prompts: list[str], seeds: list[int]) -> Sequence[Image.Image]:
        drawn = repeat(pipe, probe, **{"prompt": prompts, "seed": seeds, **given})
        images: Sequence[Image.Image] = drawn.images
        return images

    with suppress(NumericalError):  # NaN is no image
        return judges.count_right(judges.get(probe.judge), probe.prompts, probe.seed, draw)
    return 0


def repeat(pipe: Pipeline, probe: LoopProbe, **given: Any) -> Result:
    """Return the result of a run with the settings of a probe; `given` replaces or adds some.

    Raises:
        BundleError: the probe has an argument that calls of the bundle do not have.
    """
    unknown = sorted(probe.arguments.keys() - set(pipe.signature.names))
    if unknown:
        raise BundleError(f"probes: calls have no argument {unknown[0]!r}; export the bundle again")
    settings: dict[str, Any] = {
        **probe.arguments,
        "scheduler": probe.scheduler,
        "num_inference_steps": probe.num_inference_steps,
        "seed": probe.seed,
        "height": probe.height,
        "width": probe.width,
        **given,
    }
    result: Result = pipe(**settings)
    return result


def to_bytes(images: Array) -> Array:
    """Images of a call with ``output_type="np"`` as uint8, of the same shape."""
    return (images.clip(0, 1) * np.float32(255)).round().astype(np.uint8)


def compare_images(found: Array, expected: Array) -> tuple[int, float]:
    """The largest difference of 255 and the PSNR in dB of two images in uint8."""
    if found.shape != expected.shape:
        return 255, 0.0
    difference = np.abs(found.astype(np.int16) - expected.astype(np.int16))
    return int(difference.max(initial=0)), psnr(found, expected)
