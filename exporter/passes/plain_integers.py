"""Dequantised weights as casts and products, for readers that do not know the operators.

``dequantize_per_channel(w, s)`` becomes ``float(w) * s``, and by groups the same on
[out, groups, inputs of a group]: the forms that OpenVINO keeps compressed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from latentc.exporter.passes import Choices
from latentc.exporter.passes.nodes import add
from latentc.exporter.passes.quantization import operators

_ATEN = torch.ops.aten


def run(program: ExportedProgram, choices: Choices) -> int:
    """Rewrite `program`; returns the number of weights that were rewritten."""
    graph = program.graph_module.graph
    forms = {
        operators.dequantize_per_channel.default: _per_channel,
        operators.dequantize_per_channel_group.default: _per_group,
    }
    changed = 0
    for node in list(graph.nodes):
        if node.target in forms:
            with graph.inserting_before(node):
                made = forms[node.target](node)
            node.replace_all_uses_with(made)
            graph.erase_node(node)
            changed += 1
    program.graph_module.recompile()
    return changed


def _per_channel(node: Node) -> Node:
    weight, scale = node.args[:2]
    shape = [-1] + [1] * (node.meta["val"].dim() - 1)
    full = add(node.graph, _ATEN._to_copy.default, weight, dtype=torch.float32)
    return add(node.graph, _ATEN.mul.Tensor, full, _view(node, scale, shape))


def _per_group(node: Node) -> Node:
    weight, scale = node.args[:2]
    outputs, inputs = node.meta["val"].shape
    group: Any = node.args[6]
    grouped = _view(node, weight, [outputs, inputs // group, group])
    full = add(node.graph, _ATEN._to_copy.default, grouped, dtype=torch.float32)
    scales = _view(node, scale, [outputs, inputs // group, 1])
    return _view(node, add(node.graph, _ATEN.mul.Tensor, full, scales), [outputs, inputs])


def _view(node: Node, value: Any, shape: list[int]) -> Node:
    return add(node.graph, _ATEN.view.default, value, shape)
