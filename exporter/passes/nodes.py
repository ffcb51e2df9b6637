"""This module holds what passes that write nodes share: nodes with the values that `torch.export`
keeps of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def add(graph: Graph, target: Any, *arguments: Any, **keywords: Any) -> Node:
    """Return a call of an operator, added at the graph's point of insertion.

    What the node's value looks like is computed.
    """
    node: Node = graph.call_function(target, arguments, keywords)
    update(node)
    return node


def update(node: Node) -> None:
    """Compute anew what a node's value looks like, after what goes into it has changed."""
    target: Any = node.target
    with torch.no_grad():
        node.meta["val"] = target(*_values(node.args), **_values(node.kwargs))


def unmasked_attention(node: Node) -> bool:
    """Return whether the node is an attention in which every query looks at every key."""
    if node.target is not _ATTENTION:
        return False
    return _argument(node, 3, "attn_mask") is None and not _argument(node, 5, "is_causal")


def _values(arguments: Any) -> Any:
    if isinstance(arguments, Node):
        return arguments.meta["val"]
    if isinstance(arguments, tuple):
        return tuple(_values(each) for each in arguments)
    if isinstance(arguments, list):  # the graph's own lists cannot be changed
        return [_values(argument) for argument in arguments]
    if isinstance(arguments, dict):
        return {name: _values(each) for name, each in arguments.items()}
    return arguments


def _argument(node: Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)
