"""This module says which shapes a Core ML package takes: a fixed batch, and free, listed or fixed
sizes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.export import ExportedProgram

from latentc.exporter.targets.coreml.options import CoreMLOptions
from latentc.exporter.targets.options import Settings
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.programs.dimensions import symbolic
from latentc.runtimes.programs.latents import Latents


def input_types(program: ExportedProgram, component: Component, settings: Settings) -> list[Any]:
    """A coremltools TensorType for each input. Token ids are int32: Core ML has no int64.

    A dimension of the manifest that is neither the batch nor the image's, such as the
    number of tokens, is fixed to what the program was traced with.
    """
    import coremltools

    traced = traced_shapes(program, component)
    made = []
    for name, spec in component.inputs.items():
        dtype = np.int32 if spec.dtype == "int64" else np.float32
        shape = _shape(spec, traced[name], settings.options, settings.latents)
        made.append(coremltools.TensorType(name=name, shape=shape, dtype=dtype))
    return made


def traced_shapes(program: ExportedProgram, component: Component) -> dict[str, tuple[int, ...]]:
    """The shapes of the inputs that the program was captured with."""
    found = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in component.inputs:
            sizes = [
                getattr(getattr(size, "node", size), "hint", size)
                for size in node.meta["val"].shape
            ]
            found[node.name] = tuple(int(size) for size in sizes)
    return found


def _shape(
    spec: TensorSpec, traced: tuple[int, ...], options: CoreMLOptions, latents: Latents
) -> Any:
    import coremltools

    sizes = options.enumerated()
    if sizes and any(
        isinstance(dim, str) and symbolic(dim).symbol == "height" for dim in spec.shape
    ):
        shapes = []
        for height, width in sizes:
            sides = {"height": height // latents.factor, "width": width // latents.factor}
            shapes.append(_resolved(spec, traced, options.values["coreml_batch"], sides))
        return coremltools.EnumeratedShapes(shapes, default=shapes[0])
    low, high = (side // latents.factor for side in options.bounds(latents))
    usual = {"height": latents.default_height, "width": latents.default_width}
    ranges = {
        name: coremltools.RangeDim(low, high, min(max(side // latents.factor, low), high))
        for name, side in usual.items()
    }
    return coremltools.Shape(_resolved(spec, traced, options.values["coreml_batch"], ranges))


def _resolved(
    spec: TensorSpec, traced: tuple[int, ...], batch: int, sides: dict[str, Any]
) -> tuple[Any, ...]:
    values = {"batch": batch, **sides}
    return tuple(_dimension(dim, values, was) for dim, was in zip(spec.shape, traced, strict=True))


def _dimension(dim: int | str, values: dict[str, Any], was: int) -> Any:
    """A manifest dimension such as ``"8*height"``; what was traced where its symbol is open."""
    if isinstance(dim, int):
        return dim
    factor, name, _ = symbolic(dim)  # of inputs, which have no offset
    if name not in values:
        return was
    value = values[name]
    if isinstance(value, int):
        return factor * value
    bounds = (value.lower_bound, value.upper_bound, value.default)
    return value if factor == 1 else type(value)(*(factor * bound for bound in bounds))
