"""This module holds what programs know of their graphs: names and forms of inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

ROWS = "batch"  # the first dimension: one row for each image, prompt or branch
TIMESTEP = "timestep"  # the input of a denoiser that a loop feeds by itself


class Form(Protocol):
    """The dtype (numpy's name) and shape of a tensor; a dimension is a number or has a symbol."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int | str, ...]: ...


class Graph(Protocol):
    """A component, as the manifest lists it."""

    @property
    def inputs(self) -> Mapping[str, Form]: ...

    @property
    def outputs(self) -> Mapping[str, Form]: ...
