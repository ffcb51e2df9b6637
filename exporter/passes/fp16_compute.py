"""Compute in float16, but for what needs more: see `half_compute`."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from latentc.exporter.passes import Choices, half_compute

COMPUTES = "float16"


def run(program: ExportedProgram, choices: Choices) -> int:
    """Rewrite `program`; returns the number of operations that are float16 now."""
    return half_compute.rewrite(program, torch.float16)
