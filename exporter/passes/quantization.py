"""This module holds what the quantising passes share: where weights are, and how integers stand in
a program.

Integers are written with PyTorch's own operators for quantised programs, the namespace
``quantized_decomposed``: a weight becomes an int8 tensor and a dequantisation, an activation a
quantisation followed by a dequantisation. PyTorch runs such a program as it is, and each target
has a form of its own for these operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Graph, Node

operators = torch.ops.quantized_decomposed
CONVOLUTIONS = (torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default)
LINEAR = torch.ops.aten.linear.default
# The first and the last layer of a network have few channels on one side, weigh nothing and
# spoil most: nine tenths of the error of a small UNet in int8 came from its last convolution.
FEWEST_CHANNELS = 16


@dataclass(frozen=True)
class Site:
    """A weight [out, in, …] and the layers that it is multiplied in (several if it is shared)."""

    name: str
    weight: Node
    layers: tuple[Node, ...]

    @property
    def linear(self) -> bool:
        return all(layer.target is LINEAR for layer in self.layers)


def sites(program: ExportedProgram) -> Iterator[Site]:
    """Yield every weight of convolutions and linear layers only that is worth quantising."""
    names = {
        spec.arg.name: str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.PARAMETER
    }
    for node in program.graph_module.graph.nodes:
        if node.op != "placeholder" or node.name not in names:
            continue
        weight, layers = program.state_dict[names[node.name]], tuple(node.users)
        matrix = weight.is_floating_point() and weight.dim() >= 2
        large = matrix and min(weight.shape[:2]) >= FEWEST_CHANNELS
        if layers and large and all(_multiplies(layer, node) for layer in layers):
            yield Site(names[node.name], node, layers)


def _multiplies(layer: Node, weight: Node) -> bool:
    known = layer.target is LINEAR or layer.target in CONVOLUTIONS
    return known and layer.args[1] is weight and layer.args[0] is not weight


def replace_weight(
    program: ExportedProgram,
    site: Site,
    integers: torch.Tensor,
    target: Any,
    scale: torch.Tensor,
    rest: tuple[Any, ...],
) -> None:
    """Put int8 `integers` in the place of a weight, and ``target(integers, scale, zero points,
    *rest)`` behind it. `scale` has the weight's own type, and so has what is dequantised."""
    graph = program.graph_module.graph
    full = site.weight.meta["val"]
    zeros = torch.zeros(scale.shape, dtype=torch.int8)
    constants = [
        _add_constant(program, f"{site.name}_{kind}", value, full)
        for kind, value in (("scale", scale), ("zero_point", zeros))
    ]
    program.state_dict[site.name] = torch.nn.Parameter(integers, requires_grad=False)
    named = out_dtype(full) if target is operators.dequantize_per_channel.default else {}
    with graph.inserting_after(last_placeholder(graph)):
        made = graph.call_function(target, (site.weight, *constants, *rest), named)
    made.meta["val"] = full
    site.weight.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    site.weight.meta["val"] = full.to(torch.int8)


def out_dtype(value: Any) -> dict[str, torch.dtype]:
    """Return the argument that makes the operators' result as `value` is: they give float32 by
    themselves.
    """
    return {} if value.dtype is torch.float32 else {"out_dtype": value.dtype}


def _add_constant(program: ExportedProgram, name: str, value: torch.Tensor, like: Any) -> Node:
    """Return the node of a tensor added beside the weights, as a buffer of the program.

    `like` is any fake tensor.
    """
    graph = program.graph_module.graph
    first = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_before(first):
        node: Node = graph.placeholder("b_" + name.replace(".", "_"))
    node.meta["val"] = like.fake_mode.from_tensor(value, static_shapes=True)
    argument = TensorArgument(node.name)
    program.graph_signature.input_specs.insert(
        0, InputSpec(InputKind.BUFFER, argument, name, persistent=True)
    )
    program.state_dict[name] = value
    return node


def last_placeholder(graph: Graph) -> Node:
    found: Node = [node for node in graph.nodes if node.op == "placeholder"][-1]
    return found
