"""One component on its way to its builds: captured once, then lowered to each of them."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from latentc.exporter import targets
from latentc.exporter.components.description import Description, Graph
from latentc.exporter.passes import Choices, Range, calibrated, computes
from latentc.exporter.progress import Progress
from latentc.exporter.targets.options import Settings, TargetOptions
from latentc.runtimes.bundle.precision import split_passes
from latentc.runtimes.errors import DiskFull, ExportError, LatentcError, first_line
from latentc.runtimes.programs.latents import other_sizes

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from latentc.exporter.lowering.trajectories import Trajectories
    from latentc.exporter.options import ExportOptions

# Inputs by name that a graph may meet, to look for overflow with.
Samples: TypeAlias = "Callable[[Graph], Iterable[Mapping[str, torch.Tensor]]]"


class Lowering:
    """Captures when the first build asks for it; keeps the program of the last set of passes."""

    def __init__(
        self,
        graph: Graph,
        description: Description,
        options: ExportOptions,
        progress: Progress,
        samples: Samples,
        trajectories: Callable[[], Trajectories],
    ) -> None:
        self._graph = graph
        self._trajectories = trajectories
        self._ranges: Mapping[str, Range] | None = None
        self._samples = samples
        self._description = description
        self._options = options
        self._progress = progress
        self._captured: ExportedProgram | None = None
        self._variant: tuple[tuple[str, ...], Choices, ExportedProgram] | None = None
        self._notes: dict[tuple[str, ...], str] = {}

    @property
    def name(self) -> str:
        """The component's."""
        return self._graph.component.name

    def write(
        self, target: str, precision: str, kept: frozenset[str], folder: Path
    ) -> Mapping[str, Any]:
        """Write one build's files into `folder`; returns ``{"entry": file name}``.

        `precision` is the component's own; weights in `kept` are not quantised.

        Raises:
            ExportError: naming the component and the target.
        """
        name = self._graph.component.name
        passes, note = self._passes(target, precision)
        program = self.program(passes, kept)
        settings = self._settings(target, precision)
        with self._progress.stage(name, f"lower to {target} {precision}") as wrote:
            try:
                entry = targets.get(target).lower(
                    program, self._graph.component, folder, **settings
                )
                self._finish(target, passes, note, folder)
            except (OSError, LatentcError):
                raise  # the store knows what a full disk looks like
            except Exception as error:
                # The engines report a failed write in their own ways.
                if shutil.disk_usage(folder).free < 1 << 20:
                    raise DiskFull(folder.parent) from error
                raise ExportError(
                    f"{name}: lowering to {target} failed: {first_line(error)}"
                ) from error
            wrote(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
        return {"entry": entry}

    def _settings(self, target: str, precision: str) -> dict[str, Settings]:
        """Return what a target with options of its own is told besides."""
        if targets.TARGETS[target].options is TargetOptions:
            return {}
        own = self._options.of(target)
        plain, _ = split_passes(precision)
        return {"settings": Settings(plain, own, self._description.latents)}

    def _finish(self, target: str, passes: tuple[str, ...], note: str, folder: Path) -> None:
        module = targets.get(target)
        if isinstance(module, targets.Finishing):
            precision = next(filter(None, map(computes, passes)), "float32")
            module.finish(self._graph.component, self._description, precision, note, folder)

    def _passes(self, target: str, precision: str) -> tuple[tuple[str, ...], str]:
        """The passes to run, and why they are not those of the precision ("" if they are): where
        half precision would overflow, the component stays in float32."""
        asked = self._options.passes(target, precision)
        half = next(filter(None, map(computes, asked)), None)
        if half is None:
            return asked, ""
        if asked not in self._notes:
            self._notes[asked] = self._overflow(half)
            if self._notes[asked]:
                name, reason = self._graph.component.name, self._notes[asked]
                warnings.warn(f"{name} stays in float32: {reason}", UserWarning, stacklevel=2)
        if not self._notes[asked]:
            return asked, ""
        return tuple(each for each in asked if not computes(each)), self._notes[asked]

    def _overflow(self, half: str) -> str:
        import torch

        from latentc.exporter.lowering.overflow import problem

        program = self.captured()
        with self._progress.stage(self._graph.component.name, f"look for overflow in {half}"):
            return problem(program, getattr(torch, half), self._samples(self._graph))

    def forget(self) -> None:
        """Drop what was captured and made of it; it is made again when asked for."""
        self._captured = self._variant = None

    def captured(self) -> ExportedProgram:
        """The program as it was captured: float32."""
        from latentc.exporter.capture.graphs import capture, symbol_values

        if self._captured is None:
            with self._progress.stage(self._graph.component.name, "capture"):
                sizes = symbol_values(self._description, traced=True)
                latents = self._description.latents
                others = other_sizes(self._description.program)
                self._captured = capture(
                    self._graph,
                    latents.multiple,
                    sizes,
                    latents.maximum,
                    {name: symbol.most for name, symbol in others.items()},
                )
        return self._captured

    def program(self, passes: tuple[str, ...], kept: frozenset[str]) -> ExportedProgram:
        """The captured program after `passes`; calibrates if one of them needs it."""
        from latentc.exporter.capture.graphs import variant

        choices = Choices(kept, self.ranges(passes))
        if self._variant is None or self._variant[:2] != (passes, choices):
            self._variant = None
            self._variant = passes, choices, variant(self.captured(), passes, choices)
        return self._variant[2]

    def ranges(self, passes: tuple[str, ...]) -> Mapping[str, Range]:
        """Ranges of activations by the name of their layer, where `passes` want them."""
        from latentc.exporter.lowering.calibration import ranges

        if not any(map(calibrated, passes)):
            return {}
        if self._ranges is None:
            name, graph = self._graph.component.name, self._graph
            samples = self._trajectories().of(graph)
            with self._progress.counted(name, "calibrate", len(samples)) as told:
                self._ranges = ranges(self.captured(), samples, told)
        return self._ranges
