"""Carries out `latentc.exporter.lowering.layer_ranking` for the builds of an export: lowers, runs,
ranks, chooses."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentc.exporter.capture.interpreter import Inputs
from latentc.exporter.components.names import precision_of
from latentc.exporter.lowering import layer_ranking as floor
from latentc.exporter.lowering.component import Lowering
from latentc.exporter.memory import free_memory
from latentc.exporter.options import ExportOptions
from latentc.exporter.passes import has_integers
from latentc.exporter.progress import Progress
from latentc.exporter.targets import computes, verifier
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.precision import build_name
from latentc.runtimes.bundle.structures import Artifact, Build, File

_TRIAL = ".trial"


class FloorSearch:
    """Finds the layers that a build keeps.

    Args:
        staging: where the bundle is being written; `manifest` says all about it but its builds.
        probes: the inputs of each component's probes, the random ones first.
    """

    def __init__(
        self,
        lowerings: Mapping[str, Lowering],
        options: ExportOptions,
        staging: Path,
        manifest: Manifest,
        progress: Progress,
        probes: Mapping[str, Sequence[Inputs]],
    ) -> None:
        self.lowerings = lowerings
        self._options = options
        self.staging = staging
        self.manifest = manifest
        self.progress = progress
        self._probes = probes

    def run(self, target: str, precision: str) -> Mapping[str, frozenset[str]]:
        """Weights to keep, by component; empty for a build that is not quantised.

        Raises:
            VerificationError: the floor is out of reach.
        """
        quantized = {
            name: own
            for name in self.lowerings
            if has_integers(own := precision_of(precision, name))
        }
        wanted = self._options.fidelity_floor
        if not quantized or wanted is None:
            return {}
        trial = _Trial(self, target, precision)
        try:
            without = trial.psnr({})
            if without >= wanted:
                return {}
            layers = self._ranked(target, quantized)
            count = floor.fewest(
                wanted, without, layers, lambda n: trial.psnr(floor.kept(layers, n))
            )
            return floor.kept(layers, count)
        finally:
            trial.remove()

    def _ranked(self, target: str, quantized: Mapping[str, str]) -> list[floor.Layer]:
        layers: list[floor.Layer] = []
        for name, own in quantized.items():
            lowering = self.lowerings[name]
            passes = self._options.passes(target, own)
            probes = self._probes[name]
            sample = probes[(len(probes) + 1) // 2]  # the middle of those that are not random
            total = len(floor.weights(lowering))
            with self.progress.counted(name, f"rank layers in {own}", total) as told:
                layers += floor.rank(lowering, passes, sample, told)
        return sorted(layers, key=lambda layer: -layer.error)


class _Trial:
    """One build, lowered again and again with other layers kept."""

    def __init__(self, search: FloorSearch, target: str, precision: str) -> None:
        self._search = search
        self._target = target
        self._precision = precision
        self._folder = search.staging / _TRIAL
        self._made: dict[str, tuple[frozenset[str], Artifact]] = {}

    def psnr(self, kept: Mapping[str, frozenset[str]]) -> float:
        """Return the PSNR of the whole loop's image, in dB."""
        from latentc.runtimes.backends import backend as backends
        from latentc.runtimes.verification.verify import check_loop

        search = self._search
        artifacts = {
            name: self._artifact(name, kept.get(name, frozenset())) for name in search.lowerings
        }
        build = Build(
            build_name(self._target, self._precision), self._target, self._precision, artifacts
        )
        owns = [artifact.precision for artifact in artifacts.values()]
        backend = backends.get(verifier(self._target, owns))
        count = sum(len(names) for names in kept.values())
        with search.progress.stage(build.name, f"image with {count} layers kept"):
            loop = check_loop(search.staging, search.manifest, build, backend)
        free_memory()
        return loop.image_psnr

    def _artifact(self, name: str, kept: frozenset[str]) -> Artifact:
        if name in self._made and self._made[name][0] == kept:
            return self._made[name][1]
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        own = precision_of(self._precision, name)
        lowering = self._search.lowerings[name]
        entry = lowering.write(self._target, own, kept, folder)["entry"]
        files = tuple(
            File(path.relative_to(self._search.staging).as_posix(), path.stat().st_size, _NO_HASH)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        )
        place = (folder / entry).relative_to(self._search.staging).as_posix()
        made = Artifact("", place, files, own, computes(self._target, own))
        self._made[name] = kept, made
        return made

    def remove(self) -> None:
        """Delete what was written."""
        shutil.rmtree(self._folder, ignore_errors=True)


_NO_HASH = hashlib.sha256(b"").hexdigest()  # the files of a trial are not checked
