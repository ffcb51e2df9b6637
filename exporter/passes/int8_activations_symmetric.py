"""`int8_activations` with zero points of zero, the only ones that TensorRT takes."""

from __future__ import annotations

from torch.export import ExportedProgram

from latentc.exporter.passes import Choices, int8_activations

CALIBRATED = True


def run(program: ExportedProgram, choices: Choices) -> int:
    """Rewrite `program`; returns the number of activations that are quantised now."""
    return int8_activations.run(program, choices, symmetric=True)
