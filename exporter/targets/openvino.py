"""OpenVINO IR (model.xml and model.bin) from the captured program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from exporter.capture import quiet, variant
from exporter.targets import openvino_int4
from exporter.weights import in_one_file
from runtimes.manifest import Component

MODEL = "model.xml"


def lower(program: ExportedProgram, component: Component, folder: Path) -> str:
    """See `exporter.targets.Target`. The precision is the program's: nothing is compressed
    here (OpenVINO's own fp16 compression would round the time embedding's table too)."""
    import openvino

    plain = variant(program, ("plain_integers",))
    with in_one_file(plain.state_dict, folder):
        return _lower(openvino, plain, component, folder)


def _lower(openvino: Any, program: ExportedProgram, component: Component, folder: Path) -> str:
    with torch.no_grad(), quiet():
        model: Any = openvino.convert_model(program)
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
    openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
    return MODEL


def _partial_shape(openvino: Any, shape: tuple[int | str, ...]) -> Any:
    return openvino.PartialShape([dim if isinstance(dim, int) else -1 for dim in shape])
