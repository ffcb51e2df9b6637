"""Attention masks: what engines need of them, and what must not be done to results under them.

Masks that are the same for all queries are written out for ONNX Runtime. ONNX lets a mask of the
standard Attention be broadcast. ONNX Runtime's kernel for the CPU wants as many rows of it as there
are queries, and fails on one (1.31).
"""

from __future__ import annotations

from typing import Any

_MASK = 3  # of Attention's inputs


def expand(model: Any) -> int:
    """Give every Attention of an `onnx_ir.Model` with a mask [batch, heads, 1, keys] one with a row
    for each query; returns how many there were."""
    found = [node for node in model.graph if _one_row(node)]
    for node in found:
        _expand(model.graph, node)
    return len(found)


def unguard(model: Any) -> int:
    """Take away the choices that put 0 in the place of NaN after each softmax with a mask of truth
    values; returns how many there were.

    PyTorch's exporter writes them for queries all of whose keys are masked. No model here has such
    a query, and a NaN of another cause would no longer be seen.
    """
    from onnx_ir import convenience

    found = [node for node in model.graph if _is_guard(node)]
    for node in found:
        convenience.replace_all_uses_with(node.outputs[0], node.inputs[2])
        model.graph.remove(node, safe=True)
    return len(found)


def _is_guard(node: Any) -> bool:
    if node.op_type != "Where":
        return False
    test, value = (node.inputs[place].producer() for place in (0, 2))
    return (
        test is not None
        and value is not None
        and (test.op_type, value.op_type) == ("IsNaN", "Softmax")
        and test.inputs[0] is node.inputs[2]
    )


def _one_row(node: Any) -> bool:
    if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
        return False
    mask = node.inputs[_MASK] if len(node.inputs) > _MASK else None
    return mask is not None and mask.shape is not None and mask.shape[-2] == 1


def _expand(graph: Any, node: Any) -> None:
    import onnx_ir as ir

    query, mask = node.inputs[0], node.inputs[_MASK]
    one = _ones(graph)
    count = ir.node("Shape", [query], {"start": -2, "end": -1}, name=f"{node.name}_queries")
    count.outputs[0].shape, count.outputs[0].dtype = ir.Shape([1]), ir.DataType.INT64
    shape = ir.node("Concat", [count.outputs[0], one], {"axis": 0}, name=f"{node.name}_rows")
    shape.outputs[0].shape, shape.outputs[0].dtype = ir.Shape([2]), ir.DataType.INT64
    wide = ir.node("Expand", [mask, shape.outputs[0]], name=f"{node.name}_mask")
    wide.outputs[0].shape = ir.Shape([*mask.shape[:-2], query.shape[-2], mask.shape[-1]])
    wide.outputs[0].dtype = mask.dtype
    for made, suffix in ((count, "queries"), (shape, "rows"), (wide, "mask")):
        made.outputs[0].name = f"{node.outputs[0].name}_{suffix}"
    graph.insert_before(node, [count, shape, wide])
    node.replace_input_with(_MASK, wide.outputs[0])


def _ones(graph: Any) -> Any:
    """An initializer [1]: a dimension to be left as it is by Expand."""
    import numpy as np
    import onnx_ir as ir

    name = "keys_as_they_are"
    if name not in graph.initializers:
        value = ir.Value(name=name, const_value=ir.tensor(np.array([1], np.int64), name=name))
        graph.register_initializer(value)
    return graph.initializers[name]
