"""Defaults of calls: those of the diffusers class that a task stands for, read from the signature
of its call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from msgspec import structs

from exporter.families import CLASS_TASKS, Description, Offer, family_of
from runtimes.errors import UnsupportedPipeline
from runtimes.version_1.fields import Argument, Guidance
from runtimes.version_1.tasks import STEPS, Task

_TABLES: Mapping[str, str] = {
    "text-to-image": "AUTO_TEXT2IMAGE_PIPELINES_MAPPING",
    "image-to-image": "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING",
    "inpainting": "AUTO_INPAINT_PIPELINES_MAPPING",
}

Defaults = Mapping[str, tuple[float, ...]]


def described(pipe: Any, pipeline_class: str) -> Description:
    """Return the description that the class's family gives, with the defaults of diffusers' calls.

    Raises:
        UnsupportedPipeline: the family cannot describe the pipeline.
    """
    return with_class_defaults(pipe, family_of(pipeline_class).describe(pipe))


def with_class_defaults(pipe: Any, description: Description) -> Description:
    """Return the description with every default of the classes that its tasks stand for.

    What a class has no default for (latentc's own arguments, such as `guidance_rescale` of an
    image-to-image class) keeps the one that the family gave, which must be "off".
    """
    own = defaults_of(class_of(pipe, description.task.name))
    made = replace(
        description,
        arguments=tuple(_argument(own, each) for each in description.arguments),
        guidance=_guidance(own, description.guidance),
        num_inference_steps=int(own[STEPS][0]),
    )
    return replace(
        made,
        task=_task(pipe, made, description.task),
        offers=tuple(Offer(_task(pipe, made, each.task), each.graphs) for each in made.offers),
    )


def class_of(pipe: Any, task: str) -> type:
    """Return the diffusers class that does `task` with the parts of `pipe`: its own class where
    that is for the task, else the one that ``AutoPipelineFor…`` would take."""
    from diffusers.pipelines import auto_pipeline

    own = type(pipe)
    if task in CLASS_TASKS.get(own.__name__, ()) or task not in _TABLES:
        return own
    tables = {name: getattr(auto_pipeline, table) for name, table in _TABLES.items()}
    models = [model for table in tables.values() for model, cls in table.items() if cls is own]
    found = [tables[task][model] for model in models if model in tables[task]]
    return found[0] if found else own


def defaults_of(pipeline_class: type) -> Defaults:
    """Return the numbers among the defaults of a class's call, by argument."""
    parameters = inspect.signature(pipeline_class.__call__).parameters
    found: dict[str, tuple[float, ...]] = {}
    for name, parameter in parameters.items():
        value = parameter.default
        values = value if isinstance(value, tuple | list) else (value,)
        if values and all(type(each) in (int, float) for each in values):
            found[name] = tuple(map(float, values))
    return found


def longest_text(pipe: Any) -> int:
    """Return how many tokens of a text the pipeline's call reads by default.

    Raises:
        UnsupportedPipeline: its call does not say.
    """
    found = defaults_of(type(pipe)).get("max_sequence_length")
    if found is None:
        raise UnsupportedPipeline(f"{type(pipe).__name__} does not say its max_sequence_length")
    return int(found[0])


def _guidance(own: Defaults, guidance: Guidance) -> Guidance:
    scales = {
        name: own[name][0] if name in own else value for name, value in guidance.defaults.items()
    }
    return structs.replace(guidance, defaults=scales)


def _argument(own: Defaults, argument: Argument) -> Argument:
    return structs.replace(argument, default=_values(own, argument) or argument.default)


def _values(own: Defaults, argument: Argument) -> tuple[float, ...] | None:
    """The class's default in the argument's form; None where it has none."""
    values = own.get(argument.name)
    if values is None:
        return None
    if len(values) == 1:  # one number stands for all
        values *= len(argument.default)
    if len(values) != len(argument.default):
        return None
    # A model may allow less than the class's default (`trained_tasks.upscaling`).
    low, high = argument.limits or (-math.inf, math.inf)
    return tuple(min(max(each, low), high) for each in values)


def _task(pipe: Any, description: Description, task: Task) -> Task:
    """The task with what its own class has otherwise than that of the description's task."""
    cls = class_of(pipe, task.name)
    own = defaults_of(cls)
    others: dict[str, tuple[float, ...]] = {}
    for argument in description.arguments:
        values = _values(own, argument)
        if values is not None and values != argument.default:
            others[argument.name] = values
    usual = {name: (value,) for name, value in description.guidance.defaults.items()}
    usual[STEPS] = (float(description.num_inference_steps),)
    others |= {n: own[n] for n, value in usual.items() if own.get(n, value) != value}
    return structs.replace(
        task,
        strength=None if task.strength is None else own.get("strength", (task.strength,))[0],
        defaults=others,
        branch_arguments=_of_branches(cls, description, task),
    )


def _of_branches(cls: type, description: Description, task: Task) -> dict[str, tuple[str, ...]]:
    """Which arguments the class takes for guidance branches, and of them those that the family
    says it looks at, if it says any."""
    taken = inspect.signature(cls.__call__).parameters
    used = dict.fromkeys(name for vector in description.vectors for name in vector.arguments)
    prefixes = {each.prefix for each in description.guidance.branches if each.prefix}
    names = [prefix + name for prefix in sorted(prefixes) for name in used]
    known = dict.fromkeys(names, ()) if task.branch_arguments is None else task.branch_arguments
    return {name: known[name] for name in names if name in taken and name in known}
