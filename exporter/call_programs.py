"""The programs of a bundle, made of what a family says of its calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from msgspec import structs

from exporter.families import Description
from exporter.families.defaults import class_of
from runtimes.programs.statements import Program
from runtimes.version_1.fields import CallFields
from runtimes.version_1.tasks import Task
from runtimes.version_1.translation import program_of, with_positions


def positioned(description: Description) -> Description:
    """Return the description whose encoders say what the numbers of their outputs say something
    of."""
    graphs = tuple(
        replace(graph, component=with_positions(graph.component, description.embeddings))
        for graph in description.graphs
    )
    return replace(description, graphs=graphs)


def programs_of(
    pipe: Any, description: Description, tasks: Sequence[Task], num_inference_steps: int
) -> tuple[Program, ...]:
    """Return a program for each task, in their order.

    Args:
        pipe: the diffusers pipeline, whose parts say which class a task stands for.
        num_inference_steps: the step count of a call that asks for none, where its task has none
            of its own.
    """
    fields = CallFields(
        pipeline_class=type(pipe).__name__,
        num_inference_steps=num_inference_steps,
        latents=description.latents,
        texts={text.input: text.texts for text in description.text_inputs},
        arguments=description.arguments,
        vectors=description.vectors,
        guidance=description.guidance,
        components=tuple(graph.component for graph in description.graphs),
        embeddings=description.embeddings,
    )
    programs = (program_of(task, fields) for task in tasks)
    return tuple(
        structs.replace(each, stands_for=class_of(pipe, each.name).__name__) for each in programs
    )
