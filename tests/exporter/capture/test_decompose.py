"""Operators taken apart one by one: what comes out is what torch makes of the whole program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import openvino as openvino_engine
import pytest
import torch
from diffusers import DiffusionPipeline
from torch._ops import OpOverload
from torch.export import ExportedProgram

from latentc.exporter.capture.decompose import decomposed
from latentc.exporter.capture.graphs import capture, example_inputs, symbol_values
from latentc.exporter.components.description import Description
from latentc.exporter.families import family_of
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.targets.coreml import operations as coreml_operations
from latentc.exporter.targets.onnx import lowering as onnx
from latentc.exporter.targets.onnx import registry as onnx_registry
from latentc.exporter.targets.onnx import types as onnx_types
from latentc.exporter.targets.openvino import lowering as openvino
from latentc.runtimes.bundle.structures import Component, TensorSpec

TABLES = {
    "onnx": lambda: onnx._table(onnx.OPSET),
    "openvino": openvino._table,
    "coreml": coreml_operations.table,
}
# Sizes, and copies of what nobody changes.
ASIDE = {
    torch.ops.aten.sym_size.int,
    torch.ops.aten.alias.default,
    torch.ops.aten.clone.default,
}


@pytest.fixture(scope="module")
def captured(smallest: Path) -> tuple[Description, dict[str, ExportedProgram]]:
    with quiet_loading():
        pipe: Any = DiffusionPipeline.from_pretrained(smallest, safety_checker=None)
    description = family_of(type(pipe).__name__).describe(pipe)
    sizes = symbol_values(description, traced=True)
    programs = {
        graph.component.role: capture(graph, description.latents.multiple, sizes)
        for graph in description.graphs
    }
    return description, programs


def operators(program: ExportedProgram) -> Mapping[Any, int]:
    found = (node.target for node in program.graph.nodes)
    return Counter(each for each in found if isinstance(each, OpOverload) and each not in ASIDE)


@pytest.mark.parametrize("target", TABLES)
@pytest.mark.parametrize("role", ["encoder", "denoiser", "decoder"])
def test_as_torch_does_it(target: str, role: str, captured: Any) -> None:
    description, programs = captured
    program, table = programs[role], TABLES[target]()
    before = str(program.graph)
    made = decomposed(program, table)
    expected = program.run_decompositions(dict(table))
    assert operators(made) == operators(expected)
    assert not any(each in table for each in operators(made))
    graph = next(each for each in description.graphs if each.component.role == role)
    inputs = example_inputs(graph, symbol_values(description, traced=False), seed=2)
    for found, wanted in zip(made.module()(**inputs), expected.module()(**inputs), strict=True):
        assert torch.equal(found, wanted)
    assert made.run_decompositions({}) is made
    assert str(program.graph) == before, "the program itself is for other targets"
    assert made is not program
    assert made.state_dict.keys() == program.state_dict.keys()


def small(module: torch.nn.Module) -> ExportedProgram:
    rows = torch.export.Dim("rows", min=2, max=64)
    return torch.export.export(module, (torch.ones(3, 4),), dynamic_shapes=({0: rows},))


def test_what_is_left_to_torch() -> None:
    """Buffers that change."""

    class Counting(torch.nn.Module):
        count: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            return torch.reshape(x, (-1,)) + self.count

    made = decomposed(small(Counting()), {})
    assert made.graph_signature.buffers_to_mutate
    assert torch.equal(made.module()(torch.zeros(5, 4)), torch.ones(20))


def test_several_results_and_none_of_its_own() -> None:
    """A list of parts, and an operator that returns what it was given."""

    class Parts(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            first, second = torch.chunk(torch.nn.functional.dropout(x, 0.5, False), 2, dim=1)
            return first + 1, second.contiguous()

    program = small(Parts())
    made = decomposed(program, openvino._table())
    assert torch.ops.aten.chunk.default not in operators(made)
    x = torch.arange(24.0).reshape(6, 4)
    found, wanted = made.module()(x), program.module()(x)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_casts_are_those_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of several types, and numbers, are cast as PyTorch casts them."""

    class Mixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            whole = (x > 1).to(torch.int64)
            return x * whole, whole / 2, whole + 0.5, x + 1, (2 * x - whole).half() * x

    component = Component(
        "mixed",
        "denoiser",
        {"x": TensorSpec("float32", ("rows", 4))},
        {name: TensorSpec("float32", ("rows", 4)) for name in "abcde"},
    )
    program = small(Mixed())
    with monkeypatch.context() as patch:
        patch.setattr(onnx_types, "known_results", nullcontext)
        patch.setattr(onnx_registry, "made_once", nullcontext)
        onnx.lower(program, component, tmp_path)
    usual = onnx_ir.load(tmp_path / "model.onnx")
    onnx.lower(program, component, tmp_path)
    quick = onnx_ir.load(tmp_path / "model.onnx")
    for graph in (quick.graph, usual.graph):
        assert sum(node.op_type == "Cast" for node in graph) >= 4
    kinds = [[node.op_type for node in model.graph] for model in (quick, usual)]
    assert kinds[0] == kinds[1]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = np.linspace(-3, 3, 20, dtype=np.float32).reshape(5, 4)
    expected = program.module()(torch.tensor(x))
    for found, wanted in zip(session.run(None, {"x": x}), expected, strict=True):
        assert np.allclose(found, wanted.numpy(), rtol=1e-3)


def test_translations_of_one_export_are_not_those_of_the_next() -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    operator = torch.ops.aten.group_norm.default
    with onnx_registry.made_once():
        first = ONNXRegistry.from_torchlib(opset_version=onnx.OPSET)
        first.register_op(operator, onnx._translations()[operator])
        second = ONNXRegistry.from_torchlib(opset_version=onnx.OPSET)
    usual = ONNXRegistry.from_torchlib(opset_version=onnx.OPSET)
    assert first.get_decomps(operator)[0].is_custom
    assert not any(each.is_custom for each in second.get_decomps(operator))
    assert second.functions.keys() == usual.functions.keys()


def test_conversions_are_reported_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[object] = []
    monkeypatch.setattr(
        "openvino_telemetry.Telemetry.send_event", lambda *given, **_: reports.append(given)
    )
    program = decomposed(small(torch.nn.ReLU()), openvino._table())
    with openvino.unreported():
        openvino_engine.convert_model(program)
    assert not reports
    openvino_engine.convert_model(program)
    assert reports


def test_a_size_that_follows_from_the_others(tmp_path: Path) -> None:
    """-1 in a shape: a number of elements, which no converter knows as such."""

    class Flat(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x.transpose(0, 1).reshape(2, -1),)

    program = small(Flat())
    specs = {"x": TensorSpec("float32", ("rows", 4))}, {"y": TensorSpec("float32", (2, "row"))}
    x = np.arange(24, dtype=np.float32).reshape(6, 4)
    (expected,) = program.module()(torch.tensor(x))
    for module, name in ((onnx, "onnx"), (openvino, "openvino")):
        (tmp_path / name).mkdir()
        module.lower(program, Component("flat", "denoiser", *specs), tmp_path / name)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    assert np.array_equal(session.run(None, {"x": x})[0], expected)
    model = openvino_engine.compile_model(tmp_path / "openvino" / "model.xml", "CPU")
    assert np.array_equal(model({"x": x})[0], expected)
