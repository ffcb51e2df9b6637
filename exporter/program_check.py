"""Every program of a bundle against the diffusers class that it stands for, in PyTorch: before
anything is lowered, and small.

What the engines make of the graphs is for the probes; this is for what is done with them: the
arguments' defaults, the draws of noise and their order, the images' sizes, the branches.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter.classes import class_of, of_class
from exporter.eager import pipeline_over
from exporter.families import Description, calling
from exporter.probe_calls import GUIDANCE, images_of, size_of, takes_images, texts_of
from exporter.progress import Progress
from exporter.reference import LARGEST, loop_size, watched
from exporter.source import quiet_loading
from runtimes.errors import LatentcError, VerificationError, first_line
from runtimes.manifest import Manifest, ProgramCall, ProgramCheck
from runtimes.manifest_rules import LONGEST_REFUSAL
from runtimes.pipeline import Pipeline
from runtimes.programs.statements import Numbers, Program, Text
from runtimes.verify import relative_l2

_STEPS = 2
_SEEDS = (20, 21, 22, 23)
_PROMPTS = ("a large red circle", "two small blue squares beside a tree")
_LARGE = 4_000_000_000  # numbers: four images of such a model take as long as its export
# Relative L2. The largest is 2.5e-4, of T2I-Adapters for grey images, whose colours diffusers
# rounds to grey ones of 8 bits; the others are below 2e-5.
LIMIT = 3e-4


@dataclass(frozen=True)
class Shape:
    """A call makes `images` images of each of `prompts` prompts, with a seed for each image or one
    for all, and is given `given` images where it takes any."""

    prompts: int
    images: int
    seeds: tuple[int, ...]
    given: int = 1


SHAPES = (Shape(1, 1, _SEEDS[:1]), Shape(2, 2, _SEEDS))


@dataclass(frozen=True)
class Comparison:
    """One call of a program and of the diffusers class.

    Attributes:
        against: the name of that class.
        latents: relative L2 of what the decoder is given; what it makes of that, probes hold.
        refused: what diffusers says where it cannot run the call; nothing is compared then.
    """

    program: Program
    against: str
    shape: Shape
    latents: float = 0.0
    refused: str | None = None

    def record(self) -> ProgramCall:
        """Return what the manifest says of this call."""
        return ProgramCall(
            prompts=self.shape.prompts,
            images=self.shape.images,
            seeds=self.shape.seeds,
            given=self.shape.given if takes_images(self.program) else 0,
            tolerance=LIMIT,
            relative_l2=None if self.refused is not None else self.latents,
            refused=None if self.refused is None else self.refused[:LONGEST_REFUSAL],
        )


def recorded(comparisons: Sequence[Comparison]) -> tuple[ProgramCheck, ...]:
    """Return what the manifest says of comparisons, by program, in their order."""
    calls: dict[tuple[str, str], list[ProgramCall]] = {}
    for each in comparisons:
        calls.setdefault((each.program.name, each.against), []).append(each.record())
    return tuple(ProgramCheck(*key, tuple(records)) for key, records in calls.items())


def check_programs(
    pipe: Any,
    description: Description,
    manifest: Manifest,
    root: Path,
    progress: Progress,
    fixed: tuple[int, int] | None = None,
) -> tuple[Comparison, ...]:
    """Compare every program with its class, in calls of the two shapes; large models, and large
    images of an export with a fixed size, in calls of the first.

    Args:
        root: where the tokenizers and plans of the manifest stand.
        fixed: height and width in pixels of an export with a fixed size.

    Warns of calls that the class does not take.

    Raises:
        VerificationError: one gives something else.
    """
    modules = {graph.component.name: graph.module for graph in description.graphs}
    comparisons = []
    size = fixed or loop_size(description)
    numbers = (each.numel() for module in modules.values() for each in module.parameters())
    shapes = SHAPES[:1] if sum(numbers) > _LARGE or max(size) > LARGEST else SHAPES
    with pipeline_over(root, manifest, modules) as ours:
        for program in manifest.programs:
            for shape in shapes:
                with progress.stage(program.name, f"verify {len(shape.seeds)} images in PyTorch"):
                    comparisons.append(_compared(pipe, description, ours, program, shape, size))
                _judge(comparisons[-1])
    return tuple(comparisons)


def _judge(comparison: Comparison) -> None:
    """Warn of a call that the class does not take. Raises VerificationError for another result."""
    program, shape = comparison.program, comparison.shape
    if comparison.refused is not None:
        warnings.warn(
            f"the program {program.name!r} is not held against diffusers in a call of "
            f"{shape.prompts * shape.images} images, which {program.stands_for} does not take: "
            f"{comparison.refused}",
            UserWarning,
            stacklevel=3,
        )
    if comparison.latents > LIMIT:
        raise VerificationError(
            f"the program {program.name!r} does not do what {program.stands_for} does in "
            f"diffusers: {shape.prompts} prompts by {shape.images} images, latents "
            f"{comparison.latents:.1e} off, allowed {LIMIT:g}; no bundle was written"
        )


def _compared(
    pipe: Any,
    description: Description,
    ours: Pipeline,
    program: Program,
    shape: Shape,
    size: tuple[int, int],
) -> Comparison:
    against = type(pipe).__name__
    if program.name != description.program.name:
        against = class_of(pipe, program.name).__name__
    refused = ""
    for way in _ways(shape):
        arguments = {**_arguments(description, program, way, size), **_several(program, shape)}
        arguments["num_inference_steps"] = _steps(ours, program)
        try:
            latents = _theirs(pipe, description, program, way, arguments)
        except Exception as error:  # a call that diffusers' class does not take
            refused = refused or first_line(error)
            continue
        seed = list(way.seeds) if len(way.seeds) > 1 else way.seeds[0]
        try:
            result = ours(**arguments, seed=seed, output_type="latent")
        except LatentcError as error:
            raise VerificationError(
                f"the program {program.name!r} refuses a call that {program.stands_for} takes in "
                f"diffusers: {error}; no bundle was written"
            ) from error
        return Comparison(program, against, way, relative_l2(result.latents, latents))
    return Comparison(program, against, shape, refused=refused)


def _ways(shape: Shape) -> Iterator[Shape]:
    """Yield a shape, and what is tried in its place where the diffusers class does not take it:
    one image that all prompts share, one seed for all images."""
    for seeds in dict.fromkeys((shape.seeds, shape.seeds[:1])):
        for given in dict.fromkeys((shape.prompts, 1)):
            yield replace(shape, seeds=seeds, given=given)


def _steps(ours: Pipeline, program: Program) -> int:
    """Return a step count of which `_STEPS` or more are run at the program's strength."""
    numbers = {each.name: each for each in program.arguments if isinstance(each, Numbers)}
    strength = float(numbers["strength"].default[0]) if "strength" in numbers else 1.0
    counts = ours.manifest.schedule(ours.scheduler).steps
    enough = [count for count in counts if int(count * strength) >= _STEPS]
    return min(enough) if enough else max(counts)


def _several(program: Program, shape: Shape) -> dict[str, Any]:
    """Return the arguments that say how many images are made."""
    if any(isinstance(each, Text) for each in program.arguments):
        return {"num_images_per_prompt": shape.images}
    return {"batch_size": shape.prompts * shape.images}


def _theirs(
    pipe: Any,
    description: Description,
    program: Program,
    shape: Shape,
    arguments: Mapping[str, Any],
) -> np.ndarray[Any, Any]:
    """Return the latents that diffusers makes."""
    generators = [torch.Generator().manual_seed(seed) for seed in shape.seeds]
    given = {**arguments, "generator": generators if len(generators) > 1 else generators[0]}
    with quiet_loading():
        own = program.name == description.program.name
        other = pipe if own else of_class(pipe, program.name)
        with watched(other, description.denoiser, description) as seen, torch.no_grad():
            call = description.call if own else calling(other)
            if hasattr(other, "vae"):
                held: torch.Tensor = call(output_type="latent", **given)
                return seen.read(held).numpy()
            call(**given)
    assert seen.latents is not None
    return seen.latents.numpy()


def _arguments(
    description: Description, program: Program, shape: Shape, size: tuple[int, int]
) -> dict[str, Any]:
    """Return what both are given, but for seeds and counts."""
    height, width = size
    arguments: dict[str, Any] = images_of(program, height, width, shape.given)
    if description.resizable and size_of(program) is None:
        arguments |= {"height": height, "width": width}
    for name, text in texts_of(program).items():
        texts = [text, *_PROMPTS]
        arguments[name] = texts[: shape.prompts] if shape.prompts > 1 else text
    numbers = {each.name for each in program.arguments if isinstance(each, Numbers)}
    return arguments | {name: value for name, value in GUIDANCE.items() if name in numbers}
