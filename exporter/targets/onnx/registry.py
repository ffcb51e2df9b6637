"""torch's table of ONNX functions by operator, made once.

`torch.onnx.export` makes it anew each time, and reads the source of some five hundred functions
for that: half a second for every component, a tenth of the time of a small export.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from functools import cache
from typing import Any
from unittest import mock

from torch.onnx._internal.exporter._registration import ONNXRegistry

_usual: Any = ONNXRegistry.from_torchlib


@cache
def table(opset: int) -> Any:
    """Not to be added to."""
    return _usual(opset_version=opset)


def made_once() -> AbstractContextManager[Any]:
    """Inside, torch gets copies of the table, which it adds own translations to."""

    def from_torchlib(opset_version: int) -> Any:
        made = copy.copy(table(opset_version))
        made.functions = {each: list(found) for each, found in made.functions.items()}
        return made

    return mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
