"""Fewer keys and values in the largest self-attentions of a denoiser.

After "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images" (Smith et al.,
2024, https://arxiv.org/abs/2402.13573): neighbouring tokens of an image say nearly the same, so
every query is answered from a quarter of the keys and values, with a quarter of the products.

Where the paper takes one token of four, this takes their mean, which is much nearer to the
original (docs/decisions/0024). It is taken in front of the projections to keys and values, which
are linear for each token: the result is the same, and three quarters of their work is saved too.
Changed are the self-attentions of the highest resolution that has any; those below have a
sixteenth of the products. Attention to text and attention with a mask are left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from latentc.exporter.passes import Choices
from latentc.exporter.passes.nodes import add, unmasked_attention, update
from latentc.exporter.passes.quantization import LINEAR
from latentc.runtimes.errors import ExportError

FACTOR = 2  # of rows and of columns: the paper's for 1024 by 1024 pixels

_ATEN = torch.ops.aten
_RESHAPES = (_ATEN.reshape.default, _ATEN.view.default)
# Between a projection and its attention: heads are split off and moved forward.
_LAYOUT = (*_RESHAPES, _ATEN.transpose.int, _ATEN.permute.default)
_CHANNELS_LAST = [0, 2, 3, 1]


@dataclass(frozen=True)
class Place:
    """A self-attention over an image's tokens.

    tokens: float [batch, height × width, channels], row by row.
    grid: the same before it was flattened, [batch, height, width, channels].
    changing: the nodes from the projections to the attention, the attention left out.
    """

    tokens: Node
    grid: Node
    changing: tuple[Node, ...]

    @property
    def projections(self) -> list[Node]:
        """Return the projections of keys and of values."""
        return [node for node in self.changing if node.target is LINEAR]

    @property
    def count(self) -> int:
        """Return the number of tokens at the sizes that the program was traced with."""
        return _traced(self.grid, 1) * _traced(self.grid, 2)


def run(program: ExportedProgram, choices: Choices) -> int:
    """Rewrite `program`; returns how many attentions were changed.

    Raises:
        ExportError: there is no self-attention over the tokens of an image.
    """
    graph = program.graph_module.graph
    places = [place for node in graph.nodes if (place := _place(node)) is not None]
    if not places:
        raise ExportError(
            "downsampled-attention: the denoiser has no self-attention over an image's tokens "
            "that this pass knows (transformer blocks of a UNet); export without it"
        )
    most = max(place.count for place in places)
    largest = [place for place in places if place.count == most]
    for place in largest:
        _downsample(graph, place)
    graph.lint()
    program.graph_module.recompile()
    return len(largest)


def _downsample(graph: Graph, place: Place) -> None:
    with graph.inserting_before(place.tokens.next):
        fewer = _averaged(graph, place)
    for projection in place.projections:
        projection.replace_input_with(place.tokens, fewer)
    for node in place.changing:
        update(node)


def _averaged(graph: Graph, place: Place) -> Node:
    """Return the means of two by two neighbours, as tokens again.

    A last row or column without a neighbour is its own.

    Neighbours are selected by their numbers, and not by slices: OpenVINO takes sides that were
    halved by slices for the whole ones, and reshapes what has half of the size anyhow to the
    wrong shape.
    """
    channels = place.tokens.meta["val"].shape[2]
    sizes = [_size(graph, place.grid, axis) for axis in (0, 1, 2)]
    tokens = add(graph, _ATEN.reshape.default, place.tokens, [*sizes, channels])
    for axis in (1, 2):
        pair = [
            add(graph, _ATEN.index_select.default, tokens, axis, numbers)
            for numbers in _neighbours(graph, sizes[axis], tokens.meta["val"])
        ]
        tokens = add(graph, _ATEN.mul.Tensor, add(graph, _ATEN.add.Tensor, *pair), 1 / FACTOR)
    return add(graph, _ATEN.flatten.using_ints, tokens, 1, 2)


def _neighbours(graph: Graph, size: Node | int, like: Any) -> tuple[Node, Node]:
    """Return the numbers 0, 2, … and 1, 3, … below `size`, int64.

    The last of the second is that of the first where `size` is odd. `like` is any of the program's
    fake tensors.
    """
    kind: dict[str, Any] = {
        "dtype": torch.int64,
        "device": torch.device("cpu"),
        "pin_memory": False,
    }
    with like.fake_mode:
        every = add(graph, _ATEN.arange.start_step, 0, size, 1, **kind)
        first = add(graph, _ATEN.arange.start_step, 0, size, FACTOR, **kind)
        last = add(graph, _ATEN.amax.default, every, [0], True)
        second = add(graph, _ATEN.minimum.default, add(graph, _ATEN.add.Tensor, first, 1), last)
    return first, second


def _size(graph: Graph, node: Node, axis: int) -> Node | int:
    """Return a dimension: the number, or a node for it where it is open."""
    size = node.meta["val"].shape[axis]
    if isinstance(size, int):
        return size
    dimension: Node = graph.call_function(_ATEN.sym_size.int, (node, axis))
    dimension.meta["val"] = size
    return dimension


def _place(attention: Node) -> Place | None:
    """Return what there is to change about a node; None if it is no such self-attention."""
    if not unmasked_attention(attention):
        return None
    paths = [_path(node) for node in attention.args[:3]]
    tokens = {path[0].all_input_nodes[0] for path in paths if path}
    if not all(paths) or len(tokens) != 1:
        return None  # cross-attention has tokens of two kinds
    (source,) = tokens
    changing = [*paths[1], *paths[2]]
    if any(len(node.users) != 1 for node in changing) or source not in _sequences(tokens):
        return None
    grid = _grid(source)
    if grid is None:
        return None
    place = Place(source, grid, tuple(changing))
    return place if place.count == _traced(source, 1) else None  # nothing else among the tokens


def _path(end: Any) -> list[Node]:
    """Return the way from the projection of tokens to what attention takes, in order; empty if
    there is none.
    """
    nodes = [end]
    while nodes[-1].target in _LAYOUT:
        nodes.append(nodes[-1].args[0])
    return nodes[::-1] if nodes[-1].target is LINEAR else []


def _grid(tokens: Node) -> Node | None:
    """Return the image [batch, height, width, channels] that tokens were flattened from.

    It is looked for upstream, by way of other values [batch, tokens, channels].
    """
    waiting, seen = [tokens], {tokens}
    while waiting:
        node = waiting.pop()
        if node.target in _RESHAPES and _channels_last(node.args[0]):
            return node.all_input_nodes[0]
        above = [each for each in _sequences(node.all_input_nodes) if each not in seen]
        waiting += above
        seen.update(above)
    return None


def _sequences(nodes: Iterable[Node]) -> list[Node]:
    values = ((node, node.meta.get("val")) for node in nodes)
    return [node for node, v in values if isinstance(v, torch.Tensor) and v.dim() == 3]


def _channels_last(node: Any) -> bool:
    return node.target is _ATEN.permute.default and list(node.args[1]) == _CHANNELS_LAST


def _traced(node: Node, axis: int) -> int:
    size = node.meta["val"].shape[axis]
    return size if isinstance(size, int) else int(size.node.hint)
