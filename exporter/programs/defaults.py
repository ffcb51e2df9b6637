"""Defaults of a program's arguments: those of the diffusers class that it stands for, read from the
signature of its call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence

Defaults = Mapping[str, tuple[float, ...]]


def defaults_of(pipeline_class: type) -> Defaults:
    """Return the numbers among the defaults of a class's call, by argument."""
    defaults: dict[str, tuple[float, ...]] = {}
    for name, parameter in _parameters(pipeline_class).items():
        value = parameter.default
        values = value if isinstance(value, tuple | list) else (value,)
        if values and all(type(number) in (int, float) for number in values):
            defaults[name] = tuple(map(float, values))
    return defaults


def takes(pipeline_class: type, argument: str) -> bool:
    """Return whether a class's call has an argument of this name."""
    return argument in _parameters(pipeline_class)


def fitted(
    values: Sequence[float], count: int, least: float | None, most: float | None
) -> tuple[float, ...] | None:
    """Return a class's default as `count` numbers within limits: a model may allow less than the
    class's default. None where it has another count of numbers."""
    if len(values) == 1:  # one number stands for all
        values = [*values] * count
    if len(values) != count:
        return None
    low, high = -math.inf if least is None else least, math.inf if most is None else most
    return tuple(min(max(value, low), high) for value in values)


def _parameters(pipeline_class: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipeline_class.__call__).parameters
