"""ONNX: one model.onnx and one external data file per component."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from latentc.exporter.capture.decompose import Table, decomposed
from latentc.exporter.capture.graphs import quiet
from latentc.exporter.targets.onnx import attention as onnx_attention
from latentc.exporter.targets.onnx import integers as onnx_integers
from latentc.exporter.targets.onnx import masks as onnx_masks
from latentc.exporter.targets.onnx import optimize as onnx_optimize
from latentc.exporter.targets.onnx import registry as onnx_registry
from latentc.exporter.targets.onnx import types as onnx_types
from latentc.exporter.targets.onnx import weights as onnx_weights
from latentc.runtimes.bundle.structures import Component

# Opset 23 has Attention (docs/decisions/0005).
OPSET = 23
MODEL = "model.onnx"


def lower(program: ExportedProgram, component: Component, folder: Path, opset: int = OPSET) -> str:
    """See `latentc.exporter.targets.Target`."""
    import onnx

    with torch.no_grad(), quiet():
        program = decomposed(program, _table(opset))
        with (
            onnx_registry.made_once(),
            onnx_types.known_results(),
            onnx_weights.stood_in(program) as weights,
        ):
            made = torch.onnx.export(
                program,
                opset_version=opset,
                input_names=list(component.inputs),
                output_names=list(component.outputs),
                custom_translation_table=_translations() | onnx_integers.translations(),
                optimize=False,
                verbose=False,
            )
    if made is None:  # the stub's type; the dynamo exporter always returns a program
        raise RuntimeError("torch.onnx.export returned nothing")
    model = made.model
    with quiet():
        onnx_weights.put_back(model, program, weights)
        onnx_optimize.optimise(model)
    onnx_weights.transpose(model)
    _name_axes(model, component)
    _strip(model)
    onnx_integers.pack(model)
    onnx_attention.fuse(model)
    onnx_masks.expand(model)
    onnx_masks.unguard(model)
    made.save(folder / MODEL, external_data=True)
    onnx.checker.check_model(folder / MODEL, full_check=True)
    return MODEL


@cache
def _table(opset: int) -> Table:
    """Return the table of `torch.onnx.export`, which keeps it to itself."""
    from torch.onnx._internal.exporter import _decomp

    known = set(_decomp.get_onnx_implemented_overloads(onnx_registry.table(opset)))
    return _decomp.create_onnx_friendly_decomposition_table(known)


def _translations() -> dict[Any, Any]:
    """Group normalisation by way of InstanceNormalization, an operator as old as ONNX. ONNX
    Runtime has no kernel for GroupNormalization on the CPU: it would be expanded into a dozen
    nodes each time a session is made, three quarters of the time that a small UNet takes to
    load, and run slower."""
    from onnxscript.function_libs.torch_lib.ops.nn import aten_group_norm

    return {torch.ops.aten.group_norm.default: aten_group_norm}


def _name_axes(model: Any, component: Component) -> None:
    """Replace torch's symbol names (s53) by the manifest's (batch) in every shape."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for found, wanted in zip(value.shape, component.inputs[value.name].shape, strict=True):
            if isinstance(found, ir.SymbolicDim) and isinstance(wanted, str):
                _learn(names, str(found.value), wanted)
    for value in _values(model.graph):
        if value.shape is None:
            continue
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                value.shape[axis] = _rename(str(dim.value), names)


def _learn(names: dict[str, str], found: str, wanted: str) -> None:
    # A spatial axis is captured as 8*s17: s17 then stands for "height/8".
    factor, _, symbol = found.rpartition("*")
    names.setdefault(symbol, f"({wanted}/{factor})" if factor else wanted)


def _rename(expression: str, names: Mapping[str, str]) -> str:
    renamed = re.sub(r"[a-z]+\d+", lambda match: names.get(match[0], match[0]), expression)
    return re.sub(r"\b(\d+)\*\((\w+)/\1\)", r"\2", renamed)


def _values(graph: Any) -> list[Any]:
    values = list(graph.inputs)
    for node in graph:
        values.extend(node.outputs)
    return values


def _strip(model: Any) -> None:
    """Drop the exporter's per-node notes (stack traces): without them model.onnx is
    a tenth of the size, and loads faster."""
    model.graph.metadata_props.clear()
    for value in _values(model.graph):
        value.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
