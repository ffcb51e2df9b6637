"""Would a program overflow in half precision? Run in float32 and looked at, before it is typed.

Looking at every value that would be half finds also what an output does not show: an infinite
attention score becomes a picture that is wrong in one place, or black.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from exporter.capture import example_inputs
from exporter.families import Graph
from exporter.passes import half_compute
from runtimes.manifest import Probes

Inputs = Mapping[str, torch.Tensor]
# Other pictures reach further than the probes: a value may be at most half of the largest.
HEADROOM = 2.0


def problem(program: ExportedProgram, half: torch.dtype, samples: Iterable[Inputs]) -> str:
    """What would overflow, in a few words; "" if nothing does.

    Args:
        program: computes in float32; it is not changed.
        samples: inputs by name, float32 or integer, as the program takes them.
    """
    watched = _copy_without_weights(program)
    half_compute.simplify(watched.graph_module.graph)
    kinds = half_compute.classify(watched, half)
    limit = torch.finfo(half).max / HEADROOM
    typed = {node for node, kind in kinds.items() if kind is half_compute.Kind.HALF}
    for sample in samples:
        watch = _Watch(watched, typed, limit)
        with torch.no_grad():
            watch.run(*_flat(watched, sample))
        if watch.worst > limit:
            largest = f"{watch.worst:.3g}" if math.isfinite(watch.worst) else "infinity"
            return f"{watch.where} reaches {largest}, {half} ends at {torch.finfo(half).max:.3g}"
    return ""


def probe_samples(graph: Graph, probes: Probes | None, folder: Path) -> Iterator[Inputs]:
    """The inputs of a component's probes, or without probes random ones (of another size than
    those that were traced, if the size is open)."""
    if probes is None or graph.component.name not in probes.files:
        sizes = {"batch": 2, "height": 32, "width": 24, "sequence": 77}
        yield example_inputs(graph, sizes, seed=1)
        return
    with np.load(folder / probes.files[graph.component.name].path, allow_pickle=False) as archive:
        names = dict.fromkeys(key.partition("/")[0] for key in archive.files)
        for name in names:
            yield {
                tensor: torch.from_numpy(archive[f"{name}/in/{tensor}"])
                for tensor in graph.component.inputs
            }


class _Watch(Interpreter):
    """Runs a program and remembers the largest value that would be half."""

    def __init__(self, program: ExportedProgram, typed: set[Node], limit: float) -> None:
        super().__init__(program.graph_module)
        self._typed = typed
        self._limit = limit
        self.worst = 0.0
        self.where = ""

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self._typed:
            self._look(n, result)
            arguments, keywords = self.fetch_args_kwargs_from_env(n)
            mask = n.target is torch.ops.aten.scaled_dot_product_attention.default
            if mask:
                self._look(n, _scores(*arguments, **keywords))
                arguments = arguments[:3]
            self._look(n, arguments)
        return result

    def _look(self, node: Node, values: Any) -> None:
        for value in pytree.tree_leaves(values):
            if isinstance(value, torch.Tensor) and value.dtype is torch.float32 and value.numel():
                largest = float(value.abs().max())
                if largest > self.worst or math.isnan(largest):
                    self.worst, self.where = (
                        (math.inf if math.isnan(largest) else largest),
                        node.name,
                    )


def _scores(query: torch.Tensor, key: torch.Tensor, *_: Any, scale: Any = None, **__: Any) -> Any:
    """The largest attention score there can be: the product of the longest vectors."""
    factor = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    return query.norm(dim=-1).amax() * key.norm(dim=-1).amax() * factor


def _flat(program: ExportedProgram, sample: Inputs) -> Iterator[torch.Tensor]:
    """The arguments of the graph: weights, tables and inputs in its own order."""
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            yield sample[spec.arg.name]
        elif spec.target in program.state_dict:
            yield program.state_dict[spec.target]
        else:
            yield program.constants[spec.target]


def _copy_without_weights(program: ExportedProgram) -> ExportedProgram:
    shared = {id(tensor): tensor for tensor in program.state_dict.values()}
    shared |= {id(tensor): tensor for tensor in program.constants.values()}
    return copy.deepcopy(program, shared)
