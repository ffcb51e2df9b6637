"""Attention head by head, in the layout that Apple's Neural Engine prefers.

After "Deploying Transformers on the Apple Neural Engine" (Apple, 2022,
https://machinelearning.apple.com/research/neural-engine-transformers) and the variant
``SPLIT_EINSUM`` of Apple's ml-stable-diffusion: channels second and the sequence last
[batch, channels, 1, sequence], a product of its own for each head, so that no tensor holds the
scores of all heads, and both products in the one form of einsum that ML Programs have, which
needs no transposes: ``nchw,nwhu->nchu``.

Attention with a mask (that of text encoders) is left as it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.export import ExportedProgram

from latentc.exporter.passes import Choices
from latentc.exporter.passes.nodes import add, unmasked_attention

_ATEN = torch.ops.aten


def run(program: ExportedProgram, choices: Choices, query_chunk: int = 0) -> int:
    """Rewrite `program`; returns how many attentions were rewritten.

    Args:
        query_chunk: how many queries to treat at a time; 0 for all at once.
    """
    graph = program.graph_module.graph
    changed = 0
    for node in list(graph.nodes):
        if unmasked_attention(node):
            with graph.inserting_before(node):
                query, key, value = node.args[:3]
                made = _Writer(graph, query_chunk).attention(query, key, value, _scale(node))
            node.replace_all_uses_with(made)
            graph.erase_node(node)
            changed += 1
    program.graph_module.recompile()
    return changed


class _Writer:
    """Adds nodes to a graph, with the values that `torch.export` keeps about each."""

    def __init__(self, graph: torch.fx.Graph, query_chunk: int) -> None:
        self._graph = graph
        self._chunk = query_chunk

    def attention(
        self, query: torch.fx.Node, key: torch.fx.Node, value: torch.fx.Node, scale: float
    ) -> torch.fx.Node:
        """Return the attention of query, key, value [batch, heads, sequence, width], of query's
        shape.
        """
        scaled = self.add(_ATEN.mul.Tensor, query, scale)
        queries = self.add(_ATEN.permute.default, scaled, [0, 3, 1, 2])  # b c h q
        keys = self.add(_ATEN.permute.default, key, [0, 2, 1, 3])  # b k h c
        values = self.add(_ATEN.permute.default, value, [0, 3, 1, 2])  # b c h k
        heads = [
            self._head(*(self._slice(each, 2, head, head + 1) for each in (queries, keys, values)))
            for head in range(query.meta["val"].shape[1])
        ]
        joined = self.add(_ATEN.cat.default, heads, 2)
        return self.add(_ATEN.permute.default, joined, [0, 2, 3, 1])

    def _head(
        self, query: torch.fx.Node, key: torch.fx.Node, value: torch.fx.Node
    ) -> torch.fx.Node:
        parts = []
        for part in self._parts(query):
            scores = self.add(_ATEN.einsum.default, "bkhc,bchq->bkhq", [key, part])
            weights = self.add(_ATEN.softmax.int, scores, 1)
            parts.append(self.add(_ATEN.einsum.default, "bchk,bkhq->bchq", [value, weights]))
        return self.add(_ATEN.cat.default, parts, 3) if len(parts) > 1 else parts[0]

    def _parts(self, query: torch.fx.Node) -> list[torch.fx.Node]:
        length = query.meta["val"].shape[3]
        if not self._chunk or not isinstance(length, int) or length <= self._chunk:
            return [query]
        starts = range(0, length, self._chunk)
        return [self._slice(query, 3, at, min(at + self._chunk, length)) for at in starts]

    def _slice(self, node: torch.fx.Node, axis: int, begin: int, end: int) -> torch.fx.Node:
        return self.add(_ATEN.slice.Tensor, node, axis, begin, end)

    def add(self, target: Any, *arguments: Any) -> torch.fx.Node:
        return add(self._graph, target, *arguments)


def _scale(node: torch.fx.Node) -> float:
    """Return the given scale, else one over the root of the width."""
    query: Any = node.args[0]
    scale: Any = node.kwargs.get("scale")
    return 1 / math.sqrt(query.meta["val"].shape[-1]) if scale is None else float(scale)
