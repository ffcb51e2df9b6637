"""Store weights as float16, compute as before.

Each large float32 parameter becomes a float16 one followed by a cast. Tables that are not
parameters stay float32: rounding the sinusoidal frequencies of the time embedding, which are
multiplied by timesteps near 1000, costs a relative error of 5e-3 in every backend.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from latentc.exporter.passes import Choices
from latentc.exporter.stored_weights import finite, later
from latentc.runtimes.errors import ExportError

SMALLEST = 1024  # elements; norms and biases weigh nothing and are better left exact


def run(program: ExportedProgram, choices: Choices) -> int:
    """Rewrite `program`; returns the number of parameters that are float16 now.

    Raises:
        ExportError: a weight does not fit into float16's range.
    """
    names = {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.PARAMETER and spec.target is not None
    }
    graph = program.graph_module.graph
    changed = 0
    for node in list(graph.nodes):
        if node.op != "placeholder" or node.name not in names:
            continue
        weight = program.state_dict[names[node.name]]
        if weight.dtype is not torch.float32 or weight.numel() < SMALLEST:
            continue
        program.state_dict[names[node.name]] = _halve(names[node.name], weight)
        _cast_after(graph, node)
        changed += 1
    program.graph_module.recompile()
    return changed


def _halve(name: str, weight: torch.Tensor) -> torch.Tensor:
    half = later(weight, torch.float16)
    if not finite(half):
        raise ExportError(f"{name}: a weight is outside float16's range; use --precision fp32")
    return half


def _cast_after(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    full = node.meta["val"]
    last_placeholder = [other for other in graph.nodes if other.op == "placeholder"][-1]
    with graph.inserting_after(last_placeholder):
        cast = graph.call_function(
            torch.ops.aten._to_copy.default, (node,), {"dtype": torch.float32}
        )
    cast.meta["val"] = full
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    node.meta["val"] = full.to(torch.float16)
