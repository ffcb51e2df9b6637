"""Multiply in 8 bits: quantise what goes into convolutions and linear layers.

One scale and zero point for a whole activation, from the range that calibration met. Left as
they are: attention's products, and layers that cost little and spoil much, which are those of the
time embedding and other vectors (activations [batch, channels]), and the first and the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from latentc.exporter.passes import Choices, Range
from latentc.exporter.passes.quantization import Site, last_placeholder, operators, out_dtype, sites
from latentc.runtimes.errors import ExportError

CALIBRATED = True
LOWEST, HIGHEST = -128, 127


def run(program: ExportedProgram, choices: Choices, symmetric: bool = False) -> int:
    """Rewrite `program`; returns the number of activations that are quantised now.

    Args:
        symmetric: zero stays zero, as TensorRT wants it.

    Raises:
        ExportError: a layer's range is not known.
    """
    graph = program.graph_module.graph
    made: dict[tuple[Node, Range], Node] = {}
    for layer in list(quantized_layers(program, choices.kept)):
        found = choices.ranges.get(layer.name)
        if found is None:
            raise ExportError(f"{layer.name}: calibration has not met this layer")
        activation = layer.args[0]
        assert isinstance(activation, Node)
        if (activation, found) not in made:
            made[activation, found] = _quantized(program, activation, *_numbers(found, symmetric))
        layer.replace_input_with(activation, made[activation, found])
    graph.lint()
    program.graph_module.recompile()
    return len(made)


def quantized_layers(program: ExportedProgram, kept: frozenset[str]) -> Iterator[Node]:
    """Yield the layers whose activations are to be quantised."""
    for site in sites(program):
        if site.name not in kept and _pays(site):
            yield from site.layers


def rounded(activation: torch.Tensor, found: Range, symmetric: bool = False) -> torch.Tensor:
    """Return the values that an activation has after this pass."""
    scale, zero_point = _numbers(found, symmetric)
    return torch.fake_quantize_per_tensor_affine(activation, scale, zero_point, LOWEST, HIGHEST)


def _pays(site: Site) -> bool:
    activations: list[Any] = [layer.args[0] for layer in site.layers]
    return all(activation.meta["val"].dim() >= 3 for activation in activations)


def _numbers(found: Range, symmetric: bool) -> tuple[float, int]:
    """Scale and zero point. Zero is always among the values: padding is zero."""
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    if symmetric:
        return max(-low, high, 1e-12) / HIGHEST, 0
    scale = max(high - low, 1e-12) / (HIGHEST - LOWEST)
    return scale, round(LOWEST - low / scale)


def _quantized(program: ExportedProgram, activation: Node, scale: float, zero_point: int) -> Node:
    graph = program.graph_module.graph
    full = activation.meta["val"]
    scale = float(torch.tensor(scale).to(full.dtype))  # the engines' scales are of this type
    place = activation
    if activation.op == "placeholder":
        place = last_placeholder(graph)
    numbers = (scale, zero_point, LOWEST, HIGHEST, torch.int8)
    with graph.inserting_after(place):
        integers = graph.call_function(
            operators.quantize_per_tensor.default, (activation, *numbers)
        )
    with graph.inserting_after(integers):
        back: Node = graph.call_function(
            operators.dequantize_per_tensor.default, (integers, *numbers), out_dtype(full)
        )
    integers.meta["val"] = full.to(torch.int8)
    back.meta["val"] = full
    return back
