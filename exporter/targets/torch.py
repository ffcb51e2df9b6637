"""PyTorch: the ExportedProgram itself, as a .pt2 archive."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

from exporter.capture import quiet
from exporter.weights import in_one_file
from runtimes.manifest import Component

MODEL = "model.pt2"


def lower(program: ExportedProgram, component: Component, folder: Path) -> str:
    """See `exporter.targets.Target`."""
    with quiet(), in_one_file(program.state_dict, folder):
        torch.export.save(program, folder / MODEL)
    return MODEL
