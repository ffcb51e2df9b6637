"""OpenVINO's operators that make numbers of NaN, rewritten so that they keep it.

Its maxima and minima are the processor's, which give the second operand where the first one is
NaN: ReLU makes 0 of NaN, and a clamp its lower limit. Its reader of ONNX makes zeros of what
attention with a mask returns as NaN. A failure inside of a model would become a plausible image.
Choices keep NaN, and give the same numbers to the bit; what looks for the largest of many gets
infinity in the place of NaN, and returns it. The rewrite takes place as a graph is loaded, so that
graphs of every format and age are covered. TopK and HardSigmoid hide NaN as well and stay as they
are: no model that can be exported has them on floating-point numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

# (OpenVINO's module of operators, node) → what takes the node's place; None leaves it.
_Rewrite: TypeAlias = Callable[[Any, Any], Any]
# Of `keep_nan`: another number makes compiled graphs in caches anew.
VERSION = "1"
# A clamp with one limit has this as its other one. What is beyond is infinite, and stays so.
_LARGEST = float(np.finfo(np.float32).max)
_GUARDED = ("ScaledDotProductAttention", "Softmax")


def keep_nan(openvino: Any, model: Any) -> int:
    """Rewrite an `openvino.Model` in place; return how many operators were rewritten.

    Args:
        openvino: the package.
    """
    operators, changed = openvino.opset13, 0
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in _REWRITES and kind not in _STAND_INS:
            continue
        if not node.get_output_element_type(0).is_real():
            continue
        if kind in _STAND_INS:
            node.input(0).replace_source_output(_standing_in(operators, node))
        elif (made := _REWRITES[kind](operators, node)) is not None:
            openvino.utils.replace_node(node, [made])
        else:
            continue
        changed += 1
    if changed:
        model.validate_nodes_and_infer_types()
    return changed


def _relu(ops: Any, node: Any) -> Any:
    zero = ops.constant(0, node.get_output_element_type(0)).output(0)
    return _at_least(ops, node.input_value(0), zero)


def _clamp(ops: Any, node: Any) -> Any:
    value, limits = node.input_value(0), node.get_attributes()
    kind = node.get_output_element_type(0)
    value = _at_least(ops, value, ops.constant(limits["min"], kind).output(0))
    return _at_most(ops, value, ops.constant(limits["max"], kind).output(0))


def _maximum(ops: Any, node: Any) -> Any:
    return _extreme(ops, node, _at_least)


def _minimum(ops: Any, node: Any) -> Any:
    return _extreme(ops, node, _at_most)


def _extreme(ops: Any, node: Any, limited: Callable[[Any, Any, Any], Any]) -> Any:
    one, other = sorted(node.input_values(), key=_is_constant)
    chosen = limited(ops, one, other)
    if _is_constant(other):
        return chosen
    return ops.select(ops.is_nan(other), other, chosen).output(0)


# Only "less" is false for NaN in OpenVINO: its "greater" is true there.


def _at_least(ops: Any, value: Any, limit: Any) -> Any:
    if _is_beyond(limit, -1):
        return value
    return ops.select(ops.less(value, limit), limit, value).output(0)


def _at_most(ops: Any, value: Any, limit: Any) -> Any:
    if _is_beyond(limit, 1):
        return value
    return ops.select(ops.less(limit, value), limit, value).output(0)


def _is_beyond(limit: Any, sign: int) -> bool:
    """Return whether a constant limits infinity only."""
    node = limit.get_node()
    return _is_constant(limit) and bool((sign * np.asarray(node.data) >= _LARGEST).all())


def _standing_in(ops: Any, node: Any) -> Any:
    """Return the first input of an operator, with infinity in the place of NaN."""
    value = node.input_value(0)
    infinity = ops.constant(_STAND_INS[node.get_type_name()], value.get_element_type())
    return ops.select(ops.is_nan(value), infinity, value).output(0)


def _is_constant(value: Any) -> bool:
    return str(value.get_node().get_type_name()) == "Constant"


def _unguarded(ops: Any, node: Any) -> Any:
    """Return what attention or a softmax gives, without the choice that puts 0 in the place of
    NaN. It is there for queries all of whose keys are masked, of which these graphs have none."""
    condition, _, value = node.input_values()
    test = condition.get_node()
    if test.get_type_name() != "IsNaN" or value.get_node().get_type_name() not in _GUARDED:
        return None
    return value if test.input_value(0) == value else None


_STAND_INS: Mapping[str, float] = {"MaxPool": np.inf, "ReduceMax": np.inf, "ReduceMin": -np.inf}
_REWRITES: Mapping[str, _Rewrite] = {
    "Relu": _relu,
    "Clamp": _clamp,
    "Maximum": _maximum,
    "Minimum": _minimum,
    "Select": _unguarded,
}
