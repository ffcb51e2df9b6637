"""Would a program overflow in half precision? Run in float32 and looked at, before it is typed.

Looking at every value that would be half finds also what an output does not show: an infinite
attention score becomes an image that is wrong in one place, or black.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from latentc.exporter.capture.graphs import example_inputs
from latentc.exporter.capture.interpreter import Inputs, Watched
from latentc.exporter.components.description import Graph
from latentc.exporter.passes import half_compute
from latentc.runtimes.bundle.structures import Probes

# Other images reach further than the probes: a value may be at most half of the largest.
HEADROOM = 2.0


def problem(program: ExportedProgram, half: torch.dtype, samples: Iterable[Inputs]) -> str:
    """Return what would overflow, in a few words; "" if nothing does.

    Args:
        program: computes in float32; it is not changed.
        samples: inputs by name, float32 or integer, as the program takes them.
    """
    watched = Watched(program)
    half_compute.simplify(watched.program.graph_module.graph)
    kinds = half_compute.classify(watched.program, half)
    limit = torch.finfo(half).max / HEADROOM
    typed = {node for node, kind in kinds.items() if kind is half_compute.Kind.HALF}
    for sample in samples:
        largest = _Largest(typed)
        watched.run(sample, largest.look)
        if largest.value > limit:
            text = f"{largest.value:.3g}" if math.isfinite(largest.value) else "infinity"
            return f"{largest.where} reaches {text}, {half} ends at {torch.finfo(half).max:.3g}"
    return ""


def probe_samples(graph: Graph, probes: Probes | None, folder: Path) -> Iterator[Inputs]:
    """The inputs of a component's probes, or without probes random ones (of another size than
    those that were traced, if the size is open)."""
    if probes is None or graph.component.name not in probes.files:
        sizes = {"batch": 2, "height": 32, "width": 24, "sequence": 77, "frames": 2}
        yield example_inputs(graph, sizes, seed=1)
        return
    with np.load(folder / probes.files[graph.component.name].path, allow_pickle=False) as archive:
        names = dict.fromkeys(key.partition("/")[0] for key in archive.files)
        for name in names:
            yield {
                tensor: torch.from_numpy(archive[f"{name}/in/{tensor}"])
                for tensor in graph.component.inputs
            }


class _Largest:
    """Remembers the largest of the values that would be half, and where it was."""

    def __init__(self, typed: set[Node]) -> None:
        self._typed = typed
        self.value = 0.0
        self.where = ""

    def look(self, node: Node, arguments: tuple[Any, ...], result: Any) -> None:
        if node not in self._typed:
            return
        self._compare(node, result)
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            scale = node.kwargs.get("scale")
            self._compare(node, _largest_score(arguments[0], arguments[1], scale))
            arguments = arguments[:3]
        self._compare(node, arguments)

    def _compare(self, node: Node, values: Any) -> None:
        for value in pytree.tree_leaves(values):
            if isinstance(value, torch.Tensor) and value.dtype is torch.float32 and value.numel():
                largest = float(value.abs().max())
                if largest > self.value or math.isnan(largest):
                    self.value = math.inf if math.isnan(largest) else largest
                    self.where = node.name


def _largest_score(query: torch.Tensor, key: torch.Tensor, scale: Any) -> torch.Tensor:
    """The largest attention score there can be: the product of the longest vectors."""
    factor = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    made: torch.Tensor = query.norm(dim=-1).amax() * key.norm(dim=-1).amax() * factor
    return made
