"""Weights of 4 bits in OpenVINO: PyTorch has no such tensors, so that they arrive as int8."""

from __future__ import annotations

from typing import Any

import numpy as np

LOWEST, HIGHEST = -8, 7


def pack(model: Any) -> int:
    """Store weights that are dequantised by groups in 4 bits each; returns how many there are.

    They are the int8 constants [out, groups, inputs of a group] of -8 … 7 which are cast,
    multiplied and reshaped to [out, in] (see exporter/passes/plain_integers.py).
    """
    import openvino

    packed = 0
    for node in model.get_ops():
        if node.get_type_name() != "Constant" or not _in_groups(node):
            continue
        values = node.get_data()
        if values.min(initial=0) < LOWEST or values.max(initial=0) > HIGHEST or values.size % 2:
            continue
        pairs = (values.reshape(-1, 2) & 0xF).astype(np.uint8)  # the first value is the low half
        tensor = openvino.Tensor(openvino.Type.i4, openvino.Shape(values.shape))
        tensor.data.reshape(-1)[:] = pairs[:, 0] | pairs[:, 1] << 4
        made = openvino.op.Constant(tensor)
        for user in node.output(0).get_target_inputs():
            user.replace_source_output(made.output(0))
        packed += 1
    if packed:
        model.validate_nodes_and_infer_types()
    return packed


def _in_groups(node: Any) -> bool:
    if node.get_element_type().to_string() != "i8" or len(node.get_output_shape(0)) != 3:
        return False
    for expected in ("Convert", "Multiply", "Reshape"):
        users = list(node.output(0).get_target_inputs())
        if len(users) != 1 or users[0].get_node().get_type_name() != expected:
            return False
        node = users[0].get_node()
    return True
