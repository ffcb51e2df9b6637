"""This module measures activations on the pipeline's own denoising trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from latentc.exporter.passes import Range

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

_VALUES = 1 << 15  # kept of one activation and call, to choose a range by
_CLIPS = [1 - 0.03 * step for step in range(12)]


def ranges(
    program: ExportedProgram,
    samples: Iterable[Mapping[str, torch.Tensor]],
    told: Callable[[int], None],
) -> dict[str, Range]:
    """For each layer to be quantised (by its node's name) the range of its activations.

    The whole range that was met, or a narrower one if clipping the rest loses less than the
    coarser steps would (mean squared error over a part of the values).
    """
    import torch

    from latentc.exporter.capture.interpreter import Watched
    from latentc.exporter.passes.int8_activations import quantized_layers

    watched = Watched(program)
    layers = {node.name for node in quantized_layers(watched.program, frozenset())}
    kept: dict[str, list[torch.Tensor]] = {}
    ends: dict[str, Range] = {}

    def look(node: torch.fx.Node, arguments: Sequence[Any], result: Any) -> None:
        if node.name not in layers:
            return
        values = arguments[0].flatten()
        low, high = (float(end) for end in values.aminmax())
        known = ends.get(node.name, Range(low, high))
        ends[node.name] = Range(min(low, known.low), max(high, known.high))
        stride = math.ceil(values.numel() / _VALUES)
        kept.setdefault(node.name, []).append(values[::stride].clone())

    for count, sample in enumerate(samples, 1):
        watched.run(sample, look)
        told(count)
    return {name: _clipped(ends[name], torch.cat(kept[name])) for name in ends}


def _clipped(whole: Range, values: torch.Tensor) -> Range:
    tried = [Range(whole.low * clip, whole.high * clip) for clip in _CLIPS]
    return min(tried, key=lambda each: _loss(each, values))


def _loss(tried: Range, values: torch.Tensor) -> float:
    """Mean squared error of `values` in 256 steps from the one end to the other."""
    low, high = min(tried.low, 0.0), max(tried.high, 0.0)
    step = max(high - low, 1e-12) / 255
    rounded = ((values - low) / step).round().clamp(0, 255) * step + low
    return float((rounded - values).square().mean())
