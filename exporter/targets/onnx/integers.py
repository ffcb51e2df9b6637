"""Quantised programs in ONNX: QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from typing import Any

import numpy as np

from latentc.exporter.passes.quantization import operators

_BLOCK = "block_size"


def translations() -> dict[Any, Any]:
    """The ONNX form of each operator, for ``torch.onnx.export(custom_translation_table=…)``."""
    # Opset 21 brought groups; the rest must also do for the older opsets that TensorRT reads.
    # The parameters are those of the operators, in their order; integers are int8 throughout
    # and weights have zero points of zero.
    import onnx_ir as ir
    from onnxscript import opset18 as op
    from onnxscript import opset21

    def per_channel(
        x: Any, scales: Any, zeros: Any, axis: int, low: int, high: int, dtype: Any, **_: Any
    ) -> Any:
        return op.DequantizeLinear(x, scales, axis=axis)

    def per_group(
        x: Any, scales: Any, zeros: Any, low: int, high: int, dtype: Any, group: int, *_: Any
    ) -> Any:
        return opset21.DequantizeLinear(x, scales, axis=1, block_size=group)

    def quantize(x: Any, scale: float, zero: int, low: int, high: int, dtype: Any) -> Any:
        return op.QuantizeLinear(x, _number(scale, x.dtype.numpy()), _number(zero, np.int8))

    def dequantize(
        x: Any,
        scale: float,
        zero: int,
        low: int,
        high: int,
        dtype: Any,
        out_dtype: Any = None,
    ) -> Any:
        kind = np.float32 if out_dtype is None else ir.DataType(out_dtype).numpy()
        return op.DequantizeLinear(x, _number(scale, kind), _number(zero, np.int8))

    def _number(value: float, kind: Any) -> Any:
        return op.Constant(value=ir.tensor(np.array(value, kind)))

    return {
        operators.dequantize_per_channel.default: per_channel,
        operators.dequantize_per_channel_group.default: per_group,
        operators.quantize_per_tensor.default: quantize,
        operators.dequantize_per_tensor.default: dequantize,
    }


def pack(model: Any) -> int:
    """Store weights that are dequantised by groups in 4 bits each; returns how many there are.

    PyTorch has no tensors of 4 bits, so that such weights arrive as int8.
    """
    import ml_dtypes
    import onnx_ir as ir

    packed = 0
    for node in model.graph:
        block = node.attributes.get(_BLOCK)
        if node.op_type != "DequantizeLinear" or block is None or not block.as_int():
            continue
        weight = node.inputs[0]
        if weight.const_value is None or weight.dtype is not ir.DataType.INT8:
            continue
        values = weight.const_value.numpy().astype(ml_dtypes.int4)
        weight.const_value = ir.tensor(values, ir.DataType.INT4, name=weight.name)
        weight.dtype = ir.DataType.INT4
        packed += 1
    return packed
