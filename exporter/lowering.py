"""One component on its way to its builds: captured once, then lowered to each of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter import targets
from exporter.families import Description, Graph
from exporter.passes import PRECISIONS
from exporter.progress import Progress
from runtimes.errors import ExportError
from runtimes.session import first_line

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class Lowering:
    """Captures when the first build asks for it; keeps the last precision's program."""

    def __init__(self, graph: Graph, description: Description, progress: Progress) -> None:
        self._graph = graph
        self._description = description
        self._progress = progress
        self._captured: ExportedProgram | None = None
        self._variant: tuple[str, ExportedProgram] | None = None

    def write(self, target: str, precision: str, folder: Path) -> Mapping[str, Any]:
        """Write one build's files into `folder`; returns ``{"entry": file name}``.

        Raises:
            ExportError: naming the component and the target.
        """
        program = self._program(precision)
        name = self._graph.component.name
        with self._progress.stage(name, f"lower to {target} {precision}") as wrote:
            try:
                entry = targets.get(target).lower(program, self._graph.component, folder)
            except OSError:
                raise  # the store knows what a full disk looks like
            except Exception as error:
                # The engines report a failed write in their own ways.
                if shutil.disk_usage(folder).free < 1 << 20:
                    raise ExportError(f"the disk is full: {folder.parent}") from error
                raise ExportError(
                    f"{name}: lowering to {target} failed: {first_line(error)}"
                ) from error
            wrote(sum(path.stat().st_size for path in folder.iterdir()))
        return {"entry": entry}

    def _program(self, precision: str) -> ExportedProgram:
        from exporter.capture import capture, symbol_values, variant

        if self._captured is None:
            with self._progress.stage(self._graph.component.name, "capture"):
                sizes = symbol_values(self._description, traced=True)
                multiple = self._description.latents.multiple
                self._captured = capture(self._graph, multiple, sizes)
        if self._variant is None or self._variant[0] != precision:
            self._variant = precision, variant(self._captured, PRECISIONS[precision])
        return self._variant[1]
