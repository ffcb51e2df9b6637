"""One component on its way to its builds: captured once, then lowered to each of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter import targets
from exporter.families import Description, Graph
from exporter.options import ExportOptions
from exporter.progress import Progress
from exporter.targets.options import Settings, TargetOptions
from runtimes.errors import ExportError, LatentcError
from runtimes.session import first_line

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class Lowering:
    """Captures when the first build asks for it; keeps the program of the last set of passes."""

    def __init__(
        self, graph: Graph, description: Description, options: ExportOptions, progress: Progress
    ) -> None:
        self._graph = graph
        self._description = description
        self._options = options
        self._progress = progress
        self._captured: ExportedProgram | None = None
        self._variant: tuple[tuple[str, ...], ExportedProgram] | None = None

    def write(self, target: str, precision: str, folder: Path) -> Mapping[str, Any]:
        """Write one build's files into `folder`; returns ``{"entry": file name}``.

        Raises:
            ExportError: naming the component and the target.
        """
        program = self._program(self._options.passes(target, precision))
        name = self._graph.component.name
        settings = self._settings(target, precision)
        with self._progress.stage(name, f"lower to {target} {precision}") as wrote:
            try:
                entry = targets.get(target).lower(
                    program, self._graph.component, folder, **settings
                )
            except (OSError, LatentcError):
                raise  # the store knows what a full disk looks like
            except Exception as error:
                # The engines report a failed write in their own ways.
                if shutil.disk_usage(folder).free < 1 << 20:
                    raise ExportError(f"the disk is full: {folder.parent}") from error
                raise ExportError(
                    f"{name}: lowering to {target} failed: {first_line(error)}"
                ) from error
            wrote(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
        return {"entry": entry}

    def _settings(self, target: str, precision: str) -> dict[str, Settings]:
        """What a target with options of its own is told besides."""
        if targets.TARGETS[target].options is TargetOptions:
            return {}
        own = self._options.of(target)
        return {"settings": Settings(precision, own, self._description.latents)}

    def _program(self, passes: tuple[str, ...]) -> ExportedProgram:
        from exporter.capture import capture, symbol_values, variant

        if self._captured is None:
            with self._progress.stage(self._graph.component.name, "capture"):
                sizes = symbol_values(self._description, traced=True)
                multiple = self._description.latents.multiple
                self._captured = capture(self._graph, multiple, sizes)
        if self._variant is None or self._variant[0] != passes:
            self._variant = passes, variant(self._captured, passes)
        return self._variant[1]
