"""Inputs of components on denoising trajectories of the pipeline itself, to calibrate with.

Random noise in the place of latents is not what a denoiser meets: its activations differ from
step to step, and follow the prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from latentc.exporter.calibration_prompts import Calibration
from latentc.runtimes.programs.statements import loop_of

if TYPE_CHECKING:
    import torch

    from latentc.exporter.components.description import Description, Graph
    from latentc.exporter.verification.eager import Inputs
    from latentc.runtimes.bundle.manifest import Manifest

STEPS = 8  # denoiser calls taken from one trajectory
SEED = 1000


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
