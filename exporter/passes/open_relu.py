"""ReLU as a choice between 0 and the value, for engines whose maximum makes 0 of NaN.

OpenVINO's ReLU and clamp on a CPU are maxima of the processor's, which give the second operand
where the first one is NaN: a failure inside of a model would become a plausible number. Its choice
keeps NaN, and its results are ReLU's to the bit.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from exporter.passes import Choices
from exporter.passes.nodes import add

_ATEN = torch.ops.aten
_RELU = (_ATEN.relu.default, _ATEN.relu_.default)


def run(program: ExportedProgram, choices: Choices) -> int:
    """Rewrite `program`; returns the number of operations that were rewritten."""
    graph = program.graph_module.graph
    changed = 0
    for node in list(graph.nodes):
        if node.target not in _RELU:
            continue
        (value,) = node.args
        if node.target is _ATEN.relu_.default and len(value.users) > 1:
            continue  # somebody else reads what it has overwritten
        with graph.inserting_before(node):
            below = add(graph, _ATEN.lt.Scalar, value, 0)
            zero = add(graph, _ATEN.zeros_like.default, value)
            chosen = add(graph, _ATEN.where.self, below, zero, value)
        node.replace_all_uses_with(chosen)
        program.graph_signature.replace_all_uses(node.name, chosen.name)
        graph.erase_node(node)
        changed += 1
    program.graph_module.recompile()
    return changed
