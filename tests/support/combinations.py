"""This module says which combinations of pipelines, tasks and engines every run tries.

An export takes seconds, and engines see nothing of a pipeline but its graphs: of each kind of graph
one pipeline is exported for `make test`. The others are marked ``combinations`` and run by
`make test-all`. Over PyTorch's own modules, every pipeline, task and set of arguments is compared
with diffusers in both (tests/contract/test_argument_subsets.py, test_program_check.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def kept(values: Iterable[Any], *always: Any) -> list[Any]:
    """Return parameters: those of `always` run each time, the others in `make test-all` alone.
    A tuple holds the values of several arguments.

    Raises:
        ValueError: one of `always` is none of the values.
    """
    listed = [*values]
    for value in always:
        if value not in listed:
            raise ValueError(f"{value!r} is none of the parameters {listed}")
    return [
        value
        if value in always
        else pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.combinations
        )
        for value in listed
    ]
