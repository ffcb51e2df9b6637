"""Operators that a target does not know, taken apart one by one.

`ExportedProgram.run_decompositions` traces a whole program again, symbol by symbol, to take apart
the few operators that need it, or none: more than half of the time of a lowering. Here the others
stay as they are.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch._export.utils import _is_preservable_cia_op
from torch._export.verifier import load_verifier
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, TensorArgument
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

_OF_MEMORY = (torch.ops.aten.sym_stride.int, torch.ops.aten.sym_storage_offset.default)
Table = Mapping[Any, Callable[..., Any]]
_Own = dict[Any, Callable[..., Any]]


def decomposed(program: ExportedProgram, table: Table) -> ExportedProgram:
    """Return the program with operators taken apart.

    They are those that `table` has a function for, or that torch takes apart whatever the table
    says: those made of others that may return a view.

    A graph that changes its inputs is left to torch, and operators that come with constants.
    The result's own `run_decompositions`, which the converters call, returns it as it is.
    """
    changed: ExportedProgram
    functions = dict(table)
    graph = None if any(map(_is_mutable, program.graph.nodes)) else _graph(program, functions)
    if graph is None:
        changed = program.run_decompositions(functions)
    else:
        module = GraphModule(program.graph_module, graph)
        module.meta.update(program.graph_module.meta)
        dialect = [load_verifier("ATEN")]
        changed = program._update(module, _signature(program, graph), verifiers=dialect)
    object.__setattr__(changed, "run_decompositions", lambda *_, **__: changed)
    return changed


def _graph(program: ExportedProgram, table: _Own) -> Graph | None:
    graph = Graph()
    known: dict[Node, Any] = {}
    traced: dict[str, Graph | None] = {}
    mode = _fake_mode(program)
    for node in program.graph.nodes:
        if node.op == "output":
            graph.output(torch.fx.map_arg(node.args[0], known.__getitem__)).meta = dict(node.meta)
        elif _is_item(node) and isinstance(known[node.args[0]], list | tuple):
            known[node] = known[node.args[0]][node.args[1]]
        elif mode is not None and _is_taken_apart(node, table):
            kind = _kind(node)
            if kind not in traced:
                traced[kind] = _traced(node, table, mode)
            parts = traced[kind]
            if parts is None:
                return None
            known[node] = _inlined(graph, node, parts, known)
        else:
            known[node] = graph.node_copy(node, known.__getitem__)
    return graph


def _signature(program: ExportedProgram, graph: Graph) -> ExportGraphSignature:
    """Return the signature with the names that arguments and results have now: a graph renames what
    is called like a function of Python.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = [
        replace(spec, arg=replace(spec.arg, name=node.name))
        for spec, node in zip(program.graph_signature.input_specs, placeholders, strict=True)
    ]
    results: Any = graph.output_node().args[0]
    outputs = [
        replace(spec, arg=replace(spec.arg, name=result.name))
        if isinstance(result, Node) and isinstance(spec.arg, TensorArgument)
        else spec
        for spec, result in zip(program.graph_signature.output_specs, results, strict=True)
    ]
    return ExportGraphSignature(inputs, outputs)


def _is_mutable(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _fake_mode(program: ExportedProgram) -> FakeTensorMode | None:
    for node in program.graph.nodes:
        if isinstance(node.meta.get("val"), torch._subclasses.FakeTensor):
            mode: FakeTensorMode = node.meta["val"].fake_mode
            return mode
    return None


def _is_item(node: Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def _is_taken_apart(node: Node, table: _Own) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return target in table or (target._can_decompose() and not _is_preservable_cia_op(target))


def _kind(node: Node) -> str:
    """Return a key of what an operator's parts depend on.

    That is the operator itself, its numbers, and the shapes, strides, types and devices of its
    tensors.
    """
    place = {each: index for index, each in enumerate(node.all_input_nodes)}

    def told(argument: Node) -> str:
        value = argument.meta["val"]
        if isinstance(value, torch.Tensor):
            value = (value.shape, value.stride(), value.dtype, value.device)
        return f"<{place[argument]}: {value}>"

    return f"{node.target} {torch.fx.map_arg((node.args, node.kwargs), told)}"


def _traced(node: Node, table: _Own, mode: FakeTensorMode) -> Graph | None:
    """Return the graph that an operator is made of, whose inputs are its arguments that are nodes;
    None if that cannot stand in another graph.
    """
    values = [each.meta["val"] for each in node.all_input_nodes]

    def call(*given: Any) -> Any:
        value_by_node = dict(zip(node.all_input_nodes, given, strict=True))
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value_by_node.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with mode, torch.no_grad():
        graph: Graph = make_fx(call, decomposition_table=table)(*values).graph
    for each in list(graph.nodes):
        if each.target is torch.ops.aten.sym_numel.default:
            _by_sizes(graph, each)
    graph.eliminate_dead_code()
    foreign = any(
        each.op in ("get_attr", "call_module") or each.target in _OF_MEMORY for each in graph.nodes
    )
    return None if foreign or any(map(_is_mutable, graph.nodes)) else graph


def _by_sizes(graph: Graph, node: Node) -> None:
    """Say a number of elements as a product of sizes, which converters know."""
    tensor: Any = node.args[0]
    sizes = tensor.meta["val"].shape
    value: Any = math.prod(size for size in sizes if isinstance(size, int))
    product: Any = value
    with graph.inserting_before(node):
        for axis, size in enumerate(sizes):
            if isinstance(size, int):
                continue
            factor = graph.call_function(torch.ops.aten.sym_size.int, (tensor, axis))
            factor.meta["val"] = size
            value = value * size
            if product == 1:
                product = factor
            else:
                product = graph.call_function(operator.mul, (product, factor))
                product.meta["val"] = value
    node.replace_all_uses_with(product)


def _inlined(graph: Graph, node: Node, parts: Graph, known: Mapping[Node, Any]) -> Any:
    """Copy a traced operator into `graph`; returns what stands for its result."""
    own: dict[Node, Any] = {}
    given = iter(node.all_input_nodes)
    for each in parts.nodes:
        if each.op == "placeholder":
            own[each] = known[next(given)]
        elif each.op == "output":
            return torch.fx.map_arg(each.args[0], own.__getitem__)
        else:
            own[each] = graph.node_copy(each, own.__getitem__)
            own[each].meta = {**node.meta, "val": each.meta.get("val")}
    raise AssertionError("a traced graph has an output")
