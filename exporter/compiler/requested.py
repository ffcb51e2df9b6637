"""A pipeline's description, changed to what the user asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from latentc.exporter.capture.step_cache import split
from latentc.exporter.components.description import Description
from latentc.exporter.components.watermark import Marker, with_watermark
from latentc.exporter.families import family_of
from latentc.exporter.programs.changes import with_sizes
from latentc.exporter.source.adapters import kinds as adapters
from latentc.exporter.targets import TARGETS
from latentc.runtimes.errors import InputError
from latentc.runtimes.programs.latents import other_sizes
from latentc.runtimes.programs.statements import loop_of
from latentc.runtimes.programs.uses import components_run
from latentc.runtimes.unknown_names import suggestion

if TYPE_CHECKING:
    from latentc.exporter.options import ExportOptions
    from latentc.exporter.source.resolving import PipelineSource


def described(pipe: Any, source: PipelineSource, options: ExportOptions) -> Description:
    """Return the description of a loaded pipeline, changed to what was asked for.

    Raises:
        InputError: the pipeline does not have what was asked for.
    """
    if hasattr(pipe, "watermark"):  # which it has or not as another package is installed
        pipe.watermark = Marker() if options.watermark else None
    description = family_of(source.pipeline_class).describe(pipe)
    kinds = [ingredient.kind for ingredient in source.ingredients]
    description = adapters.described(pipe, description, kinds)
    if options.watermark:
        description = with_watermark(description, pipe.vae)
    if options.step_cache:
        description = split(description)
    description = with_tasks(description, options.tasks_of(source), source.pipeline_class)
    check_sizes(description, options.targets)
    return with_size(description, options)


def with_tasks(description: Description, asked: Sequence[str], pipeline_class: str) -> Description:
    """Return the description with the asked programs alone, the pipeline's own first, and the
    graphs that they need.

    Raises:
        InputError: the pipeline's class has no such task.
    """
    offers = {program.name: program for program in description.programs}
    programs = {description.program.name: description.program}
    for name in asked:
        if name not in offers:
            hint = suggestion(name, offers, "it has")
            raise InputError(f"{pipeline_class} has no task {name}; {hint}")
        programs[name] = offers[name]
    needed = {name for program in programs.values() for name in components_run(program)}
    graphs = tuple(graph for graph in description.graphs if graph.component.name in needed)
    return dataclasses.replace(description, programs=tuple(programs.values()), graphs=graphs)


def check_sizes(description: Description, targets: Sequence[str]) -> None:
    """Refuse targets whose graphs cannot have the sizes of a pipeline open.

    Raises:
        InputError: it names the size.
    """
    others = [symbol.argument for symbol in other_sizes(description.program).values()]
    for target in targets if others else ():
        if TARGETS[target].sides_alone:
            raise InputError(
                f"target {target!r} has graphs of any height and width alone, and this pipeline's "
                f"calls say {' and '.join(others)}, too: take another target"
            )


def with_size(description: Description, options: ExportOptions) -> Description:
    """Fix the latents' height and width where the user fixed the image's."""
    if options.height is None or options.width is None:
        return description
    from latentc.runtimes.bundle.sizes import check_side, fix

    latents = description.latents
    for label, value in (("height", options.height), ("width", options.width)):
        check_side(latents, label, value)
    fixed = {"height": options.height // latents.factor, "width": options.width // latents.factor}
    loop = loop_of(description.program)
    viewed = {name: loop.given_side(side) for name, side in fixed.items()}
    graphs = tuple(
        dataclasses.replace(
            graph,
            component=fix(graph.component, viewed if graph.component.role == "denoiser" else fixed),
        )
        for graph in description.graphs
    )
    programs = tuple(with_sizes(program, fixed) for program in description.programs)
    return dataclasses.replace(description, graphs=graphs, programs=programs)
