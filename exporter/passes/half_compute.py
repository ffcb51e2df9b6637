"""Compute in half precision, typed in the graph, with float32 inputs and outputs.

Products (linear, convolution, attention, embedding) and what follows them are half. Kept in
float32: normalisation, powers, sines, exponentials and sums, and everything between the float32
inputs and the first product, which is where the table of the time embedding's frequencies is
multiplied by timesteps near 1000 (rounding that table alone costs a relative error of 5e-3).
The split is that of PyTorch's autocast, less its casts at run time.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from latentc.exporter.stored_weights import finite, later
from latentc.runtimes.errors import ExportError

_aten = torch.ops.aten
_HALF = {
    _aten.linear.default,
    _aten.conv1d.default,
    _aten.conv2d.default,
    _aten.conv3d.default,
    _aten.conv_transpose2d.input,
    _aten.convolution.default,
    _aten.matmul.default,
    _aten.mm.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _aten.baddbmm.default,
    _aten.einsum.default,
    _aten.embedding.default,
    _aten.scaled_dot_product_attention.default,
}
_FULL = {
    "sin cos tan exp exp2 expm1 log log2 log10 log1p pow rsqrt sqrt reciprocal erf cumsum cumprod "
    "group_norm layer_norm rms_norm instance_norm batch_norm native_layer_norm native_group_norm "
    "sum mean var std norm linalg_vector_norm softmax log_softmax _softmax prod logsumexp "
    "square var_mean std_mean linalg_norm"
}
_FULL_NAMES = {f"aten::{name}" for line in _FULL for name in line.split()}
_CASTS = {_aten.to.dtype, _aten.to.dtype_layout, _aten._to_copy.default, _aten.to.device}
_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_MASK = 3  # of attention's arguments


class Kind(Enum):
    """A kind says how a float32 value of the captured program fares."""

    HALF = 1
    FULL = 2
    WEAK = 3  # a weight or made of weights only: takes the type of what it is combined with


def rewrite(program: ExportedProgram, half: torch.dtype) -> int:
    """Rewrite `program` in place; returns the number of operations that are half now.

    Raises:
        ExportError: a weight is outside of the type's range, or an operation writes in place.
    """
    graph = program.graph_module.graph
    simplify(graph)
    kinds = classify(program, half)
    casts: dict[tuple[Node, torch.dtype], Node] = {}
    for node in list(graph.nodes):
        if node.op == "output":
            _retype_outputs(program, node, half, casts, kinds)
        elif node.op == "call_function" and node in kinds:
            wanted = half if kinds[node] is Kind.HALF else torch.float32
            _retype_inputs(graph, node, wanted, half, casts, kinds)
            if wanted is half:
                node.meta["val"] = _as(node.meta["val"], half)
    _store_weights(program, half, casts)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return sum(kind is Kind.HALF for kind in kinds.values())


def simplify(graph: Graph) -> None:
    """Drop assertions about dtypes and casts of float32 to float32: both were true of the
    captured program only."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target in _CASTS and _is_full(node) and _is_full(node.args[0]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def classify(program: ExportedProgram, half: torch.dtype) -> dict[Node, Kind]:
    """Return the kind of every float32 value of a simplified program."""
    weights = {
        spec.arg.name for spec in program.graph_signature.input_specs if spec.kind in _WEIGHTS
    }
    kinds: dict[Node, Kind] = {}
    for node in program.graph_module.graph.nodes:
        if not _is_full(node) or node.op == "output":
            continue
        if node.op == "placeholder":
            kinds[node] = Kind.WEAK if node.name in weights else Kind.FULL
        elif node.op == "call_function":
            kinds[node] = _kind(node, kinds, half)
    return kinds


def _kind(node: Node, kinds: dict[Node, Kind], half: torch.dtype) -> Kind:
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        raise ExportError(f"{node.name}: {schema.name} writes in place; it cannot be retyped")
    if node.target in _HALF:
        return Kind.HALF
    if schema is not None and schema.name in _FULL_NAMES:
        return Kind.FULL
    if node.target is _aten.mul.Tensor and node.args[0] is node.args[1]:
        return Kind.FULL  # a square, as of a variance
    if node.kwargs.get("dtype") is torch.float32 or _huge_scalar(node, half):
        return Kind.FULL
    given = {kinds[each] for each in node.all_input_nodes if each in kinds}
    for kind in (Kind.FULL, Kind.HALF, Kind.WEAK):
        if kind in given:
            return kind
    return Kind.FULL  # made of integers or of nothing: a table


def _retype_outputs(
    program: ExportedProgram,
    output: Node,
    half: torch.dtype,
    casts: dict[tuple[Node, torch.dtype], Node],
    kinds: dict[Node, Kind],
) -> None:
    """Give the program's outputs in float32; its signature names them."""
    before = output.all_input_nodes
    _retype_inputs(program.graph_module.graph, output, torch.float32, half, casts, kinds)
    for old, new in zip(before, output.all_input_nodes, strict=True):
        if old is not new:
            program.graph_signature.replace_all_uses(old.name, new.name)


def _retype_inputs(
    graph: Graph,
    node: Node,
    wanted: torch.dtype,
    half: torch.dtype,
    casts: dict[tuple[Node, torch.dtype], Node],
    kinds: dict[Node, Kind],
) -> None:
    """Give an operation all its floating-point inputs in one type."""
    for each in node.all_input_nodes:
        if each not in kinds or _dtype(each) in (wanted, None):
            continue
        if (each, wanted) not in casts:
            casts[each, wanted] = _cast(graph, each, wanted, _is_mask(node, each))
        node.replace_input_with(each, casts[each, wanted])


def _cast(graph: Graph, node: Node, wanted: torch.dtype, mask: bool) -> Node:
    """Return a cast right behind a node; a mask's minus infinity must stay within the type."""
    place = node
    if node.op == "placeholder":
        place = [other for other in graph.nodes if other.op == "placeholder"][-1]
    with graph.inserting_after(place):
        if mask:
            limits = (node, torch.finfo(wanted).min, torch.finfo(wanted).max)
            clamped = graph.call_function(_aten.clamp.default, limits)
            clamped.meta["val"] = node.meta["val"]
            node = place = clamped
    with graph.inserting_after(place):
        cast = graph.call_function(_aten._to_copy.default, (node,), {"dtype": wanted})
    cast.meta["val"] = _as(node.meta["val"], wanted)
    return cast


def _store_weights(
    program: ExportedProgram, half: torch.dtype, casts: dict[tuple[Node, torch.dtype], Node]
) -> None:
    """Store parameters in half precision that are used in it only."""
    targets = {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.PARAMETER and spec.target is not None
    }
    for (node, dtype), cast in casts.items():
        if dtype is not half or node.name not in targets or set(node.users) != {cast}:
            continue
        name = targets[node.name]
        program.state_dict[name] = _stored(name, program.state_dict[name], half)
        node.meta["val"] = _as(node.meta["val"], half)
        cast.replace_all_uses_with(node)
        program.graph_module.graph.erase_node(cast)


def _stored(name: str, weight: torch.Tensor, half: torch.dtype) -> torch.Tensor:
    made = later(weight, half)
    if not finite(made):
        raise ExportError(f"{name}: a weight is outside {half}'s range; use --precision fp32")
    return made


def _is_mask(node: Node, value: Node) -> bool:
    if node.target is not _aten.scaled_dot_product_attention.default:
        return False
    return value is node.kwargs.get("attn_mask") or value in node.args[_MASK : _MASK + 1]


def _huge_scalar(node: Node, half: torch.dtype) -> bool:
    limit = torch.finfo(half).max
    numbers = [value for value in node.args if isinstance(value, int | float)]
    return any(
        abs(value) > limit for value in numbers if value not in (float("inf"), -float("inf"))
    )


def _is_full(node: Any) -> bool:
    return isinstance(node, Node) and _dtype(node) is torch.float32


def _dtype(node: Node) -> torch.dtype | None:
    """Return the type of a node's tensor, or of the first of several; None where it has none."""
    values = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
    return values[0].dtype if values else None


def _as(value: Any, dtype: torch.dtype) -> Any:
    def retyped(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return pytree.tree_map_only(torch.Tensor, retyped, value)
