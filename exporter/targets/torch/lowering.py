"""PyTorch: the ExportedProgram itself, as a .pt2 archive."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

from latentc.exporter.capture.graphs import quiet
from latentc.exporter.stored_weights import in_one_file
from latentc.runtimes.bundle.structures import Component

MODEL = "model.pt2"


def lower(program: ExportedProgram, component: Component, folder: Path) -> str:
    """See `latentc.exporter.targets.Target`. The inputs that were traced with are left out: they
    would be the archive's only pickle."""
    examples = program.example_inputs
    program.example_inputs = None
    try:
        with quiet(), in_one_file(program.state_dict, folder):
            torch.export.save(program, folder / MODEL)
    finally:
        program.example_inputs = examples
    return MODEL
