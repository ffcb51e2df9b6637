"""Weights of an ONNX model that are read from their files when the model is written, one at a
time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram

from latentc.exporter import stored_weights as weights
from latentc.exporter.stored_weights import Stored, actual, stand_in


@contextmanager
def stood_in(program: ExportedProgram) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, tensors that nobody may read stand for a program's large weights, which it yields by
    name: the exporter looks at shapes and types only."""
    held = program.state_dict
    taken = {
        name: weight
        for name, weight in held.items()
        if isinstance(weight, Stored) or weight.numel() >= weights.SMALLEST
    }
    held.update({name: stand_in(weight) for name, weight in taken.items()})
    try:
        yield taken
    finally:
        held.update(taken)


def put_back(model: Any, program: ExportedProgram, taken: Mapping[str, torch.Tensor]) -> None:
    """Give the initializers of an `onnx_ir.Model` their values, to be read when they are
    wanted.

    Raises:
        RuntimeError: a stand-in is left.
    """
    for name, value in model.graph.initializers.items():
        if name in taken:
            value.const_value = _lazy(name, taken[name], value.dtype, value.shape)
        elif name not in program.constants and value.const_value.size >= weights.SMALLEST:
            raise RuntimeError(f"no weight of the program has the name {name!r}")


def transpose(model: Any) -> int:
    """Replace each transposition of large weights by the transposed weights, which are made when
    they are written; returns how many there were. Casts in between come after it instead."""
    changed = 0
    for node in list(model.graph):
        if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
            continue
        source = node.inputs[0]
        cast = source.producer()
        if cast is not None and cast.op_type == "Cast" and len(source.uses()) == 1:
            source = cast.inputs[0]
        else:
            cast = None
        if _is_large(source) and len(source.uses()) == 1 and "perm" in node.attributes:
            _fold(model.graph, node, cast, source)
            changed += 1
    return changed


def _is_large(value: Any) -> bool:
    import onnx_ir as ir

    return value is not None and isinstance(value.const_value, ir.LazyTensor)


def _fold(graph: Any, node: Any, cast: Any, source: Any) -> None:
    import onnx_ir as ir

    order = tuple(node.attributes["perm"].as_ints())
    shape = ir.Shape([source.shape[axis] for axis in order])
    lazy, name = source.const_value, f"{source.name}_transposed"
    turned = ir.Value(name=name, shape=shape, type=ir.TensorType(source.dtype))
    turned.const_value = _turned(lazy, order, name, shape)
    graph.register_initializer(turned)
    output = node.outputs[0]
    if cast is None:
        output.replace_all_uses_with(turned)
    else:
        cast.replace_input_with(0, turned)
        cast.outputs[0].shape = shape
        output.replace_all_uses_with(cast.outputs[0])
    graph.remove(node, safe=True)
    del graph.initializers[source.name]


def _turned(lazy: Any, order: Iterable[int], name: str, shape: Any) -> Any:
    import numpy as np
    import onnx_ir as ir

    def make() -> Any:
        return ir.tensor(np.ascontiguousarray(lazy.numpy().transpose(order)), lazy.dtype, name=name)

    return ir.LazyTensor(make, lazy.dtype, shape, name=name)


def _lazy(name: str, weight: torch.Tensor, dtype: Any, shape: Any) -> Any:
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import TorchTensor

    def make() -> Any:
        return TorchTensor(actual(weight).detach().contiguous(), name=name)

    return ir.LazyTensor(make, dtype, ir.Shape(shape), name=name)
