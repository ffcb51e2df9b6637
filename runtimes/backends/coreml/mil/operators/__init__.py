"""The operators of MIL, each a function of numpy arrays: one file per kind, one table.

A function has the operator's name and takes the operator's inputs by their MIL names; what is
optional in MIL has MIL's default. Float arrays arrive as float32. An operator with several
outputs returns a tuple. Semantics are those of coremltools' documentation of the operators
(coremltools.converters.mil.mil.ops.defs, iOS 15 to iOS 18).
"""

from __future__ import annotations

from collections.abc import Mapping

from latentc.runtimes.backends.coreml.mil.operators import (
    arithmetic,
    convolution,
    layout,
    matrix,
    normalization,
)
from latentc.runtimes.backends.coreml.mil.operators.operator import Operator


def table() -> Mapping[str, Operator]:
    """Return every operator by its MIL name."""
    modules = (arithmetic, convolution, layout, matrix, normalization)
    return {name: operator for module in modules for name, operator in module.OPERATORS.items()}
