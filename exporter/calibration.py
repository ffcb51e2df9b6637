"""Which values activations take, measured on denoising trajectories of the pipeline itself.

Random noise in the place of latents is not what a denoiser meets: its activations differ from
step to step, and follow the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.passes import Range
from runtimes.errors import InputError
from runtimes.files import LARGEST_DOCUMENT, read_regular
from runtimes.parsing import parser

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from exporter.families import Description, Graph

STEPS = 8  # denoiser calls taken from one trajectory
SEED = 1000
_VALUES = 1 << 15  # kept of one activation and call, to choose a range by
_CLIPS = [1 - 0.03 * step for step in range(12)]

# Varied subjects and styles. Whoever knows what a model is for gives prompts of that kind.
PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a large red circle",
    "a watercolor painting of a harbour at dawn, soft light",
    "portrait of an old fisherman, detailed face, studio lighting",
    "a blue square above a yellow star",
    "a busy street in Tokyo at night, neon signs, rain",
    "a bowl of fruit on a wooden table, still life, oil on canvas",
    "a small green triangle on the left",
    "an isometric drawing of a tiny living room",
    "a macro photograph of a dew drop on a leaf",
    "an orange circle to the left of a purple square",
    "snowy mountains under a clear sky, aerial view",
)


@dataclass(frozen=True)
class Calibration:
    """The prompts of the trajectories and how many denoiser calls are taken from them."""

    prompts: tuple[str, ...] = PROMPTS
    samples: int = 32

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("calibration needs at least one prompt")
        if not 1 <= self.samples <= 4096:
            raise InputError(f"calibration samples: {self.samples} is not between 1 and 4096")


@parser(InputError, "path", "a text file of prompts")
def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line; empty lines are skipped.

    Raises:
        InputError: the file cannot be read, is not UTF-8 text, or holds no prompt.
    """
    try:
        text = read_regular(path, LARGEST_DOCUMENT).decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"calibration prompts {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"calibration prompts {path}: not a text file in UTF-8 (byte {error.start})"
        ) from error
    if "\0" in text:
        raise InputError(f"calibration prompts {path}: not a text file (it has zero bytes)")
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise InputError(f"calibration prompts {path}: empty; expected one prompt a line")
    return prompts


@dataclass(frozen=True)
class Trajectories:
    """What components met on some runs of the pipeline, by role (image encoders by their names):
    inputs by name. A denoiser's are
    those of all branches of the guidance together; an encoder got a text of each run, the decoder
    the latents at its end."""

    inputs: Mapping[str, list[Mapping[str, torch.Tensor]]]

    def of(self, graph: Graph) -> list[Mapping[str, torch.Tensor]]:
        """Those of one graph."""
        from exporter.step_cache import with_features

        component = graph.component
        role: str = "denoiser" if graph.fed_by else component.role
        if role == "image_encoder":
            role = component.name
        return [with_features(graph, each, each) for each in self.inputs[role]]


def trajectories(
    pipe: Any, description: Description, calibration: Calibration, told: Callable[[int], None]
) -> Trajectories:
    """Run the pipeline, and keep what its components were given.

    Each run makes one picture of the default size in `STEPS` steps of the pipeline's own
    scheduler; prompts are taken in turn, each time with another seed.

    Args:
        told: called with the number of the denoiser's calls so far.
    """
    from exporter.reference import (
        denoiser_inputs,
        image_encoder_inputs,
        probe_pictures,
        run,
        tokens,
        vectors,
    )
    from runtimes.manifest import LoopProbe

    latents = description.latents
    graph = next(each for each in description.graphs if each.component.role == "denoiser")
    made: list[Mapping[str, torch.Tensor]] = []
    texts: list[Mapping[str, torch.Tensor]] = []
    ends: list[Mapping[str, torch.Tensor]] = []
    encoders = [each for each in description.graphs if each.component.role == "image_encoder"]
    drawn: dict[str, list[Mapping[str, torch.Tensor]]] = {g.component.name: [] for g in encoders}
    while len(made) < calibration.samples:
        turn = len(made) // STEPS
        prompt = calibration.prompts[turn % len(calibration.prompts)]
        arguments = dict(description.probe_arguments)
        arguments |= {"prompt": prompt} if "prompt" in arguments else {}
        told_of = replace(description, probe_arguments=arguments)
        size = (latents.default_height, latents.default_width)
        probe = LoopProbe(arguments, "", STEPS, SEED + turn, *size)
        seen, images = run(pipe, told_of, probe, probe_pictures(description, *size))
        wanted = range(len(seen.calls))[: calibration.samples - len(made)]
        made += denoiser_inputs(pipe, told_of, graph, seen, size, wanted)
        texts.append(tokens(pipe, told_of))
        if seen.latents is not None:
            ends.append({"latents": seen.latents})
            numbers = vectors(told_of, *size)
            for encoder in encoders:
                given = image_encoder_inputs(encoder, images, seen.latents, numbers)
                drawn[encoder.component.name].append(given)
        told(len(made))
    return Trajectories({"denoiser": made, "encoder": texts, "decoder": ends, **drawn})


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

    from exporter.passes.int8_activations import quantized_layers
    from exporter.watch import Watched

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
