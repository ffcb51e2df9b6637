"""torch's table of ONNX functions by operator, made once.

`torch.onnx.export` makes it anew each time, and reads the source of some five hundred functions
for that: half a second for every component, a tenth of the time of a small export.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch.onnx._internal.exporter._registration import ONNXRegistry

_usual: Any = ONNXRegistry.from_torchlib


@cache
def table(opset: int) -> Any:
    """Not to be added to."""
    return _usual(opset_version=opset)


@contextmanager
def made_once() -> Iterator[None]:
    """Inside, torch gets copies of the table, which it adds own translations to."""

    def from_torchlib(opset_version: int) -> Any:
        made = copy.copy(table(opset_version))
        made.functions = {each: list(found) for each, found in made.functions.items()}
        return made

    registry: Any = ONNXRegistry
    registry.from_torchlib = staticmethod(from_torchlib)
    try:
        yield
    finally:
        registry.from_torchlib = _usual
