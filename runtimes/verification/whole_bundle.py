"""This module checks a whole bundle on this machine: its files, then its builds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

from latentc.runtimes.backends import backend as engines
from latentc.runtimes.backends.backend import Backend
from latentc.runtimes.backends.choosing import choose_build
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.quantities import megabytes
from latentc.runtimes.bundle.structures import Build, Verification
from latentc.runtimes.errors import (
    BackendError,
    BundleError,
    InputError,
    LatentcError,
    VerificationError,
)
from latentc.runtimes.options import complete, takes
from latentc.runtimes.plugins import started
from latentc.runtimes.verification.verify import check_build
from latentc.runtimes.verification.verify_arguments import Report, VerifyArguments


class Failure(NamedTuple):
    """A failure says which build could not be checked on which engine, and why."""

    build: str
    backend: str
    error: str


@dataclass(frozen=True)
class Verified:
    """A `Verified` says what a check found: the figures of each build on each engine that ran it,
    and what failed."""

    measured: tuple[tuple[Build, Verification], ...] = ()
    failures: tuple[Failure, ...] = ()

    def refuse(self) -> None:
        """Raise what speaks against the bundle, if anything does.

        Raises:
            VerificationError: a build does not reproduce PyTorch.
            BackendError: an engine failed.
        """
        misses = [f"{each.name} on {on.backend}" for each, on in self.measured if not on.passed]
        words = [f"does not reproduce PyTorch: {', '.join(misses)}"] if misses else []
        words += [f"{name} on {engine} failed: {error}" for name, engine, error in self.failures]
        if misses:
            raise VerificationError("; ".join(words))
        if words:
            raise BackendError("; ".join(words))


@takes(VerifyArguments)
def verify(bundle: str | os.PathLike[str], **arguments: Unpack[VerifyArguments]) -> Verified:
    """Hash every file of a bundle, then repeat its probes on this machine's engines.

    An engine that fails keeps no other from being tried; `Verified.refuse` raises then.

    Args:
        bundle: its folder.
        {options}

    Raises:
        BundleError: missing, damaged or altered.
        InputError: no such build or backend, or a device without a backend.
        BackendError: an engine or a device that is not here.
        VerificationError: the bundle holds no probes.
    """
    options = complete(VerifyArguments, arguments)
    report: Report = options["report"] or (lambda _: None)
    opened = Bundle.open(bundle, hashing="always")
    if options["device"] and not options["backend"]:
        raise InputError("--device names a device of one engine: give --backend too")
    pairs = [] if options["files_only"] else _pairs(opened.manifest, options, report)
    size = opened.check()
    report(f"{bundle}: all files are as the manifest says, {megabytes(size)}")
    if options["files_only"]:
        return Verified()
    if opened.manifest.probes is None:
        raise VerificationError(
            f"{bundle} holds no probes: it was exported with --no-verify (--files-only skips this)"
        )
    return _verified(opened, pairs, options["device"], report)


def _pairs(
    manifest: Manifest, options: Mapping[str, Any], report: Report
) -> list[tuple[Build, Backend]]:
    """Return every build that is to be checked with every engine that loads it here; report which
    build has none.

    Raises:
        InputError: no such build or backend.
        DeviceUnavailable: no such device.
    """
    backend, name = options["backend"], options["build"]
    choose_build(manifest, backend, name, passes=True)  # refuses what does not exist or fit
    builds = [build for build in manifest.builds if name in (None, build.name)]
    if backend:
        engine = engines.get(backend)
        engine.device(options["device"])  # refuses what there is not
        return [(build, engine) for build in builds if engines.find(backend).loads(build)]
    names_by_build = {build.name: engines.for_build(build) for build in builds}
    for build_name, names in names_by_build.items():
        if not names:
            report(f"{build_name}: not checked, no backend that loads it is installed here")
    return [(build, engines.get(n)) for build in builds for n in names_by_build[build.name]]


def _verified(
    bundle: Bundle, pairs: list[tuple[Build, Backend]], device: str | None, report: Report
) -> Verified:
    """Check each build on its engine, whatever happens to the others."""
    measured, failures = [], []
    for build, engine in pairs:
        try:
            measured.append((build, _measured(bundle, build, engine, device, report)))
        except BundleError:  # what is damaged is so for every engine
            raise
        except (LatentcError, ImportError) as error:
            failures.append(Failure(build.name, engine.name, str(error)))
            report(f"{build.name} on {engine.name}: failed: {error}")
    return Verified(tuple(measured), tuple(failures))


def _measured(
    bundle: Bundle, build: Build, engine: Backend, device: str | None, report: Report
) -> Verification:
    """Check one build; whatever an engine of another package raises is a BrokenPlugin."""

    def tell(what: str) -> None:
        report(f"{build.name} on {engine.name}: {what}")

    with started(f"backend {engine.name!r}"):
        return check_build(bundle.root, bundle.manifest, build, engine, device, report=tell)
