"""A pipeline's description, changed to what the user asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from msgspec.structs import replace

from exporter.families import Description
from exporter.options import ExportOptions
from runtimes.errors import InputError
from runtimes.version_1.tasks import Task


def with_tasks(
    description: Description, asked: Sequence[str], pipeline_class: str
) -> tuple[Description, tuple[Task, ...]]:
    """Return the description with the graphs that the asked tasks need, and all tasks, the
    pipeline's own first.

    Raises:
        InputError: the pipeline's class has no such task.
    """
    offers = {each.task.name: each for each in description.offers}
    graphs = {graph.component.name: graph for graph in description.graphs}
    tasks = [description.task]
    for name in asked:
        if name == description.task.name:
            continue
        if name not in offers:
            has = ", ".join([description.task.name, *offers])
            raise InputError(f"{pipeline_class} has no task {name}; it has: {has}")
        tasks.append(offers[name].task)
        graphs |= {
            each.component.name: graphs.get(each.component.name, each)
            for each in offers[name].graphs
        }
    return dataclasses.replace(description, graphs=tuple(graphs.values())), tuple(tasks)


def with_size(description: Description, options: ExportOptions) -> Description:
    """Fix the latents' height and width where the user fixed the picture's."""
    if options.height is None or options.width is None:
        return description
    from runtimes.sizes import check_side, fix

    latents = description.latents
    for label, value in (("height", options.height), ("width", options.width)):
        check_side(latents, label, value)
    fixed = {"height": options.height // latents.factor, "width": options.width // latents.factor}
    graphs = tuple(
        dataclasses.replace(graph, component=fix(graph.component, fixed))
        for graph in description.graphs
    )
    sizes = {"default_height": options.height, "default_width": options.width}
    return dataclasses.replace(description, graphs=graphs, latents=replace(latents, **sizes))
