"""Store the weights of linear layers in 4 bits; compute as before.

Symmetric, -8 to 7, a scale for each group of neighbouring inputs of an output channel. Each
scale is the one of a dozen that loses least (mean squared error of the group). Convolutions and
layers whose inputs do not divide into groups are left to `int8_weights`.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from latentc.exporter.passes import Choices
from latentc.exporter.passes.quantization import operators, replace_weight, sites

LOWEST, HIGHEST = -8, 7
GROUPS = (64, 32)  # inputs, the first that divides; smaller groups cost more than they gain
_SHRINK = [1 - 0.04 * step for step in range(12)]


def run(program: ExportedProgram, choices: Choices) -> int:
    """Rewrite `program`; returns the number of weights that are of 4 bits now."""
    changed = 0
    for site in list(sites(program)):
        weight = program.state_dict[site.name].detach()
        group = _group(weight, site.linear)
        if site.name in choices.kept or group is None:
            continue
        integers, scale = quantize(weight, group)
        rest = (LOWEST, HIGHEST, torch.int8, group, weight.dtype)
        per_group = operators.dequantize_per_channel_group.default
        replace_weight(program, site, integers, per_group, scale, rest)
        changed += 1
    program.graph_module.recompile()
    return changed


def rounded(weight: torch.Tensor, linear: bool) -> torch.Tensor | None:
    """Return the values that a weight [out, in] has after this pass.

    It is None where it is left alone.
    """
    group = _group(weight, linear)
    if group is None:
        return None
    integers, scale = quantize(weight, group)
    return integers * scale.repeat_interleave(group, 1)


def _group(weight: torch.Tensor, linear: bool) -> int | None:
    sizes = GROUPS if linear else ()
    return next((size for size in sizes if weight.shape[1] % size == 0), None)


def quantize(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight [out, in] as int8 of -8 … 7, same shape, and its scales.

    The scales are float32 [out, in / group].
    """
    grouped = weight.view(weight.shape[0], -1, group)
    largest = grouped.abs().amax(2, keepdim=True).clamp_min(1e-12) / -LOWEST
    best = torch.full_like(largest, torch.inf)
    scale = largest.clone()
    for shrink in _SHRINK:
        tried = largest * shrink
        error = (_rounded(grouped, tried) * tried - grouped).square_().mean(2, keepdim=True)
        scale = torch.where(error < best, tried, scale)
        best = torch.minimum(error, best)
    return _rounded(grouped, scale).flatten(1).to(torch.int8), scale.squeeze(2)


def _rounded(grouped: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (grouped / scale).round_().clamp_(LOWEST, HIGHEST)
