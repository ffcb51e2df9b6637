"""Store the weights of convolutions and linear layers in 8 bits; compute as before.

Symmetric, a scale for each output channel, from -127 to 127: the form that every engine knows.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from latentc.exporter.passes import Choices
from latentc.exporter.passes.quantization import operators, replace_weight, sites

LARGEST = 127


def run(program: ExportedProgram, choices: Choices) -> int:
    """Rewrite `program`; returns the number of weights that are int8 now."""
    changed = 0
    for site in list(sites(program)):
        if site.name in choices.kept:
            continue
        integers, scale = quantize(program.state_dict[site.name].detach())
        rest = (0, -LARGEST, LARGEST, torch.int8)
        per_channel = operators.dequantize_per_channel.default
        replace_weight(program, site, integers, per_channel, scale, rest)
        changed += 1
    program.graph_module.recompile()
    return changed


def rounded(weight: torch.Tensor, linear: bool) -> torch.Tensor:
    """Return the values that a weight [out, …] has after this pass."""
    integers, scale = quantize(weight)
    return integers * scale.view(-1, *[1] * (weight.dim() - 1))


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight [out, …] as int8 of the same shape, and scales [out] of the weight's own
    type.
    """
    least = max(1e-12, torch.finfo(weight.dtype).smallest_normal)
    scale = (weight.abs().flatten(1).amax(1).float() / LARGEST).clamp_min(least).to(weight.dtype)
    spread = scale.float().view(-1, *[1] * (weight.dim() - 1))
    return (weight / spread).round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scale
