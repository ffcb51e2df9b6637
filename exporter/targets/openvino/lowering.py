"""OpenVINO IR (model.xml and model.bin) from the captured program."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.export import ExportedProgram

from latentc.exporter.capture.decompose import Table, decomposed
from latentc.exporter.capture.graphs import quiet, variant
from latentc.exporter.passes import plain_integers
from latentc.exporter.stored_weights import in_one_file
from latentc.exporter.targets.openvino import int4 as openvino_int4
from latentc.runtimes.bundle.structures import Component

MODEL = "model.xml"


def lower(program: ExportedProgram, component: Component, folder: Path) -> str:
    """See `latentc.exporter.targets.Target`. The precision is the program's: nothing is compressed
    here (OpenVINO's own fp16 compression would round the time embedding's table too)."""
    import openvino

    plain = variant(program, (plain_integers.__name__,))
    with in_one_file(plain.state_dict, folder):
        return _lower(openvino, plain, component, folder)


def _lower(openvino: Any, program: ExportedProgram, component: Component, folder: Path) -> str:
    with torch.no_grad(), quiet(), unreported():
        model: Any = openvino.convert_model(decomposed(program, _table()))
    for port, name in zip(model.inputs, component.inputs, strict=True):
        port.get_tensor().set_names({name})
    for port, name in zip(model.outputs, component.outputs, strict=True):
        port.get_tensor().set_names({name})
    model.reshape(
        {
            port: _partial_shape(openvino, component.inputs[name].shape)
            for port, name in zip(model.inputs, component.inputs, strict=True)
        }
    )
    openvino_int4.pack(model)
    _name(model, component.name)
    openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
    return MODEL


@contextmanager
def unreported() -> Iterator[None]:
    """Inside, OpenVINO's converter tells nobody of what it does. It reports every conversion by
    network unless its user has opted out: a quarter of the time of a small export where there is
    no network.

    What stands in is what OpenVINO itself has for where its package for that is not installed.
    """
    from openvino.tools.ovc import convert_impl, telemetry_stub, telemetry_utils, utils

    with ExitStack() as stack:
        for module in (convert_impl, telemetry_utils, utils):
            stack.enter_context(mock.patch.object(module, "tm", telemetry_stub))
        yield


@cache
def _table() -> Table:
    """Return the table of `openvino.frontend.pytorch.fx_decoder`, which keeps it to itself."""
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose

    kept = {*ops_to_not_decompose()}
    every: Any = torch.export.default_decompositions()
    return {operator: function for operator, function in every.items() if operator not in kept}


def _name(model: Any, name: str) -> None:
    """Number what OpenVINO made up names for by a count of the process: the same graph is then the
    same file, which bundles can share and caches know again."""
    model.set_friendly_name(name)
    for place, each in enumerate(model.get_ordered_ops()):
        made_up = re.fullmatch(r"([A-Za-z]+_)\d+", each.get_friendly_name())
        if made_up and each.get_type_name() != "Parameter":
            each.set_friendly_name(f"{made_up[1]}{place}")


def _partial_shape(openvino: Any, shape: tuple[int | str, ...]) -> Any:
    return openvino.PartialShape([dim if isinstance(dim, int) else -1 for dim in shape])
