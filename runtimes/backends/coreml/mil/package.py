"""This module reads the inputs of an ``.mlpackage``: names, dtypes and shapes that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentc.runtimes.errors import BackendError

_DTYPES = {"FLOAT32": "float32", "FLOAT16": "float16", "INT32": "int32", "DOUBLE": "float64"}


@dataclass(frozen=True)
class Limits:
    """One input: its dtype, and either shapes to choose from or a range for each axis."""

    dtype: np.dtype[Any]
    shapes: tuple[tuple[int, ...], ...]
    ranges: tuple[tuple[int, int], ...] = ()

    def allows(self, shape: Sequence[int]) -> bool:
        """Return whether the package takes this shape."""
        if not self.ranges:
            return tuple(shape) in self.shapes
        return len(shape) == len(self.ranges) and all(
            low <= size <= high for size, (low, high) in zip(shape, self.ranges, strict=True)
        )

    @property
    def batch(self) -> int:
        """Return the size of the first axis, which is always fixed."""
        return self.ranges[0][0] if self.ranges else self.shapes[0][0]

    def __str__(self) -> str:
        if self.ranges:
            sizes = (str(a) if a == b else f"{a} to {b}" for a, b in self.ranges)
            return f"[{', '.join(sizes)}]"
        return " or ".join(str(list(shape)) for shape in self.shapes)


def read_spec(package: Path) -> Any:
    """Return the package's Model message (coremltools' protocol buffers).

    Raises:
        BackendError: the package is damaged, or no ML Program.
    """
    from coremltools.models.utils import load_spec

    try:
        spec = load_spec(str(package))
    except Exception as error:  # protobuf's, the C++ reader's and coremltools' own
        raise BackendError(f"{package.name}: not a Core ML package: {error}") from error
    if spec.WhichOneof("Type") != "mlProgram":
        raise BackendError(f"{package.name}: not a Core ML package: it holds no ML Program")
    return spec


def limits_of(spec: Any) -> Mapping[str, Limits]:
    """Return the limits of the inputs, by name."""
    return {str(each.name): _limits(each.type.multiArrayType) for each in spec.description.input}


def _limits(array: Any) -> Limits:
    kind = array.ArrayDataType.Name(array.dataType)
    dtype = np.dtype(_DTYPES[kind])
    usual = tuple(int(size) for size in array.shape)
    flexibility = array.WhichOneof("ShapeFlexibility")
    if flexibility == "enumeratedShapes":
        listed = array.enumeratedShapes.shapes
        return Limits(dtype, tuple(tuple(int(size) for size in item.shape) for item in listed))
    if flexibility == "shapeRange":
        ranges = array.shapeRange.sizeRanges
        return Limits(
            dtype, (usual,), tuple((int(r.lowerBound), int(r.upperBound)) for r in ranges)
        )
    return Limits(dtype, (usual,))
