"""Which values activations take, measured on denoising trajectories of the pipeline itself.

Random noise in the place of latents is not what a denoiser meets: its activations differ from
step to step, and follow the prompt.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentc.exporter.calibration_prompts import Calibration
from latentc.exporter.passes import Range
from latentc.runtimes.programs.statements import loop_of

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from latentc.exporter.components.description import Description, Graph
    from latentc.exporter.verification.eager import Inputs
    from latentc.runtimes.bundle.manifest import Manifest

STEPS = 8  # denoiser calls taken from one trajectory
SEED = 1000
_VALUES = 1 << 15  # kept of one activation and call, to choose a range by
_CLIPS = [1 - 0.03 * step for step in range(12)]


@dataclass(frozen=True)
class Trajectories:
    """Trajectories hold what components were given on some runs of the pipeline's own program, by
    their names. A denoiser's inputs are those of all branches of the guidance together; the decoder
    has the latents at the end of each run."""

    inputs: Inputs

    def of(self, graph: Graph) -> list[Mapping[str, torch.Tensor]]:
        """Return those of one graph; a shallow one gets features of the same call."""
        from latentc.exporter.capture.step_cache import with_features

        name = (graph.fed_by or graph).component.name
        return [with_features(graph, inputs, inputs) for inputs in self.inputs[name]]


def trajectories(
    description: Description,
    draft: Manifest,
    root: Path,
    calibration: Calibration,
    told: Callable[[int], None],
) -> Trajectories:
    """Run the pipeline's own program over its modules, and keep what they were given.

    Each run makes one image of the default size in `STEPS` steps, or the nearest number that there
    is a plan for, of the pipeline's own scheduler; prompts are taken in turn, each time with
    another seed.

    Args:
        draft: the manifest, whose files stand at `root`.
        told: called with the number of the denoiser's calls so far.
    """
    from latentc.exporter.verification.probe_calls import arguments_of, images_of
    from latentc.exporter.verification.reference import program_inputs
    from latentc.runtimes.bundle.structures import LoopProbe

    program, latents = description.program, description.latents
    size = latents.default_height, latents.default_width
    schedule = draft.schedule(draft.defaults.scheduler)
    steps = min(schedule.steps, key=lambda count: abs(count - STEPS))
    denoisers = loop_of(program).denoisers
    inputs: Inputs = {graph.component.name: [] for graph in description.graphs}
    for turn in itertools.count():
        arguments = arguments_of(program)
        if "prompt" in arguments:
            arguments["prompt"] = calibration.prompts[turn % len(calibration.prompts)]
        probe = LoopProbe(arguments, schedule.name, steps, SEED + turn, *size)
        met = program_inputs(description, draft, root, probe, images_of(program, *size))
        for name, calls in met.items():
            inputs[name] += calls
        left = calibration.samples  # of all denoisers, each as often as it runs
        for name in denoisers:
            del inputs[name][left:]
            left -= len(inputs[name])
        told(calibration.samples - left)
        if not left:
            break
    return Trajectories(inputs)


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
