"""Attention without the matrix of all scores: MultiHeadAttention, with its meaning in the file.

ONNX Runtime computes its own operator ``com.microsoft.MultiHeadAttention`` tile by tile, on the CPU
too, where the standard Attention writes down all scores: 2 GiB for one of Stable Diffusion's at
512×512. So the graph calls MultiHeadAttention, and the model defines a function of that name in
terms of the standard Attention: an engine without such an operator takes the function, as ONNX says
(docs/decisions/0025).
"""

from __future__ import annotations

from typing import Any

DOMAIN = "com.microsoft"
NAME = "MultiHeadAttention"
_ATTENTION = "Attention"
_OPSET = 23  # the first with Attention
_SWAP = (0, 2, 1, 3)  # [batch, heads, tokens, width] ↔ [batch, tokens, heads, width]
_PLAIN = {"is_causal": 0, "softcap": 0.0, "qk_matmul_output_mode": 0}


def fuse(model: Any) -> int:
    """Replace every unmasked float32 Attention of an `onnx_ir.Model`; returns how many there were.

    Heads and their width must be known; batch and tokens may be symbols.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    fused = [node for node in model.graph if _fits(node)]
    for node in fused:
        _replace(model.graph, node)
    if fused:
        RemoveUnusedNodesPass()(model)
        function = _function()
        model.functions[function.identifier()] = function
        model.opset_imports.setdefault(DOMAIN, 1)
        model.graph.opset_imports.setdefault(DOMAIN, 1)
    return len(fused)


def _fits(node: Any) -> bool:
    import onnx_ir as ir

    if node.op_type != _ATTENTION or node.domain not in ("", "ai.onnx"):
        return False
    given = [value for value in node.inputs if value is not None]
    if len(given) != 3 or any(value.uses() for value in node.outputs[1:]):
        return False
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes.pop("scale", None)
    if any(_PLAIN.get(name) != value for name, value in attributes.items()):
        return False
    if any(value.dtype is not ir.DataType.FLOAT or value.shape is None for value in given):
        return False
    heads = [_heads(value) for value in given]
    return None not in heads and len({each[0] for each in heads if each}) == 1


def _heads(value: Any) -> tuple[int, int] | None:
    """Number and width of the heads of a value [batch, heads, tokens, width], if it says so."""
    if len(value.shape) != 4:
        return None
    heads, width = value.shape[1], value.shape[3]
    return (heads, width) if isinstance(heads, int) and isinstance(width, int) else None


def _replace(graph: Any, node: Any) -> None:
    import onnx_ir as ir

    heads, width = _heads(node.inputs[0]) or (0, 0)
    new: list[Any] = []
    flat = [_flat(graph, value, new) for value in node.inputs[:3]]
    scale = node.attributes.get("scale")
    # Said also where it is the usual one: ONNX's own evaluator wants a function's attributes.
    attributes = {"num_heads": heads, "scale": scale.as_float() if scale else width**-0.5}
    # The values' heads may have a width of their own.
    _, width = _heads(node.inputs[2]) or (0, 0)
    output, (batch, _, tokens, _) = node.outputs[0], node.outputs[0].shape
    attended = ir.node(NAME, flat, attributes, domain=DOMAIN, name=node.name)
    _describe(attended.outputs[0], f"{output.name}_flat", [batch, tokens, heads * width])
    new.append(attended)
    shape = _constant(graph, [0, 0, heads, width])
    split = ir.node("Reshape", [attended.outputs[0], shape], name=f"{node.name}_split")
    _describe(split.outputs[0], f"{output.name}_split", [batch, tokens, heads, width])
    new.append(split)
    graph.insert_before(node, new)
    _use(graph, node, split.outputs[0])
    graph.remove(node, safe=True)


def _flat(graph: Any, value: Any, new: list[Any]) -> Any:
    """[batch, heads, tokens, width] → [batch, tokens, heads * width]."""
    import onnx_ir as ir

    batch, heads, tokens, width = value.shape
    producer = value.producer()
    if producer is not None and _swaps(producer):
        swapped = producer.inputs[0]
    else:
        node = ir.node("Transpose", [value], {"perm": _SWAP}, name=f"{value.name}_swap")
        swapped = _describe(node.outputs[0], f"{value.name}_swapped", [batch, tokens, heads, width])
        new.append(node)
    joined = _before_split(swapped, [batch, tokens, heads * width])
    if joined is not None:
        return joined
    shape = _constant(graph, [0, 0, heads * width])
    node = ir.node("Reshape", [swapped, shape], name=f"{value.name}_join")
    new.append(node)
    return _describe(node.outputs[0], f"{value.name}_joined", [batch, tokens, heads * width])


def _before_split(value: Any, shape: list[Any]) -> Any:
    """Return what a Reshape has made `value` of, if that has this shape."""
    producer = value.producer()
    if producer is None or producer.op_type != "Reshape":
        return None
    source = producer.inputs[0]
    return source if source.shape is not None and list(source.shape) == shape else None


def _use(graph: Any, node: Any, swapped: Any) -> None:
    """Give [batch, tokens, heads, width] to those who took the node's output."""
    import onnx_ir as ir

    output = node.outputs[0]
    for user in list(output.consumers()):
        if _swaps(user) and not user.outputs[0].is_graph_output():
            user.outputs[0].replace_all_uses_with(swapped)
            graph.remove(user, safe=True)
    if output.uses() or output.is_graph_output():
        back = ir.node("Transpose", [swapped], {"perm": _SWAP}, name=f"{node.name}_back")
        _describe(back.outputs[0], f"{output.name}_back", list(output.shape))
        graph.insert_before(node, back)
        output.replace_all_uses_with(back.outputs[0], replace_graph_outputs=True)


def _swaps(node: Any) -> bool:
    if node.op_type != "Transpose" or "perm" not in node.attributes:
        return False
    return tuple(node.attributes["perm"].as_ints()) == _SWAP


def _describe(value: Any, name: str, shape: list[Any]) -> Any:
    import onnx_ir as ir

    value.name, value.shape, value.dtype = name, ir.Shape(shape), ir.DataType.FLOAT
    return value


def _constant(graph: Any, numbers: list[int]) -> Any:
    """An initializer of these integers, one for all that want it."""
    import numpy as np
    import onnx_ir as ir

    name = "shape_" + "_".join(map(str, numbers))
    if name not in graph.initializers:
        value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers, np.int64), name=name))
        graph.register_initializer(value)
    return graph.initializers[name]


def _function() -> Any:
    """MultiHeadAttention of [batch, tokens, heads * width], as the standard Attention has it."""
    import onnx_ir as ir

    inputs = [ir.Value(name=name) for name in ("query", "key", "value")]
    kinds = {
        "q_num_heads": ("num_heads", ir.AttributeType.INT),
        "kv_num_heads": ("num_heads", ir.AttributeType.INT),
        "scale": ("scale", ir.AttributeType.FLOAT),
    }
    references = [ir.RefAttr(name, source, kind) for name, (source, kind) in kinds.items()]
    node = ir.Node("", _ATTENTION, inputs, references, num_outputs=1)
    node.outputs[0].name = "output"
    body = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": _OPSET})
    attributes = [
        ir.Attr("num_heads", ir.AttributeType.INT, None),
        ir.Attr("scale", ir.AttributeType.FLOAT, None),
    ]
    return ir.Function(DOMAIN, NAME, graph=body, attributes=attributes)
