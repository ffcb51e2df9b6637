"""Every build, compared with PyTorch on the backend that runs its target."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from latentc.exporter.memory import free_memory
from latentc.exporter.options import ExportOptions
from latentc.exporter.progress import Progress
from latentc.exporter.resources import LARGE_BUILD
from latentc.exporter.targets import verifier
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.structures import Build
from latentc.runtimes.errors import VerificationError


def verified(
    manifest: Manifest, folder: Path, options: ExportOptions, progress: Progress
) -> Manifest:
    """Return the manifest with what was found of each build that was not checked before.

    It is as it was if it has no probes.

    Args:
        folder: where the files stand that the manifest names.

    Raises:
        VerificationError: a build misses a tolerance, or the asked fidelity floor.
    """
    if manifest.probes is None:
        return manifest
    checked = tuple(_checked(build, manifest, folder, progress) for build in manifest.builds)
    changed = replace(manifest, builds=checked)
    misses = [line for build in checked for line in describe_misses(build)]
    misses += _below_floor(changed, options)
    if misses:
        raise VerificationError(
            f"the export does not reproduce PyTorch, no bundle was written: {misses[0]}"
            + (f" (and {len(misses) - 1} more)" if len(misses) > 1 else "")
        )
    return changed


def _checked(build: Build, manifest: Manifest, folder: Path, progress: Progress) -> Build:
    from latentc.runtimes.backends import backend as backends
    from latentc.runtimes.verification.verify import check_build

    if build.verification is not None and build.verification.passed:
        return build
    precisions = [artifact.precision for artifact in build.artifacts.values()]
    backend = backends.get(verifier(build.target, precisions))
    with progress.stage(build.name, f"verify on {backend.name}"):
        result = check_build(folder, manifest, build, backend, low_memory=_is_large(build))
    free_memory()
    return replace(build, verification=result)


def _below_floor(manifest: Manifest, options: ExportOptions) -> list[str]:
    floor = options.fidelity_floor
    asked = options.names()
    return [
        f"{build.name}: the image has {build.verification.loop.image_psnr:.1f} dB, "
        f"the fidelity floor is {floor:g}"
        for build in manifest.builds
        if floor is not None and build.name in asked
        if build.verification and build.verification.loop
        if build.verification.loop.image_psnr < floor
    ]


def _is_large(build: Build) -> bool:
    """Return whether a build's components should not all be in memory at once to be verified."""
    files = {
        file.path: file.size for artifact in build.artifacts.values() for file in artifact.files
    }
    return sum(files.values()) >= LARGE_BUILD


def describe_misses(build: Build) -> list[str]:
    """Return one sentence for each comparison of a build that missed its tolerance."""
    verification = build.verification
    if verification is None:
        return []
    lines = [
        f"{build.name}, {check.subject} on {check.probe}: relative L2 {check.relative_l2:.1e}, "
        f"allowed {check.tolerance:.1e}"
        for check in verification.checks
        if not check.passed
    ]
    loop = verification.loop
    if loop and not loop.passed:
        lines.append(
            f"{build.name}, whole loop: latents differ by {loop.latents_relative_l2:.1e} "
            f"(allowed {loop.tolerance:.1e}), the image by {loop.image_max_difference} of 255, "
            f"{loop.image_psnr:.1f} dB"
        )
    score = verification.score
    if score and not score.passed:
        lines.append(
            f"{build.name}: the judge finds {score.right} of {score.images} images right, "
            f"expected {score.least} at least"
        )
    return lines
