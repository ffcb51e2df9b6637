"""TensorRT: a typed ONNX graph and a recipe to build an engine from it where the GPU is.

Nothing here needs TensorRT. The graph is for the strongly typed networks of TensorRT 10 and 11:
what it computes in is what the program says (see exporter/passes/half_compute.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.export import ExportedProgram

from latentc.exporter.components.description import Description
from latentc.exporter.targets.onnx import lowering as onnx
from latentc.runtimes.bundle.recipe import FORMAT, RECIPE, Recipe
from latentc.runtimes.bundle.sizes import Span, ranges, smallest_side, text_lengths
from latentc.runtimes.bundle.structures import Component
from latentc.runtimes.programs.dimensions import symbolic
from latentc.runtimes.programs.guidance import guidance_of
from latentc.runtimes.programs.latents import other_sizes

# TensorRT 10.0 reads operators up to opset 20; its Attention (opset 23) came with 10.14. The
# products and the softmax that attention is written as here are fused by all of them.
OPSET = 18
_OPSET_INTEGERS = 19  # the first whose integers may stand for float16
_OPSET_BF16 = 22  # the first in which a convolution may be bfloat16
MODEL = "model.onnx"  # as onnx.lower calls it
_MOST_IMAGES = 4


def lower(program: ExportedProgram, component: Component, folder: Path) -> str:
    """See `latentc.exporter.targets.Target`."""
    opsets = {torch.bfloat16: _OPSET_BF16, torch.int8: _OPSET_INTEGERS}
    kinds = {weight.dtype for weight in program.state_dict.values()}
    opset = max((opsets.get(kind, OPSET) for kind in kinds), default=OPSET)
    return onnx.lower(program, component, folder, opset)


def finish(
    component: Component, description: Description, precision: str, note: str, folder: Path
) -> None:
    """Write the recipe beside the graph; see `latentc.exporter.targets.Finishing`."""
    profile = default_profile(description)[component.name]
    symbols = {
        symbolic(dim).symbol
        for spec in component.inputs.values()
        for dim in spec.shape
        if isinstance(dim, str)
    }
    kept = {name: span for name, span in profile.items() if name in symbols}
    recipe = Recipe(format=FORMAT, precision=precision, profile=kept, note=note)
    (folder / RECIPE).write_bytes(recipe.encode())


def default_profile(description: Description) -> Mapping[str, Mapping[str, Span]]:
    """Return the ranges by component and symbol: optimised for one image of the default size (and
    of the default number of frames), good for the smallest one that there is to one and a half
    times the default, and for four images. The probes' shapes are within, so that `latentc verify`
    can repeat them."""
    from latentc.exporter.capture.graphs import symbol_values

    latents = description.latents
    probe = symbol_values(description, traced=False)
    unit = latents.factor * latents.multiple
    spans: dict[str, Span] = {"images": (1, 1, max(_MOST_IMAGES, probe["batch"]))}
    for name, usual in (("height", latents.default_height), ("width", latents.default_width)):
        largest = max(usual * 3 // 2, probe[name] * latents.factor) // unit * unit
        largest = min(largest, latents.factor * (latents.maximum or largest))
        smallest = smallest_side(latents)
        spans[name] = (smallest, max(smallest, usual // unit * unit), largest)
    components = [graph.component for graph in description.graphs]
    others = other_sizes(description.program)
    for name, symbol in others.items():
        size = max(symbol.default * 3 // 2, probe[name]) // symbol.multiple * symbol.multiple
        largest = min(size, symbol.most or size)
        span = (symbol.least, symbol.default, largest)
        low, usual, high = (symbol.argument_of(each) for each in span)
        spans[symbol.argument] = low, usual, high
    lengths = text_lengths(description.programs, components)
    guidance = guidance_of(description.program)
    return ranges(components, latents, guidance, spans, lengths, others)
