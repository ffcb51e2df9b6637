"""This module computes probes with the pipeline itself, in PyTorch; every build is verified with
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import convert, to_builtins

from latentc.exporter.artifacts.source_closure import code
from latentc.exporter.artifacts.store import Store
from latentc.exporter.artifacts.versions import CAPTURE, digest, versions
from latentc.exporter.components.description import Description
from latentc.exporter.options import ExportOptions, describing
from latentc.exporter.progress import Progress
from latentc.exporter.source.resolving import PipelineSource
from latentc.exporter.verification.judging import Judged, judge_probe
from latentc.exporter.verification.judging import read as read_judged
from latentc.exporter.verification.probe_calls import arguments_of, takes_images
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.structures import JudgeProbe, LoopProbe, Probes, Schedule
from latentc.runtimes.storage.npz import write_arrays

FOLDER = "probes"
_RUNNING = ("latentc.exporter.verification.reference", "latentc.exporter.verification.judging")


@dataclass(frozen=True)
class Probing:
    """An export's pipeline, its manifest without probes and builds, and where its probes go.
    `plan`: the pipeline's own schedule, which the whole loop runs with."""

    source: PipelineSource
    options: ExportOptions
    description: Description
    draft: Manifest
    plan: Schedule
    store: Store
    progress: Progress

    def add(self, pipe: Any) -> Probes:
        """Run the pipeline, unless the store has what it would give."""
        from latentc.exporter.verification.reference import reference

        sizes, fixed = self._sizes()
        of_text = not takes_images(self.description.program)
        judged = self._judged(fixed) if of_text else None

        def write(folder: Path) -> Mapping[str, Any]:
            with self.progress.stage("reference", "run in PyTorch") as wrote:
                root = self.store.staging
                arrays, loop = reference(
                    self.description, self.draft, root, self.plan, sizes, fixed, pipe
                )
                for name, values in arrays.items():
                    write_arrays(folder / f"{name}.npz", values)
                    wrote((folder / f"{name}.npz").stat().st_size)
            return {"loop": to_builtins(loop), "judged": to_builtins(self._judge(judged))}

        key = self._key(sizes, fixed, judged is not None)
        item = self.store.item(key, FOLDER, write)
        files = {Path(file.path).stem: file for file in item.files}
        judge = convert(item.meta["judged"], JudgeProbe | None)
        return Probes(files, convert(item.meta["loop"], LoopProbe), key, judge)

    def _key(self, sizes: list[dict[str, int]], fixed: tuple[int, int] | None, judged: bool) -> str:
        options = self.options
        return digest(
            {
                "kind": "probes",
                "source": self.source.fingerprint,
                "size": [options.height, options.width],
                "sizes": [*sizes, fixed],
                "arguments": arguments_of(self.description.program),
                "schedule": self.plan.key,
                "versions": versions(CAPTURE),
                "code": code(*_RUNNING, *describing(self.source)),
                "judged": judged,
                "split": options.step_cache,
            }
        )

    def _sizes(self) -> tuple[list[dict[str, int]], tuple[int, int] | None]:
        """Return values of dimension symbols for the random probes.

        The image's size stands beside them, if it must be a certain one.
        """
        from latentc.exporter.capture.graphs import symbol_values

        options, description = self.options, self.description
        sizes = [symbol_values(description, traced=False)]
        fixed = (options.height, options.width) if options.height and options.width else None
        for target_options in options.of_targets.values():
            sizes += target_options.probe_sizes(
                description.latents, symbol_values(description, traced=True)
            )
            if description.resizable:
                fixed = fixed or target_options.loop_size()
        return sizes, fixed

    def _judged(self, fixed: tuple[int, int] | None) -> Judged | None:
        """Return who judges the images, where they may have the size that the judge is for."""
        judged = read_judged(self.source.folder)
        return judged if judged and fixed in (None, (judged.height, judged.width)) else None

    def _judge(self, asked: Judged | None) -> JudgeProbe | None:
        if asked is None:
            return None
        with self.progress.counted("judge", "draw in PyTorch", asked.images) as told:
            return judge_probe(self.description, asked, self.plan, told)
